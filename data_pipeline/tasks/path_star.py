"""Path-Star graphs G(d, ℓ): from a centre, d arms; given the graph and one arm's end, write down the way there.

    arms=5 length=5     d arms; ℓ nodes on the way, centre and goal counted
    nodes=100           numbers that nodes are given, without repeats
    separators=true     a `|` after each edge but the last

    u v | u v | … u v / centre goal = centre … goal        edges in random order; all up to `=` is given

After Bachmann and Nagarajan (arXiv 2403.06963), in the token order of the NextLat paper's Path-Star runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.tasks.base import EOS, Samples, Task, Vocabulary, equal_samples
from data_pipeline.tasks.randomness import permutations, random_bits

NODES, EDGES = 1, 2  # purposes of random bits


@dataclass(frozen=True, kw_only=True)
class PathStar(Task):
    """See the module."""

    name: ClassVar[str] = "path_star"
    arms: int = 5
    length: int = 5
    nodes: int = 100
    separators: bool = True

    def check(self) -> None:
        """Raise UserError unless the graph has an arm and an edge, and its nodes have numbers."""
        if self.arms < 1 or self.length < 2:
            raise UserError(f"task path_star: arms={self.arms}, length={self.length}: give 1 or more, and 2 or more")
        if self.nodes < self.edges + 1:
            raise UserError(f"task path_star: nodes={self.nodes}: a graph has {self.edges + 1} nodes; give that many")

    @property
    def edges(self) -> int:
        """E, edges of a graph."""
        return self.arms * (self.length - 1)

    @property
    def prompt_length(self) -> int:
        """Tokens up to `=`: 3E + 3, or 2E + 4 without separators."""
        return 3 * self.edges + 3 if self.separators else 2 * self.edges + 4

    @property
    def document_length(self) -> int:
        """EOS, the prompt, the way."""
        return 1 + self.prompt_length + self.length

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Node n is token n, and then `|`, `=`, `/`, padding (never used) and EOS."""
        return Vocabulary((*map(str, range(self.nodes)), "|", "=", "/", "<pad>", EOS))

    def generate(self, numbers: NDArray[np.int64]) -> Samples:
        """Graphs of N samples, the goal at the end of the first arm drawn."""
        count, d, steps = len(numbers), self.arms, self.length - 1
        drawn = permutations(random_bits(self.seed, numbers, self.nodes, NODES))
        centre_N1, arms_Nds = drawn[:, :1], drawn[:, 1 : 1 + d * steps].reshape(count, d, steps)
        from_centre = np.broadcast_to(centre_N1[:, :, None], (count, d, 1))
        before_Nds = np.concatenate([from_centre, arms_Nds[:, :, :-1]], 2)
        edges_NE2 = np.stack([before_Nds, arms_Nds], -1).reshape(count, self.edges, 2)
        order_NE = permutations(random_bits(self.seed, numbers, self.edges, EDGES))
        edges_NE2 = np.take_along_axis(edges_NE2, order_NE[:, :, None], 1)
        bar, equals, slash = (self._column(count, name) for name in "|=/")
        if self.separators:
            bars = np.broadcast_to(bar[:, None], (count, self.edges, 1))
            written = np.concatenate([edges_NE2, bars], 2).reshape(count, -1)[:, :-1]
        else:
            written = edges_NE2.reshape(count, -1)
        way = np.concatenate([centre_N1, arms_Nds[:, 0]], 1)
        tokens = np.concatenate([written, slash, centre_N1, way[:, -1:], equals, way], 1)
        return equal_samples(tokens, self.vocabulary.eos_id, self.prompt_length)

    def _column(self, count: int, name: str) -> NDArray[np.int64]:
        return np.full((count, 1), self.vocabulary.ids[name])

    def correct(self, answers_NL: NDArray[np.int64], ways_NL: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(N, ℓ): is each token of the answers the right one. An answer is right if all are: there is one way only.

        Token 1 is a copy of the centre, token 2 the decision; the rest follows edges.
        """
        return np.asarray(answers_NL == ways_NL)
