"""A study's page: every seed of every config, means with intervals, pictures, and all that it takes to do it again."""

from __future__ import annotations

import math
import os
import platform
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from pretrain.config import load_config
from pretrain.evals import SUITES
from pretrain.evals.pictures import ACCENT, GREY, INK, style
from pretrain.study.plan import PlannedRun, Study

# Student's t at 97.5% for 1, 2, … degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Result:
    """A run and what its evaluation found."""

    run: PlannedRun
    evaluation: dict[str, Any]


def write_page(study: Study, name: str, results: list[Result], commands: list[str], out: Path) -> Path:
    """Write out/<name>.md and its pictures, out/<name>/…; returns the page's path."""
    pictures = out / name
    pictures.mkdir(parents=True, exist_ok=True)
    rows = [(result, SUITES[study.suite].headline(result.evaluation)) for result in results]
    columns = list(dict.fromkeys(column for _, numbers in rows for column in numbers))
    draw_seeds(study, rows, columns).savefig(pictures / "seeds.png")
    parts = [f"# {study.title}", study.question.strip(), *tables(study, rows, columns)]
    parts.append(f"![Every seed of every config]({name}/seeds.png)")
    for key, entry in study.runs.items():
        first = next(result for result in results if result.run.entry is entry)
        source = first.run.folder / "evaluation" / f"{study.suite}.png"
        shutil.copyfile(source, pictures / f"{key}.png")
        parts.append(f"{entry.label}, seed {first.run.seed}:\n\n![{entry.label}]({name}/{key}.png)")
    parts.append("## How it was made\n\nAll of it, and the first of its runs and evaluations alone:")
    parts.append("\n".join(f"    {command}" for command in commands))
    parts.append("Differences between the configs, key by key:\n\n" + differences(study))
    parts.append(surroundings())
    page = out / f"{name}.md"
    beside = page.with_name(f".{page.name}.tmp")
    beside.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    beside.replace(page)
    return page


def tables(study: Study, rows: list[tuple[Result, dict[str, float]]], columns: list[str]) -> list[str]:
    """The table of means with intervals, and the table of every seed."""
    means = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    every = ["| | seed | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for entry in study.runs.values():
        own = [(result, numbers) for result, numbers in rows if result.run.entry is entry]
        cells = [mean_with_interval([numbers[column] for _, numbers in own if column in numbers]) for column in columns]
        means.append(f"| {entry.label} | " + " | ".join(cells) + " |")
        for result, numbers in own:
            cells = [f"{numbers[column]:.4g}" if column in numbers else "–" for column in columns]
            every.append(f"| {entry.label} | {result.run.seed} | " + " | ".join(cells) + " |")
    count = len(study.seeds)
    note = f"Mean of {count} seeds ± half of its 95% interval (Student's t)." if count > 1 else "One seed: no interval."
    return [note, "\n".join(means), "Every seed:", "\n".join(every)]


def mean_with_interval(values: list[float]) -> str:
    """`0.98 ± 0.01`; the mean alone where there is no interval."""
    if not values:
        return "–"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.4g}"
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    student = STUDENT[len(values) - 2] if len(values) - 2 < len(STUDENT) else 1.96
    return f"{mean:.4g} ± {student * deviation / math.sqrt(len(values)):.2g}"


def draw_seeds(study: Study, rows: list[tuple[Result, dict[str, float]]], columns: list[str]) -> Figure:
    """A panel for each number: a dot for each seed, a line at the mean."""
    labels = [entry.label for entry in study.runs.values()]
    height = 1.2 + 0.35 * len(labels)
    figure = Figure(figsize=(2.2 + 2.2 * len(columns), height), dpi=150, layout="constrained")
    for axes, column in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns, strict=True):
        for place, entry in enumerate(study.runs.values()):
            own = [numbers[column] for result, numbers in rows if result.run.entry is entry and column in numbers]
            if own:
                axes.plot([sum(own) / len(own)] * 2, [place - 0.3, place + 0.3], color=GREY, linewidth=2)
                axes.plot(own, [place] * len(own), "o", color=ACCENT, markersize=4, alpha=0.8)
        axes.set_title(column, loc="left", fontsize=10, color=INK)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        style(axes)
    return figure


def differences(study: Study) -> str:
    """A table of the keys whose values are not the same in all configs; names and seeds left out."""
    flat = [
        _flatten(load_config(entry.config, entry.overrides).model_dump(mode="json")) for entry in study.runs.values()
    ]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if not key.startswith("run.")]
    keys = [key for key in keys if len({str(one.get(key, "–")) for one in flat}) > 1]
    lines = ["| | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for entry, one in zip(study.runs.values(), flat, strict=True):
        lines.append(f"| {entry.label} | " + " | ".join(str(one.get(key, "–")) for key in keys) + " |")
    return "\n".join(lines) if keys else "none"


def _flatten(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return flat


def surroundings() -> str:
    """Versions, hardware and date."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "numpy"))
    on = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_processor()}, {os.cpu_count()} cores, no GPU"
    )
    return (
        f"Python {platform.python_version()}, {packages}; {on}; one process a run, one thread each. "
        f"Written on {datetime.now(UTC):%Y-%m-%d}."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
