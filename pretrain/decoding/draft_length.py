"""How many tokens a cycle drafts: a fixed number, or as many as pay."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from typing import Protocol

from torch import Tensor

from pretrain.decoding.coasting import Coasting


class DraftLength(Protocol):
    """Decides how many tokens a cycle drafts, and is told what came of it.

    The texts of a batch draft together, one step for all: a text that drafted less than its neighbours would save
    nothing.
    """

    def wants_another(self, drafted: int, tokens: list[int], left: list[int], longest: int) -> bool:
        """Draft once more, with `drafted` tokens drafted in this cycle? 0 begins a cycle.

        Of each text, its last token, and how many more it may draft: 0 where it is at its end and only goes along.
        `longest`: tokens of the longest text, its prompt included, when the cycle began.
        """

    def saw_draft(self, logits_BV: Tensor, q: Tensor) -> None:
        """Drafts were drawn from q, which is `sampling.distribution` of these logits."""

    def saw_cycle(self, accepted: list[int], drafted: list[int], draft_seconds: list[float], rest: float) -> None:
        """A cycle is over.

        Of each text, how many drafts stood of how many; the seconds of each draft step; those of the rest of the cycle,
        which verified the drafts.
        """


class FixedLength:
    """The same number of drafts in every cycle."""

    def __init__(self, length: int):
        self.length = length

    def wants_another(self, drafted: int, tokens: list[int], left: list[int], longest: int) -> bool:
        """See `DraftLength`."""
        return drafted < self.length

    def saw_draft(self, logits_BV: Tensor, q: Tensor) -> None:
        """See `DraftLength`."""

    def saw_cycle(self, accepted: list[int], drafted: list[int], draft_seconds: list[float], rest: float) -> None:
        """See `DraftLength`."""


class AdaptiveLength:
    """Draft on while it pays, from what was seen so far; not at all where no length does.

    Measured by the clock: d, a draft step for the B texts of the batch, and V(k), the rest of a cycle of k drafts.
    With a_i the chance that draft i stands where those before it do, a cycle of k drafts gives
    E(k) = B · (1 + a_1 + a_1 a_2 + … + a_1 ⋯ a_k) tokens in C(k) = k · d + V(k) seconds. The rule aims at the rate

        r = max over k of E(k) / C(k),

    which for k ≥ 1 is corrected by what cycles with drafts have achieved of what they were to achieve.
    Where that is k = 0 it decodes plainly, and no draft step runs: but for a trial now and then, ever more seldom,
    until what trials lose is LOSS of the time. A trial that gains is followed at once by one twice as long. Else it
    looks at plain decoding now and then, for as little of the time, and a cycle with j drafts, which are still alive
    with chances s (one of each text), drafts on if for any m ≥ 1 the tokens to be hoped for are worth their time,

        Σ w · s · a' · (1 + a_{j+2} + … + a_{j+2} ⋯ a_{j+m})  >  r · (C(j + m) − C(j)),

    the stopping rule that maximises the long-run rate (renewal-reward theorem). s is the product of the acceptance
    measured for drafts of like confidence (the draft distribution's largest probability, in ten bins), and a' is
    a_{j+1}; both as far as nothing is known of drafts after the same token: what follows some is never foreseen, and a
    cycle ends best where such a token is its last, as the next one is then the target's own. The weights w (1 on
    average) are larger for texts with more tokens to come: with the others at their end, a batch goes on for its last.
    Where LEAST drafts or more are the best fixed number, a cycle drafts as many: cut short, it leaves the next one's
    first token, the target's own, to what could be foreseen, and the texts of a batch fall out of step. And where it
    gains less than its own time to judge each draft, the usual number is drafted without: see `coasting`.

    Each decision falls before the draft is drawn, and is made from earlier ones alone; so it cannot depend on what it
    decides about, and the sampled distribution stays exact. It depends on the clock, so with temperature > 0 a seed
    does not fix the text. One rule may serve many generations, one after the other: what it learned stays of use.
    """

    LONGEST = 16
    FIRST = (0, 0, 0, 3)  # lengths of the first cycles, to learn the costs
    LOSS = 0.005  # of the time, by trials of drafts where they do not pay, and by looks at plain decoding where they do
    LOOK, COLD = 8, 4  # plain cycles in a row to see what one costs; the first ones find cold caches, and do not count
    NEAR = 1.6  # speed-up over a cold plain cycle, below which a warm one must be known
    SHORTEST_WORK = 128  # cycles with drafts between two looks
    SHORTEST_REST, LONGEST_REST = 16, 512  # plain cycles between two trials
    EXPLORE_EVERY = 96  # cycles, one drafts two tokens more than the last
    ESTIMATE_EVERY = 4  # cycles: a small model's take less than a millisecond
    LEAST = 2  # drafts of a cycle that drafts, where no fewer are the best of all fixed numbers
    FADING = 0.96  # of counts, in as many cycles that draft: what was given up is tried again some time
    ACHIEVED_FADING, TRUST = 0.97, 30.0  # of r as achieved; how many cycles the expected r is worth
    BINS = 10
    HOPE, WEIGHT = 0.8, 6.0  # acceptance before any was seen, and how many observations that is worth
    LAG = 0.5  # share of the weights that goes to texts that lag behind the others of their batch
    TOKEN_FADING = 0.9  # of a token's counts, with each draft made after it
    TOKEN_WEIGHT = 4.0  # of its own drafts that the acceptance of all is worth, where a token was seen before
    TOKEN_GAIN = 2.0  # times that acceptance are the most its own may be: a position where none stands is no token's

    def __init__(self, longest: int = LONGEST) -> None:
        self._longest = longest
        self._draft_seconds = Seconds()  # of a step
        self._rest_seconds = Seconds()  # of a cycle
        self._by_position = [[0.0, 0.0] for _ in range(longest)]  # accepted, seen
        self._by_token: dict[int, list[float]] = {}
        self._by_confidence = [[0.0, 0.0] for _ in range(self.BINS)]
        self._cycles, self._drafting, self._texts = 0, 0, 1
        self._planned: int | None = self.FIRST[0]  # drafts of the next cycle; None: while it pays
        self._coasts = False  # so many because nearly always so many pay
        self._coasting: dict[int, Coasting] = {}  # by number of texts
        self._plain_run = self._work = 0  # cycles without drafts in a row, and with
        self._look, self._looked = 0, False  # plain cycles to come, whatever pays; and whether there ever were any
        self._rest = 0  # plain cycles until the next trial
        self._patience = self.SHORTEST_REST  # no more of them than this, which doubles with every trial in vain
        # What is expected of a cycle: see `_estimate`.
        self._estimated_for, self._best, self._rate = 0, 0, 0.0
        self._achieved = [0.0, 0.0]  # tokens of the last cycles with drafts, and those that were expected of them
        self._acceptance: list[float] = []
        self._expected: list[float] = []
        self._costs: list[float] = []
        self._demanded: dict[int, float] = {}  # see `_demand`
        self._left: list[int] = []  # of each text, when the cycle began
        # Of this cycle's drafts.
        self._tokens: list[list[int]] = []  # position, text → the token drafted after
        self._bins: list[list[int]] = []  # position, text → bin of confidence
        self._alive: list[float] = []  # text → s

    def wants_another(self, drafted: int, tokens: list[int], left: list[int], longest: int) -> bool:
        """See `DraftLength`."""
        if drafted == 0:
            self._left, self._tokens, self._bins, self._alive = left, [], [], [1.0] * len(tokens)
            shorter, self._rest_seconds.length = longest < self._rest_seconds.length, longest
            if self._estimated_for and (shorter or self._estimated_for != len(tokens)):
                self._begin_with(len(tokens))
        self._tokens.append(tokens)
        if self._planned is not None:
            return drafted < self._planned
        least = max(min(self._best, self.LEAST), 1)
        return drafted < least or (drafted < self._longest and self._pays(drafted, left))

    def saw_draft(self, logits_BV: Tensor, q: Tensor) -> None:
        """See `DraftLength`."""
        if self._coasts:
            return
        chances_BV = q if q.is_floating_point() else logits_BV.float().softmax(-1)
        confidences = chances_BV.amax(-1).tolist()
        bins = [min(int(confidence * self.BINS), self.BINS - 1) for confidence in confidences]
        self._bins.append(bins)
        self._alive = [
            s * self._after(token, self._confident(b))
            for s, token, b in zip(self._alive, self._tokens[-1], bins, strict=True)
        ]

    def saw_cycle(self, accepted: list[int], drafted: list[int], draft_seconds: list[float], rest: float) -> None:
        """See `DraftLength`."""
        self._cycles += 1
        self._texts, steps = len(accepted), len(draft_seconds)
        self._plain_run, self._work = (0, self._work + 1) if steps else (self._plain_run + 1, 0)
        warm = steps or self._plain_run > self.COLD
        if warm or self._cycles <= len(self.FIRST) or not self._rest_seconds.has_about(self._texts):
            self._rest_seconds.add(self._texts, steps, rest)
        if steps:
            self._draft_seconds.add(self._texts, 0, sum(draft_seconds) / steps)
            self._count(accepted, drafted)
        if self._cycles < len(self.FIRST):
            self._planned = min(self.FIRST[self._cycles], self._longest)
            return
        if steps and not self._judge(accepted, sum(draft_seconds) + rest):
            return
        if steps and self._estimated_for == self._texts:
            self._compare(len(accepted) + sum(accepted), steps)
        trial = steps and self._planned is not None
        if trial or self._texts != self._estimated_for or self._cycles % self.ESTIMATE_EVERY == 0:
            self._estimate()
        self._plan(len(accepted) + sum(accepted), sum(draft_seconds) + rest, steps)
        self._coast()

    def _coast(self) -> None:
        """Where the next cycle is to draft while it pays, and to judge that is not worth its time: do not."""
        coasting = self._coasting.get(self._texts)
        self._coasts = self._planned is None and coasting is not None and coasting.drafts is not None
        if self._coasts and coasting:
            self._planned = coasting.drafts

    def _judge(self, accepted: list[int], seconds: float) -> bool:
        """Note what it was worth to judge this cycle's drafts. Are the next ones to be planned?

        Not in the middle of a block that coasts.
        """
        coasting = self._coasting.setdefault(self._texts, Coasting())
        if self._coasts:
            return coasting.saw_coasted(seconds)
        if self._planned is not None or self._estimated_for != self._texts:
            return True
        steps, usual = len(self._bins), coasting.usual
        more = 0.0
        if usual is not None and len(self._tokens) > steps:
            for weight, stood, token in zip(self._weights(self._left), accepted, self._tokens[-1], strict=True):
                more += weight * (stood - self._would_stand(stood, steps, token, usual))
            more -= self._rate * (self._costs[steps] - self._costs[usual])
        coasting.saw_judged(steps, more, len(accepted) + sum(accepted), seconds)
        return True

    def _would_stand(self, stood: int, drafted: int, token: int, drafts: int) -> float:
        """Of another number of drafts, where so many stood of those drafted, the last one `token`.

        Of those that were not drafted it is the chance.
        """
        if stood < drafted or drafts <= drafted:
            return min(stood, drafts)
        alive = self._after(token, self._acceptance[drafted])
        tokens = stood + alive
        for chance in self._acceptance[drafted + 1 : drafts]:
            alive *= chance
            tokens += alive
        return tokens

    def _count(self, accepted: list[int], drafted: list[int]) -> None:
        """What stood, by position, by confidence, and by the token before."""
        self._drafting += 1
        if self._drafting % self.ESTIMATE_EVERY == 0:
            for counts in (*self._by_confidence, *self._by_position):
                counts[0] *= self.FADING
                counts[1] *= self.FADING
        for text, (stood, made) in enumerate(zip(accepted, drafted, strict=True)):
            for position in range(min(stood + 1, made)):  # later ones were never compared
                self._by_position[position][0] += position < stood
                self._by_position[position][1] += 1
                if self._coasts:
                    continue
                counts = self._by_confidence[self._bins[position][text]]
                counts[0] += position < stood
                counts[1] += 1
                counts = self._by_token.setdefault(self._tokens[position][text], [0.0, 0.0])
                counts[0] = counts[0] * self.TOKEN_FADING + (position < stood)
                counts[1] = counts[1] * self.TOKEN_FADING + 1

    def _begin_with(self, texts: int) -> None:
        """A cycle of other texts than the last: costs and rate are others.

        Where it is another number of texts, a look, which was for the last number, is over; and where drafting pays
        for so many it drafts at once, whatever was planned.
        """
        as_many, self._texts = self._texts == texts, texts
        self._estimate()
        if texts in self._coasting:
            self._coasting[texts].judge_again()
        if self._coasts:
            self._coasts, self._planned = False, None
        if as_many:
            return
        self._look = 0
        if self._rate * self._rest_seconds.at(texts) > texts:
            self._planned = None

    def _estimate(self) -> None:
        """a_i, E(k) and C(k); the best k ≥ 1, and its tokens per second, corrected by what was achieved.

        The product of the a_i says too much: later positions are seen in the cycles that go well.
        """
        draft = self._draft_seconds.at(self._texts)
        rest = self._rest_seconds.by_drafts(self._texts, self._longest)
        self._acceptance, self._costs, self._demanded = [], [rest[0]], {}
        self._expected = [float(self._texts)]
        self._estimated_for, self._best, self._rate = self._texts, 0, 0.0
        tokens = alive = float(self._texts)
        chance = self.HOPE
        for k, (stood, seen) in enumerate(self._by_position, start=1):
            # Of a position never seen it is the chance of the one before.
            chance = (stood + chance * self.WEIGHT) / (seen + self.WEIGHT)
            self._acceptance.append(chance)
            self._costs.append(k * draft + rest[k])
            alive *= chance
            tokens += alive
            self._expected.append(tokens)
            reached = self._by_position[max(k - 3, 0)][1] > 0.5  # no more than two beyond what was seen lately
            if reached and tokens > self._rate * self._costs[k]:
                self._best, self._rate = k, tokens / self._costs[k]

        achieved, expected = self._achieved
        trusted = self.TRUST * self._expected[self._best]
        self._rate *= (achieved + trusted) / (expected + trusted)

    def _compare(self, tokens: int, steps: int) -> None:
        """Note what a cycle with drafts gave beside what was expected of it."""
        for i, new in enumerate((tokens, self._expected[steps])):
            self._achieved[i] = self.ACHIEVED_FADING * self._achieved[i] + new

    def _plan(self, tokens: int, seconds: float, steps: int) -> None:
        """Decide about the next cycle. The last one gave `tokens` in `seconds`, with `steps` draft steps."""
        plain_seconds = self._rest_seconds.at(self._texts)
        if self._rate * plain_seconds > self._texts:
            explores = self._cycles % self.EXPLORE_EVERY == 0
            self._planned = min(steps + 2, self._longest) if explores else None
            self._patience = self.SHORTEST_REST
            lost = self.LOOK * (plain_seconds - self._texts / self._rate) / self._costs[self._best]
            if self._work >= max(lost / self.LOSS, self.SHORTEST_WORK):
                self._look = self.LOOK
        else:
            if steps:
                lost = seconds - tokens / self._texts * plain_seconds
                self._rest = max(min(int(lost / (self.LOSS * plain_seconds)), self._patience), self.SHORTEST_REST)
                self._patience = min(2 * self._patience, self.LONGEST_REST)
                if lost < 0:  # an easier text may have begun
                    self._rest, self._patience = 0, self.SHORTEST_REST
            else:
                self._rest -= 1
            self._planned = 0 if self._rest > 0 else min(2 * steps, self._longest) or self._best
        if not self._rest_seconds.has_about(self._texts):
            self._look = 1
        elif not self._look and self._rate * plain_seconds < self.NEAR * self._texts:
            known = self._rest_seconds.has_about(self._texts, self.LOOK - self.COLD)
            # Only the first look waits for nothing: where texts leave one by one, so many are soon so many no more.
            if not known and (self._work >= self.SHORTEST_WORK or not self._looked):
                self._look, self._looked = self.LOOK, True
        if self._look:
            self._look, self._planned = self._look - 1, 0

    def _pays(self, drafted: int, left: list[int]) -> bool:
        """Are more drafts worth their time?"""
        chance, hoped = self._acceptance[drafted], 0.0
        for weight, alive, token in zip(self._weights(left), self._alive, self._tokens[-1], strict=True):
            hoped += weight * alive * self._after(token, chance)
        if drafted not in self._demanded:
            self._demanded[drafted] = self._demand(drafted)
        return hoped > self._demanded[drafted]

    def _demand(self, drafted: int) -> float:
        """Σ w · s · a' from which drafting on pays: the least over m, as each draft after the next adds its chance."""
        least, alive, gain = math.inf, 1.0, 0.0
        for k in range(drafted + 1, self._longest + 1):
            gain += alive
            least = min(least, self._rate * (self._costs[k] - self._costs[drafted]) / gain)
            alive *= self._acceptance[k] if k < self._longest else 0.0
        return least

    def _weights(self, left: list[int]) -> list[float]:
        """What a token of each text is worth, 1 on average: `left` tells who lags, as far as it can be known."""
        if len(left) == 1:
            return [1.0]
        longest = max(left)
        lags = [math.exp((n - longest) / math.sqrt(longest)) for n in left]
        share = self.LAG * len(left) / sum(lags)
        return [1.0 - self.LAG + share * lag if n else 0.0 for n, lag in zip(left, lags, strict=True)]

    def _confident(self, b: int) -> float:
        """Acceptance of drafts whose confidence lies in bin b."""
        stood, seen = self._by_confidence[b]
        return (stood + self.HOPE) / (seen + 1.0)

    def _after(self, token: int, chance: float) -> float:
        """Acceptance of drafts made after this token, where `chance` is what is expected of any."""
        stood, seen = self._by_token.get(token, (0.0, 0.0))
        own = (stood + chance * self.TOKEN_WEIGHT) / (seen + self.TOKEN_WEIGHT)
        return min(own, self.TOKEN_GAIN * chance)


