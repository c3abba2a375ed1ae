"""What a batch's drafts give, once its last text is done."""

from __future__ import annotations

import random
import statistics

import pytest
from draft_length_helpers import CONFIDENT, NO_CHANCES, mean_late, run

from pretrain.decoding import AdaptiveLength
from pretrain.decoding.stragglers import Stragglers

ROOM = 240


def decode(stragglers: Stragglers, chances: list[float], expected: float, shared: float, began: int = 0) -> int:
    """Texts of which each cycle's one draft stands in these shares of cycles; how many cycles there are at the end.

    Of all texts `expected` is expected, and of those that are left what is to count nothing.
    """
    left, stood, cycles = [float(ROOM)] * len(chances), [0.0] * len(chances), began
    texts, last = len(chances), 0
    stragglers.begin(texts, ROOM, began, shared)
    while left:
        last = round(max(left))
        stood = [owed + chance for owed, chance in zip(stood, chances, strict=True)]
        accepted = [int(owed) for owed in stood]
        stragglers.count([accepted], expected if len(accepted) == texts else 9.0)
        left = [n - 1 - each for n, each in zip(left, accepted, strict=True)]
        stays = [n > 0 for n in left]
        stood = [owed - each for owed, each, stay in zip(stood, accepted, stays, strict=True) if stay]
        chances = [chance for chance, stay in zip(chances, stays, strict=True) if stay]
        left = [n for n in left if n > 0]
        cycles += 1
    stragglers.end(last, cycles)
    return cycles


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_a_batch_gives_what_its_last_text_lets_it(shared):
    """Of two texts one is foreseen always, the other in one of five cycles: it takes 120 cycles, and 200."""
    stragglers = Stragglers()
    decode(stragglers, [1.0, 0.2], 0.6, shared)
    stragglers.begin(2, ROOM, 1000, shared)
    cycles = (1.0 - shared) * 160 + shared * 200
    assert 1.0 + 0.6 * stragglers.share(ROOM) == pytest.approx(ROOM / cycles, rel=0.01)


def test_texts_that_end_together_lose_nothing():
    stragglers = Stragglers()
    decode(stragglers, [0.5] * 8, 0.5, 0.7)
    stragglers.begin(8, ROOM, 1000, 0.7)
    assert stragglers.share(ROOM) == pytest.approx(1.0, abs=0.01)


def test_the_loss_is_the_less_the_longer_it_has_drafted():
    """By then it is known which text lags, and what its tokens are worth."""
    stragglers = Stragglers()
    decode(stragglers, [1.0, 0.0], 0.5, 1.0)
    stragglers.begin(2, ROOM, 1000, 1.0)
    shares = []
    for left in (ROOM, ROOM // 2, 1):
        shares.append(stragglers.share(left))
        stragglers.count([[0, 0]] * 60, 0.5)
    assert shares[0] < shares[1] < shares[2] and shares[2] == pytest.approx(1.0, abs=0.03)
    plain = Stragglers()
    decode(plain, [1.0, 0.0], 0.5, 1.0)
    plain.begin(2, ROOM, 1000, 1.0)
    assert plain.share(1) == shares[0]  # where nothing was drafted no text is ahead


def test_sizes_learn_by_themselves_and_one_text_has_no_straggler():
    stragglers = Stragglers()
    decode(stragglers, [1.0, 0.0], 0.5, 1.0)
    for texts in (1, 8):
        stragglers.begin(texts, ROOM, 1000, 1.0)
        assert stragglers.share(ROOM) == 1.0


def test_what_was_learned_is_forgotten_where_no_batch_drafts():
    stragglers = Stragglers()
    decode(stragglers, [1.0, 0.0], 0.5, 1.0)
    shares = []
    for number in range(60):
        stragglers.begin(2, ROOM, 1000 * number, 1.0)
        shares.append(stragglers.share(ROOM))
        stragglers.end(0, 1000 * number + ROOM)
    assert shares[0] < 0.1 and shares == sorted(shares) and shares[-1] > 0.6


def test_a_judged_draft_counts_by_the_same_share(monkeypatch):
    """0.3 · 0.9^k tokens of a text are worth 0.05 seconds at 1.84 a second up to k = 11, and 0.9^k up to any k."""
    monkeypatch.setattr(Stragglers, "share", lambda *_: 0.3)
    lengths, _ = run(lambda _: 0.9, 600, 0.05, texts=8)
    assert 9.0 < mean_late(lengths) < 13.5


def seconds_of_batches(rule: AdaptiveLength, seed: int) -> list[float]:
    """Of each of 16 batches: 8 texts of 120 tokens, of four kinds that are foreseen ever less often.

    A cycle takes 1 second, and a draft 0.4, however many the texts are.
    """
    chance, batches = random.Random(seed), []
    for _ in range(16):
        texts, longest, seconds = [(120, at) for at in (0.85, 0.65, 0.45, 0.25) * 2], 20, 0.0
        while texts:
            drafted, left = 0, [n - 1 for n, _ in texts]
            while rule.wants_another(drafted, [chance.randrange(50) for _ in left], left, longest):
                rule.saw_draft(CONFIDENT.expand(len(texts), -1), NO_CHANCES)
                drafted += 1
            stood = [next((i for i in range(drafted) if chance.random() >= at), drafted) for _, at in texts]
            rule.saw_cycle(stood, [drafted] * len(texts), [0.2] * drafted, 1.0 + 0.2 * drafted)
            seconds += 1.0 + 0.4 * drafted
            texts = [(n - 1 - k, at) for (n, at), k in zip(texts, stood, strict=True) if n - 1 - k > 1]
            longest += 1 + max(stood)
        batches.append(seconds)
    return batches


def test_the_time_that_is_shared_is_that_of_all_texts():
    """Not of the last one or two, of which as little is known here as at the beginning."""
    rule = AdaptiveLength(2, clock=lambda: 0.0)
    seconds_of_batches(rule, 0)
    assert rule._stragglers._shared > 0.9


def test_drafts_little_where_the_last_text_takes_all_that_the_others_gain(monkeypatch):
    """A draft stands in 55 of 100 cycles, and costs 40: it pays by the cycle. But in the last text 25 stand."""

    def lost() -> float:
        rules = [AdaptiveLength(2, clock=lambda: 0.0) for _ in range(4)]
        late = [statistics.fmean(seconds_of_batches(rule, seed)[6:]) for seed, rule in enumerate(rules)]
        return statistics.fmean(late) / 119 - 1.0

    learned = lost()
    monkeypatch.setattr(Stragglers, "share", lambda *_: 1.0)
    assert learned < 0.6 * lost() and lost() > 0.05
