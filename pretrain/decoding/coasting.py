"""To judge drafts one by one takes time too: whether it is worth it."""

from __future__ import annotations

from collections import deque


class Coasting:
    """Where nearly always the same number of drafts is judged right, that number is drafted without judging.

    For one number of texts. What judging gains over the usual number is known from the cycles that were judged, and
    what it costs from the seconds of cycles with as many drafts, judged and not. While it costs more, it is done for
    one block of cycles now and then, the more seldom the more it would cost, so that it loses LOSS of the time.
    """

    BLOCK = 12  # cycles
    LOSS = 0.005
    LONGEST = 8.0  # blocks without judging
    FADING = 0.8  # of what was judged, with each block of it
    HOPE = 0.03  # share of the time that judging is taken to cost, before it was measured

    def __init__(self) -> None:
        self.drafts: int | None = None  # so many in the next cycle; None: judge
        self.usual: int | None = None
        self._lengths: dict[int, float] = {}  # drafts → how often so many were judged right
        self._gained = self._tokens = 0.0  # by judging; of all of its cycles
        self._judged: deque[float] = deque(maxlen=9)  # seconds of cycles with the usual number
        self._coasted: deque[float] = deque(maxlen=9)
        self._cycles, self._rest = 0, 0.0

    @property
    def gain(self) -> float:
        """Share of the tokens that judging adds to what the usual number would have given in the same time."""
        return self._gained / self._tokens

    @property
    def cost(self) -> float:
        """Share of the time that judging takes."""
        if not self._judged or not self._coasted:
            return self.HOPE
        judged, coasted = sorted(self._judged), sorted(self._coasted)
        return 1.0 - coasted[(len(coasted) - 1) // 2] / judged[(len(judged) - 1) // 2]

    def judge_again(self) -> None:
        """Other texts come."""
        self.drafts, self._cycles = None, 0

    def saw_judged(self, drafts: int, gained: float, tokens: float, seconds: float) -> None:
        """A judged cycle: `gained` more tokens than `usual` drafts would have given in as much time."""
        self._lengths[drafts] = self._lengths.get(drafts, 0.0) + 1.0
        if self.usual is not None:
            self._gained += gained
            self._tokens += tokens
        if drafts == self.usual:
            self._judged.append(seconds)
        self._cycles += 1
        if self._cycles < self.BLOCK:
            return
        self._cycles = 0
        usual = max(self._lengths, key=self._lengths.__getitem__)
        if usual != self.usual:
            self.usual, self._gained, self._tokens = usual, 0.0, 0.0
            self._judged.clear()
            self._coasted.clear()
        elif self.gain < self.cost:
            self.drafts, self._rest = usual, min((self.cost - self.gain) / self.LOSS, self.LONGEST)
        self._lengths = {drafts: self.FADING * times for drafts, times in self._lengths.items()}
        self._gained, self._tokens = self.FADING * self._gained, self.FADING * self._tokens

    def saw_coasted(self, seconds: float) -> bool:
        """A cycle that was not judged; is its block over?"""
        self._coasted.append(seconds)
        self._cycles += 1
        if self._cycles < self.BLOCK:
            return False
        self._cycles, self._rest = 0, self._rest - 1.0
        if self._rest <= 0.0:
            self.drafts = None
        return True
