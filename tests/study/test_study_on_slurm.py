"""A study as a job array: what is submitted, what a task does, and the page once all is there. No cluster is needed."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_pipeline import UserError
from pretrain.config import dump_config
from pretrain.faults import EXIT_STOPPED
from pretrain.study import __main__ as command
from pretrain.study.plan import plan_runs, read_study

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of two configs on two seeds, of which nothing is done yet but the data."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setattr(command, "prepare", lambda *arguments, **options: None)
    runs = {name: {"label": name, "config": f"configs/belief/small/{name}.yaml"} for name in ("gpt", "nextlat")}
    study = {"title": "T", "question": "Q", "suite": "belief", "seeds": [0, 7], "runs": runs}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    return path


def finish(path: Path, *numbers: int) -> None:
    """Leave what finished and evaluated runs leave."""
    study = read_study(path)
    planned = plan_runs(study, path.stem, path.parent / "runs")
    for run in (planned[number] for number in numbers):
        result = command.result_file(study, run)
        result.parent.mkdir(parents=True)
        result.write_text("{}", encoding="utf-8")
        (run.folder / "outcome").write_text("finished at step 1\n", encoding="utf-8")
        (run.folder / "config.yaml").write_text(dump_config(run.config), encoding="utf-8")


def study_command(path: Path, *options: str) -> None:
    command.main([str(path), "--runs", str(path.parent / "runs"), "--out", str(path.parent / "out"), *options])


def put_in_path(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Programs of SLURM that say what is given here."""
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_the_array_has_a_task_for_each_config_and_seed(path, monkeypatch, capfd):
    monkeypatch.setenv("DRY_RUN", "1")
    study_command(path, "--slurm", "--gpus=1", "--time=1:00:00")
    *listed, sbatch = capfd.readouterr().out.splitlines()
    runs = path.parent / "runs"
    names = ("gpt_seed0", "gpt_seed7", "nextlat_seed0", "nextlat_seed7")
    assert listed == [f"{number} {runs}/tiny/{name}" for number, name in enumerate(names)]
    array = "sbatch --job-name=study_tiny --array=0,1,2,3 --gpus=1 --time=1:00:00"
    assert shlex.split(sbatch) == shlex.split(f"{array} slurm/study.sh {path} --runs {runs}")
    assert not runs.exists()


def test_a_later_call_submits_what_is_missing_and_the_last_one_writes_the_page(path, tmp_path, monkeypatch, capfd):
    put_in_path(tmp_path, monkeypatch, squeue="true", sbatch='echo "sbatch $*"')
    finish(path, 0, 2)
    (tmp_path / "runs/tiny/nextlat_seed7").mkdir()
    study_command(path, "--slurm")
    assert "sbatch --job-name=study_tiny --array=1,3 slurm/study.sh" in capfd.readouterr().out
    finish(path, 1, 3)
    pages = []
    monkeypatch.setattr(command, "write_page", lambda study, name, results, *rest: pages.append(len(results)) or path)
    study_command(path, "--slurm")
    study_command(path)
    assert pages == [4, 4] and "sbatch" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("squeue", "sbatch", "message"),
    [
        ("echo 123_1; echo 123_2", "true", "error: study_tiny is queued or running (job 123_1)"),
        ("exit 1", "true", "error: no SLURM answers here"),
        ("true", "echo invalid partition >&2; exit 1", "invalid partition"),
    ],
)
def test_what_cannot_be_submitted_is_said(path, tmp_path, monkeypatch, capfd, squeue, sbatch, message):
    put_in_path(tmp_path, monkeypatch, squeue=squeue, sbatch=sbatch)
    with pytest.raises(UserError, match=r"tiny\.yaml: not submitted"):
        study_command(path, "--slurm")
    assert message in capfd.readouterr().err


def test_a_task_of_the_array_completes_its_own_run(path, monkeypatch):
    arguments = ["slurm/study.sh", str(path), "--runs", "runs"]
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    shown = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    task = [
        "bash",
        "-c",
        'exec "$PYTHON" -m pretrain.study "$@"',
        "study",
        str(path),
        "--runs",
        "runs",
        "--number",
        "2",
    ]
    assert shown.startswith("srun ") and shlex.split(shown)[-len(task) :] == task
    completed = []
    monkeypatch.setattr(command, "complete", lambda study, run: completed.append(run.folder.name))
    monkeypatch.setattr(command, "StopRequests", lambda: None)  # handlers for the whole process
    study_command(path, "--number", "2")
    assert completed == ["nextlat_seed0"]
    with pytest.raises(UserError, match="--number 4: its runs are numbered from 0 to 3"):
        study_command(path, "--number", "4")


@pytest.mark.parametrize("how", ["sys.exit(75)", "os.kill(os.getpid(), 15)"])
def test_a_run_that_was_told_to_stop_ends_the_study_with_the_code_that_requeues(path, monkeypatch, capfd, how):
    monkeypatch.setattr(command, "train_command", lambda run: [sys.executable, "-c", f"import os, sys; {how}"])
    with pytest.raises(SystemExit) as stopped:
        study_command(path)
    assert stopped.value.code == EXIT_STOPPED and "the same command goes on" in capfd.readouterr().err
