"""Killed at instants that hurt and started again, a run is the run that was never killed: the short kill matrix."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.checkpoint_damage import damage_table
from benchmarks.kill_matrix import INSTANTS, Row, kill_and_compare, make_reference, table

KILLED = [
    "in forward",
    "saving: before the manifest",
    "saving: before `latest` moves",
    "resuming: while shards are read",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def row(work: Path) -> Row:
    """One run, killed once at each of the instants in turn."""
    instants = [instant for title in KILLED for instant in INSTANTS if instant.title == title]
    return kill_and_compare(instants, len(KILLED), work, make_reference(work), seed=0)


def test_a_run_killed_at_any_instant_is_the_run_never_killed(row: Row) -> None:
    assert row.kills == len(KILLED)
    assert row.resumes >= 2, "it went on from checkpoints, and was not just done again"
    assert (row.tokens_wrong, row.digits_wrong, row.weights_wrong, row.unexpected) == (0, 0, 0, [])


def test_the_table_adds_up(row: Row) -> None:
    lines = table([row, row]).splitlines()
    assert lines[-1].startswith(f"| **all** |  | {2 * len(KILLED)} | {2 * row.resumes} |")


def test_damage_to_any_file_of_a_sharded_checkpoint_is_found(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_reference(work)
    text, all_found = damage_table(run, work / "damaged")
    assert all_found and "rank_1_mp_rank_00_optim_states.pt | 1 of 1 | 16 of 16 | 1 of 1 |" in text
    monkeypatch.setattr("benchmarks.checkpoint_damage.find_whole", lambda folder, ranks: folder / "step_00000024")
    assert damage_table(run, work / "damaged")[1] is False, "a search that finds no damage fails the table"
