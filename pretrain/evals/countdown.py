"""Suite `countdown`: the share of problems with held-out targets that are solved.

Greedy and sampled at temperature 1; strict (an equation uses its numbers up) and lax (the authors' released checker,
which takes nothing away: see tasks/countdown.py). Lax is for comparison with published numbers alone.
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Table

from data_pipeline import Dataset
from data_pipeline.tasks.countdown import ANSWER, PROMPT, Countdown
from pretrain.evals.pictures import ACCENT, GREY, INK, new_picture
from pretrain.evals.subject import Subject
from pretrain.evals.suite import Suite
from pretrain.evals.task_subject import SEED, continue_rows, percent, share, test_task

PROBLEMS = 10_000
BLOCK = 500
KINDS = ("greedy", "greedy_lax", "sampled", "sampled_lax")


def measure(subject: Subject, dataset: Dataset, limit: int | None, progress: Progress) -> dict[str, Any]:
    """Solve `limit` problems.

    Keys beside those of `Subject.described`: task, problems, same_as_search (greedy answers that are the label), and
    the shares of KINDS.
    """
    task, problems = test_task(dataset, Countdown), limit or PROBLEMS
    solved, same = dict.fromkeys(KINDS, 0), 0
    generator = torch.Generator().manual_seed(SEED)
    for start in progress.track(range(0, problems, BLOCK), description="countdown"):
        rows = task.samples(start, min(start + BLOCK, problems)).rows()
        for kind, drawn in (("greedy", None), ("sampled", generator)):
            answers = continue_rows(subject, rows[:, : 1 + PROMPT], ANSWER, drawn)
            for row, answer in zip(rows.tolist(), answers.tolist(), strict=True):
                solved[kind] += task.is_solution(row[1:5], row[5], answer)
                solved[f"{kind}_lax"] += task.is_solution(row[1:5], row[5], answer, lax=True)
                same += kind == "greedy" and answer == row[1 + PROMPT :]
    numbers = {kind: share(solved[kind], problems) for kind in KINDS}
    return subject.described() | {"task": task.spec, "problems": problems} | numbers | {
        "same_as_search": share(same, problems)
    }  # fmt: skip


def headline(result: dict[str, Any]) -> dict[str, float]:
    """Solved problems."""
    return {kind.replace("_", ", "): result[kind]["value"] for kind in KINDS}


def table(result: dict[str, Any]) -> Table:
    """For the console."""
    rows = Table(title="countdown", title_justify="left", show_header=False)
    rows.add_row("problems", f"{result['problems']:,}")
    for kind in (*KINDS, "same_as_search"):
        rows.add_row(kind.replace("_", ", "), percent(result[kind]))
    return rows


def picture(result: dict[str, Any]) -> Figure:
    """A bar for each way of counting."""
    figure, axes = new_picture("Countdown: solved problems, held-out targets", height=3.4)
    values = [100 * result[kind]["value"] for kind in KINDS]
    axes.barh([kind.replace("_", ", ") for kind in KINDS], values, color=[ACCENT, GREY, ACCENT, GREY], height=0.6)
    for row, value in enumerate(values):
        axes.annotate(f"{value:.1f}%", (value, row), (4, 0), textcoords="offset points", va="center", color=INK)
    axes.set_xlabel("solved (%)")
    axes.set_xlim(0, max(5.0, 1.15 * max(values)))
    axes.invert_yaxis()
    return figure


def check(subject: Subject, dataset: Dataset, limit: int | None) -> None:
    """Needs a data set of Countdown problems."""
    test_task(dataset, Countdown)


COUNTDOWN = Suite(measure, table, picture, check, headline)
