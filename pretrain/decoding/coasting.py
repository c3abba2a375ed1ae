"""To judge drafts one by one takes time too: whether it is worth it."""

from __future__ import annotations

import math
from collections import deque


class Coasting:
    """Where to judge drafts is not worth its time, the usual number is drafted without.

    For one number of texts. Blocks of cycles are judged or coast, and what is better goes on; the other is done for two
    blocks now and then, the more seldom the more it would lose, so that LOSS of the time is lost by it. What is better
    is first reckoned: what the judged cycles gained over each fixed number of drafts is known from themselves (see
    `gains`), and what judging costs from the seconds of cycles with as many drafts, judged and not. That sees one cycle
    at a time, and not what a cycle leaves to the next: so what blocks achieved is compared with the blocks beside them,
    and as that is known ever better it overrules the reckoning (the mean of a normal distribution whose prior is the
    reckoned one).
    """

    BLOCK = 12  # cycles
    LOSS = 0.005
    LONGEST = 16.0  # blocks of one kind
    KNOWN = 500.0  # tokens of judged cycles, before it ever coasts
    FADING = 0.97  # of what was seen, with each block that is judged
    NUMBERS = 8  # fixed numbers of drafts are compared up to here
    STEADY = 0.01  # share of the tokens that another number must give more to become the usual one
    COST = 0.03  # share of the time that judging takes, as long as it was hardly measured
    SPREAD = 0.06  # standard deviation of what blocks will say around what is reckoned
    VARIANCE = 0.2  # of a cycle's tokens, of one text, over their mean squared: what is expected of blocks at first,
    BLOCKS = 4.0  # and worth so many differences of two blocks of a kind
    COMPARED_FADING = 0.9  # of what blocks say, with each that is judged

    def __init__(self, texts: int) -> None:
        self.drafts: int | None = None  # so many in the next cycle; None: judge
        self.usual: int | None = None
        # Of judged cycles: how often with so many drafts; of how many of those so many stood; and where all did, how
        # many more would have with one more draft. Texts count by what their tokens are worth.
        self._cycles_with: dict[int, float] = {}
        self._stood: dict[tuple[int, int], float] = {}
        self._more: dict[int, float] = {}
        self._gain = self._known = 0.0
        self._judged: deque[float] = deque(maxlen=31)  # of cycles with the usual number, seconds in plain cycles
        self._coasted: deque[float] = deque(maxlen=31)
        self._compared, self._times = 0.0, 0.0  # logarithms of what judged blocks achieved over others, and how many
        self._squares, self._alike = self.BLOCKS * 2.0 * self.VARIANCE / (self.BLOCK * texts), self.BLOCKS
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
        return (reckoned * (self._gain - self.cost) + told * self._compared) / (reckoned + told * self._times)

    def saw_judged(self, drafts: int, stood: list[int], worth: list[float], more: list[float], seconds: float) -> None:
        """A judged cycle.

        Of each text, how many of its drafts stood, what its tokens are worth, and how likely another draft would have
        stood. seconds: in plain cycles.
        """
        self._cycles_with[drafts] = self._cycles_with.get(drafts, 0.0) + 1.0
        for number, each, chance in zip(stood, worth, more, strict=True):
            self._stood[drafts, number] = self._stood.get((drafts, number), 0.0) + each
            if number == drafts:
                self._more[drafts] = self._more.get(drafts, 0.0) + each * chance
        tokens = sum(each * (1 + number) for number, each in zip(stood, worth, strict=True))
        self._known += tokens
        if drafts == self.usual:
            self._judged.append(seconds)
        self._count(1, tokens, len(stood) * seconds)

    def gains(self, rate: float, costs: list[float], acceptance: list[float]) -> list[float]:
        """Share of the tokens that judging gave more than 1, 2, … drafts give in as much time.

        Of drafts that a judged cycle did not make the chance is counted. See `AdaptiveLength`: r, C and a.
        """
        tokens = sum((1 + stood) * texts for (_, stood), texts in self._stood.items())
        gains = []
        for usual in range(1, min(self.NUMBERS, len(acceptance)) + 1):
            more = 0.0
            for (drafts, stood), texts in self._stood.items():
                more += texts * max(stood - usual, 0)
            for drafts, chance in self._more.items():
                for position in range(drafts, usual):
                    more -= chance
                    chance *= acceptance[min(position + 1, len(acceptance) - 1)]
            for drafts, cycles in self._cycles_with.items():
                more -= cycles * rate * (costs[drafts] - costs[usual])
            gains.append(more / tokens)
        return gains

    def saw_coasted(self, cycles: int, tokens: float, plain: float, seconds: list[float]) -> None:
        """Cycles that were not judged: see `saw_judged`. seconds: of some of them."""
        self._coasted.extend(seconds)
        self._count(cycles, tokens, plain)

    def _count(self, cycles: int, tokens: float, plain: float) -> None:
        self._made += tokens
        self._plain += plain
        self._cycles += cycles

    def end_block(self, rate: float, costs: list[float], acceptance: list[float]) -> None:
        """If it is over: of what kind is the next one? For the arguments see `gains`."""
        if self.left > 0:
            return
        judged, achieved = self.drafts is None, math.log(self._made / self._plain)
        self._cycles, self._made, self._plain = 0, 0.0, 0.0
        if judged:
            self._find_usual(self.gains(rate, costs, acceptance))
            self._fade()
        if judged and self._known < self.KNOWN:
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
            self._squares = self.FADING * self._squares + more**2
            self._alike = self.FADING * self._alike + 1.0
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

    def _find_usual(self, gains: list[float]) -> None:
        least = min(range(len(gains)), key=gains.__getitem__)
        if self.usual is None or gains[least] + self.STEADY < gains[self.usual - 1]:
            self.usual, self._last = least + 1, None
            self._compared = self._times = 0.0
            self._judged.clear()
            self._coasted.clear()
        self._gain = gains[self.usual - 1]

    def _fade(self) -> None:
        for counts in (self._cycles_with, self._stood, self._more):
            for key in counts:
                counts[key] *= self.FADING
        self._compared *= self.COMPARED_FADING
        self._times *= self.COMPARED_FADING
