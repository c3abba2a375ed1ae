from __future__ import annotations

import random

import pytest
import torch

from pretrain.decoding import AdaptiveLength
from pretrain.decoding.coasting import Coasting

SURE, UNSURE = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.0, 0.0]])
GREEDY = torch.zeros(1, dtype=torch.long)


def decode(unlike, cycles, judging, rule=None, longest=1, seed=0):
    """Cycles whose drafts are sure or not, with chances `unlike`; a judged one takes `judging` seconds more.

    A verification of up to three tokens costs the same, as does one of four to six. Returns of each cycle the drafts,
    and whether they were judged; and the rule.
    """
    rule = rule or AdaptiveLength()
    chance, words = random.Random(2 * seed), random.Random(2 * seed + 1)
    seen = []
    for _ in range(cycles):
        sure, drafted = chance.random() < 0.5, 0
        while rule.wants_another(drafted, [words.randrange(50)], [1000], longest):
            rule.saw_draft(SURE if sure else UNSURE, GREEDY)
            drafted += 1
        seen.append((drafted, not rule._coasts))
        stood = next((i for i in range(drafted) if chance.random() >= unlike[not sure]), drafted)
        rest = 1.0 + 0.5 * (drafted // 3) + (0.0 if rule._coasts else judging)
        rule.saw_cycle([stood], [drafted], [0.05] * drafted, rest)
    return seen, rule


def share_judged(seen) -> float:
    return sum(judged for _, judged in seen) / len(seen)


def test_drafts_the_usual_number_unjudged_where_judging_gains_nothing():
    seen, rule = decode((0.75, 0.75), 1000, judging=0.05)
    assert share_judged(seen[:16]) == 1.0 and share_judged(seen[300:]) < 0.4
    assert {drafted for drafted, judged in seen[300:] if not judged} <= {2, 5}
    coasting = rule._coasting[0]
    assert coasting.cost == pytest.approx(0.05 / 1.15, rel=0.3) and coasting.gain < 0.03


def test_judges_where_that_tells_good_drafts_from_bad():
    seen, rule = decode((0.98, 0.3), 1000, judging=0.05)
    assert share_judged(seen[300:]) > 0.8
    assert rule._coasting[0].gain > 0.1


def test_judges_again_when_drafts_become_unlike():
    _, rule = decode((0.75, 0.75), 500, judging=0.05)
    seen, _ = decode((0.98, 0.3), 1000, judging=0.05, rule=rule)
    assert share_judged(seen[500:]) > 0.8


def test_judges_the_next_text_from_its_beginning():
    _, rule = decode((0.75, 0.75), 500, judging=0.05, longest=200)
    for _ in range(200):
        if rule._coasts:
            break
        decode((0.75, 0.75), 1, judging=0.05, rule=rule, longest=200)
    assert rule._coasts
    begins, _ = decode((0.75, 0.75), Coasting.BLOCK - 1, judging=0.05, rule=rule, longest=20)
    assert share_judged(begins) == 1.0


def test_gives_up_what_pays_no_more_while_it_coasts():
    _, rule = decode((0.75, 0.75), 500, judging=0.05)
    seen, _ = decode((0.0, 0.0), 400, judging=0.05, rule=rule)
    assert sum(drafted for drafted, _ in seen[250:]) < 15
