from __future__ import annotations

import random

import pytest

from pretrain.decoding.acceptance import Acceptance, History
from pretrain.decoding.cycle import Cycle


def cycle(stood: int, drafted: int, tokens=None, bins=None, coasted=False) -> Cycle:
    """Of one text. Its tokens are the first, and the drafts."""
    tokens = tokens or [[position] for position in range(drafted + 1)]
    bins = [[9]] * drafted if bins is None else bins
    return Cycle([stood], [drafted], drafted, 0.0, 0.1, 1.0, 10, not coasted, coasted, [1.0], tokens, bins)


def learned(chance_at, cycles=600, drafted=6, bins=None, seed=0, tokens=lambda words: words.randrange(4096)):
    """What is learned from cycles whose drafts at a position stand with chance_at(position, bin)."""
    acceptance, chance, words = Acceptance(8), random.Random(seed), random.Random(seed + 1)
    for _ in range(cycles):
        drawn = [[bins(chance) if bins else 9] for _ in range(drafted)]
        stood = next((i for i in range(drafted) if chance.random() >= chance_at(i, drawn[i][0])), drafted)
        acceptance.count(cycle(stood, drafted, [[tokens(words)] for _ in range(drafted + 1)], drawn))
    acceptance.estimate()
    return acceptance


def test_before_anything_was_seen_drafts_are_hoped_to_stand():
    acceptance = Acceptance(4)
    acceptance.estimate()
    assert acceptance.at == pytest.approx([Acceptance.HOPE] * 4)
    assert acceptance.of_drafts(0, [4], [5], [9]) == [Acceptance.HOPE]
    assert not acceptance.was_seen(0)


def test_by_position():
    acceptance = learned(lambda position, _: (0.9, 0.5, 0.8, 0.8, 0.8, 0.8)[position])
    assert acceptance.at[:3] == pytest.approx([0.9, 0.5, 0.8], abs=0.1)
    assert acceptance.was_seen(5) and not acceptance.was_seen(6)


def test_by_confidence_and_depth():
    """Sure drafts stand, unsure ones do not; from the third on confidence is worth less."""
    acceptance = learned(
        lambda position, b: (0.98 if b == 9 else 0.5) if position < 2 else 0.7, 2000, bins=lambda c: c.choice([4, 9])
    )
    sure, unsure = (acceptance.of_drafts(0, [5000], [5001], [b])[0] for b in (9, 4))
    assert sure > 0.9 and unsure < 0.62
    deep_sure, deep_unsure = (acceptance.of_drafts(2, [5000], [5001], [b])[0] for b in (9, 4))
    assert deep_sure == pytest.approx(0.7, abs=0.12) and deep_unsure == pytest.approx(0.7, abs=0.12)


def test_confidence_foretells_or_does_not():
    likely = {4: 0.5, 9: 0.98}
    for tells in (True, False):
        acceptance = learned(lambda _, b, tells=tells: likely[b] if tells else 0.75, bins=lambda c: c.choice([4, 9]))
        for seed in range(5):  # what it tells is known by what was learned
            chance = random.Random(seed)
            for _ in range(40):
                b = chance.choice([4, 9])
                stands = chance.random() < (likely[b] if tells else 0.75)
                acceptance.count(cycle(int(stands), 1, [[5000], [5000]], [[b]]))
                acceptance.estimate()
        assert acceptance.foretells == tells


def test_where_confidence_is_unknown_any_is_taken():
    acceptance = learned(lambda _, b: 0.98 if b == 9 else 0.5, 2000, bins=lambda c: c.choice([4, 9]))
    assert 0.5 < acceptance.of_drafts(0, [5000], [5001], None)[0] < 0.95
    for _ in range(400):
        acceptance.count(cycle(0, 1, bins=[]))
    acceptance.estimate()
    assert acceptance.of_drafts(0, [5000], [5001], None)[0] < 0.1
    assert acceptance.of_drafts(0, [5000], [5001], [9])[0] > 0.9  # nothing new was seen of those


def test_a_position_counts_by_what_a_text_is_worth():
    """A batch waits for its slow texts: what is expected of it is what is expected of them."""
    acceptance = Acceptance(2)
    for _ in range(200):
        acceptance.count(Cycle([2, 0], [2, 2], 2, 0.0, 0.1, 1.0, 10, True, False, [0.4, 1.6], [[1, 2]] * 3, []))
    acceptance.estimate()
    assert acceptance.at[0] == pytest.approx(0.2, abs=0.03) and acceptance.at[1] > 0.8


def test_by_the_token_before():
    """After token 1 none stands, after token 2 all do."""
    acceptance, chance = Acceptance(2), random.Random(0)
    for _ in range(200):
        token = chance.choice([1, 2])
        acceptance.count(cycle(token - 1, 1, [[token], [chance.randrange(4096)]]))
    acceptance.estimate()
    after = [acceptance.after(token, 0.5) for token in (1, 2, 3)]
    assert after[0] < 0.25 and after[1] > 0.75 and after[2] == 0.5
    assert acceptance.after(2, 0.3) == pytest.approx(0.6)  # twice as likely at the most


def test_a_draft_is_judged_by_its_own_token_and_the_one_before():
    """Drafts 1 stand, drafts 2 do not, but for those after a 7."""
    acceptance, chance = Acceptance(2), random.Random(0)
    for _ in range(400):
        before, token = chance.choice([5, 6, 7]), chance.choice([1, 2])
        acceptance.count(cycle(int(token == 1 or before == 7), 1, [[before], [token]]))
    acceptance.estimate()
    of_drafts = acceptance.of_drafts(0, [5, 5, 7, 8, 8], [1, 2, 2, 1, 2], None)
    assert of_drafts[0] > 0.9 and of_drafts[1] < 0.1 and of_drafts[2] > 0.7
    assert of_drafts[3] > 0.75 and of_drafts[4] < 0.5  # the pair is new: by its own token


@pytest.mark.parametrize("tell", [True, False])
def test_tokens_are_asked_only_where_they_foretell(tell: bool):
    """Sampled drafts may stand by chance alone: what their tokens' last ones did is then no reason for anything."""
    acceptance, chance = Acceptance(2), random.Random(3)
    asked = []
    for _ in range(2000):
        tokens = [[chance.randrange(40)], [chance.randrange(40)]]
        stands = tokens[1][0] % 4 > 0 if tell else chance.random() < 0.75
        acceptance.count(cycle(int(stands), 1, tokens))
        acceptance.estimate()
        judged = acceptance.of_drafts(0, tokens[0] * 40, list(range(40)), None)
        asked.append(len(set(judged)) > 1 or acceptance.after(tokens[0][0], 0.5) != 0.5)
    assert all(asked[-1000:]) if tell else sum(asked[-1000:]) < 50


def test_what_was_not_seen_for_long_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    """Of pairs of tokens there is no end."""
    monkeypatch.setattr(History, "MOST", 3)
    history = History()
    for kind in (1, 2, 3, 1, 4):
        history.count(kind, False)
    assert [history.of(kind, 0.5) < 0.5 for kind in (1, 2, 3, 4)] == [True, False, True, True]


def test_coasting_forgets_nothing_of_what_it_does_not_try():
    acceptance = learned(lambda position, _: 0.8)
    deep = acceptance.at[4]
    for _ in range(400):
        acceptance.count(cycle(2, 2, bins=[], coasted=True))
    acceptance.estimate()
    assert acceptance.at[4] == pytest.approx(deep, abs=0.005) and acceptance.was_seen(5)
    assert acceptance.at[0] > 0.95
