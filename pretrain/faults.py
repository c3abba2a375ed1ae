"""What a run does when it is told to stop, or when its numbers go wrong."""

from __future__ import annotations

import math
import os
import signal
from types import FrameType

import deepspeed

from data_pipeline import Stream, UserError

EXIT_STOPPED = 75
"""Exit code of a run that was told to stop by a signal, and saved: the same command goes on (EX_TEMPFAIL)."""


class StopSignals:
    """Turns SIGINT, SIGTERM and SIGUSR2 into a flag that the loop asks for; a second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupts = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(130)


def check_applied(engine: deepspeed.DeepSpeedEngine, grad_norm: float, step: int, stream: Stream) -> None:
    """UserError if DeepSpeed left the step out because the gradient was not finite."""
    if not math.isfinite(grad_norm) or not engine.was_step_applied():
        raise UserError(
            f"step {step + 1}: the gradient's norm is {grad_norm}; the step was not applied. {_advice(step, stream)}"
        )


def check_finite(loss: float, step: int, stream: Stream) -> None:
    """UserError if the global batch of `step` gave a loss that is not finite; nothing has been applied yet."""
    if not math.isfinite(loss):
        raise UserError(f"step {step + 1}: the loss is {loss}; the step was not applied. {_advice(step, stream)}")


def _advice(step: int, stream: Stream) -> str:
    documents = [str(number) for number in stream.documents(step)]
    shown = ", ".join(documents[:8]) + (", …" if len(documents) > 8 else "")
    return (
        f"Its batch holds the training documents {shown}: look at them, or lower optimizer.learning_rate, and "
        "start the same command again to go on from the last checkpoint"
    )
