"""What a suite is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table


@dataclass(frozen=True)
class Suite:
    """One kind of evaluation: how it is measured, and how its result is shown."""

    measure: Callable[..., dict[str, Any]]
    """(subject, data set, limit, progress bar, and its options by keyword) → the content of <suite>.json."""
    table: Callable[[dict[str, Any]], Table]
    """For the console."""
    picture: Callable[[dict[str, Any]], Figure]
    """For <suite>.png."""
    check: Callable[..., None] = lambda subject, dataset, limit, **options: None
    """(subject, data set, limit, and its options): raises UserError for what this suite cannot evaluate, before any
    suite runs."""
    headline: Callable[[dict[str, Any]], dict[str, float]] = lambda result: {}
    """The few numbers of a result that a study puts side by side."""
    options: tuple[str, ...] = ()
    """Which of the command's further options measure and check take."""
    reads_data: bool = True
    """Whether it needs a data set; None is in its place where no suite does."""
