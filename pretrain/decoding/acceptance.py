"""How likely drafts stand, from those that were compared."""

from __future__ import annotations

import itertools
import math

from pretrain.decoding.cycle import Cycle


class Acceptance:
    """By position, by confidence, and by the token drafted after.

    Confidence is the draft distribution's largest probability, in ten bins. The deeper a draft, the less it tells: each
    depth, of two positions, has its own bins. It takes a pass over the vocabulary, and of some models it tells nothing
    that the token does not, as what follows some tokens is never foreseen: so it is asked whether it `foretells`.
    """

    FADING, FADE_EVERY = 0.96, 4  # of counts, in as many cycles of theirs: what was given up is tried again some time
    HOPE, WEIGHT = 0.8, 6.0  # acceptance before any was seen, and how many observations that is worth
    BINS, DEPTHS = 10, 4
    DEEPER = 3.0  # observations that those at the depth before are worth
    TOKEN_FADING = 0.9  # of a token's counts, with each draft made after it
    TOKEN_WEIGHT = 4.0  # of its own drafts that the acceptance of all is worth, where a token was seen before
    TOKEN_GAIN = 2.0  # times that acceptance are the most its own may be: a position where none stands is no token's
    FORETELLS = 0.02  # nats that confidence must tell of a draft, on average, more than position and token do
    FORETOLD_FADING, FORETOLD_HOPE = 0.995, 0.05  # of those nats, with each draft; what is hoped of them at first

    def __init__(self, longest: int) -> None:
        # Accepted and seen.
        self._by_position = [[0.0, 0.0] for _ in range(longest)]
        self._by_confidence = [[[0.0, 0.0] for _ in range(self.BINS)] for _ in range(self.DEPTHS)]
        self._by_depth = [[0.0, 0.0] for _ in range(self.DEPTHS)]
        self._by_token: dict[int, list[float]] = {}
        self._cycles = self._confident_cycles = 0
        self._foretold = self.FORETOLD_HOPE
        # See `estimate`.
        self.at = [self.HOPE] * longest
        self._confident = [[self.HOPE] * self.BINS] * self.DEPTHS
        self._any = [self.HOPE] * self.DEPTHS  # where confidence is not known

    @property
    def foretells(self) -> bool:
        """Does confidence tell more of a draft than its position and token do?"""
        return self._foretold > self.FORETELLS

    def bin_of(self, confidence: float) -> int:
        """0 … BINS − 1."""
        return min(int(confidence * self.BINS), self.BINS - 1)

    def count(self, cycle: Cycle) -> None:
        """What stood of a cycle's drafts."""
        self._fade(cycle)
        for text, (stood, made) in enumerate(zip(cycle.accepted, cycle.drafted, strict=True)):
            worth = cycle.worth[text]
            for position in range(min(stood + 1, made)):  # later ones were never compared
                stands = position < stood
                self._by_position[position][0] += worth * stands
                self._by_position[position][1] += worth
                if not cycle.tokens:
                    continue
                token, depth = cycle.tokens[position][text], self._depth(position)
                if cycle.bins:
                    self._count_confident(depth, token, cycle.bins[position][text], stands)
                self._by_depth[depth][0] += stands
                self._by_depth[depth][1] += 1
                counts = self._by_token.setdefault(token, [0.0, 0.0])
                counts[0] = counts[0] * self.TOKEN_FADING + stands
                counts[1] = counts[1] * self.TOKEN_FADING + 1

    def _fade(self, cycle: Cycle) -> None:
        self._cycles += 1
        fading: list[list[float]] = []
        if self._cycles % self.FADE_EVERY == 0:
            # What is not tried because the cycle coasts is not forgotten.
            fading += self._by_position[: cycle.steps] if cycle.coasted else self._by_position
            fading += self._by_depth
        if cycle.bins:
            self._confident_cycles += 1
            if self._confident_cycles % self.FADE_EVERY == 0:
                fading += itertools.chain(*self._by_confidence)
        for counts in fading:
            counts[0] *= self.FADING
            counts[1] *= self.FADING

    def _count_confident(self, depth: int, token: int, bin_: int, stands: bool) -> None:
        with_it, without = self.after(token, self._confident[depth][bin_]), self.after(token, self._any[depth])
        if not stands:
            with_it, without = 1.0 - with_it, 1.0 - without
        told = math.log(max(with_it, 0.01) / max(without, 0.01))
        self._foretold += (1.0 - self.FORETOLD_FADING) * (told - self._foretold)
        counts = self._by_confidence[depth][bin_]
        counts[0] += stands
        counts[1] += 1

    def estimate(self) -> None:
        """`at`: of each position, the chance that a draft stands where those before it do."""
        self.at, chance = [], self.HOPE
        for stood, seen in self._by_position:
            # Of a position never seen it is the chance of the one before.
            chance = (stood + chance * self.WEIGHT) / (seen + self.WEIGHT)
            self.at.append(chance)

        self._confident, self._any, chances, worth = [], [], [self.HOPE] * (self.BINS + 1), 1.0
        for bins, any_bin in zip(self._by_confidence, self._by_depth, strict=True):
            counts = zip([*bins, any_bin], chances, strict=True)
            chances = [(stood + worth * p) / (seen + worth) for (stood, seen), p in counts]
            self._confident.append(chances[:-1])
            self._any.append(chances[-1])
            worth = self.DEEPER

    def was_seen(self, position: int) -> bool:
        """Were drafts compared there lately?"""
        return self._by_position[position][1] > 0.5

    def after(self, token: int, chance: float) -> float:
        """Of drafts made after this token, where `chance` is what is expected of any."""
        stood, seen = self._by_token.get(token, (0.0, 0.0))
        own = (stood + chance * self.TOKEN_WEIGHT) / (seen + self.TOKEN_WEIGHT)
        return min(own, self.TOKEN_GAIN * chance)

    def of_drafts(self, position: int, tokens: list[int], bins: list[int] | None) -> list[float]:
        """Of drafts at a position, each made after its token, with confidence in its bin, if that is known."""
        if bins is None:
            chance = self._any[self._depth(position)]
            return [self.after(token, chance) for token in tokens]
        confident = self._confident[self._depth(position)]
        return [self.after(token, confident[b]) for token, b in zip(tokens, bins, strict=True)]

    def _depth(self, position: int) -> int:
        return min(position // 2, self.DEPTHS - 1)
