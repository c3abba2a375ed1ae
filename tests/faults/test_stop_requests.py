"""Signals and the clock become a flag, whenever they come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pretrain.faults.signals import STOP_SIGNALS, StopRequests, hold_back


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_is_noted_and_named(number: signal.Signals) -> None:
    stop = StopRequests()
    assert not stop.pending
    os.kill(os.getpid(), number)
    assert stop.pending and stop.reason == f"received {number.name}"


def test_a_signal_that_comes_before_the_handler_is_kept_for_it() -> None:
    hold_back()
    signal.raise_signal(signal.SIGUSR2)  # to this thread; without the mask it would end the process
    assert StopRequests().received == signal.SIGUSR2


def test_other_signals_are_taken_on_request() -> None:
    stop = StopRequests()
    stop.listen(signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.received == signal.SIGUSR1


def test_a_second_interrupt_leaves_at_once() -> None:
    program = (
        "import os, signal; from pretrain.faults.signals import StopRequests; StopRequests();"
        "os.kill(os.getpid(), signal.SIGINT); print('first'); os.kill(os.getpid(), signal.SIGINT); print('second')"
    )
    result = subprocess.run([sys.executable, "-uc", program], capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("first\n", 130)


def test_the_time_budget_counts_as_being_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stop = StopRequests()
    stop.limit_time(2.0)
    now += 119.0
    assert not stop.pending
    now += 1.0
    assert stop.pending and stop.reason == "run.wall_clock_minutes=2 are over"
    stop.limit_time(None)
    assert not stop.pending


def test_signals_are_held_back_before_torch_is_imported() -> None:
    program = "import sys; import pretrain.faults.signals; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
