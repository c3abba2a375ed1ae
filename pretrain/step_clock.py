"""How long a step takes, and what it makes of the hardware."""

from __future__ import annotations

import time

import torch

from pretrain.config import Config
from pretrain.distributed import Ranks
from pretrain.flops import flops_per_token, peak_flops
from pretrain.metrics import memory_peak_bytes


class StepClock:
    """Times one step: waiting for data, and all of it. Validation and saving are not part of a step."""

    def __init__(self, config: Config, vocab_size: int, ranks: Ranks, device: torch.device):
        self.tokens = config.tokens_per_step
        self.device = device
        peak = peak_flops(config, device)
        self.seconds_at_peak = (
            None if peak is None else self.tokens * flops_per_token(config, vocab_size) / (peak * ranks.world)
        )
        self.restart()

    def restart(self) -> None:
        """A step begins."""
        self.start = self.data = time.perf_counter()

    def data_is_here(self) -> None:
        """The step's batch has arrived."""
        self.data = time.perf_counter()

    def step_is_done(self) -> dict[str, float | int | None]:
        """The step's times, speed and memory."""
        seconds = time.perf_counter() - self.start
        return {
            "step_seconds": seconds,
            "data_seconds": self.data - self.start,
            "tokens_per_second": self.tokens / seconds,
            "mfu": None if self.seconds_at_peak is None else self.seconds_at_peak / seconds,
            "memory_peak_bytes": memory_peak_bytes(self.device),
        }
