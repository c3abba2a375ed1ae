"""Outputs of hidden Markov models, with the exact posterior over hidden states known at every position.

    process=mess3           3 states, 3 symbols (arXiv 2405.15943); mess3_a and mess3_x are its α and x
    process=random          `states` states, `symbols` symbols, drawn by the seed; not unifilar: a state and a symbol
                            leave several successors possible
    process=city            a walker on a `width` × `width` grid who turns at random; one sees the direction of each
                            step, with probability `noise` another one
    length=64               symbols of a sample

A model is T[o, s, s'] = p(next state s', symbol o | state s). From a belief b over states, after symbol o the belief is
b T[o] / (b T[o] 1); the first belief is the stationary distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.tasks.base import EOS, Samples, Task, Vocabulary, equal_samples
from data_pipeline.tasks.randomness import random_bits, unit

MODEL, SYMBOLS = 1, 2  # purposes of random bits


@dataclass(frozen=True, kw_only=True)
class Belief(Task):
    """See the module."""

    name: ClassVar[str] = "belief"
    process: Literal["mess3", "random", "city"] = "mess3"
    length: int = 64
    mess3_a: float = 0.85
    mess3_x: float = 0.05
    states: int = 8
    symbols: int = 4
    width: int = 4
    noise: float = 0.2

    def check(self) -> None:
        """Raise UserError for numbers that make no process."""
        numbers = {"length": self.length, "states": self.states, "symbols": self.symbols, "width": self.width - 1}
        for name, value in numbers.items():
            if value < 1:
                raise UserError(
                    f"task belief: {name}={getattr(self, name)}: give {2 if name == 'width' else 1} or more"
                )
        if not (0 < self.mess3_a < 1 and 0 < self.mess3_x < 0.5 and 0 <= self.noise < 1):
            raise UserError("task belief: give mess3_a between 0 and 1, mess3_x between 0 and 0.5, noise below 1")

    @property
    def document_length(self) -> int:
        """EOS and the symbols."""
        return 1 + self.length

    @cached_property
    def transitions(self) -> NDArray[np.float64]:
        """(O, S, S): T[o, s, s'], the probability of next state s' and symbol o, given state s."""
        if self.process == "mess3":
            return mess3(self.mess3_a, self.mess3_x)
        if self.process == "city":
            return noisy_city(self.width, self.noise)
        return random_process(self.seed, self.states, self.symbols)

    @cached_property
    def stationary(self) -> NDArray[np.float64]:
        """(S,): the states' distribution that a step leaves as it is."""
        step = self.transitions.sum(0)
        size = len(step)
        equations = np.concatenate([step.T - np.eye(size), np.ones((1, size))])
        found = np.linalg.lstsq(equations, np.append(np.zeros(size), 1.0), rcond=None)[0]
        return np.asarray(found / found.sum())

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The symbols a, b, c, … or compass directions, and EOS."""
        if self.process == "city":
            return Vocabulary(("N", "E", "S", "W", EOS))
        return Vocabulary((*(letters(number) for number in range(len(self.transitions))), EOS))

    def generate(self, numbers: NDArray[np.int64]) -> Samples:
        """Symbols of N walks through the states."""
        drawn = unit(random_bits(self.seed, numbers, self.length + 1, SYMBOLS))
        symbols, states = self.transitions.shape[:2]
        # Each state's joint distribution of (symbol, next state), added up, so that one uniform number draws both.
        joint = np.cumsum(self.transitions.transpose(1, 0, 2).reshape(states, -1), 1)
        joint /= joint[:, -1:]
        start = np.cumsum(self.stationary)
        state = np.minimum(np.searchsorted(start / start[-1], drawn[:, 0], side="right"), states - 1)
        tokens = np.empty((len(numbers), self.length), np.int64)
        for t in range(self.length):
            place = (joint[state] <= drawn[:, t + 1, None]).sum(1)
            tokens[:, t], state = np.divmod(np.minimum(place, symbols * states - 1), states)
        return equal_samples(tokens, self.vocabulary.eos_id, 0)

    def posteriors(self, symbols_NL: NDArray[np.int64]) -> NDArray[np.float64]:
        """(N, L + 1, S): the exact distribution over states after the first 0 … L symbols."""
        beliefs = np.empty((*(len(symbols_NL), symbols_NL.shape[1] + 1), len(self.stationary)))
        beliefs[:, 0] = self.stationary
        for t in range(symbols_NL.shape[1]):
            joint = np.einsum("ns,nsr->nr", beliefs[:, t], self.transitions[symbols_NL[:, t]])
            beliefs[:, t + 1] = joint / joint.sum(1, keepdims=True)
        return beliefs

    def entropy(self, beliefs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Nats of the next symbol's distribution, given each belief (…, S): the least loss there can be."""
        chances = np.einsum("...s,osr->...o", beliefs, self.transitions)
        return np.asarray(-(chances * np.log(np.maximum(chances, 1e-300))).sum(-1))


def mess3(a: float, x: float) -> NDArray[np.float64]:
    """T of Mess3: T[o, s, s'] with b = (1 − a) / 2, y = 1 − 2x; its own symbol is a's, its own state stays with y."""
    emits = np.full((3, 3), (1 - a) / 2) + np.eye(3) * (a - (1 - a) / 2)  # [symbol, next state]
    moves = np.full((3, 3), x) + np.eye(3) * (1 - 3 * x)  # [state, next state]
    return np.asarray(emits[:, None, :] * moves[None])


def random_process(seed: int, states: int, symbols: int) -> NDArray[np.float64]:
    """T[o, s, s'] with, for each s, about a third of the (o, s') pairs possible, at random odds."""
    bits = unit(random_bits(seed, np.arange(states), 2 * symbols * states, MODEL))
    odds, chosen = bits[:, : symbols * states], bits[:, symbols * states :]
    # −log u is exponential: normalised, uniform over the simplex. A cycle keeps every state within reach.
    weights = np.where(chosen < 1 / 3, -np.log(np.maximum(odds, 1e-12)), 0.0).reshape(states, symbols, states)
    for state in range(states):
        weights[state, state % symbols, (state + 1) % states] += 0.5
    weights /= weights.sum((1, 2), keepdims=True)
    return np.asarray(weights.transpose(1, 0, 2))


def noisy_city(width: int, noise: float) -> NDArray[np.float64]:
    """T of a walk over a grid: each step to one of the neighbours, at equal odds, its heading seen with noise."""
    headings = ((0, 1), (1, 0), (0, -1), (-1, 0))
    T = np.zeros((4, width * width, width * width))
    for x in range(width):
        for y in range(width):
            ways = [(o, x + dx, y + dy) for o, (dx, dy) in enumerate(headings)]
            ways = [way for way in ways if 0 <= way[1] < width and 0 <= way[2] < width]
            for heading, to_x, to_y in ways:
                for seen in range(4):
                    chance = 1 - noise if seen == heading else noise / 3
                    T[seen, x * width + y, to_x * width + to_y] += chance / len(ways)
    return T


def letters(number: int) -> str:
    """Name a number: a, b, …, z, aa, ab, … for 0, 1, …."""
    text = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        text = chr(ord("a") + digit) + text
    return text
