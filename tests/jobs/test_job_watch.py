"""What is shown of running jobs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline import UserError
from pretrain.jobs import submission
from pretrain.jobs.watch import main

WriteConfig = Callable[..., Path]


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose lines `squeue` prints; the working directory is a repository with jobs."""
    lines = tmp_path / "queue"
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f"#!/bin/sh\ncat {lines}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent), prepend=":")
    monkeypatch.chdir(tmp_path)
    Path("slurm/jobs").mkdir(parents=True)
    return lines


def shown(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The table's rows, cell by cell."""
    main([])
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


def submit(write_config: WriteConfig, job: str, name: str) -> Path:
    submission.main([str(write_config(name)), "--job", job])
    folder = Path("runs") / name / "jobs" / job
    (Path("slurm/jobs") / job).symlink_to(folder.resolve())
    return folder


def test_each_of_this_repositorys_jobs_is_one_line(write_config: WriteConfig, queue: Path, capsys) -> None:
    folder = submit(write_config, "7", "going")
    submit(write_config, "8", "waiting")
    capsys.readouterr()
    (folder / "starts.jsonl").write_text(
        '{"start": 0, "step": 0}\n{"start": 0, "end": "hung"}\n{"start": 1, "step": 2}\n'
    )
    lines = [{"step": 3, "loss": 4.25, "tokens_per_second": 1234.5}, {"step": 4, "loss": 4.0, "tokens_per_second": 1}]
    metrics = json.dumps(lines[0]) + "\n" + json.dumps(lines[1])[:-5]  # the last one is being written
    (folder.parents[1] / "metrics.jsonl").write_text(metrics)
    queue.write_text("7|RUNNING|1:02|node[a-b]\n8|PENDING|0:00|(Resources)\n9|RUNNING|9:59|someone-elses\n")
    going, waiting = shown(capsys)
    assert going[:9] == ["7", "going", "RUNNING", "1:02", "node[a-b]", "2", "3/20", "4.2500", "1,234"]
    assert going[9].endswith("s ago")
    assert waiting == ["8", "waiting", "PENDING", "0:00", "(Resources)", "0", "0/20", "", "", ""]


def test_a_loss_that_is_not_a_number_is_said_to_be_none(write_config: WriteConfig, queue: Path, capsys) -> None:
    folder = submit(write_config, "7", "ill")
    capsys.readouterr()
    (folder.parents[1] / "metrics.jsonl").write_text('{"step": 3, "loss": null, "tokens_per_second": 10.0}\n')
    queue.write_text("7|RUNNING|1:02|node1\n")
    assert shown(capsys)[0][6:9] == ["3/20", "not finite", "10"]


def test_without_a_queue_to_ask_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="squeue does not answer"):
        main([])
