"""To judge drafts one by one takes time too: whether it is worth it."""

from __future__ import annotations

import math
from collections import deque


class Coasting:
    """Where to judge drafts is not worth its time, a fixed number is drafted without.

    For one number of texts. Cycles come in blocks, each of one way: judged, or of a fixed number of drafts. The way that
    is known to be best goes on, and another is tried for two blocks now and then, the more seldom the more it would
    lose, so that LOSS of the time is lost by it.

    What a way is worth is first reckoned: what the judged cycles gained over each fixed number is known from themselves
    (see `saw_judged`), and what judging costs from the seconds of cycles with as many drafts, judged and not. But that
    sees one cycle at a time, and not what a cycle leaves to the next. So what a block achieved is compared with the one
    before it, of another way, and tells both how far their reckoned worth is off (a Kalman filter for each way).
    """

    BLOCK = 12  # cycles
    LOSS = 0.005
    LONGEST = 16.0  # blocks between two trials
    KNOWN, KNOWN_BLOCKS = 500.0, 6  # tokens of judged cycles, and blocks of them, before it ever coasts
    FADING = 0.97  # of what was seen, with each block
    NUMBERS = 8  # fixed numbers of drafts are tried up to here
    COST = 0.03  # share of the time that judging takes, as long as it was hardly measured
    SPREAD = 0.06  # standard deviation of what is reckoned
    VARIANCE = 0.2  # of a cycle's tokens, of one text, over their mean squared: what is expected of blocks at first,
    BLOCKS = 4.0  # and worth so many differences of two blocks of a way

    def __init__(self, texts: int) -> None:
        self.drafts: int | None = None  # so many in the next cycle; None: judge
        # Of judged cycles.
        self._tokens = self._known = 0.0
        self._blocks = 0
        self._gained = [0.0] * self.NUMBERS  # tokens more than with 1, 2, … drafts
        self._seconds: dict[tuple[bool, int], deque[float]] = {}  # judged? with so many drafts: in plain cycles
        self._off = [0.0] * self.NUMBERS  # what 1, 2, … drafts are worth more than reckoned,
        self._doubt = [self.SPREAD**2] * self.NUMBERS  # and its variance
        self._squares, self._alike = self.BLOCKS * 2.0 * self.VARIANCE / (self.BLOCK * texts), self.BLOCKS
        self._last: tuple[int | None, float] | None = None  # way and logarithm of what the last block achieved
        self._rest = 0.0  # blocks until another way is tried
        self._turned = False  # to another way before this block
        # Of this block.
        self._cycles = 0
        self._made = self._plain = 0.0  # tokens, and those that plain decoding would have given

    @property
    def left(self) -> int:
        """Cycles until the block is over."""
        return self.BLOCK - self._cycles

    @property
    def cost(self) -> float:
        """Share of the time that judging takes."""
        shares, weights = self.COST * self.BLOCKS, self.BLOCKS
        for (judged, drafts), seconds in self._seconds.items():
            coasted = self._seconds.get((False, drafts), ())
            if judged and coasted:
                weight = min(len(seconds), len(coasted))
                shares += weight * (1.0 - _median(coasted) / _median(seconds))
                weights += weight
        return shares / weights

    def worth(self, way: int | None) -> float:
        """Share of the tokens that a way gives more than judging does."""
        if way is None or not self._tokens:
            return 0.0
        return self.cost - self._gained[way - 1] / self._tokens + self._off[way - 1]

    def saw_judged(self, drafts: int, gained: list[float], tokens: float, plain: float, seconds: float) -> None:
        """A judged cycle with so many drafts.

        gained: how many tokens more than 1, 2, … drafts would have given in as much time. plain: what plain decoding
        would have given. seconds: in plain cycles.
        """
        self._tokens += tokens
        self._known += tokens
        for i, more in enumerate(gained):
            self._gained[i] += more
        self._seconds.setdefault((True, drafts), deque(maxlen=31)).append(seconds)
        self._count(1, tokens, plain)

    def saw_coasted(self, cycles: int, tokens: float, plain: float, seconds: list[float]) -> None:
        """Cycles that were not judged: see `saw_judged`. seconds: of some of them."""
        if self.drafts is not None:
            self._seconds.setdefault((False, self.drafts), deque(maxlen=31)).extend(seconds)
            self._count(cycles, tokens, plain)

    def _count(self, cycles: int, tokens: float, plain: float) -> None:
        self._made += tokens
        self._plain += plain
        self._cycles += cycles
        if self._cycles >= self.BLOCK:
            self._end_block()

    def _end_block(self) -> None:
        way, achieved = self.drafts, math.log(self._made / self._plain)
        self._cycles, self._made, self._plain = 0, 0.0, 0.0
        if way is None:
            self._blocks += 1
            self._tokens *= self.FADING
            self._gained = [self.FADING * gained for gained in self._gained]
        if self._known < self.KNOWN or self._blocks < self.KNOWN_BLOCKS:
            return
        if way is not None and achieved < 0.0:
            self._turn(None)  # not even plain decoding is slower
        elif self._turned:
            self._turned = False  # the first block of its way bears traces of the other
        else:
            self._compare(way, achieved)
            self._decide(way)

    def _compare(self, way: int | None, achieved: float) -> None:
        """This block with the last one. If that was of the same way it tells how blocks vary."""
        before, self._last = self._last, (way, achieved)
        if before is None:
            return
        other, more = before[0], achieved - before[1]
        if other == way:
            self._squares = self.FADING * self._squares + more**2
            self._alike = self.FADING * self._alike + 1.0
            return
        surprise = more - (self.worth(way) - self.worth(other))
        variance = sum(self._doubt[one - 1] for one in (way, other) if one) + self._squares / self._alike
        for one, sign in ((way, 1.0), (other, -1.0)):
            if one:
                share = self._doubt[one - 1] / variance
                self._off[one - 1] += sign * share * surprise
                self._doubt[one - 1] *= 1.0 - share

    def _decide(self, way: int | None) -> None:
        """Of what way is the next block?"""
        self._rest -= 1.0
        # What was found out fades too.
        self._doubt = [min(doubt / self.FADING, self.SPREAD**2) for doubt in self._doubt]
        ways = [None, *range(1, self.NUMBERS + 1)]
        best = max(ways, key=self.worth)
        if best != way:
            self._turn(best)
            others = [self.worth(other) for other in ways if other != best]
            self._rest = min(2.0 * (self.worth(best) - max(others)) / self.LOSS, self.LONGEST)
        elif self._rest <= 0.0:
            self._turn(max((other for other in ways if other != way), key=self._hoped))

    def _hoped(self, way: int | None) -> float:
        """What a way is worth if it is as much better than known as it well may be."""
        return self.worth(way) + (math.sqrt(self._doubt[way - 1]) if way else 0.0)

    def _turn(self, way: int | None) -> None:
        self.drafts, self._turned = way, True


def _median(numbers: deque[float] | tuple[()]) -> float:
    return sorted(numbers)[len(numbers) // 2]
