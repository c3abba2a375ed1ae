from __future__ import annotations

import pytest

from pretrain.decoding.text_worth import TextWorth


def worth(left: list[int], shared: float, room: int = 100, cycles: int = 20) -> list[float]:
    texts = TextWorth()
    texts.shared = shared
    texts.begin([room] * len(left), 0)
    return texts.of_each(left, cycles)


def test_a_text_alone_is_worth_its_tokens():
    assert worth([7], 0.5) == [1.0]


def test_texts_that_began_together_are_worth_the_same():
    assert worth([100, 100, 100], 0.5, cycles=0) == pytest.approx([1.0, 1.0, 1.0])
    assert worth([60, 60], 0.9) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("shared", [0.0, 0.4, 1.0])
def test_tokens_of_a_cycle_are_worth_their_number(shared):
    left, cycles = [20, 40, 60, 70], 1000  # so many that the rates are known
    rates = [(2000 - n) / cycles for n in left]
    weights = worth(left, shared, room=2000, cycles=cycles)
    assert sum(w * rate for w, rate in zip(weights, rates, strict=True)) == pytest.approx(sum(rates), rel=0.01)


def test_a_slow_text_saves_more_cycles_with_each_token():
    """Of two texts, one twice as fast as the other, where no time is shared."""
    fast, slow = worth([0 + 1000, 3000], 0.0, room=5000, cycles=1000)
    assert slow / fast == pytest.approx(2.0, rel=0.02)


def test_the_last_text_is_worth_the_more_the_more_time_is_shared():
    ratios = [worth([10, 12, 60], shared)[2] for shared in (0.0, 0.5, 0.9)]
    assert ratios[0] < ratios[1] < ratios[2] < 6.0


def test_a_text_at_its_end_is_worth_nothing():
    assert worth([0, 9], 0.5)[0] == 0.0 and worth([0, 0], 0.5) == [0.0, 0.0]


def test_another_batch_begins_anew():
    texts = TextWorth()
    texts.begin([50, 50], 0)
    slow, fast = texts.of_each([40, 10], 20)
    assert slow > 2 * fast
    texts.begin([80, 80], 20)
    assert texts.of_each([80, 80], 20) == pytest.approx([1.0, 1.0])
