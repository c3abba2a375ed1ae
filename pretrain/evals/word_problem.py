"""Suite `word_problem`: state tracking beyond the training length, by the trunk and by p_ψ alone.

Test words are three times as long as those of training. The trunk answers at every position as it was trained to. p_ψ
starts from the trunk's first hidden state and then rolls out by itself, fed with the elements, and the head reads its
states. Reported: A(t), the share of right answers after t elements, and of words with all answers right up to there.
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
from data_pipeline.tasks.word_problem import WordProblem, correct_positions
from pretrain.evals.pictures import ACCENT, GREY, INK, new_picture
from pretrain.evals.subject import Subject
from pretrain.evals.suite import Suite
from pretrain.evals.task_subject import hidden_states, latent_dynamics, percent, shares, test_task

WORDS = 2000
LENGTHS = 3
"""Test words are so many times as long as training words."""


def measure(subject: Subject, dataset: Dataset, limit: int | None, progress: Progress) -> dict[str, Any]:
    """Answer `limit` test words.

    Keys beside those of `Subject.described`: task, words, trained_length, trunk, and dynamics where there is a p_ψ;
    these two hold `accuracy` and `all_correct`, a list over t = 0 … 3·length of shares with their intervals.
    """
    trained = test_task(dataset, WordProblem)
    task = test_task(dataset, WordProblem, length=LENGTHS * trained.length)
    count = limit or WORDS
    made = task.samples(0, count)
    assert made.labels is not None
    rows, labels = made.rows(), made.labels.reshape(count, -1)
    with torch.inference_mode():
        states = hidden_states(subject, rows)
        result = subject.described() | {"task": task.spec, "words": count, "trained_length": trained.length}
        result["trunk"] = _summary((states @ subject.head_VD.T).argmax(-1).cpu().numpy(), labels)
        if (found := latent_dynamics(subject)) is not None:
            dynamics, embeddings = found
            state, answers = states[:, 0], [(states[:, 0] @ subject.head_VD.T).argmax(-1)]
            for t in progress.track(range(1, rows.shape[1]), description="word_problem"):
                state = dynamics.step(state, embeddings[torch.from_numpy(rows[:, t]).to(embeddings.device)])
                answers.append((state @ subject.head_VD.T).argmax(-1))
            result["dynamics"] = _summary(torch.stack(answers, 1).cpu().numpy(), labels)
    return result


def _summary(answers_NT: NDArray[np.int64], labels_NT: NDArray[np.int64]) -> dict[str, Any]:
    right, all_right = correct_positions(answers_NT, labels_NT)
    return {"accuracy": shares(right), "all_correct": shares(all_right)}


def headline(result: dict[str, Any]) -> dict[str, float]:
    """A(t) at one, two and three training lengths."""
    length, numbers = result["trained_length"], {}
    for who, name in (("trunk", "trunk"), ("dynamics", "p_ψ")):
        for times in range(1, LENGTHS + 1) if who in result else ():
            numbers[f"{name} A({times * length})"] = result[who]["accuracy"][times * length]["value"]
    return numbers


def table(result: dict[str, Any]) -> Table:
    """For the console."""
    length = result["trained_length"]
    rows = Table(title=f"word_problem: trained on words of {length}", title_justify="left")
    rows.add_column("elements")
    kinds = [kind for kind in ("trunk", "dynamics") if kind in result]
    for kind in kinds:
        rows.add_column("p_ψ rolled out" if kind == "dynamics" else "trunk", justify="right")
    for t in sorted({length // 2, length, length + 1, *(k * length for k in range(2, LENGTHS + 1))}):
        rows.add_row(str(t), *(percent(result[kind]["accuracy"][t]) for kind in kinds))
    return rows


def picture(result: dict[str, Any]) -> Figure:
    """A(t) of the trunk and of p_ψ."""
    figure, axes = new_picture("Right answers after t elements")
    for kind, name, colour in (("trunk", "trunk", INK), ("dynamics", "p_ψ rolled out", ACCENT)):
        if kind in result:
            points = result[kind]["accuracy"]
            axes.plot([100 * point["value"] for point in points], color=colour, label=name, marker="o", markersize=3)
            low, high = ([100 * point[end] for point in points] for end in ("low", "high"))
            axes.fill_between(range(len(points)), low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axvline(result["trained_length"], color=GREY, linestyle="--", linewidth=1)
    axes.annotate("trained up to here", (result["trained_length"], 4), (4, 0), textcoords="offset points", color=INK)
    axes.set_xlabel("elements of the word")
    axes.set_ylabel("right (%)")
    axes.set_ylim(0, 103)
    axes.legend(frameon=False)
    return figure


def check(subject: Subject, dataset: Dataset, limit: int | None) -> None:
    """Needs a data set of the word problem."""
    test_task(dataset, WordProblem)


WORD_PROBLEM = Suite(measure, table, picture, check, headline)
