from __future__ import annotations

import itertools
import random
import statistics

import pytest
import torch
from draft_length_helpers import CONFIDENT, NO_CHANCES, computing, flat, mean_late, rate, run, step_up

from pretrain.decoding import AdaptiveLength, FixedLength
from pretrain.decoding.draft_length import DraftLength


@pytest.mark.parametrize("verify", [flat, step_up, computing])
@pytest.mark.parametrize(("chance", "cost"), [(0.9, 0.05), (0.7, 0.1), (0.8, 0.3), (0.5, 0.05), (0.2, 0.4)])
@pytest.mark.parametrize("texts", [1, 8])
def test_is_nearly_as_fast_as_the_best_fixed_length_none_included(chance, cost, verify, texts):
    lengths, _ = run(lambda _: chance, 800, cost, verify, texts=texts)
    best = max(rate([k], chance, cost, verify) for k in range(AdaptiveLength.LONGEST + 1))
    # Where the first draft is dear and the next ones are not, bad luck at the start is found out slowly.
    assert rate(lengths[200:], chance, cost, verify) > (0.9 if verify is step_up else 0.95) * best


@pytest.mark.parametrize("texts", [1, 8])
def test_where_drafting_never_pays_it_costs_next_to_nothing_from_the_start(texts):
    lengths, _ = run(lambda _: 0.3, 2000, 0.3, computing, texts=texts)
    for cycles, share in ((100, 0.93), (2000, 0.985)):
        assert rate(lengths[:cycles], 0.3, 0.3, computing) > share
    trials = [number for number, length in enumerate(lengths) if length]
    rests = [b - a for a, b in itertools.pairwise(trials)]
    assert 3 < len(rests) < 40 and max(rests) >= 4 * rests[0]
    assert len({lengths[trial] for trial in trials[1:]}) > 1  # what longer ones cost is tried too


def test_a_plain_cycle_asks_for_no_draft_and_looks_at_no_logits():
    _, rule = run(lambda _: 0.0, 300, 0.5)
    rule.saw_draft = lambda *_: pytest.fail("nothing is drafted")
    assert rule._planned == 0 and not rule.wants_another(0, [0], [1000], 1)


def test_cheap_sure_drafts_run_long_and_no_longer_than_they_may():
    long, _ = run(lambda _: 1.0, 300, 0.02)
    assert mean_late(long) > AdaptiveLength.LONGEST - 1
    few, _ = run(lambda _: 1.0, 300, 0.02, rule=AdaptiveLength(2))
    assert max(few) == 2 and mean_late(few) > 1.9


def test_tries_again_after_giving_up():
    _, rule = run(lambda _: 0.0, 200, draft_seconds=0.3)
    lengths, _ = run(lambda _: 1.0, 700, draft_seconds=0.3, rule=rule)
    assert mean_late(lengths) > 4


def test_a_trial_that_gains_is_followed_at_once_by_one_twice_as_long():
    """A hard text turned drafting off; the next one is easy, and every draft of it stands."""
    _, rule = run(lambda _: 0.1, 300, 0.3, step_up)
    lengths, _ = run(lambda _: 1.0, 300, 0.3, step_up, rule=rule)
    first = next(number for number, length in enumerate(lengths) if length)
    trial = lengths[first]
    assert lengths[first : first + 3] == [trial, 2 * trial, 4 * trial]
    assert mean_late(lengths[first : first + 80]) > 8


def test_a_trial_that_gains_by_luck_is_not_followed_by_ever_longer_ones():
    """A draft gives half a token and takes 0.55 of a cycle's seconds: of eight texts many a cycle gains, none pays."""
    for seed in range(3):
        lengths, _ = run(lambda _: 0.5, 2000, 0.3, lambda k: 1.0 + 0.25 * k, texts=8, seed=seed)
        assert lengths.count(0) > 1000 and len(lengths) - lengths.count(0) > 20
        assert max(lengths[50:]) <= 1 + AdaptiveLength.LONGER


@pytest.mark.parametrize("vocabulary", [1, 50, 4096])
def test_stops_where_a_position_is_never_accepted(vocabulary):
    """However often each token came before, after which drafts stood at other positions."""
    lengths, _ = run(lambda position: 0.95 if position < 3 else 0.0, 400, 0.1, vocabulary=vocabulary)
    assert 2.5 <= mean_late(lengths) <= 3.6


