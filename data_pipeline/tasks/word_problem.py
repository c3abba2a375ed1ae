"""The word problem of a permutation group: after each element, say the product of all so far.

    group=A5        A, S or C and a number: alternating, symmetric or cyclic group of so many points
    generators=K    words over K fixed elements that generate the group, chosen by the seed; 0: over the whole group
    letters=A+B     words over these elements, in cycle notation as in (012)+(01)(23), in place of chosen ones
    length=12       elements of a word

Tokens are the group's elements and EOS. Each token is answered with the element that is the product so far, and not
with the next token: the EOS that opens a word with the identity, the t-th element with x_1 · x_2 · … · x_t, where
(p · q)(i) = p(q(i)). The opening EOS also lets a trunk with rotary positions tell the constant words a, aa, aaa apart,
which without it have identical states.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations as all_permutations
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.tasks.base import EOS, Samples, Task, Vocabulary, equal_samples
from data_pipeline.tasks.randomness import below, permutations, random_bits

LARGEST_POINTS = 6
GENERATORS, WORDS = 1, 2  # purposes of random bits


@dataclass(frozen=True, kw_only=True)
class WordProblem(Task):
    """See the module."""

    name: ClassVar[str] = "word_problem"
    group: str = "A5"
    generators: int = 0
    letters: str = ""
    length: int = 12

    def check(self) -> None:
        """Raise UserError for an unknown group, or generators that are unknown, too few or too many."""
        if not re.fullmatch(r"[ASC][1-9]\d?", self.group) or not 2 <= self.points <= LARGEST_POINTS:
            raise UserError(f"task word_problem: group={self.group}: give A, S or C and 2 to {LARGEST_POINTS}, like A5")
        if self.length < 1:
            raise UserError(f"task word_problem: length={self.length}: give 1 or more")
        if not 0 <= self.generators <= len(self.elements):
            raise UserError(
                f"task word_problem: generators={self.generators}: {self.group} has {len(self.elements)} elements; "
                "give as many at most, or 0 for words over all of them"
            )
        _ = self.alphabet

    @property
    def points(self) -> int:
        """How many points the group permutes."""
        return int(self.group[1:])

    @cached_property
    def elements(self) -> NDArray[np.int64]:
        """(G, points): the group's permutations in lexicographic order; the identity is the first."""
        points = range(self.points)
        if self.group[0] == "C":
            return np.array([[(i + k) % self.points for i in points] for k in points])
        every = list(all_permutations(points))
        return np.array([p for p in every if self.group[0] == "S" or is_even(p)])

    @cached_property
    def products(self) -> NDArray[np.int64]:
        """(G, G): entry [a, b] is the number of a · b."""
        composed = self.elements[:, self.elements]  # [a, b, i] = a(b(i))
        weights = self.points ** np.arange(self.points)[::-1]
        numbers = self.elements @ weights
        order = np.argsort(numbers)
        return np.asarray(order[np.searchsorted(numbers, composed @ weights, sorter=order)])

    @cached_property
    def alphabet(self) -> NDArray[np.int64]:
        """(K,): the elements that words are made of, sorted."""
        size = len(self.elements)
        if self.letters:
            return self._named(self.letters.split("+"))
        if not self.generators:
            return np.arange(size)
        tries = permutations(random_bits(self.seed, np.arange(100), size, GENERATORS))[:, : self.generators]
        for chosen in np.sort(tries, 1):
            if len(generated(chosen, self.products)) == size:
                return np.asarray(chosen)
        raise UserError(
            f"task word_problem: no {self.generators} elements that generate {self.group} were found; give more "
            "generators"
        )

    def _named(self, letters: list[str]) -> NDArray[np.int64]:
        """The elements of these names, sorted; UserError unless they are different ones and generate the group."""
        names = self.vocabulary.names[:-1]
        unknown = [letter for letter in letters if letter not in names]
        chosen = np.array(sorted({names.index(letter) for letter in letters if letter in names}), np.int64)
        if unknown:
            problem = f"{unknown[0]} is not an element of {self.group}; names are like {names[1]}, smallest point first"
        elif self.generators:
            problem = f"generators={self.generators} chooses them; leave one of the two out"
        elif len(chosen) < len(letters):
            problem = "one is named twice"
        elif len(generated(chosen, self.products)) < len(names):
            problem = f"they do not generate {self.group}"
        else:
            return chosen
        raise UserError(f"task word_problem: letters={self.letters}: {problem}")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The elements in cycle notation, and EOS."""
        return Vocabulary((*(cycles(p) for p in self.elements.tolist()), EOS))

    @property
    def document_length(self) -> int:
        """EOS and the word."""
        return self.length + 1

    def generate(self, numbers: NDArray[np.int64]) -> Samples:
        """Uniform words and their products so far."""
        words_NL = self.alphabet[below(random_bits(self.seed, numbers, self.length, WORDS), len(self.alphabet))]
        return equal_samples(words_NL, self.vocabulary.eos_id, 0, self.running_products(words_NL))

    def running_products(self, words_NL: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N, L + 1): the product of the first 0 … L elements of each word."""
        products = np.zeros((len(words_NL), words_NL.shape[1] + 1), np.int64)
        for t in range(words_NL.shape[1]):
            products[:, t + 1] = self.products[products[:, t], words_NL[:, t]]
        return products

    def as_text(self, tokens: Iterable[int]) -> str:
        """A word, without its EOS, with the product so far after each element: `(012)=(012) (01)(23)=(023) …`."""
        word = np.asarray(list(tokens), np.int64)[None]
        pairs = zip(word[0], self.running_products(word)[0, 1:], strict=True)
        return " ".join(f"{self.vocabulary.names[x]}={self.vocabulary.names[y]}" for x, y in pairs)


def correct_positions(answers_NT: NDArray[np.int64], labels_NT: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(2, N, T): is the answer at position t right; and are all the answers up to t."""
    right = answers_NT == labels_NT
    return np.stack([right, np.logical_and.accumulate(right, 1)])


def is_even(permutation: Iterable[int]) -> bool:
    """Whether a permutation has an even number of inversions."""
    p = list(permutation)
    return sum(p[i] > p[j] for i in range(len(p)) for j in range(i + 1, len(p))) % 2 == 0


def generated(elements: NDArray[np.int64], products: NDArray[np.int64]) -> set[int]:
    """The subgroup that elements generate; in a finite group their products do."""
    found, new = {0}, [0]
    while new:
        reached = {int(products[a, b]) for a in new for b in elements}
        new = sorted(reached - found)
        found |= reached
    return found


def cycles(permutation: list[int]) -> str:
    """Cycle notation, fixed points left out, such as (02)(134); e is the identity."""
    text, seen = "", set()
    for start in range(len(permutation)):
        cycle = []
        while start not in seen:
            seen.add(start)
            cycle.append(start)
            start = permutation[start]
        if len(cycle) > 1:
            text += f"({''.join(map(str, cycle))})"
    return text or "e"
