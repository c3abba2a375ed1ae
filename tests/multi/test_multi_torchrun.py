"""torchrun, on one machine and as on two: the lines of docs/launching.md, on the loopback."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from launch import LAUNCHER, environment, read_metrics, without_times

TORCHRUN = str(LAUNCHER.with_name("torchrun"))


def torchrun(config: Path, *options: str) -> subprocess.Popen[str]:
    command = [TORCHRUN, *options, "-m", "pretrain.train", "--config", str(config)]
    one_thread = environment() | {"OMP_NUM_THREADS": "1"}  # sums depend on it, and torchrun decides it by its ranks
    return subprocess.Popen(command, env=one_thread, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ends_well(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def test_two_ranks_of_one_machine_and_one_of_each_of_two_make_the_same_run(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    near = write_config("near", {"schedule.steps": 6, "schedule.warmup_steps": 2, "schedule.decay_steps": 2})
    far = write_config("far", {"schedule.steps": 6, "schedule.warmup_steps": 2, "schedule.decay_steps": 2})
    machine_of_two = torchrun(near, "--standalone", "--nproc-per-node", "2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "my_run")
    machines = [torchrun(far, "--nnodes", "2", "--nproc-per-node", "1", *meet) for _ in range(2)]
    assert "6/6" in ends_well(machine_of_two)
    outputs = [ends_well(machine) for machine in machines]
    assert sum("6/6" in output for output in outputs) == 1, "rank 0 alone writes"
    runs = [read_metrics(tmp_path / "runs" / name) for name in ("near", "far")]
    assert len(runs[0]) == 6 and without_times(runs[0]) == without_times(runs[1])
