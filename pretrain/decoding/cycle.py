"""What there is to learn from a cycle of drafts and their verification, or from several that were not judged."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Cycle:
    """One cycle. Lists are by text, or by position and then by text."""

    accepted: list[int]
    drafted: list[int]
    steps: int
    draft_seconds: float
    rest: float
    """Seconds of all else: the verification, and what was done between the cycles."""
    longest: int
    """Tokens of the longest text when it began."""
    judged: bool
    """Drafted on while it paid."""
    coasted: bool
    worth: list[float]
    """Of each text's tokens."""
    tokens: list[list[int]]
    """Drafted after."""
    bins: list[list[int]]
    """Of the drafts' confidence; none where it was not observed."""

    @property
    def made(self) -> int:
        """Tokens of all texts."""
        return len(self.accepted) + sum(self.accepted)

    @property
    def value(self) -> float:
        """The same, by what they are worth."""
        return value_of(self.accepted, self.worth)

    @property
    def seconds(self) -> float:
        """All of its time."""
        return self.draft_seconds + self.rest


@dataclass(slots=True)
class Cycles:
    """Cycles that were not judged, taken together: there is not the time to learn from each."""

    number: int = 0
    value: float = 0.0
    """Of their tokens."""
    seconds: float = 0.0
    draft_seconds: list[float] = field(default_factory=list)
    """By cycle."""

    def add(self, value: float, draft_seconds: float, rest: float) -> None:
        """One more."""
        self.number += 1
        self.value += value
        self.seconds += draft_seconds + rest
        self.draft_seconds.append(draft_seconds)


def value_of(accepted: list[int], worth: list[float]) -> float:
    """Of the tokens of a cycle, where `worth` tells that of each text's."""
    return sum(each * (1 + stood) for each, stood in zip(worth, accepted, strict=True))
