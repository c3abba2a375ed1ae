"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from pretrain.config import Config


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Warm-up rises linearly and reaches the peak with its last step. `constant` then stays; `cosine` follows half
    a cosine to `final_fraction` of the peak at the last step; `wsd` stays, and falls linearly over its decay.
    """
    peak, floor = config.optimizer.learning_rate, config.schedule.final_fraction
    warmup, total = config.warmup_steps, config.total_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    match config.schedule.name:
        case "cosine":
            progress = (step - warmup + 1) / max(1, total - warmup)
            return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
        case "wsd":
            remaining = (total - step) / config.decay_steps
            return peak * (floor + (1 - floor) * min(1.0, remaining))
        case _:
            return peak
