"""Train like `pretrain.train`, and die by SIGKILL at an instant that was planned: the victim of the kill matrix.

Training code knows nothing of it: the plan, in the variable KILL_PLAN, names a function, and this script wraps it.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "KILL_PLAN"


@dataclass(frozen=True)
class Plan:
    """Where, when and whom SIGKILL meets."""

    target: str
    """`module:function` or `module:Class.method` whose call is the instant."""
    when: str = "before"
    """`before` the call, `after` it; or `seconds`: that long after the first call, by the clock."""
    call: int = 1
    """Which of the calls."""
    seconds: float = 0.0
    """For `when="seconds"`."""
    argument: str = "*"
    """Only calls count whose last argument, as text, fits this pattern."""
    rank: int | None = None
    """The rank that dies; None: every rank, and their launcher."""
    note: str = ""
    """A file to touch just before: proof that the instant was reached."""

    def as_environment(self) -> dict[str, str]:
        """The plan as the victim reads it."""
        return {VARIABLE: json.dumps(asdict(self))}


def lie_in_wait(plan: Plan) -> None:
    """Wrap the planned function, in the rank that dies (of several, in whichever comes first)."""
    if plan.rank is not None and plan.rank != int(os.environ.get("RANK", "0")):
        return
    module_name, _, path = plan.target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        last = args[-1] if args else next(reversed(kwargs.values()), "")
        matches = plan.argument == "*" or fnmatch.fnmatch(Path(str(last)).name, plan.argument)
        calls += matches
        due = matches and calls == plan.call
        if due and plan.when == "before":
            die(plan)
        if due and plan.when == "seconds":
            threading.Timer(plan.seconds, die, [plan]).start()
        result = original(*args, **kwargs)
        if due and plan.when == "after":
            die(plan)
        return result

    setattr(owner, name, wrapped)


def die(plan: Plan) -> None:
    """SIGKILL for this rank alone, or for its whole process group, where its launcher is too."""
    Path(plan.note).touch()
    if plan.rank is None:
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def main(argv: list[str] | None = None) -> None:
    """The command line of `pretrain.train`."""
    from pretrain import train

    if VARIABLE in os.environ:
        lie_in_wait(Plan(**json.loads(os.environ[VARIABLE])))
    train.main(argv)


if __name__ == "__main__":
    from pretrain.distributed import run_and_leave

    run_and_leave(main)
