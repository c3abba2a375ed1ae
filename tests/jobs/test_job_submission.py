"""What a job keeps of code and config, and the runs of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline import UserError
from pretrain.config import load_config
from pretrain.jobs import submission
from pretrain.jobs.sweep import combinations

WriteConfig = Callable[..., Path]


def test_a_job_keeps_the_resolved_config_and_code_that_runs(write_config: WriteConfig, tmp_path: Path, capsys) -> None:
    config = write_config("kept")
    submission.main([str(config), "run.seed=5", "--tasks", "2", "--job", "12"])
    folder = tmp_path / "runs" / "kept" / "jobs" / "12"
    assert capsys.readouterr().out == f"{folder}\n"
    assert load_config(folder / "config.yaml") == load_config(config, ["run.seed=5"])
    for name in ("pretrain/train.py", "data_pipeline/stream.py", "slurm/task.sh", "pretrain/jobs/restarts.py"):
        assert (folder / "code" / name).read_bytes() == (submission.REPOSITORY / name).read_bytes()
    assert (folder / "code" / "slurm" / "task.sh").stat().st_mode & 0o111, "still executable"
    assert not list(folder.rglob("__pycache__")) and not list(folder.rglob("site.env"))


def test_the_first_start_alone_decides_what_a_job_runs(write_config: WriteConfig, tmp_path: Path) -> None:
    config = load_config(write_config("kept"))
    first = submission.keep(config, "12")
    (first / "code" / "COMMIT").write_text("as it was")
    assert submission.keep(load_config(write_config("kept"), ["run.seed=9"]), "12") == first
    assert (first / "code" / "COMMIT").read_text() == "as it was"
    assert load_config(first / "config.yaml").run.seed == 1


@pytest.mark.parametrize(
    ("overrides", "tasks", "message"),
    [
        (["batch.global_sequences=9", "batch.micro_sequences=3"], 2, "is not a multiple of 2 ranks"),
        (["data.path=/nowhere"], 2, "/nowhere"),
    ],
)
def test_what_would_end_the_job_at_once_is_refused(
    write_config: WriteConfig, tmp_path: Path, overrides: list[str], tasks: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        submission.main([str(write_config("refused")), *overrides, "--tasks", str(tasks), "--job", "1"])
    assert not (tmp_path / "runs").exists()


def test_a_sweep_is_every_combination_in_folders_of_their_own() -> None:
    runs = combinations("base", ["run.seed=0,1", "optimizer.betas=[0.9,0.95],[0.8,0.9]", "batch.micro_sequences=2"])
    assert runs[1] == [
        "run.seed=0", "optimizer.betas=[0.8,0.9]", "batch.micro_sequences=2", "run.name=base-seed_0-betas_0.8_0.9",
    ]  # fmt: skip
    assert len(runs) == 4 and len({run[-1] for run in runs}) == 4


def test_a_sweep_in_which_nothing_varies_is_refused() -> None:
    with pytest.raises(UserError, match="nothing varies"):
        combinations("base", ["run.seed=0", "optimizer.betas=[0.9,0.95]"])
