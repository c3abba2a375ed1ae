"""What drafts are worth to a whole batch: it goes on for its slowest text."""

from __future__ import annotations

import math


class Stragglers:
    """How much fewer tokens drafts give a batch, in the end, than its texts together promise while all are there.

    Plainly decoded, texts of the same length end together. Drafts stand more often in some than in others, and the last
    text goes on when the others have left: of a cycle's time the share c that fewer texts would take too is for it
    alone. With ā drafts that stand in a text's mean cycle and ǎ in one of the last text's, a cycle is worth

        1 / ((1 − c) / (1 + ā) + c / (1 + ǎ))

    tokens of each text. Which text is the last shows late (`TextWorth`), so what this is beside the tokens that were
    expected is learned from batches that are over, for each size of them.
    """

    FADING = 0.7  # of what was learned, with each batch that drafted throughout
    FORGOTTEN = 0.97  # of it, in logarithms, with each that did not draft: drafts are given another chance some time
    ENOUGH = 8  # cycles with drafts of all texts, to learn from a batch
    LEAST, MOST = 0.05, 2.0  # of what one batch may tell

    def __init__(self) -> None:
        self._learned: dict[int, tuple[float, float]] = {}  # by size: logarithm, and what that is worth, in batches
        self.begin(1, 0, 0, 0.0)

    def begin(self, texts: int, room: int, cycles: int, shared: float) -> None:
        """Other texts, which may have so many tokens each, after so many cycles. `shared`: c of as many."""
        self._texts, self._room, self._began, self._shared = texts, room, cycles, shared
        # Of cycles with drafts: how many, of how many texts in all, and drafts that stood.
        self._drafting = self._rows = self._stood = 0
        self._full, self._expected = 0, 0.0  # those of all texts, and drafts of a text expected to stand in them

    def count(self, accepted: list[list[int]], expected: float) -> None:
        """Cycles of as many texts, with as many drafts, of which `expected` of each text were to stand."""
        cycles, texts = len(accepted), len(accepted[0])
        self._drafting += cycles
        self._rows += cycles * texts
        self._stood += sum(map(sum, accepted))
        if texts == self._texts:
            self._full += cycles
            self._expected += cycles * expected

    def end(self, left: int, cycles: int) -> None:
        """The batch is over: its last text, when its last cycle began, had so many tokens to come."""
        if self._texts == 1 or not self._room:
            return
        size = self._size(self._texts)
        learned, worth = self._learned.get(size, (0.0, 0.0))
        if self._full < self.ENOUGH or not self._stood:
            self._learned[size] = self.FORGOTTEN * learned, worth
            return
        before_last = cycles - self._began - 1
        last = max(self._room - left - before_last, 0) / self._drafting
        mean = self._stood / self._rows
        achieved = 1.0 / ((1.0 - self._shared) / (1.0 + mean) + self._shared / (1.0 + last)) - 1.0
        share = min(max(achieved * self._full / self._expected, self.LEAST), self.MOST)
        drafted = self._drafting / (before_last + 1)
        worth *= self.FADING**drafted
        self._learned[size] = (worth * learned + drafted * math.log(share)) / (worth + drafted), worth + drafted

    def share(self, left: int) -> float:
        """Of the drafts that stand from now on, by what they will have been worth: 1 where nothing is lost.

        The more of the texts was drafted, the better it is known which of them lag. `left`: tokens to come.
        """
        if self._texts == 1:
            return 1.0
        learned, _ = self._learned.get(self._size(self._texts), (0.0, 0.0))
        made = self._drafting * (1.0 + self._stood / max(self._rows, 1))  # while it drafted
        return min(math.exp(learned * left / max(left + made, 1.0)), 1.0)

    def _size(self, texts: int) -> int:
        return round(math.log2(texts))
