"""To judge drafts one by one takes time too: whether it is worth it."""

from __future__ import annotations

import math
from collections import deque


class Coasting:
    """Where more drafts than the least number hardly ever pay, that many are drafted and none is judged: it coasts.

    For one number of texts. Cycles come in blocks, judged or coasting. What is known to be better goes on, and the
    other is tried for two blocks now and then, the more seldom the more it would lose: for LOSS of the time.

    What coasting is worth is first reckoned: what the judged cycles gained over the least number is known from
    themselves, or expected of those that coast (`expects`), and what judging costs from the seconds of draft steps,
    judged and not. But that sees one cycle at a time, and not what a cycle leaves to the next. So what a block achieved
    is compared with the one before it, of the other kind, and tells how far that reckoning is off (a Kalman filter).
    """

    BLOCK, LONG_BLOCK = 12, 24  # cycles; the long ones coast where that is thought to be better
    LOSS = 0.002  # of the time, by trials of the other kind
    LONGEST, LONGEST_COASTING = 576.0, 192.0  # cycles between two trials
    KNOWN, KNOWN_BLOCKS = 250.0, 6  # tokens of judged cycles, and blocks of them, before it ever coasts
    FADING = 0.97  # of what was seen, with each block of BLOCK
    COST, MOST = 0.03, 0.1  # share of the time that judging takes, as long as it was hardly measured; and the most
    STEPS = 4.0  # draft steps, of which what judging adds is what it adds to a cycle: half of it is in two steps
    KEPT = 31  # last seconds of draft steps, for so many texts
    SLOW = 2  # blocks in a row that coasted and were slower than plain decoding, and it judges
    SPREAD = 0.03  # standard deviation of what is reckoned
    VARIANCE = 0.8  # of a block's tokens over their mean, times its cycles and texts, as long as few were seen:
    BLOCKS = 4.0  # worth so many differences of two blocks of a kind

    def __init__(self, texts: int) -> None:
        self.coasts = False  # in the next cycle
        # Of judged cycles.
        self._tokens = self._gained = self._known = 0.0
        self._blocks = 0
        self._judged: dict[int, deque[float]] = {}  # texts → seconds of a draft step,
        self._coasted: dict[int, deque[float]] = {}  # and where it coasts
        self._cycle_seconds: dict[int, float] = {}  # texts → of a whole cycle
        self._off, self._doubt = 0.0, self.SPREAD**2  # what coasting is worth more than reckoned, and its variance
        self._squares, self._alike = self.BLOCKS * 2.0 * self.VARIANCE / (self.BLOCK * texts), self.BLOCKS
        self._last: tuple[bool, float] | None = None  # did the last block coast, and the logarithm of what it achieved
        self._slow = 0  # see SLOW
        self._rest: float | None = None  # cycles until the other kind is tried
        self._turned = False  # to the other kind before this block
        # Of this block.
        self._block = self.BLOCK  # cycles it is to have
        self._cycles = 0
        self._made = self._plain = 0.0  # tokens, and those that plain decoding would have given

    @property
    def knows(self) -> bool:
        """Was enough seen to decide?"""
        return self._known >= self.KNOWN and self._blocks >= self.KNOWN_BLOCKS

    @property
    def left(self) -> int:
        """Cycles until the block is over."""
        return self._block - self._cycles

    @property
    def cost(self) -> float:
        """Share of the time that judging takes."""
        shares, weights = self.COST * self.BLOCK, float(self.BLOCK)
        for texts in self._judged.keys() & self._coasted.keys():
            judged, coasted = sorted(self._judged[texts]), sorted(self._coasted[texts])
            weight = min(len(judged), self.BLOCK * len(coasted))
            more = judged[len(judged) // 2] - coasted[len(coasted) // 2]
            shares += weight * min(max(self.STEPS * more / self._cycle_seconds[texts], 0.0), self.MOST)
            weights += weight
        return shares / weights

    @property
    def worth(self) -> float:
        """Share of the tokens that coasting gives more than judging."""
        return self.cost - self._gained / max(self._tokens, 1.0) + self._off

    def saw_judged(self, texts: int, gained: float, tokens: float, plain: float, step: float, cycle: float) -> None:
        """A judged cycle.

        gained: how many tokens more than the least number of drafts would have given in as much time. plain: tokens
        that plain decoding would have. step, cycle: seconds of its draft steps, and of a cycle with the least number.
        """
        self._tokens += tokens
        self._known += tokens
        self._gained += gained
        self._judged.setdefault(texts, deque(maxlen=self.KEPT)).append(step)
        self._cycle_seconds[texts] = cycle
        if not self.coasts:
            self._count(1, tokens, plain)

    def expects(self, gained: float, tokens: float) -> None:
        """Cycles that were not judged gave so many tokens; judging is expected to have given `gained` more."""
        self._tokens += tokens
        self._gained += gained

    def saw_coasted(self, texts: int, cycles: int, tokens: float, plain: float, step: float) -> None:
        """Cycles that were not judged, all of as many texts: see `saw_judged`."""
        self._coasted.setdefault(texts, deque(maxlen=self.KEPT // 4)).append(step)
        if self.coasts:
            self._count(cycles, tokens, plain)

    def _count(self, cycles: int, tokens: float, plain: float) -> None:
        self._made += tokens
        self._plain += plain
        self._cycles += cycles
        if self.left <= 0:
            achieved = math.log(self._made / self._plain)
            self._cycles, self._made, self._plain = 0, 0.0, 0.0
            self._end_block(achieved)

    def _end_block(self, achieved: float) -> None:
        """Is the next block to coast? `achieved`: logarithm of what it was faster than plain decoding."""
        if not self.coasts:
            self._blocks += 1
        fading = self.FADING ** (self._block / self.BLOCK)
        self._tokens *= fading
        self._gained *= fading
        if not self.knows:
            return
        self._slow = self._slow + 1 if self.coasts and achieved < 0.0 else 0
        if self._slow == self.SLOW:
            self._turn()
        elif self._turned:
            self._turned = False  # the first block of its kind bears traces of the other
        else:
            self._compare(achieved)
            if self.coasts or achieved >= 0.0:  # where drafts lose, judging them is how that is found out
                self._decide()
        self._block = self.LONG_BLOCK if self.coasts and self.worth > 0.0 and not self._slow else self.BLOCK

    def _compare(self, achieved: float) -> None:
        """This block with the last one. If that was of the same kind it tells how blocks vary."""
        before, self._last = self._last, (self.coasts, achieved)
        if before is None:
            return
        more = achieved - before[1]
        if before[0] == self.coasts:
            self._squares = self.FADING * self._squares + more**2
            self._alike = self.FADING * self._alike + 1.0
            return
        surprise = (more if self.coasts else -more) - self.worth
        share = self._doubt / (self._doubt + self._squares / self._alike)
        self._off += share * surprise
        self._doubt *= 1.0 - share

    def _decide(self) -> None:
        self._rest = self._until_trial() if self._rest is None else self._rest - self._block
        self._doubt = min(self._doubt / self.FADING, self.SPREAD**2)  # what was found out fades too
        if self.coasts != (self.worth > 0.0):
            self._turn()
            self._rest = self._until_trial()
        elif self._rest <= 0.0:
            self._turn()

    def _until_trial(self) -> float:
        longest = self.LONGEST_COASTING if self.coasts else self.LONGEST
        return min(2 * self.BLOCK * abs(self.worth) / self.LOSS, longest)

    def _turn(self) -> None:
        self.coasts, self._turned = not self.coasts, True
