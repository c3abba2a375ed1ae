"""Suite `path_star`: the share of graphs whose way to the goal is written without a fault.

Greedy, and sampled at temperature 1 as the authors do. Besides, with the true way so far given, the share of right
tokens at each place: the first is a copy, the second the decision; the one before the goal shows first that a run is
about to solve the task.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.progress import Progress
from rich.table import Table

from data_pipeline import Dataset
from data_pipeline.tasks.path_star import PathStar
from pretrain.evals.pictures import ACCENT, GREY, INK, new_picture
from pretrain.evals.subject import Subject
from pretrain.evals.suite import Suite
from pretrain.evals.task_subject import SEED, continue_rows, hidden_states, percent, share, shares, test_task

GRAPHS = 2000
BLOCK = 250


def measure(subject: Subject, dataset: Dataset, limit: int | None, progress: Progress) -> dict[str, Any]:
    """Solve `limit` test graphs.

    Keys beside those of `Subject.described`: task, graphs, greedy and sampled (shares of whole ways), greedy_by_token,
    and forced_by_token (the true way so far given).
    """
    task = test_task(dataset, PathStar)
    graphs = limit or GRAPHS
    right: dict[str, list[NDArray[np.bool_]]] = {"greedy": [], "sampled": []}
    forced: list[NDArray[np.bool_]] = []
    generator = torch.Generator().manual_seed(SEED)
    for start in progress.track(range(0, graphs, BLOCK), description="path_star"):
        rows = task.samples(start, min(start + BLOCK, graphs)).rows()
        prompts, ways = rows[:, : 1 + task.prompt_length], rows[:, 1 + task.prompt_length :]
        for kind, drawn in (("greedy", None), ("sampled", generator)):
            right[kind].append(task.correct(continue_rows(subject, prompts, task.length, drawn), ways))
        with torch.inference_mode():
            states = hidden_states(subject, rows)[:, task.prompt_length : -1]
            forced.append(task.correct((states @ subject.head_VD.T).argmax(-1).cpu().numpy(), ways))
    solved = {kind: np.concatenate(parts) for kind, parts in right.items()}
    return subject.described() | {
        "task": task.spec,
        "graphs": graphs,
        **{kind: share(int(each.all(1).sum()), graphs) for kind, each in solved.items()},
        "greedy_by_token": shares(solved["greedy"]),
        "forced_by_token": shares(np.concatenate(forced)),
    }


def headline(result: dict[str, Any]) -> dict[str, float]:
    """Solved graphs."""
    decision = result["forced_by_token"][1]["value"]
    return {"greedy": result["greedy"]["value"], "sampled": result["sampled"]["value"], "decision token": decision}


def table(result: dict[str, Any]) -> Table:
    """For the console."""
    rows = Table(title="path_star", title_justify="left", show_header=False)
    rows.add_row("graphs", f"{result['graphs']:,}")
    rows.add_row("solved, greedy", percent(result["greedy"]))
    rows.add_row("solved, sampled at T = 1", percent(result["sampled"]))
    for place, one in enumerate(result["forced_by_token"], 1):
        rows.add_row(f"token {place}, the way so far given", percent(one))
    return rows


def picture(result: dict[str, Any]) -> Figure:
    """Right tokens by place in the way."""
    figure, axes = new_picture(f"Path-Star: {100 * result['greedy']['value']:.1f}% of graphs solved")
    places = np.arange(1, len(result["greedy_by_token"]) + 1)
    for offset, key, colour in ((-0.2, "greedy_by_token", ACCENT), (0.2, "forced_by_token", GREY)):
        label = "greedy" if colour == ACCENT else "the true way so far given"
        axes.bar(places + offset, [100 * one["value"] for one in result[key]], 0.38, color=colour, label=label)
    axes.set_xlabel("place in the way; 1 is the centre, 2 the decision")
    axes.set_ylabel("right (%)")
    axes.set_xticks(places)
    axes.set_ylim(0, 103)
    axes.legend(frameon=False, labelcolor=INK)
    return figure


def check(subject: Subject, dataset: Dataset, limit: int | None) -> None:
    """Needs a data set of Path-Star graphs."""
    test_task(dataset, PathStar)


PATH_STAR = Suite(measure, table, picture, check, headline)
