"""What there is to learn from a cycle of drafts and their verification, or from several that were not judged."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Cycle:
    """One cycle. Lists are by text, or by position and then by text."""

    accepted: list[int]
    drafted: list[int]
    steps: int
    first_draft_seconds: float
    """Of the first step, which takes longer than others."""
    draft_seconds: float
    """Of all."""
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
    """The cycle's first, and the drafts; without the last draft where nobody asked for one more after it."""
    bins: list[list[int]]
    """Of the drafts' confidence; none where it was not observed."""

    @property
    def made(self) -> int:
        """Tokens of all texts."""
        return len(self.accepted) + sum(self.accepted)

    @property
    def value(self) -> float:
        """The same, by what they are worth."""
        return sum(each * (1 + stood) for each, stood in zip(self.worth, self.accepted, strict=True))

    @property
    def seconds(self) -> float:
        """All of its time."""
        return self.draft_seconds + self.rest


@dataclass(slots=True)
class Cycles:
    """Cycles that were not judged, taken together: there is not the time to learn from each. Lists are by cycle."""

    accepted: list[list[int]] = field(default_factory=list)
    draft_seconds: list[list[float]] = field(default_factory=list)
    """Of each step."""
    rest: list[float] = field(default_factory=list)

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.rest)

    @property
    def seconds(self) -> float:
        """All of their time."""
        return sum(map(sum, self.draft_seconds)) + sum(self.rest)

    def add(self, accepted: list[int], draft_seconds: list[float], rest: float) -> None:
        """One more."""
        self.accepted.append(accepted)
        self.draft_seconds.append(draft_seconds)
        self.rest.append(rest)

    def value(self, worth: list[float]) -> float:
        """Of their tokens, where `worth` tells that of each text's."""
        by_text = zip(*self.accepted, strict=True)
        return sum(each * (self.number + sum(stood)) for each, stood in zip(worth, by_text, strict=True))
