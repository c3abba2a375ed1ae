"""What `auto` knows of costs: of each length, of each number of texts, and as they change."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable

import pytest
from draft_length_helpers import CONFIDENT, NO_CHANCES, flat, mean_late, rate, run, step_up

from pretrain.decoding import AdaptiveLength
from pretrain.decoding.seconds import Seconds


def cold() -> Callable[[int], float]:
    """Plain cycles after one with drafts find cold caches: they take 1.4 seconds, and 1.0 from the fifth on."""
    plain_cycles = itertools.count()

    def seconds(drafts: int) -> float:
        nonlocal plain_cycles
        if drafts:
            plain_cycles = itertools.count()
            return 1.6
        return 1.4 if next(plain_cycles) < 4 else 1.0

    return seconds


@pytest.mark.parametrize(("draft_seconds", "pays"), [(0.5, False), (0.05, True)])
def test_plain_decoding_is_held_against_drafting_with_warm_caches(draft_seconds, pays):
    """Two tokens in 2.1 seconds are faster than one in 1.4, and slower than one in 1.0."""
    lengths, _ = run(lambda _: 1.0, 600, draft_seconds, cold(), AdaptiveLength(1))
    assert mean_late(lengths) > 0.8 if pays else mean_late(lengths) < 0.2
    if not pays:  # known early: the first look waits for nothing
        assert sum(lengths[20:60]) < 8


def test_looks_at_plain_decoding_cost_next_to_nothing_where_drafting_is_far_better():
    far, _ = run(lambda _: 0.95, 2000, 0.05, flat)
    near, _ = run(lambda _: 0.67, 2000, 0.1, step_up)
    assert 0 < far[20:].count(0) < 2000 / 40
    assert 4 * AdaptiveLength.LOOK <= near[20:].count(0) < 2000 / 5


def test_drafts_as_many_as_fill_a_block_where_costs_have_steps():
    """A verification of 1 … 3 tokens costs the same, and so does one of 4 … 6: two or five drafts, not three."""

    def blocks(drafts: int) -> float:
        return 1.0 + 0.4 * (drafts // 3)

    lengths, _ = run(lambda _: 0.8, 1000, 0.05, blocks)
    drafting = [length for length in lengths[200:] if length]
    assert drafting.count(2) + drafting.count(5) > 0.7 * len(drafting)
    assert rate(lengths[200:], 0.8, 0.05, blocks) > 0.95 * max(rate([k], 0.8, 0.05, blocks) for k in range(17))


def test_a_batch_of_more_texts_does_not_begin_with_the_costs_of_the_last_one():
    """The last text of a batch drafts long, as drafts cost it little; eight new texts pay for what they draft."""

    def eight(drafts: int) -> float:
        return 8.0 * (1.0 + 0.3 * drafts)

    def one(drafts: int) -> float:
        return 1.0 + 0.1 * drafts

    best = max(rate([k], 0.8, 0.02, one) for k in range(17))
    first, long = [], []
    for seed in range(5):
        lengths, rule = run(lambda _: 0.8, 200, 0.8, eight, texts=8, seed=seed)
        alone, _ = run(lambda _: 0.8, 60, 0.02, one, rule=rule, seed=seed, left=1001)
        begins, _ = run(lambda _: 0.8, 1, 0.8, eight, rule=rule, texts=8, seed=seed)
        assert 1 < mean_late(lengths) < 4
        assert rate(alone[30:], 0.8, 0.02, one) > 0.95 * best
        long.append(mean_late(alone))
        first += begins
    assert min(long) > 4 and statistics.mean(long) > 4.75
    assert 1 <= statistics.median(first) <= 5


def test_follows_costs_that_change():
    _, rule = run(lambda _: 0.8, 300, 0.05)
    dear, _ = run(lambda _: 0.8, 300, 0.9, rule=rule)
    assert mean_late(dear) < 0.5


def test_a_smaller_batch_costs_one_plain_cycle_where_drafting_is_far_better():
    _, rule = run(lambda _: 0.95, 200, 0.05, flat, texts=8)
    fewer, _ = run(lambda _: 0.95, 40, 0.05, flat, rule=rule, texts=2)
    assert fewer[0] == 0 and fewer.count(0) == 1


def test_every_number_of_texts_costs_one_plain_cycle_at_most_until_it_lasts():
    """Drafting gains little, so that plain decoding is looked at with warm caches; but not for each text's end."""
    lengths, rule = run(lambda _: 0.75, 1000, 0.1, step_up, texts=8)
    assert lengths.count(0) > 2 * AdaptiveLength.LOOK
    for texts in (5, 2, 1):
        fewer, _ = run(lambda _: 0.75, 12, 0.1, step_up, rule=rule, texts=texts)
        assert fewer.count(0) <= 1
    longer, _ = run(lambda _: 0.75, 150, 0.1, step_up, rule=rule, texts=1)
    assert longer.count(0) >= AdaptiveLength.LOOK


