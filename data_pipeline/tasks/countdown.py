"""Countdown: combine four numbers by + − · / into a target.

    a b c d target | | | | | | | | x o y = z | x o y = z | x o y = target

The first 13 tokens are given; the eight `|` are pauses to think in. Each equation takes two of the numbers that are
there and puts its result in their place. The label is the first solution of a depth-first search: pairs in the order of
their places, and for each x+y, x·y, larger−smaller, larger/smaller where that is exact; products stay below 10,000; a
result goes to the end of the numbers. Numbers are drawn from 1 … 99 again and again until the target can be reached.
Targets are 10 … 100; a tenth of them, chosen by the seed, is kept for split=test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tasks.base import EOS, Samples, Task, Vocabulary, equal_samples
from data_pipeline.tasks.randomness import below, permutations, random_bits

OPERATORS = ("+", "*", "-", "/")
LIMIT = 10_000
PAUSES, PROMPT, ANSWER = 8, 13, 17
FIRST_TARGET, LAST_TARGET, HELD_OUT = 10, 100, 0.1
NONE = -1  # the result of an operation that is not allowed
TARGETS, TARGET, NUMBERS = 1, 2, 3  # purposes of random bits
BLOCK = 512  # problems searched at a time: 1,152 ends of each fit into a core's cache


@dataclass(frozen=True, kw_only=True)
class Countdown(Task):
    """See the module."""

    name: ClassVar[str] = "countdown"

    @property
    def document_length(self) -> int:
        """EOS, what is given, the equations: 31."""
        return 1 + PROMPT + ANSWER

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Number n is token n, and then `|`, the operators, `=` and EOS."""
        return Vocabulary((*map(str, range(LIMIT)), "|", "*", "/", "+", "-", "=", EOS))

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """The targets of the split."""
        every = np.arange(FIRST_TARGET, LAST_TARGET + 1)
        shuffled = every[permutations(random_bits(self.seed, np.zeros(1, np.int64), len(every), TARGETS))[0]]
        held_out = round(len(every) * HELD_OUT)
        return np.sort(shuffled[:held_out] if self.split == "test" else shuffled[held_out:])

    def generate(self, numbers: NDArray[np.int64]) -> Samples:
        """Problems with the search's first solution."""
        targets = self.targets[below(random_bits(self.seed, numbers, 1, TARGET)[:, 0], len(self.targets))]
        given = np.zeros((len(numbers), 4), np.int64)
        ends = np.zeros(len(numbers), np.int64)
        open_, attempt = np.arange(len(numbers)), 0
        while len(open_):
            drawn = 1 + below(random_bits(self.seed, numbers[open_], 4, NUMBERS + attempt), 99)
            found = np.concatenate([first_end(a, b) for a, b in _blocks(drawn, targets[open_])])
            solved = found >= 0
            given[open_[solved]], ends[open_[solved]] = drawn[solved], found[solved]
            open_, attempt = open_[~solved], attempt + 1
        ids = self.vocabulary.ids
        pauses = np.full((len(numbers), PAUSES), ids["|"])
        tokens = np.concatenate([given, targets[:, None], pauses, self._equations(given, ends)], 1)
        return equal_samples(tokens, self.vocabulary.eos_id, PROMPT)

    def _equations(self, given_N4: NDArray[np.int64], ends_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N, 17): the equations of the ways that end at `ends`, in tokens."""
        ids = self.vocabulary.ids
        operators = np.array([ids[name] for name in OPERATORS])
        numbers, parts, rows = given_N4, [], np.arange(len(given_N4))
        for count, (pair, operator) in zip((4, 3, 2), _choices(ends_N), strict=True):
            first, second = np.array(list(combinations(range(count), 2)))[pair].T
            x, y = numbers[rows, first], numbers[rows, second]
            x, y = np.where(operator >= 2, np.maximum(x, y), x), np.where(operator >= 2, np.minimum(x, y), y)
            z = np.choose(operator, [x + y, x * y, x - y, x // np.maximum(y, 1)])
            equation = [x, operators[operator], y, np.full(len(rows), ids["="]), z]
            parts += equation if count == 2 else [*equation, np.full(len(rows), ids["|"])]
            rest = _rest(count)[pair]
            numbers = np.concatenate([np.take_along_axis(numbers, rest, 1), z[:, None]], 1)
        return np.stack(parts, 1)

    def is_solution(self, given: Sequence[int], target: int, answer: Sequence[int], lax: bool = False) -> bool:
        """Whether 17 tokens solve a problem: three well-formed, true equations over numbers that are there.

        Strictly, an equation uses up its two numbers and leaves its result, and the last result is the target. lax: as
        in the authors' released checker, numbers are a set from which nothing is taken away.
        """
        names = [self.vocabulary.names[int(token)] for token in answer]
        if len(names) != ANSWER or names[5] != "|" or names[11] != "|":
            return False
        there, result = list(map(int, given)), NONE
        for start in (0, 6, 12):
            x, operator, y, equals, z = names[start : start + 5]
            if operator not in OPERATORS or equals != "=" or not (x.isdecimal() and y.isdecimal() and z.isdecimal()):
                return False
            result = _apply(operator, int(x), int(y))
            if result != int(z) or result == NONE:
                return False
            for number in (int(x), int(y)):
                if number not in there:
                    return False
                if not lax:
                    there.remove(number)
            there.append(result)
        return result == int(target)


def _apply(operator: str, x: int, y: int) -> int:
    """x operator y, or NONE where that is no whole number of 0 or more."""
    if operator == "/":
        return x // y if y and x % y == 0 else NONE
    result = {"+": x + y, "*": x * y, "-": x - y}[operator]
    return result if result >= 0 else NONE


def first_end(given_B4: NDArray[np.int64], targets_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """(B,): the first end of the search, of 1,152 in their order, that is the target; −1 where there is none.

    All ends are computed: (pair, operator) of the first equation, of the second, of the third, from slow to fast.
    """
    numbers = given_B4.astype(np.int32)[:, None, :]
    for count in (4, 3, 2):
        pairs = np.array(list(combinations(range(count), 2)))
        rest = _rest(count)
        x, y = numbers[:, :, pairs[:, 0]], numbers[:, :, pairs[:, 1]]
        results = _results(x, y)  # (B, ways so far, pairs, operators)
        kept = np.broadcast_to(numbers[:, :, rest][:, :, :, None, :], (*results.shape, count - 2))
        numbers = np.concatenate([kept, results[..., None]], -1).reshape(len(given_B4), -1, count - 1)
    hits = numbers[:, :, 0] == targets_B[:, None]
    return np.where(hits.any(1), hits.argmax(1), NONE)


def _results(x: NDArray[np.int32], y: NDArray[np.int32]) -> NDArray[np.int32]:
    """x+y, x·y, larger−smaller, larger/smaller along a new last axis; NONE where not allowed, or made from NONE."""
    larger, smaller = np.maximum(x, y), np.minimum(x, y)
    product = x * y
    divisor = np.maximum(smaller, 1)
    quotient = larger // divisor
    exact = (smaller > 0) & (quotient * divisor == larger)
    allowed = [x + y < LIMIT, product < LIMIT, True, exact]
    results = np.stack([x + y, product, larger - smaller, quotient], -1)
    possible = (smaller >= 0)[..., None] & np.stack(np.broadcast_arrays(*allowed), -1)
    return np.where(possible, results, np.int32(NONE))


def _choices(ends: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(pair, operator) of the three equations of each end."""
    ends, choices = ends.copy(), []
    for pairs in (1, 3, 6):
        ends, operator = np.divmod(ends, 4)
        ends, pair = np.divmod(ends, pairs)
        choices.append((pair, operator))
    return choices[::-1]


def _rest(count: int) -> NDArray[np.int64]:
    """(pairs, count − 2): the places that each pair of places leaves."""
    pairs = combinations(range(count), 2)
    return np.array([[place for place in range(count) if place not in pair] for pair in pairs], np.int64)


def _blocks(given: NDArray[np.int64], targets: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    return [(given[a : a + BLOCK], targets[a : a + BLOCK]) for a in range(0, len(given), BLOCK)]
