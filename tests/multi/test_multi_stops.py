"""Told to stop before training, in validation, while saving, by the clock: saved, exit code 75, nothing lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch import environment, read_metrics, without_times

from pretrain.faults import EXIT_STOPPED

WriteConfig = Callable[..., Path]
SMALL: dict[str, object] = {"model.layers": 1, "deepspeed.zero_optimization.stage": 1, "validation.sequences": 8}


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pretrain.train", "--config", str(config), *overrides]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_signal_while_torch_is_imported_stops_the_run_before_its_first_step(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    process = start(write_config("early", SMALL))
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():  # mapped near the beginning of an import that takes seconds
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, output
    assert "received SIGUSR2 at step 0 of 20; the same command goes on from there" in output
    assert (tmp_path / "runs" / "early" / "outcome").read_text() == "stopped at step 0\n"
    assert read_metrics(tmp_path / "runs" / "early") == []


def test_stops_in_validation_while_saving_and_by_the_clock_change_no_digit(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    validating = write_config("validating", SMALL | {"validation.every": 4})
    saving = write_config("saving", SMALL | {"validation.every": 4, "checkpoint.every": 3})
    budget = write_config("budget", SMALL | {"validation.every": 4, "run.wall_clock_minutes": 59})
    whole = write_config("whole", SMALL | {"validation.every": 4})
    script = str(Path(__file__).with_name("signalled_runs.py"))
    starts = [
        f"{validating}|validate",
        f"{validating}",
        f"{saving}|save",
        f"{saving}|validate",
        f"{saving}",
        f"{budget}|clock",
        f"{budget}",
        f"{whole}",
    ]
    result = subprocess.run([sys.executable, script, *starts], env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    runs = tmp_path / "runs"
    assert (runs / "validating_returned").read_text().split() == ["False", "True"]
    assert (runs / "saving_returned").read_text().split() == ["False", "False", "True"]
    assert "received SIGTERM at step 4 of 20" in result.stdout, "in validation: at once"
    assert "received SIGTERM at step 3 of 20" in result.stdout, "while saving: no step more"
    assert (runs / "budget_returned").read_text().split() == ["False", "True"]
    assert "run.wall_clock_minutes=59 are over at step 1 of 20" in result.stdout
    expected = without_times(read_metrics(runs / "whole"))
    assert "val_loss" in expected[3]
    for name in ("validating", "saving", "budget"):
        assert without_times(read_metrics(runs / name)) == expected