class Seconds:
    """What something costs, by how many texts it is done for and the drafts of each: medians of the last times.

    All at `length`, tokens of the longest text: costs grow with it by the factor 1 + growth · length, with that of
    GROWTHS by which measurements of the same texts and drafts agree best. Without a cache they grow nearly in
    proportion.
    """

    KEPT = 9
    OTHERS = 0.03  # what a measurement with another number of texts is worth
    LINE = 2.0  # measurements with so many drafts that the line is worth
    GROWTHS = (0.0, 1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 4)
    FADING = 0.98  # of disagreement (squared, in logarithms) with each measurement
    STEADY = 0.02  # of disagreement, by which any growth must be better than none

    def __init__(self) -> None:
        self.length = 0
        # Number of texts → drafts of each → …
        self._measured: dict[int, dict[int, deque[tuple[int, float]]]] = {}  # length and seconds
        self._medians: dict[int, dict[int, float]] = {}  # of seconds at length 0, as are these, where none are drafted:
        self._plain: dict[int, float] = {}
        self._growth = 0.0
        self._disagreement = [0.0] * len(self.GROWTHS)

    def add(self, texts: int, drafts: int, seconds: float) -> None:
        """One measurement."""
        kept = self._measured.setdefault(texts, {}).setdefault(drafts, deque(maxlen=self.KEPT))
        length, before = kept[-1] if kept else (0, 0.0)
        if self.length and before > 0.0 and seconds > 0.0:  # a coarse clock may say 0
            for i, growth in enumerate(self.GROWTHS):
                ratio = seconds / before * (1.0 + growth * length) / (1.0 + growth * self.length)
                self._disagreement[i] = self.FADING * self._disagreement[i] + math.log(ratio) ** 2
        kept.append((self.length, seconds))
        self._find_median(texts, drafts)

    def has_about(self, texts: int, times: int = 1) -> bool:
        """Was this number of texts measured so often without drafts, or one less than twice or more than half of it?"""
        return len(self._measured.get(texts, {}).get(0, ())) >= times or any(
            texts < 2 * other < 4 * texts and len(self._measured[other][0]) >= times for other in self._plain
        )

    def at(self, texts: int) -> float:
        """Seconds for so many texts without drafts, on the line between measured numbers, or the nearest."""
        return (1.0 + self._growth * self.length) * self._at_length_0(texts)

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
        grown = 1.0 + self._growth * self.length
        return [grown * s for s in seconds]

    def _find_growth(self) -> None:
        growing = min(range(1, len(self.GROWTHS)), key=self._disagreement.__getitem__)
        grows = self._disagreement[growing] + self.STEADY < self._disagreement[0]
        growth = self.GROWTHS[growing] if grows else 0.0
        if growth != self._growth:
            self._growth = growth
            for texts, measured in self._measured.items():
                for drafts in measured:
                    self._find_median(texts, drafts)

    def _find_median(self, texts: int, drafts: int) -> None:
        kept = sorted(seconds / (1.0 + self._growth * length) for length, seconds in self._measured[texts][drafts])
        # Of an even number the smaller one: what disturbs a measurement makes it longer, above all the first.
        self._medians.setdefault(texts, {})[drafts] = median = kept[(len(kept) - 1) // 2]
        if not drafts:
            self._plain[texts] = median

    def _at_length_0(self, texts: int) -> float:
        if texts in self._plain:
            return self._plain[texts]
        plain = sorted(self._plain)
        above = min(bisect_left(plain, texts), len(plain) - 1)
        below = above if plain[above] <= texts else max(above - 1, 0)
        low, high = self._plain[plain[below]], self._plain[plain[above]]
        share = (texts - plain[below]) / (plain[above] - plain[below]) if above > below else 0.0
        return low + share * (high - low)

    def _line(self, texts: int) -> tuple[float, float]:
        """Seconds of a cycle with drafts, at length 0: start and slope, by drafts of each text, of the best line.

        Its points are multiples of what as many texts cost without drafts, so that those of other numbers of texts are
        of use too. Cycles without drafts count for little: the first step up is often the steepest. But they give the
        line a direction where only one length was measured.
        """
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
