"""Who decides how many tokens a cycle drafts: here, a fixed number."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class DraftLength(Protocol):
    """Decides how many tokens a cycle drafts, and is told what came of it.

    The texts of a batch draft together, one step for all: a text that drafted less than its neighbours would save
    nothing.
    """

    def wants_another(self, drafted: int, tokens: list[int], left: list[int], longest: int) -> bool:
        """Draft once more, with `drafted` tokens drafted in this cycle? 0 begins a cycle.

        Of each text, its last token, and how many more it may draft: 0 where it is at its end and only goes along.
        `longest`: tokens of the longest text, its prompt included, when the cycle began.
        """

    def saw_draft(self, logits_BV: Tensor, q: Tensor) -> None:
        """Drafts were drawn from q, which is `sampling.distribution` of these logits."""

    def saw_cycle(self, accepted: list[int], drafted: list[int], draft_seconds: list[float], rest: float) -> None:
        """A cycle is over.

        Of each text, how many drafts stood of how many; the seconds of each draft step; those of the rest of the cycle,
        which verified the drafts.
        """


class FixedLength:
    """The same number of drafts in every cycle."""

    def __init__(self, length: int):
        self.length = length

    def wants_another(self, drafted: int, tokens: list[int], left: list[int], longest: int) -> bool:
        """See `DraftLength`."""
        return drafted < self.length

    def saw_draft(self, logits_BV: Tensor, q: Tensor) -> None:
        """See `DraftLength`."""

    def saw_cycle(self, accepted: list[int], drafted: list[int], draft_seconds: list[float], rest: float) -> None:
        """See `DraftLength`."""