def test_drafts_longer_in_cycles_whose_drafts_are_sure():
    """Confidence tells which cycles' drafts stand; positions alone do not."""
    rule, chance, words = AdaptiveLength(), random.Random(0), random.Random(1)
    lengths: dict[bool, list[int]] = {True: [], False: []}
    for _ in range(800):
        sure, drafted = chance.random() < 0.5, 0
        while rule.wants_another(drafted, [words.randrange(50)], [1000], 1):
            rule.saw_draft(torch.tensor([[5.0 if sure else 0.5, 0.0, 0.0]]), NO_CHANCES)
            drafted += 1
        accepted = next((i for i in range(drafted) if chance.random() >= (0.98 if sure else 0.3)), drafted)
        rule.saw_cycle([accepted], [drafted], [0.15] * drafted, 1.0)
        lengths[sure].append(drafted)
    assert mean_late(lengths[True]) > mean_late(lengths[False]) + 4


@pytest.mark.parametrize("texts", [1, 8])
@pytest.mark.parametrize("tells", [True, False])
def test_asks_how_confident_drafts_are_only_where_that_tells(tells, texts):
    """A pass over the vocabulary for each draft is worth its time only where it foretells what stands."""
    rule, chance, words = AdaptiveLength(), random.Random(0), random.Random(1)
    asked = judged = 0
    for cycle in range(1200):
        sure = [chance.random() < 0.5 for _ in range(texts)]
        logits_BV, drafted = torch.tensor([[5.0 if each else 0.5, 0.0, 0.0] for each in sure]), 0
        while rule.wants_another(drafted, [words.randrange(50) for _ in sure], [1000] * texts, 1):
            rule.saw_draft(logits_BV, NO_CHANCES)
            drafted += 1
        chances = [(0.98 if each else 0.5) if tells else 0.75 for each in sure]
        stood = [next((i for i in range(drafted) if chance.random() >= each), drafted) for each in chances]
        if cycle >= 600 and (rule._planned is None or not tells):  # where nothing tells, one text alone coasts
            judged, asked = judged + 1, asked + rule._asks
        rule.saw_cycle(stood, [drafted] * texts, [0.15] * drafted, 1.0)
    assert judged > 200
    assert asked > 0.85 * judged if tells else 0 < asked < 1.5 * judged / (rule.SAMPLE_EVERY * texts)


def test_all_that_it_does_is_its_own_time():
    """A clock that ticks whenever it is read: each part takes one tick.

    To begin a cycle, each decision, each look at how confident a draft is, and to learn.
    """
    ticks = itertools.count()
    rule, seen = AdaptiveLength(clock=lambda: next(ticks)), 0
    for _ in range(200):
        judges, before = rule._planned is None, rule._own
        lengths, _ = run(lambda _: 0.8, 1, verify=flat, draft_seconds=0.05, rule=rule, seed=seen)
        if judges and rule._seen:  # else it has learned, and counts anew
            assert rule._own - before == 1 + lengths[0] + 1 + (lengths[0] if rule._bins else 0) + 1
            seen += 1
    assert seen > 30


def test_what_a_batch_achieves_is_held_against_what_is_expected_of_its_slow_texts():
    """Nine of ten drafts of the first text stand, three of the second's. What the rule takes itself counts nothing."""
    medians = []
    for seed in range(5):
        rule, chance, left, compared = AdaptiveLength(clock=lambda: 0.0), random.Random(seed), [0, 0], []
        for _ in range(2000):
            if not all(left):
                left = [400, 400]
            drafted = 0
            while rule.wants_another(drafted, [chance.randrange(50) for _ in range(2)], list(left), 1):
                rule.saw_draft(CONFIDENT.expand(2, -1), NO_CHANCES)
                drafted += 1
            stood = [next((i for i in range(drafted) if chance.random() >= p), drafted) for p in (0.9, 0.3)]
            rule.saw_cycle(stood, [drafted] * 2, [0.05] * drafted, 1.0)
            left = [max(n - 1 - each, 0) for n, each in zip(left, stood, strict=True)]
            compared.append((rule._worth[1] / rule._worth[0], rule._achieved[0] / max(rule._achieved[1], 1.0)))
        ratios, achieved = zip(*compared[500:], strict=True)
        assert statistics.median(ratios) > 1.5
        medians.append(statistics.median(achieved))
    assert statistics.median(medians) == pytest.approx(1.0, abs=0.08)
    assert max(medians) < 1.2  # as where all texts counted alike


