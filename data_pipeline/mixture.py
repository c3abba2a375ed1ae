"""Mixtures of sources as pure arithmetic: place n of a run → a source, and a place in that source's own order.

Up to any place, each source has had its share to within a few samples: shares are rounded, not drawn. Sources are
the leaves of a balanced tree; each node divides its places between its halves like Bresenham's line, in exact
integers. A place is found in O(log sources), wherever it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError

# Weights are integers out of this many; also the number of samples after which an endless phase repeats itself.
WHOLE = 1 << 40
# Samples of a phase, so that its arithmetic is exact in 64 bits.
MOST = 1 << 50


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with one set of weights. samples: its length, or None without an end."""

    weights: tuple[float, ...]
    samples: int | None = None


@dataclass(frozen=True)
class Mixture:
    """Phases one after another, the last without an end. Make it with by_weights, by_epochs or by_phases."""

    phases: tuple[Phase, ...]

    @property
    def sources(self) -> int:
        """How many sources there are."""
        return len(self.phases[0].weights)

    def locate(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each place (N,) and how many samples of that source come before it: int64, (N,) each."""
        starts, bases, parts = self._plan
        phases = np.searchsorted(starts, places, side="right") - 1
        source, index = np.empty_like(places), np.empty_like(places)
        for phase in np.unique(phases).tolist():
            here = phases == phase
            source[here], index[here] = _divide(places[here] - starts[phase], parts[phase])
            index[here] += bases[phase][source[here]]
        return source, index

    def counts(self, place: int) -> NDArray[np.int64]:
        """Samples of each source among places 0 … place − 1: (sources,) int64."""
        starts, bases, parts = self._plan
        phase = int(np.searchsorted(starts, place, side="right")) - 1
        return bases[phase] + _prefix(place - int(starts[phase]), parts[phase])

    @cached_property
    def _plan(self) -> tuple[NDArray[np.int64], list[NDArray[np.int64]], list[NDArray[np.int64]]]:
        """Of each phase: where it starts, each source's samples before it, and its integer parts."""
        starts, bases, parts = [0], [np.zeros(self.sources, np.int64)], []
        exact = np.zeros(self.sources)  # what each source should have had before the phase
        for phase in self.phases:
            weights = normalised(phase.weights)
            if phase.samples is None:
                parts.append(largest_remainder(weights * WHOLE, WHOLE))
                break
            exact += weights * phase.samples
            wanted = np.where(weights > 0, exact - bases[-1], 0)
            parts.append(largest_remainder(wanted, phase.samples))
            starts.append(starts[-1] + phase.samples)
            bases.append(bases[-1] + parts[-1])
        return np.array(starts), bases, parts


def by_weights(weights: Sequence[float]) -> Mixture:
    """One set of weights for the whole run. Raises UserError unless they are numbers ≥ 0, one of them above."""
    return by_phases([Phase(tuple(weights))])


def by_epochs(epochs: Sequence[float], samples: Sequence[int]) -> Mixture:
    """Each source as many times as `epochs` says, of so many samples each, spread evenly; then again."""
    if len(epochs) != len(samples) or not all(number >= 0 for number in epochs):
        raise UserError(f"epochs {list(epochs)}: give a number of 0 or more for each source")
    parts = tuple(round(number * size) for number, size in zip(epochs, samples, strict=True))
    if not sum(parts):
        raise UserError(f"epochs {list(epochs)}: less than one sample together: give more")
    return by_phases([Phase(tuple(float(part) for part in parts), sum(parts))] * 2)


def by_phases(phases: Sequence[Phase]) -> Mixture:
    """Phases one after another; the last goes on without an end. Raises UserError for weights that are none."""
    for phase in phases:
        if len(phase.weights) != len(phases[0].weights):
            raise UserError(f"weights {list(phase.weights)}: every phase must name every source")
        if not all(0 <= weight < float("inf") for weight in phase.weights) or not max(phase.weights, default=0) > 0:
            raise UserError(f"weights {list(phase.weights)}: give numbers of 0 or more, at least one above 0")
        if phase.samples is not None and not 1 <= phase.samples < MOST:
            raise UserError(f"a stretch of {phase.samples:,} samples: give 1 or more, and fewer than {MOST:,}")
    if not phases or any(phase.samples is None for phase in phases[:-1]):
        raise UserError("a schedule of weights needs a length for every phase but the last")
    return Mixture((*phases[:-1], Phase(phases[-1].weights)))


def anneal(start: Sequence[float], end: Sequence[float], samples: int, steps: int = 64) -> list[Phase]:
    """Weights that move from `start` to `end` over so many samples, in `steps` equal phases."""
    a, b = normalised(start), normalised(end)
    borders = [samples * step // steps for step in range(steps + 1)]
    middles = [(step + 0.5) / steps for step in range(steps)]
    phases = zip(middles, np.diff(borders).tolist(), strict=True)
    return [Phase(tuple((a + (b - a) * middle).tolist()), length) for middle, length in phases if length]


def normalised(weights: Sequence[float]) -> NDArray[np.float64]:
    """Weights that add up to 1, also where their sum is beyond floating point: (sources,)."""
    scaled = np.array(weights, np.float64) / max(weights)
    return np.asarray(scaled / scaled.sum())


def largest_remainder(shares: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Integers ≥ 0 that add up to `total` and differ from the shares by less than one where that can be.

    shares: (K,) that add up to about `total`; one that is 0 or less gets nothing.
    """
    whole = np.floor(np.maximum(shares, 0)).astype(np.int64)
    rest = np.where(shares > 0, shares - whole, -1.0)
    missing = total - int(whole.sum())
    while missing > 0:
        most = np.argsort(-rest, kind="stable")[: min(missing, max(1, int((shares > 0).sum())))]
        whole[most] += 1
        missing -= len(most)
    for _ in range(-missing):
        whole[int(np.argmax(whole - shares))] -= 1
    return whole


def share(n: NDArray[np.int64], part: int, whole: int) -> NDArray[np.int64]:
    """Round n · part / whole exactly, halves up: (N,) int64. 0 ≤ part ≤ whole < 2**50, n < 2**62.

    The product does not fit 64 bits. A quotient in floating point is off by one at most, and its remainder, which
    is small, comes out right modulo 2**64.
    """
    turns, rest = np.divmod(n, whole)
    guess = np.floor(rest.astype(np.float64) * part / whole + 0.5).astype(np.int64)
    product = 2 * (rest.astype(np.uint64) * np.uint64(part) - guess.astype(np.uint64) * np.uint64(whole))
    remainder = product.astype(np.int64) + whole
    return turns * part + guess + remainder // (2 * whole)


def _divide(places: NDArray[np.int64], parts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Source and index of each place, of a phase that gives its sources the places of `parts`."""
    if len(parts) == 1:
        return np.zeros_like(places), places
    half = len(parts) // 2
    part, whole = int(parts[:half].sum()), int(parts.sum())
    if whole == 0:
        return np.zeros_like(places), places
    before = share(places, part, whole)
    left = share(places + 1, part, whole) > before
    source, index = np.empty_like(places), np.empty_like(places)
    source[left], index[left] = _divide(before[left], parts[:half])
    source[~left], index[~left] = _divide((places - before)[~left], parts[half:])
    source[~left] += half
    return source, index


def _prefix(place: int, parts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Samples of each source among the first `place` of a phase."""
    if len(parts) == 1:
        return np.array([place], np.int64)
    half = len(parts) // 2
    whole = int(parts.sum())
    before = int(share(np.array([place]), int(parts[:half].sum()), whole)[0]) if whole else 0
    return np.concatenate([_prefix(before, parts[:half]), _prefix(place - before, parts[half:])])
