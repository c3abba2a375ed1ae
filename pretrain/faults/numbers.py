"""Numbers gone wrong: told by all ranks alike before a step is applied, and what the run then does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed

from data_pipeline import Stream, UserError
from pretrain.config import Config, FaultsConfig

SHOWN_DOCUMENTS = 8


@dataclass(frozen=True)
class Fault:
    """Why a step was not applied. The same on every rank."""

    kind: str
    """`non_finite` or `spike`: the key of the `faults` section that says what follows."""
    words: str
    """What is wrong, for people."""


def judge_loss(loss: float, recent: Sequence[float], config: FaultsConfig) -> Fault | None:
    """What is wrong with a global batch's loss, given the losses of the last applied steps; None: nothing.

    A spike is a loss whose robust z-score, (loss − median) / (1.4826·MAD), is above `spike_z`. MAD, the median
    distance from the median, times 1.4826 is the standard deviation where losses are normally distributed; unlike
    that, it is not moved by earlier spikes (Iglewicz and Hoaglin, 1993). Judged only against a full window.
    """
    if not math.isfinite(loss):
        return Fault("non_finite", f"the loss is {loss}")
    if config.spike == "ignore" or len(recent) < config.spike_window:
        return None
    median = statistics.median(recent)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in recent)
    score = (loss - median) / max(deviation, 1e-3 * abs(median), 1e-12)  # a flat curve makes no spike of its rounding
    if score <= config.spike_z:
        return None
    return Fault("spike", f"the loss is {loss:.4g}, {score:.1f} deviations above its recent median {median:.4g}")


def judge_gradient(grad_norm: float, applied: bool) -> Fault | None:
    """What is wrong with a gradient, by its global norm; `applied`: whether DeepSpeed itself did not refuse it."""
    if math.isfinite(grad_norm) and applied:
        return None
    return Fault("non_finite", f"the gradient's norm is {grad_norm}")


class UpdateGate:
    """Lets an engine's optimizer update the weights, or not.

    When closed, `engine.step()` runs as ever, so that accumulated gradients and counters are as after any other step,
    at each ZeRO stage; only the inner optimizer leaves weights and moments as they are. (Setting the learning rate to
    zero would let the gradient into the moments, and DeepSpeed has no call that drops a step.)
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self._update = engine.basic_optimizer.step
        self._open = True
        engine.basic_optimizer.step = self._step_if_open

    @contextmanager
    def closed_if(self, condition: bool) -> Iterator[None]:
        """Updates within are left out if `condition`."""
        self._open = not condition
        try:
            yield
        finally:
            self._open = True

    def _step_if_open(self, *args: Any, **kwargs: Any) -> Any:
        return self._update(*args, **kwargs) if self._open else None


def policy(fault: Fault, step: int, in_a_row: int, config: Config, stream: Stream) -> str:
    """`skip` or `rollback`, as the config says; UserError where it says stop, or there were too many in a row."""
    chosen = config.faults.non_finite if fault.kind == "non_finite" else config.faults.spike
    remedy = (
        f"{documents_in_words(stream, step)}: look at them, lower optimizer.learning_rate, or set faults.{fault.kind}="
        "skip, and start the same command again to go on from the last checkpoint"
    )
    if chosen == "stop":
        raise UserError(f"step {step + 1}: {fault.words}; the step was not applied. {remedy}")
    if in_a_row > config.faults.in_a_row:
        raise UserError(
            f"step {step + 1}: {fault.words}, after {in_a_row - 1} steps in a row that were not applied either "
            f"(faults.in_a_row={config.faults.in_a_row}). {remedy}"
        )
    return str(chosen)


def documents_in_words(stream: Stream, step: int) -> str:
    """`Its batch holds the training documents 3, 17, …`."""
    documents = [str(number) for number in stream.documents(step)[: SHOWN_DOCUMENTS + 1]]
    more = ", …" if len(documents) > SHOWN_DOCUMENTS else ""
    return f"Its batch holds the training documents {', '.join(documents[:SHOWN_DOCUMENTS])}{more}"
