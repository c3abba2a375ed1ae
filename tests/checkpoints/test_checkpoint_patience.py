"""A failing run gives a save in progress the time it needs, and waits for no rank that has died."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from pretrain.checkpoints import saving
from pretrain.checkpoints.files import CheckpointFiles
from pretrain.checkpoints.saving import _finish_or_abandon, _Save


@pytest.fixture
def save(monkeypatch: pytest.MonkeyPatch) -> _Save:
    monkeypatch.setattr(saving, "PATIENCE_FOR_OTHERS", 0.2)
    return _Save(1, Path("unfinished"), CheckpointFiles(), {})


def begin(save: _Save, own_seconds: float, others_seconds: float) -> threading.Thread:
    """A save whose own part takes so long, and the other ranks' so much longer; gives up when told to."""

    def work() -> None:
        time.sleep(own_seconds)
        save.written.set()
        if save.abandoned.wait(others_seconds):
            save.problem = "given up"

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_dead_rank_is_not_waited_for(save: _Save) -> None:
    thread = begin(save, own_seconds=0.0, others_seconds=3600.0)
    _finish_or_abandon(save, thread)
    assert not thread.is_alive() and save.problem == "given up"


def test_a_save_that_all_ranks_can_finish_is_finished(save: _Save) -> None:
    """The others may take as long as this rank did, and a little more."""
    thread = begin(save, own_seconds=1.0, others_seconds=0.5)
    _finish_or_abandon(save, thread)
    assert not thread.is_alive() and save.problem is None
