"""To judge drafts one by one takes time too: whether it is worth it."""

from __future__ import annotations

import math
from collections import deque


class Coasting:
    """Where to judge drafts is not worth its time, the usual number is drafted without.

    For one number of texts. Blocks of cycles are judged or coast, and what is better goes on; the other is done for two
    blocks now and then, the more seldom the more it would lose, so that LOSS of the time is lost by it. What is better
    is first reckoned: what judging gains is known from the judged cycles themselves (see `saw_judged`), and what it
    costs from the seconds of cycles with as many drafts, judged and not. That sees one cycle at a time, and not what a
    cycle leaves to the next: so what blocks achieved is compared with the blocks beside them, and as that is known ever
    better it overrules the reckoning (the mean of a normal distribution whose prior is the reckoned one).
    """

    BLOCK = 12  # cycles
    LOSS = 0.005
    LONGEST = 16.0  # blocks of one kind
    FADING = 0.9  # of what was seen, with each block that is judged
    SLOWLY = 0.98  # of surprises, and of differences
    DOUBT = 600.0  # tokens of judged cycles, until surprises in them count for half
    KNOWN = 500.0  # tokens of judged cycles, before it ever coasts
    COST = 0.03  # share of the time that judging takes, as long as it was hardly measured
    SPREAD = 0.06  # standard deviation of what blocks will say around what is reckoned
    VARIANCE = 0.2  # of a cycle's tokens, of one text, over their mean squared: what is expected of blocks at first,
    BLOCKS = 4.0  # and worth so many differences of two blocks of a kind
    STEADY = 1.5  # times as often as the usual number must another be right

    def __init__(self, texts: int) -> None:
        self.drafts: int | None = None  # so many in the next cycle; None: judge
        self.usual: int | None = None
        self._judged_tokens = 0.0
        self._squares, self._alike = self.BLOCKS * 2.0 * self.VARIANCE / (self.BLOCK * texts), self.BLOCKS
        self._lengths: dict[int, float] = {}  # drafts → how often so many were judged right
        self._foreseen = self._tokens = 0.0  # gained by judging, as foreseen; and all tokens of those cycles
        self._surprise, self._surprised_tokens = 0.0, self.DOUBT  # gained but not foreseen
        self._judged: deque[float] = deque(maxlen=31)  # of cycles with the usual number, seconds in plain cycles
        self._coasted: deque[float] = deque(maxlen=31)
        self._compared, self._times = 0.0, 0.0  # logarithms of what judged blocks achieved over others, and how many
        self._last: tuple[bool, float] | None = None  # judged? achieved
        self._rest = 0.0  # blocks until the other kind is tried
        self._turned = False  # from one kind to the other before this block
        # Of this block.
        self._cycles = 0
        self._made = self._plain = 0.0  # tokens, and those that plain decoding would have given

    @property
    def left(self) -> int:
        """Cycles until the block is over."""
        return self.BLOCK - self._cycles

    @property
    def gain(self) -> float:
        """Share of the tokens that judging adds to what the usual number gives in the same time, as reckoned."""
        if not self._tokens:
            return 0.0
        return self._foreseen / self._tokens + self._surprise / self._surprised_tokens

    @property
    def cost(self) -> float:
        """Share of the time that judging takes."""
        if min(len(self._judged), len(self._coasted)) < self.BLOCK // 2:
            return self.COST
        judged, coasted = sorted(self._judged), sorted(self._coasted)
        return 1.0 - coasted[len(coasted) // 2] / judged[len(judged) // 2]

    @property
    def worth(self) -> float:
        """What judging gains above its cost, as reckoned and as blocks say."""
        reckoned, told = 1.0 / self.SPREAD**2, self._alike / self._squares
        return (reckoned * (self.gain - self.cost) + told * self._compared) / (reckoned + told * self._times)

    def saw_judged(
        self, drafts: int, foreseen: float, gained: float, tokens: float, plain: float, seconds: float
    ) -> None:
        """A judged cycle.

        `gained`: tokens more than `usual` drafts would have given in as much time; `foreseen`: so many were expected
        when all drafts had been seen and none was verified, which tells nearly the same with less noise. `plain`: what
        plain decoding would have given. seconds: in plain cycles.
        """
        self._lengths[drafts] = self._lengths.get(drafts, 0.0) + 1.0
        self._judged_tokens += tokens
        if self.usual is not None:
            self._foreseen += foreseen
            self._tokens += tokens
            self._surprise += gained - foreseen
            self._surprised_tokens += tokens
        if drafts == self.usual:
            self._judged.append(seconds)
        self._count(1, tokens, plain)

    def saw_coasted(self, cycles: int, tokens: float, plain: float, seconds: list[float]) -> None:
        """Cycles that were not judged: see `saw_judged`. seconds: of some of them."""
        self._coasted.extend(seconds)
        self._count(cycles, tokens, plain)

    def _count(self, cycles: int, tokens: float, plain: float) -> None:
        self._made += tokens
        self._plain += plain
        self._cycles += cycles
        if self._cycles < self.BLOCK:
            return
        judged, achieved = self.drafts is None, math.log(self._made / self._plain)
        self._cycles, self._made, self._plain = 0, 0.0, 0.0
        if judged:
            self._find_usual()
            self._fade()
        if judged and self._judged_tokens < self.KNOWN:
            return
        if not judged and achieved < 0.0:
            self._turn()  # not even plain decoding is slower
        elif self._turned:
            self._turned = False  # the first block of its kind bears traces of the other
        else:
            self._compare(judged, achieved)
            self._decide(judged)

    def _compare(self, judged: bool, achieved: float) -> None:
        """This block with the last one. If that was of the same kind it tells how blocks vary."""
        more = achieved - self._last[1] if self._last else 0.0
        if self._last and self._last[0] != judged:
            self._compared += more if judged else -more
            self._times += 1.0
        elif self._last:
            self._squares = self.SLOWLY * self._squares + more**2
            self._alike = self.SLOWLY * self._alike + 1.0
        self._last = judged, achieved

    def _decide(self, judged: bool) -> None:
        """Of what kind is the next block?"""
        worth = self.worth
        self._rest -= 1.0
        if judged != (worth > 0.0):  # the other kind is better
            self._turn()
            self._rest = min(2.0 * abs(worth) / self.LOSS, self.LONGEST)  # as that is tried for two blocks
        elif self._rest <= 0.0:
            self._turn()

    def _turn(self) -> None:
        self.drafts, self._turned = (self.usual, True) if self.drafts is None else (None, True)

    def _find_usual(self) -> None:
        often = max(self._lengths, key=self._lengths.__getitem__)
        if self.usual is None or self._lengths[often] > self.STEADY * self._lengths.get(self.usual, 0.0):
            self.usual, self._last = often, None
            self._foreseen = self._tokens = self._surprise = self._compared = self._times = 0.0
            self._surprised_tokens = self.DOUBT
            self._judged.clear()
            self._coasted.clear()

    def _fade(self) -> None:
        self._lengths = {drafts: self.FADING * times for drafts, times in self._lengths.items()}
        self._foreseen *= self.FADING
        self._tokens *= self.FADING
        self._surprise *= self.SLOWLY
        self._surprised_tokens = self.DOUBT + self.SLOWLY * (self._surprised_tokens - self.DOUBT)
        self._compared *= self.FADING
        self._times *= self.FADING
