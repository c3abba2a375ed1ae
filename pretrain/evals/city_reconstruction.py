"""The map that a model's walks imply: true streets where they explain a walk, new ones only where none does.

Each walk starts at its origin and follows true streets, and streets added before, as far as they go. Where no street
of the wanted heading leads on, one is added: to the crossing, within RADIUS of here, from which known streets follow
the rest of the walk furthest, or to the destination where one turn is left. Added streets are those that the city does
not have: false ones. A walk that cannot be explained so is counted and left out. After the reconstruction of Vafa et
al., with one street for each crossing and heading.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from data_pipeline.tasks.city import City
from pretrain.evals.pictures import GREY, INK

RADIUS = 4.0  # blocks
FALSE = "#c0232c"

Streets = dict[tuple[int, int], int]


def reconstruct(task: City, walks: list[list[int]]) -> dict[str, Any]:
    """Keys: false_edges, true_edges, unexplained_walks, and reconstruction, to draw: places, true and false edges."""
    city = task.city
    true: Streets = {(a, h): int(b) for a, row in enumerate(city.neighbours) for h, b in enumerate(row) if b >= 0}
    used: set[tuple[int, int]] = set()
    added: Streets = {}
    unexplained = 0
    gaps = np.linalg.norm(city.places[:, None] - city.places[None], axis=2)
    for walk in walks:
        headings = [token - len(city.names) for token in walk[2:]]
        origin_and_end_are_crossings = len(walk) > 1 and max(walk[:2]) < len(city.names)
        if not origin_and_end_are_crossings or not headings or not all(0 <= heading < 8 for heading in headings):
            unexplained += 1
            continue
        explained = _explain(walk[0], walk[1], headings, true | added, gaps)
        if explained is None:
            unexplained += 1
            continue
        passed, new = explained
        used |= passed & true.keys()
        added |= new
    edges = {
        "true": sorted([a, true[a, h]] for a, h in used),
        "false": sorted([a, b] for (a, _), b in added.items()),
    }
    return {
        "false_edges": len(added),
        "true_edges": len(used),
        "unexplained_walks": unexplained,
        "reconstruction": {"places": city.places.tolist()} | edges,
    }


def _explain(
    here: int, end: int, headings: list[int], known: Streets, gaps: np.ndarray
) -> tuple[set[tuple[int, int]], Streets] | None:
    """The streets that a walk passes, and those of them that are new; None where it cannot be explained."""
    passed: set[tuple[int, int]] = set()
    new: Streets = {}
    for place, heading in enumerate(headings):
        left = headings[place + 1 :]
        streets = known | new
        if (here, heading) not in streets:
            near = [int(other) for other in np.flatnonzero(gaps[here] <= RADIUS) if other != here]
            if not left:
                near = [other for other in near if other == end]
            if not near:
                return None
            new[here, heading] = max(near, key=lambda other: _reach(other, end, left, streets))
        passed.add((here, heading))
        here = (known | new)[here, heading]
    return (passed, new) if here == end else None


def _reach(here: int, end: int, headings: list[int], streets: Streets) -> float:
    """How many of the headings known streets follow from here; more than all where they lead to the end."""
    for done, heading in enumerate(headings):
        if (here, heading) not in streets:
            return done
        here = streets[here, heading]
    return len(headings) + (1 if here == end else -0.5)


def draw(found: dict[str, Any], false_edges: int, true_edges: int) -> Figure:
    """Crossings and streets; false ones in red."""
    figure = Figure(figsize=(7.2, 7.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    places = np.array(found["places"])
    for kind, colour, width in (("true", GREY, 0.8), ("false", FALSE, 1.0)):
        for a, b in found[kind]:
            axes.annotate(
                "",
                places[b],
                places[a],
                arrowprops={"arrowstyle": "->", "color": colour, "lw": width, "shrinkA": 1, "shrinkB": 1},
            )
    axes.scatter(places[:, 0], places[:, 1], s=4, color=INK, zorder=3)
    title = f"The city in the model's walks: {true_edges:,} true streets, {false_edges:,} false ones in red"
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return figure
