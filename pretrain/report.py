"""One page about one or several runs: curves of every loss, speed, and what the evaluation found, as pictures.

    python -m pretrain.report RUN [RUN …] --out report.html

The page is one file with its pictures inside. A run's evaluation is read from RUN/evaluation/*.json, where
`pretrain.evaluate --out RUN/evaluation` puts it.
"""

from __future__ import annotations

import argparse
import html
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_pipeline import UserError, run_command
from pretrain.config import Config, load_config
from pretrain.metrics import METRICS_FILE

COLOURS = ["#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569"]
LOSS_TERMS = {
    "loss_next_token": ("Next token", "nats per token"),
    "loss_next_latent": ("Next latent", "SmoothL1"),
    "loss_kl": ("KL of rollout", "nats per token"),
    "loss_rollout_cross_entropy": ("Cross-entropy of rollout", "nats per token"),
    "loss_multi_token": ("Extra heads of MTP", "nats per token"),
    "loss_joint_token": ("Joint tokens of JTP", "nats per token"),
    "loss_previous_token": ("Previous token of BST", "nats per token"),
    "loss": ("Whole objective", "weighted sum"),
}
DIAGNOSTICS = {
    "hidden_effective_rank": ("Effective rank of h", "dimensions"),
    "hidden_norm": ("Norm of h", ""),
    "latent_cosine": ("Cosine of prediction and h", ""),
    "latent_target_variance": ("Variance of h (pale: prediction)", ""),
    "draft_acceptance": ("Drafts accepted, of 5", "share"),
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1e293b; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p { max-width: 46rem } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #e2e8f0 }
th:first-child, td:first-child { text-align: left } th { font-weight: 600; color: #475569 }
svg { max-width: 100%; height: auto } pre { background: #f1f5f9; padding: .8rem; overflow-x: auto }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em }
"""


@dataclass(frozen=True)
class Run:
    """What the page needs of a run."""

    folder: Path
    config: Config
    records: list[dict[str, Any]]
    evaluation: dict[str, dict[str, Any]]
    colour: str

    @property
    def name(self) -> str:
        """The run's name."""
        return self.config.run.name

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Tokens and values, at the steps that have `key`."""
        points = [(record["tokens"], record[key]) for record in self.records if record.get(key) is not None]
        return [tokens for tokens, _ in points], [value for _, value in points]


def read_run(folder: Path, colour: str) -> Run:
    """Read a run's folder; UserError where it is not one."""
    metrics = folder / METRICS_FILE
    if not metrics.exists():
        raise UserError(f"{folder}: no {METRICS_FILE} here; give the folder of a run that has started")
    try:
        records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{metrics}: a line is not JSON ({error}); is a run writing to it right now?") from None
    if not records:
        raise UserError(f"{metrics}: no step yet; wait for the run's first one")
    evaluation = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((folder / "evaluation").glob("*.json"))
    }
    return Run(folder, load_config(folder / "config.yaml"), records, evaluation, colour)


def write_report(folders: Iterable[Path], out: Path) -> None:
    """Write the page about the runs in `folders` to `out`, at once."""
    runs = [read_run(folder, COLOURS[i % len(COLOURS)]) for i, folder in enumerate(folders)]
    sections = [
        (
            "Losses",
            "Training (each step pale, its running mean dark) and validation (dots) over tokens.",
            picture(runs, draw_losses, (11, 6.4)),
        ),
        ("Speed and steadiness", "", picture(runs, draw_speed, (11, 3.1))),
    ]
    if any(run.curve("hidden_norm")[0] for run in runs):
        note = "Hidden states and p_ψ on a few validation sequences (pretrain/diagnostics.py says how each is defined)."
        sections.append(("What the losses do not tell", note, picture(runs, draw_diagnostics, (11, 5.6))))
    if any("perplexity" in run.evaluation for run in runs):
        note = (
            "Validation text in bits per byte, end-of-document tokens included. xz sees the same bytes and nothing "
            "else; the model has seen the training text before."
        )
        sections.append(("Compression", note, picture(runs, draw_bits_per_byte, (11, 0.8 + 0.6 * (len(runs) + 1)))))
    if any("speculative" in run.evaluation for run in runs):
        note = (
            "Greedy decoding with p_ψ drafting. A draft counts as accepted if the trunk itself would have chosen it; "
            "the share is of those drafts whose predecessors were all accepted."
        )
        sections.append(("Draft acceptance by position", note, picture(runs, draw_acceptance, (11, 3.4))))
    body = "".join(f"<h2>{title}</h2><p>{note}</p>{content}" for title, note, content in sections)
    title = ", ".join(run.name for run in runs)
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1>{summary_table(runs)}{body}{configs(runs)}</html>"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.tmp")
    beside.write_text(page, encoding="utf-8")
    beside.rename(out)


def summary_table(runs: list[Run]) -> str:
    """One row per run: its size, its end, its speed."""
    columns: dict[str, Callable[[Run], str]] = {
        "run": lambda r: f"<span class=swatch style='background:{r.colour}'></span>{html.escape(r.name)}",
        "objective": lambda r: r.config.objective.name,
        "steps": lambda r: f"{r.records[-1]['step']:,} of {r.config.total_steps:,}",
        "tokens": lambda r: f"{r.records[-1]['tokens']:,}",
        "next token": lambda r: f"{r.records[-1]['loss_next_token']:.4f}{_given(r)}",
        "validation": lambda r: _last(r, "val_loss_next_token", "{:.4f}") + _given(r),
        "bits per byte": lambda r: _evaluated(r, "perplexity", "bits_per_byte", "{:.3f}"),
        "accepted per cycle": lambda r: _evaluated(r, "speculative", "accepted_per_cycle", "{:.2f}"),
        "tokens/s": lambda r: f"{_median(r.curve('tokens_per_second')[1]):,.0f}",
        "training": lambda r: _duration(sum(r.curve("step_seconds")[1])),
    }
    head = "".join(f"<th>{name}" for name in columns)
    rows = "".join("<tr>" + "".join(f"<td>{cell(run)}" for cell in columns.values()) for run in runs)
    return f"<table><tr>{head}{rows}</table>"


def configs(runs: list[Run]) -> str:
    """The resolved configs, folded."""
    return "".join(
        f"<details><summary>config of {html.escape(run.name)}</summary><pre>"
        f"{html.escape((run.folder / 'config.yaml').read_text(encoding='utf-8'))}</pre></details>"
        for run in runs
    )


def draw_losses(figure: Figure, runs: list[Run]) -> None:
    """A panel per loss term that any run has."""
    present = [key for key in LOSS_TERMS if any(key in run.records[-1] for run in runs)]
    if len(present) == 2:  # next token alone: the whole objective is the same curve
        present = present[:1]
    for index, key in enumerate(present):
        axes = figure.add_subplot((len(present) + 1) // 2, 2 if len(present) > 1 else 1, index + 1)
        title, unit = LOSS_TERMS[key]
        for run in runs:
            tokens, values = run.curve(key)
            axes.plot(tokens, values, color=run.colour, linewidth=0.8, alpha=0.3)
            axes.plot(tokens, smoothed(values), color=run.colour, linewidth=1.6, label=run.name)
            axes.plot(*run.curve(f"val_{key}"), "o", color=run.colour, markersize=5, markeredgecolor="white")
        _dress(axes, title, unit)
        if key != "loss_next_latent":
            axes.set_ylim(bottom=0)
    if len(runs) > 1:
        figure.axes[0].legend(frameon=False)


def smoothed(values: list[float], steps: float = 20.0) -> list[float]:
    """Running mean that forgets over about so many steps, without bias at the beginning."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = total * (1 - 1 / steps) + value, weight * (1 - 1 / steps) + 1.0
        result.append(total / weight)
    return result


def draw_speed(figure: Figure, runs: list[Run]) -> None:
    """Tokens per second, learning rate, gradient norm."""
    panels = [("tokens_per_second", "Throughput", "tokens/s"), ("learning_rate", "Learning rate", "")]
    panels.append(("grad_norm", "Gradient norm before clipping", ""))
    for index, (key, title, unit) in enumerate(panels):
        axes = figure.add_subplot(1, 3, index + 1)
        for run in runs:
            axes.plot(*run.curve(key), color=run.colour, linewidth=1.2)
        _dress(axes, title, unit)
        axes.set_ylim(bottom=0)


def draw_diagnostics(figure: Figure, runs: list[Run]) -> None:
    """A panel per diagnostic that any run has."""
    present = [key for key in DIAGNOSTICS if any(run.curve(key)[0] for run in runs)]
    for index, key in enumerate(present):
        axes = figure.add_subplot((len(present) + 2) // 3, min(3, len(present)), index + 1)
        for run in runs:
            axes.plot(*run.curve(key), ".-", color=run.colour, linewidth=1.4, label=run.name)
            if key == "latent_target_variance":
                axes.plot(*run.curve("latent_prediction_variance"), color=run.colour, linewidth=1.4, alpha=0.4)
        _dress(axes, *DIAGNOSTICS[key])
    if len(runs) > 1:
        figure.axes[0].legend(frameon=False)


def draw_bits_per_byte(figure: Figure, runs: list[Run]) -> None:
    """Bars: each run, and xz -9 on the same bytes."""
    axes = figure.add_subplot()
    evaluated = [run for run in runs if run.evaluation.get("perplexity", {}).get("bits_per_byte") is not None]
    bars = [(run.name, run.evaluation["perplexity"]["bits_per_byte"], run.colour) for run in evaluated]
    xz = [run.evaluation["perplexity"].get("xz_bits_per_byte") for run in evaluated]
    bars += [("xz -9", value, "#94a3b8") for value in xz[:1] if value is not None]
    names, values, colours = zip(*reversed(bars), strict=True) if bars else ((), (), ())
    drawn = axes.barh(names, values, color=colours, height=0.6)
    axes.bar_label(drawn, fmt="%.3f", padding=4)
    _dress(axes, "", "", x_label="bits per byte (less is better)")
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)


def draw_acceptance(figure: Figure, runs: list[Run]) -> None:
    """Lines: the share of accepted drafts at each position."""
    axes = figure.add_subplot()
    for run in runs:
        shares = run.evaluation.get("speculative", {}).get("acceptance_by_position")
        if shares:
            positions = range(1, len(shares) + 1)
            axes.plot(positions, shares, "o-", color=run.colour, linewidth=1.6, label=run.name)
            axes.set_xticks(list(positions))
    _dress(axes, "", "share accepted", x_label="position in the draft")
    axes.set_ylim(0, 1)
    if len(runs) > 1:
        axes.legend(frameon=False)


def picture(runs: list[Run], draw: Callable[[Figure, list[Run]], None], size: tuple[float, float]) -> str:
    """A drawing as inline SVG; text stays text."""
    with plt.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, runs)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _dress(axes: Axes, title: str, unit: str, x_label: str = "tokens") -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(unit)
    axes.set_xlabel(x_label)
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if x_label == "tokens":
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))


def _short(value: float) -> str:
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{letter}"
    return f"{value:g}"


def _given(run: Run) -> str:
    """A remark on next-token losses that others' cannot be compared with."""
    return " given the suffix" if run.config.objective.name == "bst" else ""


def _last(run: Run, key: str, form: str) -> str:
    values = run.curve(key)[1]
    return form.format(values[-1]) if values else "–"


def _evaluated(run: Run, suite: str, key: str, form: str) -> str:
    value = run.evaluation.get(suite, {}).get(key)
    return form.format(value) if value is not None else "–"


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="pretrain.report", description="Write one page about one or several runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, such as report.html")
    arguments = parser.parse_args(argv)
    write_report(arguments.runs, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    run_command(main)
