"""Real ranks whose saves fail, whose checkpoints are attacked, and whose numbers stay what they are."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from launch import HERE, launch, read_metrics, without_times

from benchmarks.small_run import write_run_config
from data_pipeline import UserError
from pretrain.checkpoints import open_checkpoint

FULL = os.strerror(errno.ENOSPC)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of all runs below, of one start of two ranks, and what it printed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    common: dict[str, object] = {"checkpoint.every": 4, "validation.every": 4}

    def config(name: str, changes: dict[str, object] | None = None) -> str:
        return str(write_run_config(folder, tiny_data, name, common | (changes or {})))

    kept: dict[str, object] = {
        "checkpoint.keep": 1,
        "checkpoint.keep_every": 12,
        "checkpoint.mirror": str(folder / "second"),
    }
    result = launch(
        2,
        str(HERE / "troubled_runs.py"),
        f"none:{config('reference', kept)}",
        f"none:{config('waiting', {'checkpoint.in_background': False})}",
        f"second rank at step 8:{config('one_fails')}",
        f"second rank always:{config('all_fail', {'checkpoint.failures_allowed': 1})}",
        f"first rank at the end:{config('last_fails')}",
        f"no room:{config('no_room')}",
        f"none:{config('stopped')}|run.stop_after=8",
        f"attacked:{config('attacked')}",
    )
    return folder / "runs", result


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("name", ["waiting", "one_fails", "last_fails", "no_room", "attacked"])
def test_no_trouble_with_a_checkpoint_changes_a_digit(
    started: tuple[Path, subprocess.CompletedProcess[str]], name: str
) -> None:
    runs, _ = started
    assert without_times(read_metrics(runs / name)) == without_times(read_metrics(runs / "reference"))


def test_the_stall_of_each_save_is_in_the_line_that_follows(
    started: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    runs, result = started
    stalls = {record["step"]: record.get("checkpoint_stall_seconds") for record in read_metrics(runs / "reference")}
    assert [step for step, stall in stalls.items() if stall is not None] == [5, 9, 13, 17]
    assert "training waited" in result.stdout


def test_a_save_that_fails_on_one_rank_is_told_and_counted_and_the_run_goes_on(
    started: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    runs, result = started
    assert steps(runs / "one_fails") == [16, 20]
    counted = {line["step"]: line.get("checkpoint_failures") for line in read_metrics(runs / "one_fails")}
    assert {step: count for step, count in counted.items() if count} == {13: 1}, "known to all ranks at the next save"
    for name, why in [("one_fails", FULL), ("no_room", "no room for a checkpoint")]:
        warning = f"{runs / name}/checkpoints/step_00000008: not saved: "
        lines = [line for line in result.stderr.splitlines() if warning in line]
        assert len(lines) == 1 and "the run goes on" in lines[0] and why in lines[0]


def test_too_many_failures_in_a_row_end_the_run_on_all_ranks(
    started: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    runs, result = started
    told = [line for line in result.stdout.splitlines() if "all_fail" in line and "error:" in line]
    assert sorted(line[:6] for line in told) == ["rank 0", "rank 1"]
    why = f"2 checkpoints in a row could not be saved, the last one because: rank 1: {FULL}"
    assert all(why in line for line in told)
    assert steps(runs / "all_fail") == [] and len(read_metrics(runs / "all_fail")) == 12
    assert list((runs / "all_fail" / "checkpoints").iterdir()) == [], "no half of a checkpoint stays"


def test_a_run_does_not_end_well_without_its_last_checkpoint(
    started: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    runs, result = started
    told = [line for line in result.stdout.splitlines() if "last_fails" in line and "error:" in line]
    assert len(told) == 2 and all(f"not saved, and it was the last: rank 0: {FULL}" in line for line in told)
    assert steps(runs / "last_fails") == [12, 16]


def test_a_malicious_checkpoint_is_left_for_an_older_one_and_never_executed(
    started: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    runs, result = started
    assert f"leaving damaged checkpoint {runs / 'attacked'}/checkpoints/step_00000008" in result.stderr
    assert f"going on from {runs / 'attacked'}/checkpoints/step_00000004" in result.stdout
    assert not (runs / "attacked" / "executed").exists()


def test_rules_of_retention_hold_here_and_in_the_mirror(
    started: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    runs, _ = started
    second = runs.parent / "second"
    assert steps(runs / "reference") == [12, 20]
    assert sorted(path.name for path in second.iterdir()) == ["latest", "step_00000012", "step_00000020"]
    assert (second / "latest").read_text() == "step_00000020"
    for path in (runs / "reference" / "checkpoints").glob("step_*/*"):
        assert (second / path.parent.name / path.name).read_bytes() == path.read_bytes()


def test_a_checkpoint_records_its_validation_loss_and_all_ranks_generators(
    started: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    runs, _ = started
    checkpoint = open_checkpoint(runs / "reference")
    assert checkpoint.state["validation_loss"] == read_metrics(runs / "reference")[-1]["val_loss_next_token"]
    assert len(list(checkpoint.path.glob("generators_rank_*.pt"))) == 2


def test_a_named_checkpoint_that_is_malicious_is_refused(
    started: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    import shutil

    import torch
    from troubled_runs import MakesAFolder

    from pretrain.checkpoints.manifest import MANIFEST, flush_and_hash, write_manifest

    runs, _ = started
    path = Path(shutil.copytree(open_checkpoint(runs / "reference").path, tmp_path / "step_00000020"))
    torch.save({"module": MakesAFolder(str(tmp_path / "executed"))}, path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    files = [file for file in path.iterdir() if file.name != MANIFEST]
    write_manifest(path, {"step": 20}, flush_and_hash(path, files))
    with pytest.raises(UserError, match=r"zero_pp_rank_0_mp_rank_00_model_states\.pt is no file of plain data"):
        open_checkpoint(path)  # what export and evaluate open with
    assert not (tmp_path / "executed").exists()
