"""The picture of the suite `latent`."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pretrain.evals.pictures import ACCENT, GREY, INK, style


def picture(result: dict[str, Any]) -> Figure:
    """The spectrum; the rollout's drift by step, where there is one; and reliability."""
    steps = result["dynamics"]
    figure = Figure(figsize=(12 if steps else 8, 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, 3 if steps else 2)
    for axes in panels:
        style(axes)
    _draw_spectrum(panels[0], result)
    if steps:
        _draw_drift(panels[1], steps)
    _draw_reliability(panels[-1], result)
    return figure


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", color=INK, fontsize=11)


def _draw_spectrum(axes: Axes, result: dict[str, Any]) -> None:
    _title(axes, f"Singular values: effective rank {result['effective_rank']:.1f}")
    shares = [share for share in result["spectrum"] if share > 1e-8]
    axes.semilogy(range(1, len(shares) + 1), shares, color=ACCENT)
    axes.set_xlabel("number")
    axes.set_ylabel("share of their sum")


def _draw_drift(axes: Axes, steps: list[dict[str, Any]]) -> None:
    _title(axes, "Rollout of p_ψ beside the true states")
    numbers = range(1, len(steps) + 1)
    lines = {
        "relative error": ("relative_error", ACCENT, "-"),
        "the same, state copied": ("copied", GREY, "-"),
        "1 − cosine": ("cosine", INK, ":"),
        "KL, nats": ("kl", INK, "-"),
    }
    for label, (key, colour, dashes) in lines.items():
        values = [1 - step[key] if key == "cosine" else step[key] for step in steps]
        axes.plot(numbers, values, color=colour, linestyle=dashes, marker="o", markersize=3, label=label)
    axes.set_xlabel("steps of the rollout")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)


def _draw_reliability(axes: Axes, result: dict[str, Any]) -> None:
    _title(axes, "Reliability")
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1)
    steps = result["dynamics"] or []
    drawn = [("trunk", result["trunk"], INK, "-")]
    for number in sorted({1, len(steps)}) if steps else ():
        drawn.append((f"p_ψ, step {number}", steps[number - 1], ACCENT, "-" if number == 1 else ":"))
    for label, one, colour, dashes in drawn:
        places = [(100 * bin["confidence"], 100 * bin["right"]) for bin in one["bins"]]
        name = f"{label}: {100 * one['calibration_error']:.1f}% off"
        axes.plot(*zip(*places, strict=True), color=colour, linestyle=dashes, marker="o", markersize=3, label=name)
    axes.set_xlabel("probability of the likeliest token (%)")
    axes.set_ylabel("it was right (%)")
    axes.legend(frameon=False, fontsize=8)
