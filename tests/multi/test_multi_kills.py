"""Killed at instants that hurt and started again, a run is the run that was never killed: the short kill matrix."""

from __future__ import annotations

import pytest

from benchmarks.kill_matrix import INSTANTS, Row, kill_and_compare, make_reference, table

KILLED = [
    "in forward",
    "saving: before the manifest",
    "saving: before `latest` moves",
    "resuming: while shards are read",
]


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> Row:
    """One run, killed once at each of the instants in turn."""
    work = tmp_path_factory.mktemp("kills")
    instants = [instant for title in KILLED for instant in INSTANTS if instant.title == title]
    return kill_and_compare(instants, len(KILLED), work, make_reference(work), seed=0)


def test_a_run_killed_at_any_instant_is_the_run_never_killed(row: Row) -> None:
    assert row.kills == len(KILLED)
    assert row.resumes >= 2, "it went on from checkpoints, and was not just done again"
    assert (row.tokens_wrong, row.digits_wrong, row.weights_wrong, row.unexpected) == (0, 0, 0, [])


def test_the_table_adds_up(row: Row) -> None:
    lines = table([row, row]).splitlines()
    assert lines[-1].startswith(f"| **all** |  | {2 * len(KILLED)} | {2 * row.resumes} |")
