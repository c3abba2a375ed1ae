"""What a generation did, counted cycle by cycle."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DecodingStatistics:
    """Counts over all texts of a generation. tokens = cycles + accepted, always; position 0 is a cycle's first."""

    cycles: int = 0
    """Target's own samples: one for each text in each forward pass (but for the last, if the text ends with it)."""
    drafted: int = 0
    """Tokens drafted by the draft model, whether or not they were compared."""
    accepted: int = 0
    """Drafts that stood."""
    alive_by_position: list[int] = field(default_factory=list)
    """In how many cycles a draft at this position was compared: it existed, and all before it stood."""
    accepted_by_position: list[int] = field(default_factory=list)
    """In how many of those it stood."""
    tokens: int = 0
    """Tokens generated."""
    prefill_seconds: float = 0.0
    """Time of the forward pass over the prompts."""
    seconds: float = 0.0
    """Time from then to the last token."""
    draft_seconds: float = 0.0
    """Of that, time in draft steps."""
    draft_steps: int = 0
    """Draft steps, each for all texts of the batch at once."""
    verify_seconds: float = 0.0
    """Of that, time in the trunk's forward passes and in comparing."""
    verifications: int = 0
    """Forward passes of the trunk after the prompts'."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated per second, the prompts' forward pass left out."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def accepted_per_cycle(self) -> float:
        """Mean number of drafts that stood in a cycle."""
        return self.accepted / self.cycles if self.cycles else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the compared drafts that stood, by position."""
        pairs = zip(self.accepted_by_position, self.alive_by_position, strict=True)
        return [accepted / alive for accepted, alive in pairs]

    def count_cycle(self, drafted: int, accepted: int) -> None:
        """Add one text's outcome of one cycle."""
        assert 0 <= accepted <= drafted, f"{accepted} accepted of {drafted} drafted"
        self.cycles += 1
        self.drafted += drafted
        self.accepted += accepted
        self.tokens += 1 + accepted
        for position in range(min(accepted + 1, drafted)):
            if position == len(self.alive_by_position):
                self.alive_by_position.append(0)
                self.accepted_by_position.append(0)
            self.alive_by_position[position] += 1
            self.accepted_by_position[position] += position < accepted

    def count_steps(self, drafts: int, draft_seconds: float, verify_seconds: float) -> None:
        """Add what one cycle of all texts took: its draft steps, and the trunk's forward pass with the comparison."""
        self.draft_steps += drafts
        self.draft_seconds += draft_seconds
        self.verifications += 1
        self.verify_seconds += verify_seconds

    def add(self, other: DecodingStatistics) -> None:
        """Add another generation's counts and times."""
        for name in self.__dataclass_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, list):
                longest = range(max(len(mine), len(theirs)))
                setattr(self, name, [sum(part[i] for part in (mine, theirs) if i < len(part)) for i in longest])
            else:
                setattr(self, name, mine + theirs)