def test_one_text_after_a_batch_is_one_text():
    _, rule = run(lambda _: 0.8, 200, 0.05, flat, texts=8)
    rule.wants_another(0, [1], [1001], 1)
    assert rule._expected[0] == 1.0


def test_ends_before_what_follows_a_token_that_foretells_nothing():
    """Tokens 0 … 9: after a 7 no draft ever stands, after the others nearly all do. No other sign tells them apart."""
    rule, chance = AdaptiveLength(), random.Random(0)
    went_on: dict[bool, list[bool]] = {True: [], False: []}
    for cycle in range(1200):
        words = [chance.randrange(10) for _ in range(AdaptiveLength.LONGEST + 1)]
        drafted = 0
        while rule.wants_another(drafted, [words[drafted]], [1000], 1):
            if cycle >= 300 and drafted >= rule.LEAST and rule._planned is None:
                went_on[words[drafted] == 7].append(True)
            rule.saw_draft(CONFIDENT, NO_CHANCES)
            drafted += 1
        if cycle >= 300 and rule.LEAST <= drafted < AdaptiveLength.LONGEST and rule._planned is None:
            went_on[words[drafted] == 7].append(False)
        stands = [word != 7 and chance.random() < 0.95 for word in words]
        accepted = next((i for i in range(drafted) if not stands[i]), drafted)
        rule.saw_cycle([accepted], [drafted], [0.1] * drafted, 1.0)
    assert len(went_on[True]) > 50 and statistics.mean(went_on[True]) < 0.1
    assert len(went_on[False]) > 500 and statistics.mean(went_on[False]) > 0.7


def test_drafts_for_the_text_that_lags_and_not_for_one_at_its_end():
    """The first text's drafts nearly always stand, the second's hardly ever."""
    rule, chance = AdaptiveLength(), random.Random(0)
    lengths: dict[tuple[int, int], list[int]] = {(900, 100): [], (500, 500): [], (100, 900): []}
    for cycle in range(900):
        drafted, left = 0, list(lengths)[cycle % 3]
        while rule.wants_another(drafted, [1, 2], list(left), 1):
            rule.saw_draft(CONFIDENT.expand(2, -1), NO_CHANCES)
            drafted += 1
        accepted = [next((i for i in range(drafted) if chance.random() >= p), drafted) for p in (0.95, 0.1)]
        rule.saw_cycle(accepted, [drafted, drafted], [0.2] * drafted, 1.0)
        lengths[left].append(drafted)
    first, both, second = map(mean_late, lengths.values())
    # Where it is as far as the other the first is worth as much: a third draft gives 0.95 ** 3 tokens, and takes 0.8.
    assert first > 8 and second < 2.5 <= both < first - 2


def test_leaves_a_token_that_is_hard_to_foresee_to_the_next_cycle():
    """Every third token is foreseen in 7 of 10 times, the others always; two drafts are best, and begin with it.

    A third draft seems to pay in each cycle (8 texts · 0.7 tokens > 24 tokens a second · 0.2 s). But where it stands,
    the next cycle begins with a token that would have been foreseen, and the hard one is soon among the drafts.
    """

    def speed(rule: DraftLength, seed: int) -> float:
        chance, places, tokens, seconds = random.Random(seed), [0] * 8, 0, 0.0
        for cycle in range(1200):
            drafted = 0
            while rule.wants_another(drafted, [(place + drafted) % 3 for place in places], [1000] * 8, 1):
                rule.saw_draft(CONFIDENT.expand(8, -1), NO_CHANCES)
                drafted += 1
            stands = [[(place + i) % 3 > 0 or chance.random() < 0.7 for i in range(1, 17)] for place in places]
            accepted = [next((i for i in range(drafted) if not row[i]), drafted) for row in stands]
            places = [place + 1 + stood for place, stood in zip(places, accepted, strict=True)]
            rule.saw_cycle(accepted, [drafted] * 8, [0.01] * drafted, 0.6 + 0.19 * drafted)
            if cycle >= 200:
                tokens, seconds = tokens + 8 + sum(accepted), seconds + 0.6 + 0.2 * drafted
        return tokens / seconds

    two = speed(FixedLength(2), 0)
    assert speed(FixedLength(3), 0) < 0.97 * two
    assert min(speed(AdaptiveLength(), seed) for seed in range(4)) > 0.985 * two


