"""What a suite is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Table

from data_pipeline import Dataset
from pretrain.evals.subject import Subject


@dataclass(frozen=True)
class Suite:
    """One kind of evaluation: how it is measured, and how its result is shown."""

    measure: Callable[[Subject, Dataset, int | None, Progress], dict[str, Any]]
    """(subject, data set, limit, progress bar) → the content of <suite>.json."""
    table: Callable[[dict[str, Any]], Table]
    """For the console."""
    picture: Callable[[dict[str, Any]], Figure]
    """For <suite>.png."""
    check: Callable[[Subject, Dataset, int | None], None] = lambda subject, dataset, limit: None
    """Raises UserError for what this suite cannot evaluate, before any suite runs."""
    headline: Callable[[dict[str, Any]], dict[str, float]] = lambda result: {}
    """The few numbers of a result that a study puts side by side."""
