"""Starting real ranks through the real launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LAUNCHER = Path(sys.executable).parent / "deepspeed"


def launcher_command(ranks: int, *program: str) -> list[str]:
    """The `deepspeed` launcher's command line for `ranks` local ranks, which meet on a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [str(LAUNCHER), "--log_level=error", f"--num_accelerators={ranks}", f"--master_port={port}", *program]


def environment() -> dict[str, str]:
    """For child processes: the CPU accelerator, and this interpreter's commands first."""
    return os.environ | {"DS_ACCELERATOR": "cpu", "PATH": f"{LAUNCHER.parent}:{os.environ['PATH']}"}


def launch(ranks: int, *program: str) -> subprocess.CompletedProcess[str]:
    """Run a program on `ranks` ranks to its end; fails the test with its output if it fails."""
    command = launcher_command(ranks, *program)
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result


def run_many(ranks: int, *configs: str) -> subprocess.CompletedProcess[str]:
    """Run configs one after the other on the same ranks; `path|section.key=value` overrides keys."""
    return launch(ranks, str(HERE / "many_runs.py"), *configs)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """A run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics that must repeat to the last digit: all but times, speed and memory."""
    varying = ("seconds", "tokens_per_second", "mfu", "memory_peak_bytes", "_failures")
    return [{key: value for key, value in record.items() if not key.endswith(varying)} for record in records]
