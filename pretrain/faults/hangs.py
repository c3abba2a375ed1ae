"""Ending a run whose ranks wait for each other forever: within minutes, with names and stacks, and a code of its own.

    logs/heartbeat_rank_N.json   what rank N is doing
    logs/stacks_rank_N.txt       the Python stacks of its threads, when the run was ended
    logs/flight_recorder_rank_N  torch's record of the last collectives (torch.distributed.flight_recorder reads it)
    logs/hangs.txt               who was waited for

A thread in each rank does all of it, without a collective. Ranks read each other's files only when they are stuck
themselves: if one rank hangs, soon all of them are.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import psutil
import torch

from pretrain.config import Config
from pretrain.distributed import Ranks
from pretrain.faults import EXIT_HUNG, write_outcome
from pretrain.faults.heartbeat import Beat, Heart, blame, read_beats

GRACE_SECONDS = 5.0
"""From finding out until the end: every rank finds out for itself and writes its stacks."""

DUMP_SIGNAL = signal.SIGRTMIN + 1
"""Asks a process for its stacks, even if it cannot run Python any more. SIGUSR1 and SIGUSR2 are taken."""

SLOW_PHASES = ("start", "load", "save", "validation")


class HangMonitor:
    """Knows what this rank is doing, and ends the job when no rank gets on. A context manager.

    Raises nothing and stops nothing by itself except through `os._exit(EXIT_HUNG)`.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.run = config.run.folder
        self.logs = self.run / "logs"
        self.ranks = ranks
        self._limit = 60 * config.faults.hang_minutes
        self._interval = min(5.0, self._limit / 10)
        self._slow_limit = max(self._limit, 60 * config.faults.slow_phase_minutes)
        self._heart = Heart(ranks.rank, silent_after=self._limit / 2)
        self._first_step: int | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang-monitor", daemon=True)
        self._stacks: IO[str] | None = None

    def __enter__(self) -> Self:
        """Starts to watch."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self._stacks = (self.logs / f"stacks_rank_{self.ranks.rank}.txt").open("a", encoding="utf-8")
        faulthandler.register(DUMP_SIGNAL, file=self._stacks, all_threads=True)
        self.enter(0, "start")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops watching: what follows is the end of the process."""
        self._closed.set()
        self._thread.join()
        faulthandler.unregister(DUMP_SIGNAL)
        if self._stacks is not None:
            self._stacks.close()

    def enter(self, step: int, phase: str) -> None:
        """This rank begins a phase of optimizer step `step`, counted from 1. The first step may be slow."""
        self._first_step = self._first_step or step or None
        slow = phase in SLOW_PHASES or step == self._first_step
        self._heart.beat(step, phase, self._slow_limit if slow else self._limit)

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            try:
                self._heart.write(self.logs)
                if self._heart.last.overdue(time.time()) and self._nobody_gets_on():
                    self._end_job()
            except OSError as error:  # a full or lost disk is met, and told, by whoever needs it
                print(f"warning: no heartbeat of rank {self.ranks.rank}: {error}", file=sys.stderr, flush=True)
                self._closed.wait(60.0)

    def _nobody_gets_on(self) -> bool:
        """Whether every rank that is heard of is overdue: one that is not may yet set the others free."""
        now = time.time()
        beats = read_beats(self.logs, self.ranks.world).values()
        return all(beat.silent(now) or beat.overdue(now) for beat in beats)

    def _end_job(self) -> None:
        """Write what is known and end this process; unless it gets on meanwhile, say because it was only stopped."""
        stuck = self._heart.last
        try:
            self._write_stacks()
            ask_for_stacks(beat for beat in self._beats().values() if beat.silent(time.time()))
            if not self._still_in(stuck):
                return
            now, beats = time.time(), self._beats()
            speakers = [rank for rank, beat in beats.items() if not beat.silent(now)]
            if self.ranks.rank == min(speakers, default=self.ranks.rank):
                self._report(beats, now)
            elif not self._still_in(stuck):  # whoever ends first is ended by all: let it be the one that reports
                return
        except Exception:  # the end must not depend on a disk or on the other ranks' files
            traceback.print_exc()
        os._exit(EXIT_HUNG)

    def _still_in(self, stuck: Beat) -> bool:
        """Whether this rank is in the same phase as before when a time of grace is over. Its heart beats meanwhile."""
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            if self._closed.wait(self._interval) or self._heart.last is not stuck:
                print(f"warning: {stuck.in_words(time.time())}; it gets on again", file=sys.stderr, flush=True)
                return False
            self._heart.write(self.logs)
        return True

    def _beats(self) -> dict[int, Beat]:
        return read_beats(self.logs, self.ranks.world)

    def _report(self, beats: dict[int, Beat], now: float) -> None:
        suspects = blame(beats, self.ranks.world, now)
        shown = "; ".join(suspects[:4]) + (f"; and {len(suspects) - 4} more" if len(suspects) > 4 else "")
        line = f"no rank has got on for {self._heart.last.limit_seconds:.0f} s. The others wait for {shown}"
        print(f"error: {line}. Stacks of all ranks: {self.logs}/stacks_rank_*.txt", file=sys.stderr, flush=True)
        with (self.logs / "hangs.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            file.writelines(f"    {beat.in_words(now)}\n" for beat in beats.values())
        write_outcome(self.run, f"hung at step {self._heart.last.step}: {shown}")

    def _write_stacks(self) -> None:
        assert self._stacks is not None
        self._stacks.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.ranks.rank}, {self._heart.last}\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        # In a thread of its own: it takes locks that a hung collective may hold.
        threading.Thread(target=self._write_flight_record, daemon=True).start()

    def _write_flight_record(self) -> None:
        bindings: Any = torch._C._distributed_c10d
        dump = bindings._dump_nccl_trace if torch.cuda.is_available() else bindings._dump_fr_trace
        (self.logs / f"flight_recorder_rank_{self.ranks.rank}").write_bytes(dump())


def ask_for_stacks(beats: Iterable[Beat]) -> None:
    """Have silent processes of this machine write their stacks; a stopped one is continued for that."""
    for beat in beats:
        try:
            process = psutil.Process(beat.pid)
            if beat.host == socket.gethostname() and process.create_time() == beat.process_started:
                process.send_signal(DUMP_SIGNAL)
                process.send_signal(signal.SIGCONT)
        except psutil.Error:
            continue


def arm_flight_recorder(logs: Path) -> None:
    """Have torch record the last collectives; before the process group starts."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(logs / "flight_recorder_rank_"))
