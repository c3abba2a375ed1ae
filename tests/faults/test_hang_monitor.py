"""When a job counts as hung: only when no rank that is heard of may yet set the others free."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.distributed import Ranks
from pretrain.faults.hangs import HangMonitor
from pretrain.faults.heartbeat import Heart

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("seconds_in_phase", "seconds_unheard", "hung"),
    [(61, 0, True), (59, 0, False), (59, 31, True)],
    ids=["overdue too", "still in time", "silent"],
)
def test_a_job_hangs_when_every_rank_is_overdue_or_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds_in_phase: float, seconds_unheard: float, hung: bool
) -> None:
    monitor = HangMonitor(load_config(QUICKSTART, [f"run.dir={tmp_path}"]), Ranks(0, 2, 0, 2))
    monitor.logs.mkdir(parents=True)
    for rank, phase, unheard in ((0, 61.0, 0.0), (1, seconds_in_phase, seconds_unheard)):
        heart = Heart(rank, silent_after=30.0)
        heart.beat(5, "forward", 60.0)
        heart.last = replace(heart.last, since=time.time() - phase)
        then = time.time() - unheard
        with monkeypatch.context() as clock:
            clock.setattr(time, "time", partial(float, then))
            heart.write(monitor.logs)
    assert monitor._nobody_gets_on() is hung
