"""To judge drafts one by one takes time too: whether it is worth it."""

from __future__ import annotations

import math


class Coasting:
    """Where no other number of drafts pays often enough, always as many are drafted and none is judged: it coasts.

    For one number of texts. Cycles come in blocks, judged or coasting. What is known to be better goes on, and the
    other is tried for two blocks now and then, the more seldom the more it would lose: for LOSS of the time.

    What coasting is worth is first reckoned: what the judged cycles gained over the fixed number is known from
    themselves, or expected of those that coast (`expects`), and what judging costs from its own seconds. But that sees
    one cycle at a time, and not what a cycle leaves to the next. So what a block achieved is compared with the one
    before it, of the other kind, and tells how far that reckoning is off (a Kalman filter).
    """

    BLOCK, LONG_BLOCK = 12, 24  # cycles; the long ones coast where that is thought to be better
    LOSS = 0.002  # of the time, by trials of the other kind
    LONGEST, LONGEST_COASTING = 576.0, 192.0  # cycles between two trials
    KNOWN, KNOWN_BLOCKS = 250.0, 3  # tokens of judged cycles, and blocks of them, before it ever coasts
    FADING = 0.97  # of what was seen, with each block of BLOCK
    OWN_FADING, MOST = 0.9, 0.1  # of its own share of the time, with each time it was measured; the most it may be
    COASTS = 0.3  # of what judging takes coasting takes too, as long as it never did
    SLOW = 2  # blocks in a row that coasted and were slower than plain decoding, and it judges
    SPREAD = 0.03  # standard deviation of what is reckoned
    OUT_OF_STEP = 0.03  # share of the tokens that a large batch loses, it is thought, as judging brings it out of step
    VARIANCE = 0.8  # of a block's tokens over their mean, times its cycles and texts, as long as few were seen:
    BLOCKS = 4.0  # worth so many differences of two blocks of a kind
    NEARLY = 1.04  # times as fast: another fixed number must be thought to be better by more, to count
    BEST_FADING = 0.9  # of how much better that was thought to be, with each time of it

    def __init__(self, texts: int) -> None:
        self.coasts = False  # in the next cycle
        self.blind = False  # nothing tells one draft from another: judging them gains nothing, and is not tried
        # Of judged cycles.
        self._tokens = self._gained = self._known = 0.0
        self._blocks = 0
        self._own: dict[bool, float] = {}  # where it coasts or does not, the rule's own share of the time
        # What coasting is worth more than reckoned, and its variance.
        self._off, self._doubt = self.OUT_OF_STEP * (1.0 - 1.0 / texts), self.SPREAD**2
        self._squares, self._alike = self.BLOCKS * 2.0 * self.VARIANCE / (self.BLOCK * texts), self.BLOCKS
        self._last: tuple[bool, float] | None = None  # did the last block coast, and the logarithm of what it achieved
        self._slow = 0  # see SLOW
        self._better: float | None = None  # logarithm of how many times as fast the best fixed number is
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
    def is_nearly_best(self) -> bool:
        """Is the least number thought to be nearly as fast as the best fixed one?"""
        return (self._better or 0.0) < math.log(self.NEARLY)

    @property
    def left(self) -> int:
        """Cycles until the block is over."""
        return self._block - self._cycles

    @property
    def cost(self) -> float:
        """Share of the time that judging takes."""
        judging = self._own.get(False, 0.0)
        return judging - self._own.get(True, self.COASTS * judging)

    @property
    def worth(self) -> float:
        """Share of the tokens that coasting gives more than judging."""
        return self.cost - (0.0 if self.blind else self._gained / max(self._tokens, 1.0) - self._off)

    def saw_best(self, faster: float) -> None:
        """The best fixed number of drafts is expected to be so many times as fast as the least number."""
        new = math.log(faster)
        self._better = new if self._better is None else new + self.BEST_FADING * (self._better - new)

    def took(self, coasts: bool, share: float) -> None:
        """The rule itself took so much of the time of some cycles, all of which coasted or none."""
        new, old = min(share, self.MOST), self._own.get(coasts)
        self._own[coasts] = new if old is None else new + self.OWN_FADING * (old - new)

    def saw_judged(self, gained: float, tokens: float, plain: float) -> None:
        """A judged cycle.

        gained: how many tokens more than the fixed number of drafts would have given in as much time. plain: tokens
        that plain decoding would have.
        """
        self._tokens += tokens
        self._known += tokens
        self._gained += gained
        if not self.coasts:
            self._count(1, tokens, plain)

    def expects(self, gained: float, tokens: float) -> None:
        """Cycles that were not judged gave so many tokens; judging is expected to have given `gained` more."""
        self._tokens += tokens
        self._gained += gained

    def saw_coasted(self, cycles: int, tokens: float, plain: float) -> None:
        """Cycles that were not judged: see `saw_judged`."""
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
        elif self._rest <= 0.0 and not (self.blind and self.coasts):
            self._turn()

    def _until_trial(self) -> float:
        longest = self.LONGEST_COASTING if self.coasts else self.LONGEST
        return min(2 * self.BLOCK * abs(self.worth) / self.LOSS, longest)

    def _turn(self) -> None:
        self.coasts, self._turned = not self.coasts, True