def test_coasts_with_one_draft_and_looks_what_a_second_gives():
    """At first it never stands; then it does, and one draft is not enough."""
    rule, late = AdaptiveLength(), []
    for second in (0.1, 0.9):
        coasts, drafts = 0, []
        for cycle in range(600):
            drafts += run(lambda i, at=second: 0.9 if i == 0 else at, 1, 0.2, flat, rule=rule, texts=8, seed=cycle)[0]
            coasts += rule._coasts
        late.append(statistics.mean(drafts[200:]))
        if second == 0.1:
            assert statistics.median(drafts[100:]) == 1 and coasts > 300
            assert 1 <= drafts[100:].count(2) < 40
    assert late[0] < 1.1 and late[1] > 1.8


def test_keeps_texts_in_step_where_every_third_token_cannot_be_foreseen():
    """After two drafts a cycle's first token, the target's own, is that third one; after one draft it is wasted.

    Eight texts that go on so but for a token in fifty; two drafts are best, and bring all of them in step.
    """

    def seconds(drafts: int) -> float:
        return 8.0 + 4.5 * drafts

    def per_second(rule) -> float:
        chance, places, tokens, time = random.Random(0), [0] * 8, 0, 0.0
        for cycle in range(600):
            drafted = 0
            # The token drafted after tells nothing: else the rule would see where a third one comes.
            while rule.wants_another(drafted, [chance.randrange(4096) for _ in places], [1000] * 8, 1):
                rule.saw_draft(CONFIDENT.expand(8, -1), NO_CHANCES)
                drafted += 1
            stands = [[(place + i) % 3 > 0 and chance.random() < 0.98 for i in range(1, 17)] for place in places]
            accepted = [next((i for i in range(drafted) if not row[i]), drafted) for row in stands]
            places = [place + 1 + stood for place, stood in zip(places, accepted, strict=True)]
            rule.saw_cycle(accepted, [drafted] * 8, [0.0] * drafted, seconds(drafted))
            if cycle >= 200:
                tokens, time = tokens + 8 + sum(accepted), time + seconds(drafted)
        return tokens / time

    fixed = [per_second(FixedLength(length)) for length in range(6)]
    assert fixed.index(max(fixed)) == 2
    assert per_second(AdaptiveLength()) > 0.98 * fixed[2]


def test_a_smaller_batch_is_decided_about_anew():
    lengths, rule = run(lambda _: 0.8, 300, 0.2, computing, texts=8)
    assert mean_late(lengths) < 0.5
    alone, _ = run(lambda _: 0.8, 300, 0.2, flat, rule=rule, texts=1)
    assert mean_late(alone) > 2


def test_a_look_ends_with_the_batch():
    rule = AdaptiveLength()
    for cycle in range(80):
        run(lambda _: 0.75, 1, 0.1, step_up, rule=rule, texts=8, seed=cycle, left=1000 - 3 * cycle)
    for cycle in range(200):
        run(lambda _: 0.75, 1, 0.1, step_up, rule=rule, seed=cycle)
        if cycle > 20 and rule._look >= 4:
            break
    assert rule._look >= 4 and rule._planned == 0
    begins, _ = run(lambda _: 0.75, 3, 0.1, step_up, rule=rule, texts=8)
    assert all(begins)


def test_a_text_that_leaves_does_not_make_drafts_look_better():
    """Eight texts give more tokens a second than seven; both rates must be of as many."""
    for seed in range(100):
        lengths, rule = run(lambda _: 0.6, 380, 0.65, flat, texts=8, seed=seed)
        if any(lengths[-10:]) and not any(lengths[-3:]):  # a trial, and then it rests
            break
    assert any(lengths[-10:]) and rule._rest > 8
    fewer, _ = run(lambda _: 0.6, 8, 0.65, flat, rule=rule, texts=7)
    assert fewer == [0] * 8


@pytest.mark.parametrize(
    ("left", "longest", "others"),
    [
        ([50, 30, 20], 121, False),  # the same texts a cycle later
        ([50, 30], 110, False),  # the longest left
        ([60, 30], 90, True),  # more to come than before
        ([50, 30, 20], 90, True),  # none left, and all are shorter
        ([50, 30, 20, 10], 121, True),  # one more
    ],
)
def test_tells_other_texts_from_those_that_are_left(left, longest, others):
    rule = AdaptiveLength()
    rule.wants_another(0, [1, 2, 3], [52, 32, 22], 120)
    rule.saw_cycle([0, 0, 0], [0, 0, 0], [], 1.0)
    rule.wants_another(0, [1] * len(left), left, longest)
    assert (rule._text_worth._began == rule._cycles) == others
    assert rule._batch == (len(left) if others else 3)
