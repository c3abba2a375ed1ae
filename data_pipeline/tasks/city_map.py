"""Cities: crossings, and where each heading leads from them. Drawn at random, or read from the files of Vafa et al."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.tasks.randomness import below, random_bits, unit

HEADINGS = ("N", "NE", "E", "SE", "S", "SW", "W", "NW")
STEPS = np.array([(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)])
TWO_WAY, CLOSED, DEAD_END = 0.15, 0.08, 0.04  # shares of streets, blocks, and crossings
NOWHERE = -1
FAR = 1 << 30


@dataclass(frozen=True)
class CityMap:
    """Names of the V crossings; neighbours (V, 8): where each heading leads, or −1; places (V, 2): to draw them."""

    names: tuple[str, ...]
    neighbours: NDArray[np.int64]
    places: NDArray[np.float64]

    @cached_property
    def degrees(self) -> NDArray[np.int64]:
        """(V,): how many headings lead somewhere."""
        return (self.neighbours >= 0).sum(1)

    @cached_property
    def ways(self) -> NDArray[np.int64]:
        """(V, 8): the headings that lead somewhere, in their order, first."""
        return np.argsort(self.neighbours < 0, axis=1, kind="stable")

    @cached_property
    def distances(self) -> NDArray[np.int64]:
        """(V, V): turns of the shortest way from row to column, FAR where there is none."""
        reached = np.append(
            np.eye(len(self.names), dtype=np.bool_), [[False] * len(self.names)], 0
        )  # last row: NOWHERE
        distance = np.where(reached[:-1], 0, FAR)
        for length in range(1, len(self.names)):
            further = reached[self.neighbours.T].any(0)  # what some neighbour has reached
            new = further & ~reached[:-1]
            if not new.any():
                break
            distance[new] = length
            reached[:-1] |= new
        return distance

    @cached_property
    def first_steps(self) -> NDArray[np.int64]:
        """(V, V): the first heading, in their order, of a shortest way from row to column."""
        ahead = np.where(self.neighbours[:, :, None] >= 0, self.distances[self.neighbours], FAR)
        return np.asarray(ahead.argmin(1))


def synthetic_city(width: int, height: int, seed: int) -> CityMap:
    """A one-way grid with two-way streets, diagonal avenues, closed blocks and dead ends; see tasks/city.py.

    Its largest part within which every crossing can be reached from every other.
    """
    # The streets of a grid, each with a purpose of its own for its random bits.
    bits = unit(random_bits(seed, np.arange(width + height), 8))
    neighbours = np.full((width * height, len(HEADINGS)), NOWHERE)

    def open_street(x: int, y: int, heading: int, both: bool) -> None:
        to_x, to_y = x + STEPS[heading, 0], y + STEPS[heading, 1]
        if 0 <= to_x < width and 0 <= to_y < height:
            neighbours[x * height + y, heading] = to_x * height + to_y
            if both:
                neighbours[to_x * height + to_y, (heading + 4) % 8] = x * height + y

    for x in range(width):
        heading = 0 if (x + (bits[x, 0] < 0.25)) % 2 else 4
        for y in range(height):
            open_street(x, y, heading, bool(bits[x, 1] < TWO_WAY))
    for y in range(height):
        heading = 2 if (y + (bits[y, 2] < 0.25)) % 2 else 6
        for x in range(width):
            open_street(x, y, heading, bool(bits[y, 3] < TWO_WAY))
    for avenue in range(max(1, (width + height) // 12)):
        heading = (1, 5, 3, 7)[avenue % 4]
        x, y = int((0.25 + bits[avenue, 5] / 2) * width), 0 if STEPS[heading, 1] > 0 else height - 1
        while 0 <= x < width and 0 <= y < height:
            open_street(x, y, heading, bool(bits[avenue, 6] < 0.5))
            x, y = x + int(STEPS[heading, 0]), y + int(STEPS[heading, 1])
    _close_blocks(neighbours, seed)
    _make_dead_ends(neighbours, seed)
    kept = largest_connected(neighbours)
    renamed = np.append(np.full(len(neighbours), NOWHERE), NOWHERE)
    renamed[kept] = np.arange(len(kept))
    places = np.stack(np.divmod(kept, height), 1).astype(np.float64)
    return CityMap(tuple(map(str, range(len(kept)))), renamed[neighbours[kept]], places)


def _close_blocks(neighbours: NDArray[np.int64], seed: int) -> None:
    closed = unit(random_bits(seed, np.arange(len(neighbours)), len(HEADINGS), 1)) < CLOSED
    neighbours[closed] = NOWHERE


def _make_dead_ends(neighbours: NDArray[np.int64], seed: int) -> None:
    """Leave some crossings with one two-way street."""
    bits = random_bits(seed, np.arange(len(neighbours)), 2, 2)
    for crossing in np.flatnonzero(unit(bits[:, 0]) < DEAD_END).tolist():
        leads = np.flatnonzero(neighbours[crossing] >= 0)
        if len(leads):
            heading = int(leads[below(bits[crossing : crossing + 1, 1], len(leads))[0]])
            other = int(neighbours[crossing, heading])
            neighbours[neighbours == crossing] = NOWHERE
            neighbours[crossing] = NOWHERE
            neighbours[crossing, heading], neighbours[other, (heading + 4) % 8] = other, crossing


def largest_connected(neighbours: NDArray[np.int64]) -> NDArray[np.int64]:
    """The crossings of the largest part in which each can be reached from each, sorted."""
    left, best = set(range(len(neighbours))), np.empty(0, np.int64)
    edges = [(int(a), int(b)) for a, row in enumerate(neighbours) for b in row if b >= 0]
    forward: dict[int, list[int]] = {node: [] for node in left}
    backward: dict[int, list[int]] = {node: [] for node in left}
    for a, b in edges:
        forward[a].append(b)
        backward[b].append(a)
    while len(left) > len(best):
        start = min(left)
        part = _reach(start, forward) & _reach(start, backward)
        left -= part
        if len(part) > len(best):
            best = np.array(sorted(part))
    return best


def _reach(start: int, leads: Mapping[int, list[int]]) -> set[int]:
    found, new = {start}, [start]
    while new:
        node = new.pop()
        for other in leads[node]:
            if other not in found:
                found.add(other)
                new.append(other)
    return found


# ---- the original files


class _PlainUnpickler(pickle.Unpickler):
    """Builds numbers, texts, tuples and dictionaries; refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def read_map(path: str) -> CityMap:
    """The map of node_and_direction_to_neighbor.pkl: {(crossing, heading): crossing}. Raises UserError.

    Crossings are placed on a circle: the file does not say where they are.
    """
    try:
        with Path(path).open("rb") as file:
            leads = _PlainUnpickler(file).load()
        edges = {(str(a), str(heading)): str(b) for (a, heading), b in leads.items() if heading in HEADINGS}
    except OSError as error:
        raise UserError(f"task city: map={path}: cannot be read ({error.strerror}): check the path") from error
    except Exception as error:  # whatever a file that is no pickle makes the reader do
        raise UserError(
            f"task city: map={path}: not a dictionary of (crossing, heading) to crossing ({error}): give "
            "node_and_direction_to_neighbor.pkl"
        ) from error
    names = sorted({name for (a, _), b in edges.items() for name in (a, b)}, key=lambda name: (len(name), name))
    ids = {name: number for number, name in enumerate(names)}
    neighbours = np.full((len(names), len(HEADINGS)), NOWHERE)
    for (a, heading), b in edges.items():
        neighbours[ids[a], HEADINGS.index(heading)] = ids[b]
    angle = np.arange(len(names)) * 2 * np.pi / max(1, len(names))
    return CityMap(tuple(names), neighbours, np.stack([np.cos(angle), np.sin(angle)], 1))


def read_walks(path: str, city: CityMap, ids: Mapping[str, int]) -> list[list[int]]:
    """The walks of a file of `origin destination N E … end` lines, in tokens. Raises UserError for another file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task city: walks_file={path}: cannot be read ({error}): check the path") from error
    walks = []
    for number, line in enumerate(filter(None, lines), 1):
        words = line.split()
        if words[-1] != "end" or len(words) < 3 or any(word not in ids for word in words[:-1]):
            raise UserError(
                f"task city: {path}:{number}: not `origin destination turns … end` on the map: give both files of one "
                "city"
            )
        walks.append([ids[word] for word in words[:-1]])
    return walks
