"""Finding the way through a city: given an origin and a destination, write down the turns.

    origin destination N NE E … W            the EOS that opens the next document is the end of the walk

    width=24 height=24      crossings of the grid; those that cannot be reached from everywhere else are left out
    walks=random            a walk that turns at random for shortest … longest steps, its end taken as the destination;
                            or `shortest`: the shortest way to a random destination (the first in the order of turns)
    longest=62              most turns of a walk: with the two crossings and EOS, 65 tokens
    map_seed=0              draws the city
    map=FILE walks_file=FILE    in place of all that, a city and walks as Vafa et al. (arXiv 2406.03689) released them

Streets are one-way, alternating at random; some are two-way; diagonal avenues cut through; some blocks are closed; some
crossings are dead ends, joined to the rest by one two-way street. A tenth of the pairs of origin and destination,
chosen by the map's seed, is kept for split=test.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.tasks.base import EOS, Samples, Task, Vocabulary
from data_pipeline.tasks.city_map import HEADINGS, CityMap, read_map, read_walks, synthetic_city
from data_pipeline.tasks.randomness import below, random_bits, unit

HELD_OUT = 0.1
PAIRS, START, TURNS = 1, 2, 1000  # purposes of random bits; TURNS + k for the k-th attempt at a sample


@dataclass(frozen=True, kw_only=True)
class City(Task):
    """See the module."""

    name: ClassVar[str] = "city"
    width: int = 24
    height: int = 24
    map_seed: int = 0
    walks: Literal["random", "shortest"] = "random"
    shortest: int = 2
    longest: int = 62
    map: str = ""
    walks_file: str = ""

    def check(self) -> None:
        """Raise UserError for lengths that do not fit, or half of the original files."""
        if bool(self.map) != bool(self.walks_file):
            raise UserError("task city: map and walks_file belong together: give both files, or neither")
        if not 1 <= self.shortest <= self.longest:
            raise UserError(f"task city: shortest={self.shortest}, longest={self.longest}: give 1 ≤ shortest ≤ longest")
        if self.width < 3 or self.height < 3:
            raise UserError(f"task city: width={self.width}, height={self.height}: give 3 or more of each")
        if self.map and self.count > len(self.recorded):
            raise UserError(
                f"task city: {self.walks_file} has {len(self.recorded):,} walks: give samples of that at most"
            )

    @cached_property
    def city(self) -> CityMap:
        """The map."""
        return read_map(self.map) if self.map else synthetic_city(self.width, self.height, self.map_seed)

    @cached_property
    def recorded(self) -> list[list[int]]:
        """The walks of the file, in tokens."""
        return read_walks(self.walks_file, self.city, self.vocabulary.ids)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Crossings by their names, then the eight headings, and EOS."""
        return Vocabulary((*self.city.names, *HEADINGS, EOS))

    def is_held_out(self, origins: NDArray[np.int64], destinations: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each pair is kept for the test split."""
        pairs = np.asarray(origins) * len(self.city.names) + destinations
        return np.asarray(unit(random_bits(self.map_seed, pairs, 1, PAIRS))[:, 0] < HELD_OUT)

    def generate(self, numbers: NDArray[np.int64]) -> Samples:
        """Walks whose pairs belong to the split: drawn again and again until they do."""
        if self.map:
            return self._laid_out([self.recorded[number] for number in (numbers % (1 << 40)).tolist()])
        found: list[list[int]] = [[] for _ in numbers]
        open_, attempt = np.arange(len(numbers)), 0
        while len(open_):
            origins, ends, turns, lengths = self._attempt(numbers[open_], attempt)
            good = (self.is_held_out(origins, ends) == (self.split == "test")) & (origins != ends) & (lengths > 0)
            for row in np.flatnonzero(good).tolist():
                heading = (turns[row, : lengths[row]] + len(self.city.names)).tolist()
                found[open_[row]] = [int(origins[row]), int(ends[row]), *heading]
            open_, attempt = open_[~good], attempt + 1
        return self._laid_out(found)

    def _attempt(
        self, numbers: NDArray[np.int64], attempt: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Origins (N,), destinations (N,), headings (N, longest), and how many of them count (N,); 0: no such walk."""
        city, bits = self.city, random_bits(self.seed, numbers, self.longest + 2, TURNS + attempt)
        place = origins = below(bits[:, 0], len(city.names))
        lengths = self.shortest + below(bits[:, 1], self.longest - self.shortest + 1)
        turns = np.zeros((len(numbers), self.longest), np.int64)
        if self.walks == "shortest":
            ends = below(bits[:, 1], len(city.names))
            distance = city.distances[origins, ends]
            for t in range(self.longest):
                turns[:, t] = city.first_steps[place, ends]
                place = np.where(place == ends, place, city.neighbours[place, turns[:, t]])
            fits = (self.shortest <= distance) & (distance <= self.longest)
            return origins, ends, turns, np.where(fits, distance, 0)
        for t in range(self.longest):
            choice = below(bits[:, t + 2], city.degrees[place])
            turns[:, t] = city.ways[place, choice]
            place = np.where(t < lengths, city.neighbours[place, turns[:, t]], place)
        return origins, place, turns, lengths

    def _laid_out(self, walks: list[list[int]]) -> Samples:
        eos = self.vocabulary.eos_id
        lengths = np.array([len(walk) + 1 for walk in walks])
        tokens = np.array([token for walk in walks for token in (eos, *walk)], np.int64)
        return Samples(tokens, np.cumsum(lengths) - lengths, np.full(len(walks), 2))

    def is_valid(self, tokens: list[int]) -> bool:
        """Whether origin, destination and turns are a legal walk that ends at its destination.

        tokens: without EOS at either end. A walk that was cut off before its EOS is judged as if it ended there, so the
        caller must not pass it.
        """
        place = self.walk(tokens)
        return place is not None and place == tokens[1]

    def walk(self, tokens: list[int]) -> int | None:
        """The crossing where a walk ends; None where a turn is illegal, or a token no turn."""
        crossings = len(self.city.names)
        if len(tokens) < 2 or max(tokens[:2]) >= crossings:
            return None
        place = tokens[0]
        for token in tokens[2:]:
            if not crossings <= token < crossings + len(HEADINGS):
                return None
            place = int(self.city.neighbours[place, token - crossings])
            if place < 0:
                return None
        return place
