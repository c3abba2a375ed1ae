"""How long a step and each of its phases take, and what the step makes of the hardware."""

from __future__ import annotations

import time
from collections import defaultdict

import torch

from pretrain.config import Config
from pretrain.distributed import Ranks
from pretrain.faults.hangs import HangMonitor
from pretrain.flops import flops_per_token, peak_flops
from pretrain.metrics import memory_peak_bytes

IN_STEP = ("forward", "backward", "agreement")
"""Phases between waiting for data and the update, which takes the rest of the step."""


class StepClock:
    """Times one step, and tells the monitor what this rank is doing. Validation and saving are not part of a step.

    On a GPU phases are timed by events in the stream, read after the step's losses were, so that timing waits for
    nothing that the step does not wait for anyway. The last phase is what is left of the time on the host's clock.
    Communication inside forward and backward overlaps with them and cannot be told apart.
    """

    def __init__(self, config: Config, vocab_size: int, ranks: Ranks, device: torch.device, monitor: HangMonitor):
        self.tokens = config.tokens_per_step
        self.device = device
        self.monitor = monitor
        self.step = 0
        peak = peak_flops(config, device)
        self.seconds_at_peak = (
            None if peak is None else self.tokens * flops_per_token(config, vocab_size) / (peak * ranks.world)
        )

    def begin_step(self, step: int) -> None:
        """Optimizer step `step`, counted from 1, begins: it waits for its data."""
        self.step = step
        self.monitor.enter(step, "data")
        self.start = self.data = time.perf_counter()
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def data_is_here(self) -> None:
        """The step's batch has arrived."""
        self.data = time.perf_counter()

    def enter(self, phase: str) -> None:
        """A phase of the step begins, and the one before ends: forward, backward, agreement or update."""
        self.monitor.enter(self.step, phase)
        self._marks.append((phase, self._now()))

    def step_is_done(self) -> dict[str, float | int | None]:
        """The step's times, speed and memory."""
        seconds, phases = time.perf_counter() - self.start, defaultdict[str, float](float)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            phases[phase] += _between(begin, end)
        data = self.data - self.start
        return {
            "step_seconds": seconds,
            "data_seconds": data,
            **{f"{phase}_seconds": phases[phase] for phase in IN_STEP},
            "update_seconds": max(0.0, seconds - data - sum(phases[phase] for phase in IN_STEP)),
            "tokens_per_second": self.tokens / seconds,
            "mfu": None if self.seconds_at_peak is None else self.seconds_at_peak / seconds,
            "memory_peak_bytes": memory_peak_bytes(self.device),
        }

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Seconds between two marks of one kind."""
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
    return begin.elapsed_time(end) / 1000
