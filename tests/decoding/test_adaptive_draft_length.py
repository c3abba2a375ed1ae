from __future__ import annotations

import random

import pytest
import torch

from pretrain.decoding import AdaptiveLength


def run(acceptance, cycles: int, draft_seconds=0.1, verify_seconds=1.0, rule: AdaptiveLength | None = None):
    """Drive the rule with simulated costs; the drafts per cycle, and the rule. acceptance: position → chance."""
    rule = rule or AdaptiveLength()
    chance = random.Random(0)
    lengths = []
    for _ in range(cycles):
        drafted = 0
        while rule.wants_another(drafted):
            rule.saw_draft(torch.tensor([[3.0, 0.0, 0.0]]), draft_seconds)
            drafted += 1
        accepted = next((i for i in range(drafted) if chance.random() >= acceptance(i)), drafted)
        rule.saw_verification([accepted], [drafted], verify_seconds)
        lengths.append(drafted)
    return lengths, rule


def mean_late(lengths: list[int]) -> float:
    late = lengths[len(lengths) // 2 :]
    return sum(late) / len(late)


def expected_rate(length: int, chance: float, draft_seconds: float) -> float:
    """Tokens per second where each draft stands with `chance` and a verification takes a second."""
    return sum(chance**i for i in range(length + 1)) / (1.0 + length * draft_seconds)


@pytest.mark.parametrize(("chance", "cost"), [(0.9, 0.1), (0.7, 0.1), (0.8, 0.3), (0.5, 0.05), (0.2, 0.4)])
def test_is_nearly_as_fast_as_the_best_fixed_length(chance, cost):
    lengths, _ = run(lambda _: chance, 600, draft_seconds=cost)
    late = lengths[300:]
    best = max(expected_rate(k, chance, cost) for k in range(AdaptiveLength.LONGEST + 1))
    tokens = sum(sum(chance**i for i in range(k + 1)) for k in late)
    assert tokens / sum(1.0 + k * cost for k in late) > 0.95 * best


def test_dear_drafts_that_never_stand_are_given_up_and_cheap_sure_ones_run_long():
    given_up, _ = run(lambda _: 0.0, 300, draft_seconds=0.5)
    assert mean_late(given_up) < 0.5
    long, _ = run(lambda _: 1.0, 300, draft_seconds=0.02)
    assert mean_late(long) == AdaptiveLength.LONGEST


def test_tries_again_after_giving_up():
    _, rule = run(lambda _: 0.0, 200, draft_seconds=0.3)
    lengths, _ = run(lambda _: 1.0, 400, draft_seconds=0.3, rule=rule)
    assert mean_late(lengths) > 4


def test_stops_where_a_position_is_never_accepted():
    lengths, _ = run(lambda position: 0.95 if position < 3 else 0.0, 400, draft_seconds=0.1)
    assert 2.5 <= mean_late(lengths) <= 4
