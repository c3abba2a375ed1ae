"""What draft steps and cycles cost on this machine, from measurements as they come."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections import deque


class Seconds:
    """What something costs, by how many texts it is done for and the drafts of each: medians of the last times.

    All as the machine goes now, which other work and its clock change: what was measured last tells of all how many
    times as long as at first they take. So what was not done for long is known as it would be now.

    And at `length`, tokens of the longest text: costs grow with it by the factor 1 + growth · length, with that of
    GROWTHS by which measurements of the same texts and drafts agree best. Without a cache they grow nearly in
    proportion.
    """

    KEPT = 9
    PACE = 5  # measurements of any kind that tell how the machine goes now: their median
    OTHERS = 0.03  # what a measurement with another number of texts is worth
    ENOUGH = 4  # measurements, to compare numbers of texts
    LINE = 2.0  # measurements with so many drafts that the line is worth
    GROWTHS = (0.0, 1 / 2048, 1 / 1024, 1 / 512, 1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 4)
    COMPARED = 4  # of so many measurements one, with the oldest kept of its kind
    FADING = 0.95  # of disagreement (squared, in logarithms) with each that is compared
    STEADY = 0.02  # of disagreement, by which any growth must be better than none

    def __init__(self) -> None:
        self.length = 0
        # Number of texts → drafts of each → …
        self._measured: dict[int, dict[int, deque[tuple[int, float, float]]]] = {}  # length, seconds, and pace then
        self._medians: dict[int, dict[int, float]] = {}  # of seconds at length 0 and pace 1, as are these of no drafts:
        self._plain: dict[int, float] = {}
        self._changed: set[tuple[int, int]] = set()  # their medians are to be found
        self._paces: deque[float] = deque(maxlen=self.PACE)  # times as long as expected
        self._pace = 1.0
        self._measurements = 0
        self._last: dict[tuple[int, int], int] = {}  # which measurement was the last one of these
        self._growth = 0.0
        self._disagreement = [0.0] * len(self.GROWTHS)

    def add(self, texts: int, drafts: int, seconds: float, length: int = 0) -> None:
        """One measurement, with the longest text of so many tokens."""
        kept = self._measured.setdefault(texts, {}).setdefault(drafts, deque(maxlen=self.KEPT))
        self._measurements += 1
        if self._measurements % self.COMPARED == 0 and kept:
            self._compare(*kept[0][:2], length, seconds)
        median = self._medians.get(texts, {}).get(drafts, 0.0)
        if median > 0.0:  # a coarse clock may say 0
            self._paces.append(seconds / (median * (1.0 + self._growth * length)))
            if len(self._paces) == self.PACE:
                self._pace = max(statistics.median(self._paces), 0.01)
        kept.append((length, seconds, self._pace))
        self._changed.add((texts, drafts))
        self._last[texts, drafts] = self._measurements
        if not drafts:
            self._plain.setdefault(texts, seconds / self._pace)

    def _compare(self, length: int, seconds: float, other_length: int, other_seconds: float) -> None:
        """How well does each growth tell the seconds of one measurement from the other's?"""
        if length and seconds > 0.0 and other_seconds > 0.0:  # a coarse clock may say 0
            for i, growth in enumerate(self.GROWTHS):
                ratio = other_seconds / seconds * (1.0 + growth * length) / (1.0 + growth * other_length)
                self._disagreement[i] = self.FADING * self._disagreement[i] + math.log(ratio) ** 2

    def has_about(self, texts: int, times: int = 1) -> bool:
        """Was this number of texts measured so often without drafts, or one less than twice or more than half of it?"""
        return len(self._measured.get(texts, {}).get(0, ())) >= times or any(
            texts < 2 * other < 4 * texts and len(self._measured[other][0]) >= times for other in self._plain
        )

    def times(self, texts: int, drafts: int) -> int:
        """How often this was measured, up to KEPT."""
        return len(self._measured.get(texts, {}).get(drafts, ()))

    def known(self, texts: int, drafts: int, times: int) -> tuple[int, int]:
        """In the order of how well this is known: by how often it was measured, up to so many times, and how lately."""
        return min(self.times(texts, drafts), times), self._last.get((texts, drafts), 0)

    def at(self, texts: int) -> float:
        """Seconds for so many texts without drafts, on the line between measured numbers, or the nearest; 0 of none."""
        self._find_medians()
        return self._now() * self._at_length_0(texts) if self._plain else 0.0

    def by_drafts(self, texts: int, longest: int) -> list[float]:
        """Seconds of a cycle with 0 … `longest` drafts of each text.

        Kernels work in blocks, so that costs have steps: each number of drafts tends to its own median, from the line.
        """
        self._find_growth()
        start, slope = self._line(texts)
        measured, medians = self._measured.get(texts, {}), self._medians.get(texts, {})
        seconds = [self._at_length_0(texts)]
        for drafts in range(1, longest + 1):
            line = start + slope * drafts
            if drafts in medians:
                times = len(measured[drafts])
                line = (times * medians[drafts] + self.LINE * line) / (times + self.LINE)
            seconds.append(line)
        now = self._now()
        return [now * s for s in seconds]

    def shared(self, texts: int, drafts: int) -> float:
        """Share of a cycle's seconds that fewer texts would take too: a half, where that is not known."""
        fewer = min((n for n, measured in self._measured.items() if self._is_known(measured)), default=texts)
        if 2 * fewer > texts or not self._is_known(self._measured.get(texts, {})):
            return 0.5
        few, all_texts = self.by_drafts(fewer, drafts)[drafts], self.by_drafts(texts, drafts)[drafts]
        each = (all_texts - few) / (texts - fewer)
        return min(max(1.0 - texts * each / all_texts, 0.0), 1.0)

    def _now(self) -> float:
        return self._pace * (1.0 + self._growth * self.length)

    def _is_known(self, measured: dict[int, deque[tuple[int, float, float]]]) -> bool:
        return any(drafts and len(kept) >= self.ENOUGH for drafts, kept in measured.items())

    def _find_growth(self) -> None:
        growing = min(range(1, len(self.GROWTHS)), key=self._disagreement.__getitem__)
        grows = self._disagreement[growing] + self.STEADY < self._disagreement[0]
        growth = self.GROWTHS[growing] if grows else 0.0
        if growth != self._growth:
            self._growth = growth
            self._changed = {(texts, drafts) for texts, measured in self._measured.items() for drafts in measured}
            self._forget_pace()

    def _forget_pace(self) -> None:
        """What was taken for it was growth."""
        for measured in self._measured.values():
            for kept in measured.values():
                old = [(length, seconds, 1.0) for length, seconds, _ in kept]
                kept.clear()
                kept.extend(old)
        self._paces.clear()
        self._pace = 1.0

    def _find_medians(self) -> None:
        for texts, drafts in self._changed:
            measured = self._measured[texts][drafts]
            kept = sorted(seconds / (pace * (1.0 + self._growth * length)) for length, seconds, pace in measured)
            # Of an even number the smaller one: what disturbs a measurement makes it longer, above all the first.
            self._medians.setdefault(texts, {})[drafts] = median = kept[(len(kept) - 1) // 2]
            if not drafts:
                self._plain[texts] = median
        self._changed.clear()

    def _at_length_0(self, texts: int) -> float:
        if texts in self._plain:
            return self._plain[texts]
        plain = sorted(self._plain)
        above = bisect_left(plain, texts)
        if above == 0 or len(plain) == 1:
            return self._plain[plain[0]]
        # Beyond the most that were measured the line through the fewest goes on.
        left, right = (plain[above - 1], plain[above]) if above < len(plain) else (plain[0], plain[-1])
        slope = (self._plain[right] - self._plain[left]) / (right - left)
        if above < len(plain):
            return self._plain[left] + slope * (texts - left)
        return self._plain[right] + max(slope, 0.0) * (texts - right)

    def _line(self, texts: int) -> tuple[float, float]:
        """Seconds of a cycle with drafts, at length 0: start and slope, by drafts of each text, of the best line.

        Its points are multiples of what as many texts cost without drafts, so that those of other numbers of texts are
        of use too. Cycles without drafts count for little: the first step up is often the steepest. But they give the
        line a direction where only one length was measured.
        """
        self._find_medians()
        n = x = y = xx = xy = 0.0
        for other, medians in self._medians.items():
            plain, worth = self._at_length_0(other), 1.0 if other == texts else self.OTHERS
            for drafts, seconds in medians.items():
                multiple, times = seconds / plain, len(self._measured[other][drafts])
                # Noise grows with what is measured.
                weight = (worth if drafts else 0.25 * worth) * times / multiple**2
                n, x, y = n + weight, x + weight * drafts, y + weight * multiple
                xx, xy = xx + weight * drafts**2, xy + weight * drafts * multiple
        spread = n * xx - x * x
        slope = max((n * xy - x * y) / spread, 0.0) if spread > 0.0 else 0.0
        plain = self._at_length_0(texts)
        return plain * (y - slope * x) / n, plain * slope
