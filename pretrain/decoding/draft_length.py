"""How many tokens a cycle drafts: a fixed number, or as many as pay."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from pretrain.decoding.coasting import Coasting
from pretrain.decoding.seconds import Seconds


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


@dataclass(slots=True)
class _Cycle:
    """What there is to learn from a cycle."""

    accepted: list[int]
    drafted: list[int]
    steps: int
    draft_seconds: float
    rest: float
    longest: int
    judged: bool
    coasted: bool
    worth: list[float]  # of each text's tokens
    tokens: list[list[int]]  # position, text → the token drafted after
    bins: list[list[int]]  # position, text → bin of confidence

    @property
    def made(self) -> int:
        """Tokens of all texts."""
        return len(self.accepted) + sum(self.accepted)

    @property
    def seconds(self) -> float:
        """All of its time."""
        return self.draft_seconds + self.rest


@dataclass(slots=True)
class _Coasted:
    """Cycles that were not judged, taken together."""

    cycles: int = 0
    tokens: float = 0.0  # by what they are worth
    seconds: float = 0.0
    drafting: list[float] = field(default_factory=list)  # seconds of all draft steps, by cycle

    def add(self, tokens: float, draft_seconds: float, rest: float) -> None:
        """One more."""
        self.cycles += 1
        self.tokens += tokens
        self.seconds += draft_seconds + rest
        self.drafting.append(draft_seconds)


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
    LOOKS_LOSS = 0.002
    LOOK, COLD = 8, 4  # plain cycles in a row to see what one costs; the first ones find cold caches, and do not count
    NEAR = 1.6  # speed-up over a cold plain cycle, below which a warm one must be known
    SHORTEST_WORK = 128  # cycles with drafts between two looks
    SHORTEST_REST, LONGEST_REST = 16, 512  # plain cycles between two trials
    EXPLORE_EVERY = 96  # cycles, one drafts two tokens more than the last
    ESTIMATE_EVERY = 4  # cycles: a small model's take less than a millisecond
    SAMPLE = 1  # cycle of a block that coasts, from which is learned as from others
    LEAST = 2  # drafts of a cycle that drafts, where no fewer are the best of all fixed numbers
    FADING = 0.96  # of counts, in as many cycles that draft: what was given up is tried again some time
    ACHIEVED_FADING, TRUST = 0.97, 30.0  # of r as achieved; how many cycles the expected r is worth
    BINS = 10
    DEPTHS, DEEPER = 4, 3.0  # the deeper a draft, the less its confidence tells; each depth is of two positions, and is
    # taken to be as the one before it, which is worth so many observations
    HOPE, WEIGHT = 0.8, 6.0  # acceptance before any was seen, and how many observations that is worth
    ALONE = [1.0]
    RATED = 4.0  # cycles of a text that its rate is taken to be the others', and
    SPREAD = 0.7  # standard deviation of the cycles that a text takes more than another, over the root of theirs
    TOKEN_FADING = 0.9  # of a token's counts, with each draft made after it
    TOKEN_WEIGHT = 4.0  # of its own drafts that the acceptance of all is worth, where a token was seen before
    TOKEN_GAIN = 2.0  # times that acceptance are the most its own may be: a position where none stands is no token's

    def __init__(self, longest: int = LONGEST) -> None:
        self._longest = longest
        self._draft_seconds = Seconds()  # of a step
        self._rest_seconds = Seconds()  # of a cycle
        self._by_position = [[0.0, 0.0] for _ in range(longest)]  # accepted, seen
        self._by_token: dict[int, list[float]] = {}
        self._by_confidence = [[[0.0, 0.0] for _ in range(self.BINS)] for _ in range(self.DEPTHS)]
        self._cycles, self._drafting, self._texts = 0, 0, 1
        self._planned: int | None = self.FIRST[0]  # drafts of the next cycle; None: while it pays
        self._coasts = False  # so many because nearly always so many pay
        self._coasting: dict[int, Coasting] = {}  # by number of texts
        self._plain_run = self._work = 0  # cycles without drafts in a row, and with
        self._look, self._looked = 0, False  # plain cycles to come, whatever pays; and whether there ever were any
        self._rest = 0  # plain cycles until the next trial
        self._patience = self.SHORTEST_REST  # no more of them than this, which doubles with every trial in vain
        # What is expected of a cycle: see `_estimate`.
        self._estimated_for, self._best, self._rate, self._least = 0, 0, 0.0, 1
        self._achieved = [0.0, 0.0]  # tokens of the last cycles with drafts, and those that were expected of them
        self._acceptance: list[float] = []
        self._confident = [[self.HOPE] * self.BINS] * self.DEPTHS  # depth, bin of confidence → acceptance
        self._expected: list[float] = []
        self._costs: list[float] = []
        self._demanded: dict[int, float] = {}  # see `_demand`
        self._worth: list[float] = []  # of each text's tokens in this cycle
        # Of this cycle's drafts, as in `_Cycle`.
        self._tokens: list[list[int]] = []
        self._bins: list[list[int]] = []
        self._alive: list[float] | None = None  # text → s, with the first drafts `_followed`
        self._followed = 0
        self._seen: list[_Cycle] = []  # nothing learned from them yet
        self._coasted, self._block_left = _Coasted(), 0
        self._room, self._began = 0, 0  # tokens that each text of this batch may have, and the cycle when it began
        self._shared = 0.5
        self._observes = True  # this cycle's drafts
        self._new = 0  # cycles of so many texts as never before, each to be learned from at once

    def wants_another(self, drafted: int, tokens: list[int], left: list[int], longest: int) -> bool:
        """See `DraftLength`."""
        if drafted == 0:
            self._tokens, self._bins, self._alive = [], [], None
            shorter, self._rest_seconds.length = longest < self._rest_seconds.length, longest
            if shorter or self._room < max(left) or self._texts < len(tokens):
                self._room, self._began = max(left), self._cycles
            if self._estimated_for and (shorter or self._estimated_for != len(tokens)):
                self._begin_with(len(tokens))
            self._worth = self._weights(left)
            self._observes = self._planned is None or (self._coasts and self._coasted.cycles < self.SAMPLE)
        if self._observes:
            self._tokens.append(tokens)
        if self._planned is not None:
            return drafted < self._planned
        return drafted < self._least or (drafted < self._longest and self._pays(drafted, left))

    def saw_draft(self, logits_BV: Tensor, q: Tensor) -> None:
        """See `DraftLength`."""
        if not self._observes:
            return
        chances_BV = q if q.is_floating_point() else logits_BV.float().softmax(-1)
        confidences = chances_BV.amax(-1).tolist()
        self._bins.append([min(int(confidence * self.BINS), self.BINS - 1) for confidence in confidences])

    def saw_cycle(self, accepted: list[int], drafted: list[int], draft_seconds: list[float], rest: float) -> None:
        """See `DraftLength`.

        What a cycle has to teach is learned every few cycles: most cycles are too short to be spent on it.
        """
        self._cycles += 1
        self._texts = len(accepted)
        if self._coasts:
            self._coasted.add(_worth(accepted, self._worth), sum(draft_seconds), rest)
            over = self._coasted.cycles >= self._block_left
        else:
            often = self._cycles % self.ESTIMATE_EVERY == 0 or self._new > 0
            over, self._new = self._planned is not None or often, self._new - 1
        if self._coasted.cycles <= self.SAMPLE:
            judged = self._planned is None and self._estimated_for == self._texts
            self._seen.append(
                _Cycle(
                    *(accepted, drafted, len(draft_seconds), sum(draft_seconds), rest, self._rest_seconds.length),
                    *(judged, self._coasts, self._worth, self._tokens, self._bins),
                )
            )
        if over or self._estimated_for != self._texts:
            self._learn()

    def _learn(self) -> None:
        """From the cycles seen, and decide about the next ones."""
        last = self._seen[-1]
        self._take_in()
        if self._cycles < len(self.FIRST):
            self._planned = min(self.FIRST[self._cycles], self._longest)
            return
        plain = not last.steps and self._cycles % self.ESTIMATE_EVERY
        if self._texts != self._estimated_for or not plain:
            self._estimate()
        self._plan(last)
        self._coast()

    def _take_in(self) -> None:
        """Count what the last cycles gave, and what they took."""
        seen = self._seen
        for cycle in seen:
            texts, steps = len(cycle.accepted), cycle.steps
            self._plain_run, self._work = (0, self._work + 1) if steps else (self._plain_run + 1, 0)
            warm = steps or self._plain_run > self.COLD
            if warm or self._cycles <= len(self.FIRST) or not self._rest_seconds.has_about(texts):
                self._rest_seconds.add(texts, steps, cycle.rest, cycle.longest)
            if steps:
                self._draft_seconds.add(texts, 0, cycle.draft_seconds / steps)
                self._count(cycle)
                self._judge(cycle)
                if self._estimated_for == texts:
                    self._compare(cycle)
        coasted, self._seen, self._coasted = self._coasted, [], _Coasted()
        if coasted.cycles:
            self._work += max(coasted.cycles - self.SAMPLE, 0)
            plain, step = texts * coasted.seconds / self._costs[0], statistics.median(coasted.drafting) / steps
            self._coasting_of(texts).saw_coasted(texts, coasted.cycles, coasted.tokens, plain, step)

    def _coasting_of(self, texts: int) -> Coasting:
        """Numbers of texts that differ little share what they know."""
        key = round(math.log2(texts))
        if key not in self._coasting:
            self._coasting[key] = Coasting(texts)
        return self._coasting[key]

    def _coast(self) -> None:
        """Where the next cycle is to draft while it pays, and to judge that is not worth its time: do not."""
        self._coasts = self._planned is None and self._least > 1 and self._coasting_of(self._texts).coasts
        if self._coasts:
            self._planned, self._block_left = self._least, self._coasting_of(self._texts).left

    def _judge(self, cycle: _Cycle) -> None:
        """Note what it was worth to judge this cycle's drafts."""
        if not cycle.judged:
            return
        texts, least = len(cycle.accepted), min(self.LEAST, self._longest)
        tokens, plain = _worth(cycle.accepted, cycle.worth), texts * cycle.seconds / self._costs[0]
        step = cycle.draft_seconds / cycle.steps
        self._coasting_of(texts).saw_judged(texts, self._gained(cycle), tokens, plain, step, self._costs[least])

    def _gained(self, cycle: _Cycle) -> float:
        """How many tokens more a judged cycle gave than the least number of drafts would have in as much time."""
        steps, least = cycle.steps, min(self.LEAST, self._longest)
        gained = -self._rate * (self._costs[steps] - self._costs[least])
        for text, (stood, worth) in enumerate(zip(cycle.accepted, cycle.worth, strict=True)):
            for position in range(least, stood):
                chance = self._after(cycle.tokens[position][text], self._acceptance[position])
                gained += worth * (1.0 + chance - self._mean)
            if stood == steps < least:  # it made fewer, and the next one would have stood by chance
                gained -= worth * self._acceptance[steps]
        return gained

    def _count(self, cycle: _Cycle) -> None:
        """What stood, by position, and where drafts were judged by confidence, and by the token before."""
        self._drafting += 1
        if self._drafting % self.ESTIMATE_EVERY == 0:
            # What is not tried because the cycle coasts is not forgotten.
            positions = self._by_position[: cycle.steps] if cycle.coasted else self._by_position
            for counts in itertools.chain(*self._by_confidence, positions):
                counts[0] *= self.FADING
                counts[1] *= self.FADING
        for text, (stood, made) in enumerate(zip(cycle.accepted, cycle.drafted, strict=True)):
            for position in range(min(stood + 1, made)):  # later ones were never compared
                stands = position < stood
                counts = self._by_position[position]
                counts[0] += stands
                counts[1] += 1
                if not cycle.bins:
                    continue
                counts = self._by_confidence[min(position // 2, self.DEPTHS - 1)][cycle.bins[position][text]]
                counts[0] += stands
                counts[1] += 1
                counts = self._by_token.setdefault(cycle.tokens[position][text], [0.0, 0.0])
                counts[0] = counts[0] * self.TOKEN_FADING + stands
                counts[1] = counts[1] * self.TOKEN_FADING + 1

    def _begin_with(self, texts: int) -> None:
        """A cycle of other texts than the last: costs and rate are others.

        Where it is another number of texts, a look, which was for the last number, is over; and where drafting pays
        for so many it drafts at once, whatever was planned.
        """
        self._take_in()
        as_many, self._texts = self._texts == texts, texts
        self._estimate()
        if self._coasts:
            self._coasts, self._planned = False, None
        if not as_many:
            self._look = 0
            if not self._rest_seconds.has_about(texts):
                self._planned, self._new = 0, 2 * self.ESTIMATE_EVERY
            elif self._rate * self._costs[0] > texts:
                self._planned = None
        self._coast()

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

        self._confident, expected, worth = [], [self.HOPE] * self.BINS, 1.0
        for bins in self._by_confidence:
            expected = [(stood + worth * e) / (seen + worth) for (stood, seen), e in zip(bins, expected, strict=True)]
            self._confident.append(expected)
            worth = self.DEEPER
        self._mean = sum(stood for stood, _ in self._by_position) / max(sum(seen for _, seen in self._by_position), 1.0)
        self._shared = self._rest_seconds.shared(self._texts, self._best)
        achieved, expected = self._achieved
        trusted = self.TRUST * self._expected[self._best]
        self._rate *= (achieved + trusted) / (expected + trusted)
        self._least = max(min(self._best, self.LEAST), 1)

    def _compare(self, cycle: _Cycle) -> None:
        """Note what a cycle with drafts gave beside what was expected of it."""
        for i, new in enumerate((cycle.made, self._expected[cycle.steps])):
            self._achieved[i] = self.ACHIEVED_FADING * self._achieved[i] + new

    def _plan(self, last: _Cycle) -> None:
        """Decide about the next cycle."""
        plain_seconds, steps = self._costs[0], last.steps
        if self._rate * plain_seconds > self._texts:
            explores = self._cycles % self.EXPLORE_EVERY == 0
            self._planned = min(steps + 2, self._longest) if explores else None
            self._patience = self.SHORTEST_REST
            lost = self.LOOK * (plain_seconds - self._texts / self._rate) / self._costs[self._best]
            if self._work >= max(lost / self.LOOKS_LOSS, self.SHORTEST_WORK):
                self._look = self.LOOK
        else:
            if steps:
                lost = last.seconds - last.made / self._texts * plain_seconds
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
        if self._alive is None:
            self._alive, self._followed = [1.0] * len(left), 0
        for position in range(self._followed, drafted):
            confident = self._confident[min(position // 2, self.DEPTHS - 1)]
            for text, (token, b) in enumerate(zip(self._tokens[position], self._bins[position], strict=True)):
                self._alive[text] *= self._after(token, confident[b])
        self._followed = drafted
        chance, hoped = self._acceptance[drafted], 0.0
        for n, weight, alive, token in zip(left, self._worth, self._alive, self._tokens[drafted], strict=True):
            if n:
                stands = self._after(token, chance)
                hoped += weight * alive * stands * (1.0 + stands - self._mean)
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
        """What a token of each text is worth, so that a cycle's tokens are worth their number in all.

        A batch takes Σ n_i / ρ_i cycles of one text, of n_i tokens to come and ρ_i a cycle, and has to go on for
        max n_i / ρ_i cycles; `_shared` of a cycle's time is for the latter.
        """
        if len(left) == 1:
            return self.ALONE
        cycles = self._cycles - self._began + self.RATED
        made = [self._room - n for n in left]
        prior = self.RATED * (sum(made) / (len(left) * max(cycles - self.RATED, 1)) or 1.0)
        rates = [(m + prior) / cycles for m in made]
        to_come = [n / rate for n, rate in zip(left, rates, strict=True)]
        last = max(to_come)
        late = [math.exp((cycles - last) / (self.SPREAD * math.sqrt(last))) for cycles in to_come]
        share, all_late = 1.0 - self._shared, sum(late)
        per_cycle = sum(rates) / len(left)
        return [
            per_cycle / rate * (share + self._shared * len(left) * each / all_late) if n else 0.0
            for n, rate, each in zip(left, rates, late, strict=True)
        ]

    def _after(self, token: int, chance: float) -> float:
        """Acceptance of drafts made after this token, where `chance` is what is expected of any."""
        stood, seen = self._by_token.get(token, (0.0, 0.0))
        own = (stood + chance * self.TOKEN_WEIGHT) / (seen + self.TOKEN_WEIGHT)
        return min(own, self.TOKEN_GAIN * chance)


def _worth(accepted: list[int], worth: list[float]) -> float:
    """Of the tokens of a cycle: `worth` tells that of each text's."""
    return sum(each * (1 + stood) for each, stood in zip(worth, accepted, strict=True))
