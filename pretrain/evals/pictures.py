"""One look for all pictures: little ink, labelled axes, one accent colour."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ACCENT, GREY, INK = "#0b6e99", "#b8bec4", "#2b2f33"


def new_picture(title: str, width: float = 7.2, height: float = 4.2) -> tuple[Figure, Axes]:
    """A figure with one empty plot, drawn without a display."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=INK, fontsize=12, pad=12)
    style(axes)
    return figure, axes


def style(axes: Axes) -> None:
    """Take away what carries nothing."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.set_axisbelow(True)
