"""Being told to stop: by a signal or by the clock, at any time from the interpreter's first lines on."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def hold_back() -> None:
    """Keep the signals that stop a run pending until StopRequests takes them.

    Importing torch takes seconds, and until there is a handler SIGTERM and SIGUSR2 kill the process. Threads that
    are started meanwhile inherit the mask, so that the main thread, which runs Python's handlers, gets them later.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


class StopRequests:
    """Turns signals, and a wall-clock budget, into a flag that the loop asks for; a second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupts = 0
        self._started = time.monotonic()
        self._budget_minutes: float | None = None
        self.listen(*STOP_SIGNALS)

    def listen(self, *numbers: signal.Signals) -> None:
        """Take these signals, those included that came while `hold_back` held them."""
        for number in numbers:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def limit_time(self, minutes: float | None) -> None:
        """Count as told to stop so many minutes after this object was made; None: never."""
        self._budget_minutes = minutes

    @property
    def pending(self) -> bool:
        """Whether this rank was told to stop."""
        return self.received is not None or self._time_is_up

    @property
    def reason(self) -> str:
        """Why, in words; another rank's reasons are not known here."""
        if self.received is not None:
            return f"received {self.received.name}"
        if self._time_is_up:
            return f"run.wall_clock_minutes={self._budget_minutes:g} are over"
        return "another rank was told to stop"

    @property
    def _time_is_up(self) -> bool:
        if self._budget_minutes is None:
            return False
        return time.monotonic() - self._started >= 60 * self._budget_minutes

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(130)
