"""The benchmarks' tasks: for each a generator of samples, their vocabulary and text form, and what scores an answer.

    task = open_task("path_star,arms=5,length=5,nodes=100,samples=200000")
    task.samples(0, 100)

Sample i is a function of the task and i alone, so any part can be made anywhere, at any time.
"""

from __future__ import annotations

from data_pipeline.errors import UserError
from data_pipeline.tasks.base import Samples, Task, Vocabulary, parse_options
from data_pipeline.tasks.belief import Belief
from data_pipeline.tasks.city import City
from data_pipeline.tasks.countdown import Countdown
from data_pipeline.tasks.path_star import PathStar
from data_pipeline.tasks.word_problem import WordProblem

TASKS: dict[str, type[Task]] = {task.name: task for task in (Belief, City, Countdown, PathStar, WordProblem)}

__all__ = ["TASKS", "Samples", "Task", "Vocabulary", "open_task"]


def open_task(spec: str) -> Task:
    """The task that `NAME,key=value,…` describes. Raises UserError for an unknown task, key or value."""
    name, _, options = spec.partition(",")
    if name not in TASKS:
        raise UserError(f"task {name!r}: no such task; there are {', '.join(sorted(TASKS))}")
    return parse_options(TASKS[name], options)
