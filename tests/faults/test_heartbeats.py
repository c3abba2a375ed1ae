"""Who is blamed when no rank gets on, from what each said of itself."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.faults.heartbeat import Beat, Heart, beat_file, blame, main_thread_position, read_beats

NOW = 1000.0
STUCK = Beat(0, "host", 17, 0.0, 5, "forward", NOW - 61, 60.0, 30.0, NOW - 1, "file.py:5 in f", waits=True)


def test_a_silent_rank_is_blamed_alone() -> None:
    beats = {0: STUCK, 1: replace(STUCK, rank=1, time=NOW - 31), 2: replace(STUCK, rank=2, waits=False)}
    (words,) = blame(beats, 3, NOW)
    assert words == "rank 1 (host, pid 17): in forward of step 5 when it was last heard of, 31 s ago"


def test_a_rank_without_a_word_is_blamed() -> None:
    assert blame({0: STUCK}, 2, NOW) == ["rank 1: never heard of"]


def test_the_rank_that_works_while_the_others_wait_is_blamed() -> None:
    beats = {0: STUCK, 1: replace(STUCK, rank=1, waits=False), 2: replace(STUCK, rank=2)}
    (words,) = blame(beats, 3, NOW)
    assert words == "rank 1 (host, pid 17): in forward of step 5 for 61 s, at file.py:5 in f"


@pytest.mark.parametrize("waits", [True, False])
def test_where_all_look_alike_the_one_furthest_behind_is_blamed(waits: bool) -> None:
    alike = replace(STUCK, waits=waits)
    beats = {0: alike, 1: replace(alike, rank=1, step=4), 2: replace(alike, rank=2, since=NOW - 62)}
    (words,) = blame(beats, 3, NOW)
    assert words.startswith("rank 1 ")
    del beats[1]
    (words,) = blame(beats | {1: replace(alike, rank=1)}, 3, NOW)
    assert words.startswith("rank 2 ")


def test_a_beat_is_overdue_and_silent_past_its_limits() -> None:
    assert STUCK.overdue(NOW) and not STUCK.overdue(NOW - 2)
    slow = replace(STUCK, limit_seconds=1e6)  # a stopped process wrote last in a phase that may take long
    assert not slow.silent(NOW + 28) and slow.silent(NOW + 30)


def test_a_beat_is_read_back_and_damage_counts_as_no_word(tmp_path: Path) -> None:
    heart = Heart(1, silent_after=30.0)
    heart.beat(3, "backward", 60.0)
    heart.write(tmp_path)
    beat_file(tmp_path, 2).write_text('{"rank": 2')
    (beat,) = read_beats(tmp_path, 3).values()
    assert (beat.rank, beat.step, beat.phase, beat.pid) == (1, 3, "backward", os.getpid())
    assert beat.where == "", "looked up only when the phase takes long"
    heart.beat(3, "backward", 0.0)
    heart.write(tmp_path)
    assert "main_thread_position" in read_beats(tmp_path, 3)[1].where, "written by the main thread itself here"


@pytest.mark.parametrize(
    ("file", "waits"),
    [
        ("/lib/torch/distributed/distributed_c10d.py", True),
        ("/lib/deepspeed/runtime/zero/partition_parameters.py", True),
        ("/lib/concurrent/futures/_base.py", False),  # a batch that a thread of the data pipeline does not deliver
    ],
)
def test_waiting_for_others_is_told_from_other_waiting(file: str, waits: bool) -> None:
    namespace: dict[str, Any] = {}
    exec(compile("def wait(event):\n    event.wait()", file, "exec"), namespace)
    seen, done = [], threading.Event()

    def look() -> None:
        seen.append(main_thread_position())
        done.set()

    threading.Timer(0.05, look).start()
    namespace["wait"](done)
    ((where, found),) = seen
    assert found == waits and "threading.py" in where
