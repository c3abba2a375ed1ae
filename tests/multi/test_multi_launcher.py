"""The command line through the real launcher: mistakes cost one line, Ctrl-C costs nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import environment, launcher_command, read_metrics, run_many, without_times

MODULE = ("--module", "pretrain.train", "--config")
WriteConfig = Callable[..., Path]


def start(ranks: int, config: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start a run as a terminal does: the launcher and its ranks in a process group of their own."""
    command = launcher_command(ranks, *MODULE, str(config), *overrides)
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_a_mistake_in_the_config_is_one_line_and_leaves_nothing(write_config: WriteConfig, tmp_path: Path) -> None:
    process = start(2, write_config("typo"), "model.widht=64")
    output, _ = process.communicate(timeout=120)
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert errors == [f"error: {tmp_path}/typo.yaml: unknown key model.widht=64; did you mean model.width?"]
    assert "Traceback" not in output
    assert process.returncode != 0
    assert not (tmp_path / "runs").exists()


def test_a_batch_that_does_not_fit_the_ranks_is_refused_before_anything_starts(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    process = start(2, write_config("odd"), "batch.global_sequences=9", "batch.micro_sequences=3")
    output, _ = process.communicate(timeout=120)
    assert "error: batch.global_sequences=9 is not a multiple of 2 ranks × batch.micro_sequences=3" in output
    assert "Traceback" not in output and process.returncode != 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_says_how_to_go_on_and_loses_nothing(
    write_config: WriteConfig, tmp_path: Path, number: signal.Signals
) -> None:
    config = write_config(
        "interrupted", {"schedule.steps": 60, "schedule.name": "constant", "schedule.decay_steps": None}
    )
    metrics = tmp_path / "runs" / "interrupted" / "metrics.jsonl"
    process = start(2, config)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert f"received {number.name} at step" in output, output
    assert "the same command goes on from there" in output and process.returncode != 0
    done = len(read_metrics(tmp_path / "runs" / "interrupted"))
    assert 5 <= done < 60
    run_many(2, str(config), f"{config}|run.name=whole")
    runs = tmp_path / "runs"
    assert without_times(read_metrics(runs / "interrupted")) == without_times(read_metrics(runs / "whole"))
