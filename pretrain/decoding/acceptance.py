"""How likely drafts stand, from those that were compared."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict

from pretrain.decoding.cycle import Cycle


class History:
    """What stood lately of drafts of a kind: made after a token, of a token, of one after another."""

    FADING = 0.9  # of a kind's counts, with each draft of it
    WEIGHT = 4.0  # of its own drafts that the acceptance of all is worth, where the kind was seen before
    MOST = 2**16  # kinds; those seen last

    def __init__(self) -> None:
        self._counts: OrderedDict[int | tuple[int, int], tuple[float, float]] = OrderedDict()  # accepted and seen

    def count(self, kind: int | tuple[int, int], stands: bool) -> None:
        """A draft of this kind was compared."""
        stood, seen = self._counts.get(kind, (0.0, 0.0))
        self._counts[kind] = stood * self.FADING + stands, seen * self.FADING + 1.0
        self._counts.move_to_end(kind)
        if len(self._counts) > self.MOST:
            self._counts.popitem(last=False)

    def of(self, kind: int | tuple[int, int], chance: float) -> float:
        """That one of this kind stands, where `chance` is what is expected of any."""
        counts = self._counts.get(kind)
        if counts is None:
            return chance
        return (counts[0] + chance * self.WEIGHT) / (counts[1] + self.WEIGHT)


class Acceptance:
    """By position, by confidence, and by token: the one a draft is made after, the draft's own, and both.

    Its own token is not known before it is drawn, but then tells the most, the two together more than either: so what
    is yet to be drafted is judged by the token before it, and what is drafted by its own.

    Confidence is the draft distribution's largest probability, in ten bins. The deeper a draft, the less it tells: each
    depth, of two positions, has its own bins. It takes a pass over the vocabulary, and of some models it tells nothing
    that the tokens do not, as what follows some tokens is never foreseen. Where drafts are sampled tokens may tell
    nothing either, and to go by what is chance makes it worse. So it is asked of both what they foretold.
    """

    FADING, FADE_EVERY = 0.96, 4  # of counts, in as many cycles of theirs: what was given up is tried again some time
    HOPE, WEIGHT = 0.8, 6.0  # acceptance before any was seen, and how many observations that is worth
    BINS, DEPTHS = 10, 4
    DEEPER = 3.0  # observations that those at the depth before are worth
    FORETELLS = 0.01  # nats a draft, on average, that tokens must tell more than the depth; or confidence than those
    TOKEN_GAIN = 2.0  # times the acceptance of all are the most a token's may be: it may be the position's that none is
    FORETOLD_FADING, FORETOLD_HOPE = 0.995, 0.05  # of those nats, with each draft; what is hoped of them at first

    def __init__(self, longest: int) -> None:
        # Accepted and seen.
        self._by_position = [[0.0, 0.0] for _ in range(longest)]
        self._by_confidence = [[[0.0, 0.0] for _ in range(self.BINS)] for _ in range(self.DEPTHS)]
        self._by_depth = [[0.0, 0.0] for _ in range(self.DEPTHS)]
        self._after, self._by_token, self._by_pair = History(), History(), History()
        self._cycles = self._confident_cycles = 0
        self._foretold = self._foretold_after = self._foretold_by_both = self.FORETOLD_HOPE  # see FORETELLS
        # See `estimate`.
        self.at = [self.HOPE] * longest
        self._confident = [[self.HOPE] * self.BINS] * self.DEPTHS
        self._any = [self.HOPE] * self.DEPTHS  # where confidence is not known

    @property
    def foretells(self) -> bool:
        """Does confidence tell more of a draft than its position and tokens do?"""
        return self._foretold > self.FORETELLS

    @property
    def anything_foretells(self) -> bool:
        """Does anything tell more of a draft than its position does?"""
        return max(self._foretold, self._foretold_after, self._foretold_by_both) > self.FORETELLS

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
                if position + 1 < len(cycle.tokens):
                    before, token = cycle.tokens[position][text], cycle.tokens[position + 1][text]
                    bin_ = cycle.bins[position][text] if cycle.bins else None
                    self._count_observed(self._depth(position), before, token, bin_, stands)

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

    def _count_observed(self, depth: int, before: int, token: int, bin_: int | None, stands: bool) -> None:
        chance = self._any[depth]
        known = self._of_draft(before, token, chance)
        after, by_both = self._by_after(before, chance), self._by_both(before, token, chance)
        self._foretold_after = self._fade_in(self._foretold_after, after, chance, stands)
        self._foretold_by_both = self._fade_in(self._foretold_by_both, by_both, chance, stands)
        if bin_ is not None:
            confident = self._of_draft(before, token, self._confident[depth][bin_])
            self._foretold = self._fade_in(self._foretold, confident, known, stands)
            counts = self._by_confidence[depth][bin_]
            counts[0] += stands
            counts[1] += 1
        self._by_depth[depth][0] += stands
        self._by_depth[depth][1] += 1
        self._after.count(before, stands)
        self._by_token.count(token, stands)
        self._by_pair.count((before, token), stands)

    def _fade_in(self, foretold: float, informed: float, simple: float, stands: bool) -> float:
        """The nats foretold, with those that a chance better informed than another told of one more draft."""
        if not stands:
            informed, simple = 1.0 - informed, 1.0 - simple
        told = math.log(max(informed, 0.01) / max(simple, 0.01))
        return told + self.FORETOLD_FADING * (foretold - told)

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
        """Of drafts yet to be made after this token, where `chance` is what is expected of any."""
        return self._by_after(token, chance) if self._foretold_after > self.FORETELLS else chance

    def of_drafts(self, position: int, before: list[int], tokens: list[int], bins: list[int] | None) -> list[float]:
        """Of drafts made at a position, each of its token after another, with confidence in its bin, if known."""
        depth = self._depth(position)
        chances = [self._any[depth]] * len(tokens) if bins is None else [self._confident[depth][bin_] for bin_ in bins]
        return [self._of_draft(*each) for each in zip(before, tokens, chances, strict=True)]

    def _of_draft(self, before: int, token: int, chance: float) -> float:
        return self._by_both(before, token, chance) if self._foretold_by_both > self.FORETELLS else chance

    def _by_after(self, token: int, chance: float) -> float:
        return min(self._after.of(token, chance), self.TOKEN_GAIN * chance)

    def _by_both(self, before: int, token: int, chance: float) -> float:
        own = self._by_pair.of((before, token), self._by_token.of(token, chance))
        return min(own, self.TOKEN_GAIN * chance)

    def _depth(self, position: int) -> int:
        return min(position // 2, self.DEPTHS - 1)