def test_one_slow_measurement_changes_nothing():
    seconds = Seconds()
    for value in (9.0, 1.0, 1.1):
        seconds.add(8, 0, value)
    assert seconds.at(8) == seconds.at(20) == 1.1 and seconds._line(8) == (1.1, 0.0)
    seconds.add(8, 0, 1.0)
    assert seconds.at(8) == 1.0
    seconds.add(8, 2, 3.0)
    start, slope = seconds._line(8)
    assert start + 2 * slope == pytest.approx(3.0) and slope == pytest.approx(1.0)
    seconds.add(8, 4, 2.0)
    assert seconds._line(8)[1] >= 0.0


def test_begins_a_new_text_with_what_short_texts_cost():
    """Without a cache a verification of a long text is dear, and many drafts pay; for a short one few do."""
    rule, chance = AdaptiveLength(), random.Random(0)
    first = []
    for _ in range(30):
        length = 10
        while length < 200:
            drafted = 0
            while rule.wants_another(drafted, [0], [1000], length):
                rule.saw_draft(CONFIDENT, NO_CHANCES)
                drafted += 1
            stood = next((i for i in range(drafted) if chance.random() >= 0.8), drafted)
            first += [(length, drafted)] if length == 10 or length > 150 else []
            rule.saw_cycle([stood], [drafted], [0.3] * drafted, 0.02 * length)
            length += 1 + stood
    short, long = ([drafted for at, drafted in first[40:] if (at == 10) == begins] for begins in (True, False))
    assert statistics.mean(short) <= 1 and statistics.mean(long) > 2.5


def test_what_drafts_cost_is_learned_from_other_numbers_of_texts_too():
    """Without a cache time grows with the texts, and hardly with the drafts; with many texts at once, with both."""
    for plain, start, slope in ((lambda n: 3.0 * n, 1.0, 0.02), (lambda n: 0.6 + 0.2 * n, 1.2, 0.25)):
        seconds = Seconds()
        for texts, drafts in ((8, 0), (8, 5), (3, 0), (3, 2), (3, 13), (1, 0), (1, 8)):
            seconds.add(texts, drafts, plain(texts) * (start + slope * drafts if drafts else 1.0))
        for texts in (8, 3):
            first, another = seconds._line(texts)
            for drafts in (1, 5, 10):
                expected = plain(texts) * (start + slope * drafts)
                assert first + another * drafts == pytest.approx(expected, rel=0.12)


def test_a_first_measurement_that_was_slow_is_made_again():
    """Kernels are slow the first time: four drafts are best here, and were thought to take thrice as long."""
    times: dict[int, int] = {}

    def verify(drafts: int) -> float:
        times[drafts] = times.get(drafts, 0) + 1
        return 1.0 if times[drafts] > 2 or not drafts else 3.0

    lengths, _ = run(lambda _: 0.79, 600, 0.2, verify)
    assert max(range(1, 9), key=lambda k: rate([k], 0.79, 0.2, flat)) == 4
    assert rate(lengths[300:], 0.79, 0.2, flat) > 0.97 * rate([4], 0.79, 0.2, flat)


def test_the_first_draft_step_counts_by_itself():
    """It takes five times as long as others: to draft at all is dear, and then to draft on is not."""
    rule, chance, lengths = AdaptiveLength(), random.Random(0), []
    for _ in range(600):
        drafted = 0
        while rule.wants_another(drafted, [chance.randrange(50)], [1000], 1):
            rule.saw_draft(CONFIDENT, NO_CHANCES)
            drafted += 1
        stood = next((i for i in range(drafted) if chance.random() >= 0.9), drafted)
        rule.saw_cycle([stood], [drafted], [0.5, *[0.1] * (drafted - 1)][:drafted], 1.0)
        lengths.append(drafted)
    differences = [after - before for before, after in itertools.pairwise(rule._costs)]
    assert differences[0] == pytest.approx(0.5, rel=0.15)
    assert differences[1:8] == pytest.approx([0.1] * 7, rel=0.3, abs=0.05)
    assert mean_late(lengths) > 5


def test_explores_what_may_be_the_best():
    """Neighbours of the best length, whatever is thought of them; others, up to two more, only if promising."""
    _, rule = run(lambda _: 0.8, 100, 0.2, flat)
    rule._expected, rule._costs, rule._best = [1.0, 1.8, 2.4, 2.9, 3.3, 3.7, 4.0, 4.2], [1.0] * 8, 4
    explored = set()
    for slow in ([], [1, 2], [3, 5], [3, 6]):
        for drafts in range(1, 8):
            rule._costs[drafts] = 9.0 if drafts in slow else 1.0
        rule._rest_seconds = Seconds()
        seen = []
        for _ in range(20):
            seen.append(rule._least_known())
            rule._rest_seconds.add(1, seen[-1], 1.0)
        explored.add(tuple(sorted(set(seen))))
        assert rule._explores_in() == rule._explored + rule.EXPLORE_EVERY - rule._cycles
    assert explored == {(2, 3, 4, 5, 6), (3, 4, 5, 6), (2, 3, 4, 5)}
    rule._rest_seconds = Seconds()
    assert rule._explores_in() == rule._explored + rule.EXPLORE - rule._cycles
    rule._batch = 2  # of which one is left, and soon none
    assert rule._explores_in() == rule._explored + rule.EXPLORE_EVERY - rule._cycles
