from __future__ import annotations

import random

import pytest

from pretrain.decoding.seconds import Seconds


def test_seconds_by_drafts_are_the_line_until_measured_often():
    seconds = Seconds()
    seconds.add(1, 0, 1.0)
    for drafts, cost in ((1, 2.0), (2, 2.0), (3, 3.0), (4, 3.0)):
        seconds.add(1, drafts, cost)
    start, slope = seconds._line(1)
    few = seconds.by_drafts(1, 6)
    assert few[0] == 1.0 and few[5:] == pytest.approx([start + slope * drafts for drafts in (5, 6)])
    assert few[2] == pytest.approx((2.0 + 2 * (start + 2 * slope)) / 3)  # one measurement beside the line's two
    for _ in range(8):
        for drafts, cost in ((1, 2.0), (2, 2.0), (3, 3.0), (4, 3.0)):
            seconds.add(1, drafts, cost)
    often = seconds.by_drafts(1, 4)
    assert abs(often[2] - 2.0) < 0.1 and often[3] - often[2] > 0.8 and abs(often[2] - often[1]) < 0.1


def test_plain_seconds_of_a_number_of_texts_that_was_not_measured():
    seconds = Seconds()
    for texts, cost in ((8, 2.2), (2, 1.0)):
        seconds.add(texts, 0, cost)
    assert [seconds.at(texts) for texts in (1, 2, 5, 8, 9)] == pytest.approx([1.0, 1.0, 1.6, 2.2, 2.4])
    assert [texts for texts in range(1, 20) if seconds.has_about(texts)] == [2, 3, *range(5, 16)]
    assert not seconds.has_about(8, times=2)
    seconds.add(6, 0, 2.0)
    seconds.add(6, 0, 2.0)
    assert seconds.has_about(8, times=2) and not seconds.has_about(2, times=2)


@pytest.mark.parametrize("texts", [2, 8])
def test_share_of_the_time_that_fewer_texts_would_take_too(texts):
    seconds = Seconds()

    def true(texts: int, drafts: int) -> float:
        return 2.0 + 0.25 * texts + 0.1 * drafts

    seconds.add(texts, 0, true(texts, 0))
    assert seconds.shared(texts, 2) == 0.5  # not known
    for drafts in (1, 2, 3) * Seconds.KEPT:
        seconds.add(texts, drafts, true(texts, drafts))
    assert seconds.shared(texts, 2) == 0.5  # of fewer texts it is not
    seconds.add(1, 0, true(1, 0))
    for drafts in (1, 2, 3) * Seconds.KEPT:
        seconds.add(1, drafts, true(1, drafts))
    assert seconds.shared(texts, 2) == pytest.approx(1.0 - 0.25 * texts / true(texts, 2), abs=0.02)
    assert seconds.shared(1, 2) == 0.5


@pytest.mark.parametrize(
    ("growth", "error"), [(0.0, 0.15), (1 / 1000, 0.06), (1 / 200, 0.15), (1 / 40, 0.15), (0.5, 0.15)]
)
def test_seconds_follow_the_length_of_texts(growth, error):
    """Texts of 20 to 180 tokens, one after the other; the next one begins at 20 again. A tenth of it is noise."""
    chance, seconds = random.Random(0), Seconds()

    def true(drafts: int) -> float:
        return (2.0 + 0.1 * drafts) * (1.0 + growth * seconds.length)

    for _ in range(4):
        for length in range(20, 181, 4):
            seconds.length = length
            drafts = chance.choice([0, 1, 2, 5])
            seconds.add(4, drafts, true(drafts) * chance.uniform(0.95, 1.05), length)
    for length in (20, 100, 180):
        seconds.length = length
        found = seconds.by_drafts(4, 5)
        assert found == pytest.approx([true(drafts) for drafts in range(6)], rel=error)
        assert seconds.at(4) == found[0]


def test_a_slower_machine_is_slower_for_what_was_not_measured_since():
    """Three drafts were measured when all went well; now all takes half as long again, as one draft shows."""
    seconds = Seconds()
    for _ in range(9):
        for drafts, cost in ((0, 1.0), (1, 2.0), (3, 2.4)):
            seconds.add(1, drafts, cost)
    before = seconds.by_drafts(1, 3)
    for _ in range(40):
        seconds.add(1, 1, 3.0)
    assert seconds.by_drafts(1, 3) == pytest.approx([1.5 * each for each in before], rel=0.02)
    for _ in range(40):
        seconds.add(1, 1, 2.0)
    assert seconds.by_drafts(1, 3) == pytest.approx(before, rel=0.02)


def test_a_text_that_grows_is_not_taken_for_a_slower_machine():
    """Without a cache time grows with the text; each begins anew."""
    seconds = Seconds()
    for _ in range(6):
        for length in range(20, 160, 2):
            seconds.add(1, length % 4, (1.0 + 0.1 * (length % 4)) * (1.0 + length / 16), length)
    for seconds.length in (20, 150):
        expected = [(1.0 + 0.1 * drafts) * (1.0 + seconds.length / 16) for drafts in range(3)]
        assert seconds.by_drafts(1, 2) == pytest.approx(expected, rel=0.1)


def test_what_is_known_least_comes_first():
    seconds = Seconds()
    for drafts in (0, 1, 1, 1, 1, 2, 3, 3, 3):
        seconds.add(1, drafts, 1.0)
    order = sorted(range(1, 5), key=lambda drafts: seconds.known(1, drafts, 3))
    assert order == [4, 2, 1, 3]  # never, once; of those that were measured enough the one seen longest ago
    assert seconds.times(1, 1) == 4 and seconds.times(8, 1) == 0
