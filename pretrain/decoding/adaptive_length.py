"""How many tokens a cycle drafts: as many as pay."""

from __future__ import annotations

import itertools
import math
import operator
import statistics
from collections.abc import Callable
from time import perf_counter

from torch import Tensor

from pretrain.decoding.acceptance import Acceptance
from pretrain.decoding.coasting import Coasting
from pretrain.decoding.cycle import Cycle, Cycles
from pretrain.decoding.seconds import Seconds
from pretrain.decoding.stragglers import Stragglers
from pretrain.decoding.text_worth import TextWorth


class AdaptiveLength:
    """Draft on while it pays, from what was seen so far; not at all where no length does.

    Measured by the clock: D(k), the draft steps of a cycle of k drafts for the B texts of the batch, and V(k), the rest
    of it. With a_i the chance that draft i stands where those before it do, such a cycle gives
    E(k) = B · (1 + a_1 + a_1 a_2 + … + a_1 ⋯ a_k) tokens in C(k) = D(k) + V(k) seconds. The rule aims at the rate

        r = max over k of E(k) / C(k),

    which for k ≥ 1 is corrected by what cycles with drafts have achieved of what they were to achieve.
    Where that is k = 0 it decodes plainly, and no draft step runs: but for a trial now and then, ever more seldom,
    until what trials lose is LOSS of the time. One that gains is followed at once by another, twice as long if WHOLE of
    its drafts stood. Else it looks at plain decoding now and then, for LOOKS_LOSS of the time, and a cycle with j
    drafts, which are still alive with chances s (one of each text), drafts on if for any m ≥ 1 the tokens to be hoped
    for are worth their time,

        Σ w · s · a' · (1 + a_{j+2} + … + a_{j+2} ⋯ a_{j+m})  >  r · (C(j + m) − C(j)),

    the stopping rule that maximises the long-run rate (renewal-reward theorem). s is the product of the acceptance of
    such drafts, by their tokens and their confidence, where those foretell it, and a' is a_{j+1}, as far as nothing is
    known of drafts after the same token: see `Acceptance`. The weights w tell what a token of each text is worth:
    `TextWorth`; the a_i are weighted so too. Of the drafts of a batch, which goes on for its slowest text, a share
    counts: `Stragglers`.
    A cycle's first token is the target's own and never refused, and best spent on one that is hard to foresee. So a
    cycle drafts LEAST, unless fewer in every cycle are as good: cut short, it leaves the next one's first token to what
    could be foreseen, and the texts of a batch fall out of step. And where it gains less than its own time to judge
    each draft, LEAST are drafted without, or fewer; of one text as many as are clearly better, or, where nothing
    foretells what stands, as are the best: `Coasting`.

    Each decision falls before the draft is drawn, and is made from earlier ones alone; so it cannot depend on what it
    decides about, and the sampled distribution stays exact. It depends on the clock, so with temperature > 0 a seed
    does not fix the text. One rule may serve many generations, one after the other: what it learned stays of use.
    """

    LONGEST = 16
    FIRST = (0, 0, 0, 3)  # lengths of the first cycles, to learn the costs
    LOSS = 0.005  # of the time, by trials of drafts where they do not pay
    LOOKS_LOSS = 0.002  # of the time, by looks at plain decoding where they do
    LOOK, COLD = 8, 4  # plain cycles in a row to see what one costs; the first ones find cold caches, and do not count
    NEAR = 1.6  # speed-up over a cold plain cycle, below which a warm one must be known
    SHORTEST_WORK = 128  # cycles with drafts between two looks
    SHORTEST_REST, LONGEST_REST = 16, 512  # plain cycles between two trials
    WHOLE = 0.9  # of a trial's drafts
    LONGER = 2  # drafts that a trial, or an exploring cycle, has more than what is thought best
    EXPLORE, EXPLORE_EVERY = 8, 96  # cycles, one of which shows what a length costs that was seen less than
    TIMES = 3  # times, or not lately,
    PROMISING = 0.7  # and is thought to be so many times as fast as the best, or faster
    LEARN_EVERY = 4  # cycles: a small model's take less than a millisecond
    ESTIMATE_EVERY = 8  # judged cycles: what is expected of one changes more slowly than what is known of tokens
    PLAIN_ESTIMATE_EVERY = 16  # plain cycles: of drafts they tell nothing
    NEW = 8  # cycles of so many texts as never before, each of which is learned from at once
    SAMPLE_EVERY = 8  # cycles of those that coast: one is observed, to learn from it as from others
    TAIL = 48  # cycles, after a text left, that so many texts coast where more did: mostly too few to learn anything
    LEAST = 2  # drafts of a cycle that drafts, where fewer are not as good
    CLEARLY = 1.02  # times as fast as fewer they must be thought to be: what is thought of more is mostly too good
    ACHIEVED_FADING, TRUST = 0.97, 30.0  # of r as achieved; how many cycles the expected r is worth

    def __init__(self, longest: int = LONGEST, clock: Callable[[], float] = perf_counter) -> None:
        self._longest, self._clock = longest, clock
        self._draft_seconds = Seconds()  # of a cycle's first step
        self._later_draft = Seconds()  # of its others, over that
        self._rest_seconds = Seconds()  # of a cycle
        self._acceptance = Acceptance(longest)
        self._text_worth = TextWorth()
        self._stragglers = Stragglers()
        self._coasting: dict[int, Coasting] = {}  # by number of texts: see `_size`
        self._batch, self._shrank = 1, -self.TAIL  # texts the batch began with, and the cycle when one left last
        self._cycles, self._texts = 0, 1
        self._left = 0  # tokens that the text with the most of them has to come
        self._explored = 0  # cycle
        self._planned: int | None = self.FIRST[0]  # drafts of the next cycle; None: while it pays
        self._plain_run = self._work = 0  # cycles without drafts in a row, and with
        self._look, self._looked = 0, False  # plain cycles to come, whatever pays; and whether there ever were any
        self._rest = 0  # plain cycles until the next trial
        self._trials = 0  # after a rest
        self._patience = self.SHORTEST_REST  # no more of them than this, which doubles with every trial in vain
        self._new = 0  # see NEW
        # Not learned from yet.
        self._seen: list[Cycle] = []
        self._coasts, self._coasted, self._block_left = False, Cycles(), 0
        self._own = 0.0  # seconds that it took itself
        self._foregone: list[float] = []  # see `_gain`, of the cycles that coasted and were observed
        # What is expected of a cycle: see `_estimate`.
        self._estimated_for, self._best, self._rate = 0, 0, 0.0
        self._least = 1  # drafts of a judged cycle, at least
        self._few = self._fixed = 1  # of one that coasts, if none is much better; and whether or not one is
        self._achieved = [0.0, 0.0]  # tokens of the last cycles with drafts, and those that were expected of them
        self._stands: list[float] = []  # of each text, of 0 … longest drafts
        self._share = 1.0  # of those, that counts in the end: see `Stragglers`
        self._expected: list[float] = []
        self._costs: list[float] = []
        self._demanded: dict[int, float] = {}  # see `_demand`
        # Of this cycle, as in `Cycle`.
        self._observes = self._asks = True  # its drafts; and how confident each is
        self._worth: list[float] = []
        self._tokens: list[list[int]] = []
        self._bins: list[list[int]] = []
        self._alive: list[float] = []  # text → s, with as many drafts `_followed`
        self._followed = 0

    def wants_another(self, drafted: int, tokens: list[int], left: list[int], longest: int) -> bool:
        """See `DraftLength`."""
        if drafted == 0:
            start = self._clock()
            self._begin_cycle(left, longest)
            self._own += self._clock() - start
        if self._planned is not None and not self._observes:
            return drafted < self._planned  # of most drafts where it coasts, in no time
        start = self._clock()
        wants = self._decide(drafted, tokens, left)
        self._own += self._clock() - start
        return wants

    def saw_draft(self, logits_BV: Tensor, q: Tensor) -> None:
        """See `DraftLength`."""
        if self._asks:
            start = self._clock()
            chances_BV = q if q.is_floating_point() else logits_BV.float().softmax(-1)
            confidences = chances_BV.amax(-1).tolist()
            self._bins.append([self._acceptance.bin_of(confidence) for confidence in confidences])
            self._own += self._clock() - start

    def saw_cycle(self, accepted: list[int], drafted: list[int], draft_seconds: list[float], rest: float) -> None:
        """See `DraftLength`.

        What a cycle has to teach is learned every few cycles: most cycles are too short to be spent on it.
        """
        start = self._clock()
        self._cycles += 1
        if self._coasts:
            self._coasted.add(accepted, draft_seconds, rest)
            over = self._coasted.number >= self._block_left
        else:
            rests = self._planned == 0 and not self._look and self._rest > self.LEARN_EVERY
            judges = self._planned is None
            over = not (rests or judges) or self._new > 0 or self._cycles % self.LEARN_EVERY == 0
            self._new -= 1
        if not self._coasts or self._observes:
            self._texts, steps, seconds = len(accepted), len(draft_seconds), sum(draft_seconds)
            judged = self._planned is None and self._estimated_for == self._texts
            drafts = (self._worth, self._tokens, self._bins)
            length = self._rest_seconds.length
            first = draft_seconds[0] if draft_seconds else 0.0
            cycle = Cycle(accepted, drafted, steps, first, seconds, rest, length, judged, self._coasts, *drafts)
            self._seen.append(cycle)
            over = over or self._estimated_for != self._texts
        if over:
            self._learn()
        self._own += self._clock() - start

    def _decide(self, drafted: int, tokens: list[int], left: list[int]) -> bool:
        self._tokens.append(tokens)
        if self._planned is not None:
            # Of a batch only judged cycles are trusted: what it would gain it loses as its texts fall out of step.
            if len(tokens) == 1 and drafted == self._planned < self._longest:
                self._foregone.append(self._gain(drafted, left))
            return drafted < self._planned
        return drafted < self._least or (drafted < self._longest and self._pays(drafted, left))

    def _begin_cycle(self, left: list[int], longest: int) -> None:
        texts = len(left)
        others = self._are_others(left, longest)
        if others:
            self._end_batch()
            self._text_worth.begin(left, self._cycles)
            shared = self._rest_seconds.shared(texts, self._best)
            self._stragglers.begin(texts, max(left), self._cycles, shared)
            self._batch, self._shrank = texts, -self.TAIL
        elif texts < self._texts:
            self._shrank = self._cycles
        self._rest_seconds.length, self._left = longest, max(left)
        if self._estimated_for and (others or self._estimated_for != texts):
            self._begin_with(left)
        samples = (self._coasted.number if self._coasts else self._cycles) % (self.SAMPLE_EVERY * texts) == 0
        self._observes = self._planned is None or (self._coasts and samples)
        self._asks = self._observes and (samples or self._acceptance.foretells)
        if self._coasts and not self._observes:
            return  # most cycles are such, and what they do takes no time
        if self._planned != 0 or len(self._worth) != texts:
            self._worth = self._text_worth.of_each(left, self._cycles)
        self._tokens, self._bins, self._alive, self._followed = [], [], [1.0] * texts, 0

    def _are_others(self, left: list[int], longest: int) -> bool:
        """Are these other texts than the last? Texts of a batch come to have less left, and leave, and grow longer."""
        if max(left) > self._left or len(left) > self._texts:
            return True
        return longest < self._rest_seconds.length and len(left) == self._texts

    def _end_batch(self) -> None:
        if self._estimated_for:
            self._take_in()
            self._stragglers.end(self._left, self._cycles)

    def _begin_with(self, left: list[int]) -> None:
        """A cycle of other texts than the last, or of those of them that are left: costs and rate are others.

        Where it is another number of texts, a look, which was for the last number, is over; and where drafting pays
        for so many it drafts at once, whatever was planned.
        """
        self._take_in()
        texts = len(left)
        self._text_worth.shared = self._rest_seconds.shared(texts, self._best)
        as_many, self._texts = self._texts == texts, texts
        self._worth = self._text_worth.of_each(left, self._cycles)
        self._estimate()
        if self._planned:  # drafts, as many as the last texts were to try, or coasted with
            self._coasts, self._planned = False, None
        if not as_many:
            self._look = 0
            if not self._rest_seconds.has_about(texts):
                self._planned, self._new = 0, self.NEW
            elif self._drafting_pays:
                self._planned = None
        self._coast()

    def _learn(self) -> None:
        """From the cycles seen, and decide about the next ones."""
        last, cycles = self._seen[-1], len(self._seen)
        self._take_in()
        if self._cycles < len(self.FIRST):
            self._planned = min(self.FIRST[self._cycles], self._longest)
            return
        every = 1 if last.steps else self.PLAIN_ESTIMATE_EVERY
        if last.judged and self._new <= 0:
            every = self.ESTIMATE_EVERY
        if self._texts != self._estimated_for or self._cycles % every == 0:
            self._estimate()
        self._plan(last, cycles)
        self._coast()

    def _take_in(self) -> None:
        """Count what the last cycles gave, and what they took."""
        for cycle in self._seen:
            texts, steps = len(cycle.accepted), cycle.steps
            self._plain_run, self._work = (0, self._work + 1) if steps else (self._plain_run + 1, 0)
            warm = steps or self._plain_run > self.COLD
            if warm or self._cycles <= len(self.FIRST) or not self._rest_seconds.has_about(texts):
                self._rest_seconds.add(texts, steps, cycle.rest, cycle.longest)
            if steps:
                self._draft_seconds.add(texts, 0, cycle.first_draft_seconds)
                if steps > 1 and cycle.first_draft_seconds > 0.0:
                    later = (cycle.draft_seconds - cycle.first_draft_seconds) / (steps - 1)
                    self._later_draft.add(texts, 0, later / cycle.first_draft_seconds)
                self._acceptance.count(cycle)
                if not cycle.coasted:
                    self._count_for_the_batch([cycle.accepted], steps)
                if cycle.judged:
                    self._judge(cycle)
                if self._estimated_for == texts:
                    self._compare(cycle)
        coasted = self._coasted
        if coasted.number or (self._seen and all(cycle.judged for cycle in self._seen)):
            seconds = coasted.seconds or sum(cycle.seconds for cycle in self._seen)
            self._coasting_of(self._texts).took(coasted.number > 0, self._own / seconds)
        self._own = 0.0
        if coasted.number:
            self._count_for_the_batch(coasted.accepted, len(coasted.draft_seconds[0]))
            self._work += coasted.number - len(self._seen)
            value, plain = coasted.value(self._worth), self._texts * coasted.seconds / self._costs[0]
            coasting = self._coasting_of(self._texts)
            if self._foregone:
                coasting.expects(coasted.number * statistics.fmean(self._foregone), value)
            coasting.saw_coasted(coasted.number, value, plain)
        self._seen, self._coasted, self._foregone = [], Cycles(), []

    def _count_for_the_batch(self, accepted: list[list[int]], steps: int) -> None:
        if self._estimated_for == len(accepted[0]):
            self._stragglers.count(accepted, self._stands[steps])

    def _judge(self, cycle: Cycle) -> None:
        """Note what it was worth to judge this cycle's drafts."""
        texts = len(cycle.accepted)
        plain = texts * cycle.seconds / self._costs[0]
        self._coasting_of(texts).saw_judged(self._gained(cycle, self._fixed), cycle.value, plain)

    def _gained(self, cycle: Cycle, fixed: int) -> float:
        """How many tokens more a judged cycle gave than this number of drafts would have in as much time."""
        steps = cycle.steps
        gained = -self._rate * (self._costs[steps] - self._costs[fixed])
        # Where it made fewer, and all stood, the next ones would have by chance.
        missed = sum(itertools.accumulate(self._acceptance.at[steps:fixed], operator.mul))
        for stood, worth in zip(cycle.accepted, cycle.worth, strict=True):
            gained += self._share * worth * (max(stood - fixed, 0) - missed * (stood == steps))
        return gained

    def _compare(self, cycle: Cycle) -> None:
        """Note what a cycle with drafts gave beside what was expected of it."""
        expected = sum(cycle.worth) * (1.0 + self._stands[cycle.steps])
        for i, new in enumerate((cycle.value, expected)):
            self._achieved[i] = self.ACHIEVED_FADING * self._achieved[i] + new

    def _estimate(self) -> None:
        """E(k) and C(k); the best k ≥ 1, and its tokens per second, corrected by what was achieved.

        Tokens count by what they are worth.

        The product of the a_i says too much: later positions are seen in the cycles that go well.
        """
        self._acceptance.estimate()
        first = self._draft_seconds.at(self._texts)
        another = first * (self._later_draft.at(self._texts) or 1.0)
        rest = self._rest_seconds.by_drafts(self._texts, self._longest)
        self._costs = [seconds + (first + (k - 1) * another if k else 0.0) for k, seconds in enumerate(rest)]
        self._demanded = {}
        self._estimated_for, self._best, self._rate = self._texts, 0, 0.0
        self._stands = [0.0, *itertools.accumulate(itertools.accumulate(self._acceptance.at, operator.mul))]
        self._share = self._stragglers.share(self._left)
        worth = sum(self._worth)
        self._expected = [worth * (1.0 + self._share * stand) for stand in self._stands]
        for k in range(1, self._longest + 1):
            reached = self._acceptance.was_seen(max(k - 3, 0))  # no more than two beyond what was seen lately
            if reached and self._expected[k] > self._rate * self._costs[k]:
                self._best, self._rate = k, self._per_second(k)
        achieved, expected = self._achieved
        trusted = self.TRUST * self._expected[self._best]
        self._rate *= (achieved + trusted) / (expected + trusted)
        few = min(self.LEAST, self._longest)
        one, more = self._per_second(1), self._per_second(few)
        self._least = few if more > self.CLEARLY * one else 1
        # Where they are about as good, to coast with more shows as much as judging does, and takes no time.
        self._few = few if self.CLEARLY * more > one else 1

    @property
    def _drafting_pays(self) -> bool:
        return self._rate * self._costs[0] > self._expected[0]  # a coarse clock may say 0

    def _per_second(self, drafts: int) -> float:
        """Tokens, of so many drafts in every cycle."""
        return self._expected[drafts] / self._costs[drafts]

    def _plan(self, last: Cycle, cycles: int) -> None:
        """Decide about the next cycle, after so many that were learned from, and the last of them."""
        plain_seconds, plain_tokens = self._costs[0], self._expected[0]
        if self._drafting_pays:
            self._planned = None
            self._patience = self.SHORTEST_REST
            lost = self.LOOK * (plain_seconds - plain_tokens / self._rate) / self._costs[self._best]
            if self._work >= max(lost / self.LOOKS_LOSS, self.SHORTEST_WORK):
                self._look = self.LOOK
        else:
            self._rest_or_try(last, cycles, plain_seconds)
        if not self._rest_seconds.has_about(self._texts):
            self._look = 1
        elif not self._look and self._rate * plain_seconds < self.NEAR * plain_tokens:
            known = self._rest_seconds.has_about(self._texts, self.LOOK - self.COLD)
            # Only the first look waits for nothing: where texts leave one by one, so many are soon so many no more.
            if not known and (self._work >= self.SHORTEST_WORK or not self._looked):
                self._look, self._looked = self.LOOK, True
        if self._look:
            self._look, self._planned = self._look - 1, 0
        elif self._planned is None and self._explores_in() <= 0:
            self._planned, self._explored = self._least_known(), self._cycles

    def _explores_in(self) -> int:
        """Cycles until the next one that explores."""
        # Texts of a batch leave: so many as are left are soon fewer.
        known = self._texts < self._batch or self._rest_seconds.times(self._texts, self._least_known()) >= self.TIMES
        return self._explored + (self.EXPLORE_EVERY if known else self.EXPLORE) - self._cycles

    def _least_known(self) -> int:
        """That length, of those that may turn out to be the best, whose time was measured seldom, or not lately."""
        best, enough = self._best, self.PROMISING * self._per_second(self._best)
        lengths = range(1, min(best + self.LONGER, self._longest) + 1)
        candidates = [k for k in lengths if abs(k - best) <= 1 or self._per_second(k) >= enough]
        return min(candidates, key=lambda k: self._rest_seconds.known(self._texts, k, self.TIMES))

    def _rest_or_try(self, last: Cycle, cycles: int, plain_seconds: float) -> None:
        """Drafts do not pay: is the next cycle a trial of them?"""
        if last.steps:
            stood, shared = sum(last.accepted) / self._texts, self._text_worth.shared
            # Of one cycle alone the last text has what stood of the worst.
            gained = (1.0 - shared) * stood + shared * min(last.accepted)
            lost = last.seconds - (1.0 + gained) * plain_seconds
            self._rest = max(min(int(lost / (self.LOSS * plain_seconds)), self._patience), self.SHORTEST_REST)
            self._patience = min(2 * self._patience, self.LONGEST_REST)
            if last.seconds < (1.0 + self._share * stood) * plain_seconds:  # an easier text may have begun
                self._rest, self._patience = 0, self.SHORTEST_REST
        else:
            self._rest -= cycles
        if self._rest > 0:
            self._planned = 0
        elif last.steps:
            whole = sum(last.accepted) >= self.WHOLE * last.steps * self._texts
            self._planned = min(2 * last.steps, self._longest) if whole else self._best
        else:
            self._trials += 1
            # What longer ones cost is a guess until it is tried, and may be a bad one.
            longer = 0 if self._trials % 2 else self.LONGER
            self._planned = min(self._best + longer, self._longest)

    def _coast(self) -> None:
        """Where the next cycle is to draft while it pays, and to judge that is not worth its time: do not."""
        own = decides = self._coasting_of(self._texts)
        if not own.knows and self._cycles < self._shrank + self.TAIL:
            larger = (n for n in sorted(self._coasting) if self._size(self._texts) < n <= self._size(self._batch))
            decides = next((self._coasting[n] for n in larger if self._coasting[n].knows), own)
        # A batch is judged also by which of its texts lag.
        own.blind = self._texts == 1 and not self._acceptance.anything_foretells
        own.saw_best(self._per_second(self._best) / self._per_second(self._few))
        alone = self._texts == 1 and decides is own  # a batch's best number changes with which of its texts lag
        # Where nothing foretells a draft, nothing speaks for few.
        self._fixed = max(self._best, 1) if alone and (own.blind or not own.is_nearly_best) else self._few
        may = self._drafting_pays and (alone or decides.is_nearly_best)
        self._coasts = self._planned is None and may and decides.coasts
        if self._coasts:
            block = own.left if decides is own else Coasting.BLOCK
            self._planned, self._block_left = self._fixed, max(min(block, self._explores_in()), 1)

    def _coasting_of(self, texts: int) -> Coasting:
        size = self._size(texts)
        if size not in self._coasting:
            self._coasting[size] = Coasting(texts)
        return self._coasting[size]

    def _size(self, texts: int) -> int:
        """Numbers of texts that differ little share what they know about coasting."""
        return round(math.log2(texts))

    def _pays(self, drafted: int, left: list[int]) -> bool:
        """Are more drafts worth their time?"""
        if drafted not in self._demanded:
            self._demanded[drafted] = self._demand(drafted)
        return self._hoped(drafted, left) > self._demanded[drafted]

    def _gain(self, drafted: int, left: list[int]) -> float:
        """Tokens that more drafts are expected to give above what is worth their time, at best; 0 where none pay."""
        hoped, most, alive, drafts = self._hoped(drafted, left), 0.0, 1.0, 0.0
        for k in range(drafted + 1, self._longest + 1):
            drafts += alive
            most = max(most, hoped * drafts - self._rate * (self._costs[k] - self._costs[drafted]))
            alive *= self._acceptance.at[k] if k < self._longest else 0.0
        return most

    def _hoped(self, drafted: int, left: list[int]) -> float:
        """Σ w · s · a', as far as it counts in the end."""
        acceptance = self._acceptance
        for position in range(self._followed, drafted):
            bins = self._bins[position] if self._asks else None
            chances = acceptance.of_drafts(position, self._tokens[position], self._tokens[position + 1], bins)
            self._alive = [s * chance for s, chance in zip(self._alive, chances, strict=True)]
        self._followed = drafted
        chance, hoped = acceptance.at[drafted], 0.0
        for n, worth, alive, token in zip(left, self._worth, self._alive, self._tokens[drafted], strict=True):
            if n:
                hoped += worth * alive * acceptance.after(token, chance)
        return self._share * hoped

    def _demand(self, drafted: int) -> float:
        """The least over m of what is to be hoped for of one draft: each one after the next adds its chance."""
        least, alive, gain = math.inf, 1.0, 0.0
        for k in range(drafted + 1, self._longest + 1):
            gain += alive
            least = min(least, self._rate * (self._costs[k] - self._costs[drafted]) / gain)
            alive *= self._acceptance.at[k] if k < self._longest else 0.0
        return least
