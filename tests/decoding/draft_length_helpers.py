"""Cycles of the rule of `auto` at simulated costs."""

from __future__ import annotations

import random

import torch

from pretrain.decoding import AdaptiveLength

CONFIDENT = torch.tensor([[3.0, 0.0, 0.0]])
NO_CHANCES = torch.zeros(1, dtype=torch.long)  # greedy: a token is what can come


def run(
    acceptance,
    cycles,
    draft_seconds=0.1,
    verify=lambda k: 1.0,
    rule=None,
    texts=1,
    seed=0,
    vocabulary=50,
    left=1000,
):
    """Drive the rule with simulated costs; the drafts per cycle, and the rule.

    acceptance: position → chance. verify: number of drafts → seconds of the rest of a cycle. The tokens of the
    vocabulary are equally frequent, and tell nothing. left: tokens that each text
    has to come, in all cycles.
    """
    rule = rule or AdaptiveLength()
    chance, words = random.Random(2 * seed), random.Random(2 * seed + 1)
    lengths = []
    for _ in range(cycles):
        drafted = 0
        while rule.wants_another(drafted, [words.randrange(vocabulary) for _ in range(texts)], [left] * texts, 1):
            rule.saw_draft(CONFIDENT.expand(texts, -1), NO_CHANCES)
            drafted += 1
        accepted = [
            next((i for i in range(drafted) if chance.random() >= acceptance(i)), drafted) for _ in range(texts)
        ]
        rule.saw_cycle(accepted, [drafted] * texts, [draft_seconds] * drafted, verify(drafted))
        lengths.append(drafted)
    return lengths, rule


def mean_late(lengths: list[int]) -> float:
    late = lengths[len(lengths) // 2 :]
    return sum(late) / len(late)


def rate(lengths, chance: float, draft_seconds: float, verify) -> float:
    """Tokens per second to be expected of cycles of these lengths, where each draft stands with `chance`."""
    tokens = sum(sum(chance**i for i in range(k + 1)) for k in lengths)
    return tokens / sum(verify(k) + k * draft_seconds for k in lengths)


def flat(drafts: int) -> float:
    """A verification where the weights are what takes time."""
    return 1.0


def step_up(drafts: int) -> float:
    """One where more than one token is another kernel, and then each costs little."""
    return 1.4 + 0.05 * drafts if drafts else 1.0


def computing(drafts: int) -> float:
    """One where arithmetic is what takes time, as for many texts at once."""
    return 1.0 + 0.8 * drafts
