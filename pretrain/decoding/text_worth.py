"""What a token of each text of a batch is worth: a batch goes on for its last text."""

from __future__ import annotations

import math


class TextWorth:
    """By the tokens that texts have to come, and how many they make in a cycle.

    With n_i tokens to come and ρ_i a cycle, a batch takes Σ n_i / ρ_i cycles of one text, and goes on for max n_i / ρ_i
    cycles. So where a share c of a cycle's time would be the same for fewer texts, a token of text i saves, but for a
    factor, (1 − c + c · B · σ_i) / ρ_i; σ_i is the chance that i is the last.
    """

    RATED = 4.0  # cycles of a text that the mean of all is worth
    SPREAD = 0.7  # standard deviation of the cycles that a text takes more than another, over the root of theirs

    def __init__(self) -> None:
        self.shared = 0.5  # c
        self._room, self._began = 0, 0  # tokens that each text of this batch may have, and the cycle when it began

    def begin(self, left: list[int], cycles: int) -> None:
        """Other texts, after so many cycles."""
        self._room, self._began = max(left), cycles

    def of_each(self, left: list[int], cycles: int) -> list[float]:
        """Of each text's tokens, so that a cycle's are worth their number in all. `left`: tokens to come."""
        if len(left) == 1:
            return [1.0]
        cycles -= self._began
        made = [self._room - n for n in left]
        expected = self.RATED * (sum(made) / (len(left) * max(cycles, 1)) or 1.0)
        rates = [(m + expected) / (cycles + self.RATED) for m in made]
        to_come = [n / rate for n, rate in zip(left, rates, strict=True)]
        last = max(to_come)
        spread = self.SPREAD * math.sqrt(last) or 1.0
        late = [math.exp((n - last) / spread) for n in to_come]
        per_cycle, share = sum(rates) / len(left), self.shared * len(left) / sum(late)
        return [
            per_cycle / rate * (1.0 - self.shared + share * each) if n else 0.0
            for n, rate, each in zip(left, rates, late, strict=True)
        ]
