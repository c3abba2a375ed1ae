"""What each rank is doing, in a small file that the others can read when it does nothing any more."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import psutil


@dataclass(frozen=True)
class Beat:
    """One rank's word of itself. Times are seconds since 1970 by the rank's own clock."""

    rank: int
    host: str
    pid: int
    process_started: float
    """Together with the pid it names a process for good."""
    step: int
    """The optimizer step at work, counted from 1; 0 before the first."""
    phase: str
    since: float
    """When the phase began."""
    limit_seconds: float
    """How long the phase may take."""
    time: float
    """When this was written."""
    where: str = ""
    """The innermost line of Python of the main thread, once the phase has taken half of its limit."""
    waits: bool = False
    """Whether that line waits for other ranks."""

    def silent(self, now: float) -> bool:
        """Whether the process does not even write this file any more."""
        return now - self.time > self.limit_seconds / 2

    def overdue(self, now: float) -> bool:
        """Whether the phase takes longer than it may."""
        return now - self.since > self.limit_seconds

    def in_words(self, now: float) -> str:
        """`rank 1 (host, pid 17): in forward of step 3 for 61 s, at file.py:5 in f`."""
        text = f"rank {self.rank} ({self.host}, pid {self.pid}): in {self.phase} of step {self.step} "
        if self.silent(now):
            return text + f"when it was last heard of, {now - self.time:.0f} s ago"
        return text + f"for {now - self.since:.0f} s" + (f", at {self.where}" if self.where else "")


class Heart:
    """Keeps this rank's beat: in memory, at a cost of microseconds, until it is written."""

    def __init__(self, rank: int) -> None:
        process = psutil.Process()
        self.last = Beat(
            rank, socket.gethostname(), process.pid, process.create_time(), 0, "start", time.time(), 0.0, 0.0
        )

    def beat(self, step: int, phase: str, limit_seconds: float) -> None:
        """A phase begins."""
        old = self.last
        self.last = Beat(
            old.rank, old.host, old.pid, old.process_started, step, phase, time.time(), limit_seconds, old.time
        )

    def write(self, folder: Path) -> None:
        """Put the beat where the others find it; whoever reads meanwhile sees the one before."""
        now, values = time.time(), asdict(self.last)
        values["time"] = now
        if now - self.last.since > self.last.limit_seconds / 2:
            values["where"], values["waits"] = main_thread_position()
        beside = folder / f".heartbeat_rank_{self.last.rank}.tmp"
        beside.write_text(json.dumps(values), encoding="utf-8")
        beside.rename(beat_file(folder, self.last.rank))


def beat_file(folder: Path, rank: int) -> Path:
    """Where a rank's beat is."""
    return folder / f"heartbeat_rank_{rank}.json"


def read_beats(folder: Path, ranks: int) -> dict[int, Beat]:
    """The beats of a run's ranks; a rank without a readable one is missing."""
    beats = {}
    for rank in range(ranks):
        try:
            beats[rank] = Beat(**json.loads(beat_file(folder, rank).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
    return beats


def main_thread_position() -> tuple[str, bool]:
    """The main thread's innermost line of Python, and whether it waits there for other ranks.

    Waiting is told by what is called: torch's or DeepSpeed's communication, or a handle's `wait`. On a GPU a thread
    also waits in any copy to the host, which cannot be told from other work; there the flight recorder helps.
    """
    innermost = sys._current_frames().get(threading.main_thread().ident or 0)
    if innermost is None:
        return "", False
    where = f"{innermost.f_code.co_filename}:{innermost.f_lineno} in {innermost.f_code.co_name}"
    frame: FrameType | None = innermost
    for _ in range(6):
        if frame is None:
            break
        file = frame.f_code.co_filename.replace(os.sep, "/")
        if "torch/distributed/" in file or "deepspeed/comm/" in file or frame.f_code.co_name == "wait":
            return where, True
        frame = frame.f_back
    return where, False


def blame(beats: dict[int, Beat], ranks: int, now: float) -> list[str]:
    """The ranks that the others wait for, in words, the most suspicious kind alone.

    Ranks that went silent; else ranks that work on while others wait; else those that are furthest behind.
    """
    missing = [f"rank {rank}: never heard of" for rank in range(ranks) if rank not in beats]
    silent = [beat for beat in beats.values() if beat.silent(now)]
    if missing or silent:
        return missing + [beat.in_words(now) for beat in silent]
    at_work = [beat for beat in beats.values() if not beat.waits]
    if len(at_work) in (0, len(beats)):
        oldest = min((beat.step, beat.since) for beat in beats.values())
        at_work = [beat for beat in beats.values() if (beat.step, beat.since) == oldest]
    return [beat.in_words(now) for beat in at_work]
