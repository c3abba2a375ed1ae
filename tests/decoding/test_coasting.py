from __future__ import annotations

import copy
import random
import statistics

import pytest
import torch
from draft_length_helpers import flat, rate, run

from pretrain.decoding import AdaptiveLength
from pretrain.decoding.coasting import Coasting
from pretrain.decoding.cycle import Cycle
from pretrain.decoding.seconds import Seconds

SURE, UNSURE = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.0, 0.0]])
GREEDY = torch.zeros(1, dtype=torch.long)


class Costly(AdaptiveLength):
    """Takes `judging` seconds of its clock for each cycle that it judges, and no others."""

    def __init__(self) -> None:
        super().__init__(clock=lambda: self.now)
        self.now = self.judging = 0.0

    def _begin_cycle(self, left, longest):
        super()._begin_cycle(left, longest)
        if not self._coasts:
            self.now += self.judging


def decode(unlike, cycles, judging, rule=None, longest=1, seed=0, texts=1, left=1000):
    """Cycles whose drafts are sure or not, with chances `unlike`; to judge one takes the rule `judging` seconds.

    A verification of up to three tokens costs the same, as does one of four to six. The tokens tell nothing. Returns of
    each cycle the drafts, and whether they were judged; and the rule.
    """
    rule = rule or Costly()
    rule.judging = judging
    chance, words = random.Random(2 * seed), random.Random(2 * seed + 1)
    seen = []
    for _ in range(cycles):
        sure, drafted = chance.random() < 0.5, 0
        while rule.wants_another(drafted, [words.randrange(50) for _ in range(texts)], [left] * texts, longest):
            rule.saw_draft((SURE if sure else UNSURE).expand(texts, -1), GREEDY)
            drafted += 1
        judged = not rule._coasts
        seen.append((drafted, judged))
        stood = [
            next((i for i in range(drafted) if chance.random() >= unlike[not sure]), drafted) for _ in range(texts)
        ]
        rest = 1.0 + 0.5 * (drafted // 3) + (judging if judged else 0.0)
        rule.saw_cycle(stood, [drafted] * texts, [0.05] * drafted, rest)
    return seen, rule


def share_judged(seen) -> float:
    return sum(judged for _, judged in seen) / len(seen)


def test_drafts_the_least_number_unjudged_where_judging_gains_nothing():
    seen, rule = decode((0.75, 0.75), 1000, judging=0.05)
    assert share_judged(seen[:16]) == 1.0 and share_judged(seen[300:]) < 0.4
    assert {drafted for drafted, judged in seen if not judged} == {AdaptiveLength.LEAST}
    coasting = rule._coasting[0]
    assert coasting.cost == pytest.approx(0.05 / (1.15 + 0.05), rel=0.2)
    assert coasting._gained < 0.03 * coasting._tokens


@pytest.mark.parametrize(("stands", "drafts"), [(0.9, 5), (0.95, 8)])
def test_coasts_with_as_many_as_fill_the_best_number_of_blocks(stands, drafts):
    """Or with a number that is as good: of 95% eleven are 2% slower than eight, fewer or more by far."""

    def per_second(k: int) -> float:
        return sum(stands**i for i in range(k + 1)) / (1.0 + 0.5 * (k // 3) + 0.05 * k)

    assert max(range(1, AdaptiveLength.LONGEST + 1), key=per_second) == drafts
    seen, _ = decode((stands, stands), 1000, judging=0.05)
    assert share_judged(seen[300:]) < 0.35
    assert {drafted for drafted, judged in seen[300:] if not judged} == {drafts}


@pytest.mark.parametrize("seed", range(3))
def test_coasts_with_two_drafts_where_one_is_as_good(seed):
    """Two are 0.6% faster than one: less than tells whether a judged cycle has to draft both."""
    rule, chance, words, coasts = Costly(), random.Random(seed), random.Random(seed + 10), 0
    rule.judging = 0.05
    for _ in range(600):
        drafted = 0
        while rule.wants_another(drafted, [words.randrange(50) for _ in range(8)], [1000] * 8, 1):
            rule.saw_draft(SURE.expand(8, -1), GREEDY)
            drafted += 1
        coasts += rule._coasts
        stood = [next((i for i in range(drafted) if chance.random() >= 0.7), drafted) for _ in range(8)]
        rest = 1.0 + (0.0 if rule._coasts else rule.judging)
        rule.saw_cycle(stood, [drafted] * 8, [0.39] * drafted, rest)
    assert coasts > 300


def test_what_a_judged_cycle_gained_over_a_fixed_number():
    """What it gave more, and what its time was worth; where it stopped early, less what would have stood by chance."""
    _, rule = decode((0.9, 0.9), 300, judging=0.05)
    chances, costs = rule._acceptance.at, rule._costs

    def gained(accepted, steps):
        cycle = Cycle([accepted], [steps], steps, 0.0, 0.1, 1.0, 1, True, False, [2.0], [], [])
        return rule._gained(cycle, 4) + rule._rate * (costs[steps] - costs[4])

    assert gained(7, 8) == pytest.approx(2.0 * 3)
    assert gained(4, 8) == gained(1, 8) == gained(1, 2) == pytest.approx(0.0)
    assert gained(2, 2) == pytest.approx(-2.0 * (chances[2] + chances[2] * chances[3]))


@pytest.mark.parametrize(
    ("texts", "step", "coasts"), [(1, 0.5, True), (1, 0.02, True), (8, 0.5, True), (8, 0.02, False)]
)
def test_coasts_with_another_number_where_that_is_much_better_but_not_a_batch(texts, step, coasts):
    _, rule = decode((0.75, 0.75), 300, judging=0.05, texts=texts)
    rule._rest_seconds = Seconds()
    for drafts in [*range(AdaptiveLength.LONGEST + 1)] * Seconds.KEPT:
        rule._rest_seconds.add(texts, drafts, 1.0 + max(drafts - AdaptiveLength.LEAST, 0) * step)
    rule._estimate()
    assert (rule._best == AdaptiveLength.LEAST) == (step == 0.5)
    rule._coasting_of(texts).coasts = True
    for _ in range(30):
        rule._planned = None
        rule._coast()
    assert rule._coasts == coasts
    assert rule._planned == (rule._best if coasts else None)
    assert rule._fixed == (rule._best if texts == 1 else AdaptiveLength.LEAST)  # which judging is held against


def test_looks_at_plain_decoding_while_it_coasts():
    seen, _ = decode((0.75, 0.75), 3000, judging=0.05)
    assert 0 < sum(drafted == 0 for drafted, _ in seen[300:]) < 40


def test_what_judging_gained_once_fades():
    coasting = costly()
    for gained in (0.6, 0.0):
        for _ in range(60 * Coasting.BLOCK):
            if coasting.coasts:  # a trial
                coasting.saw_coasted(coasting.left, 1.8 * coasting.left, 1.0 * coasting.left)
            else:
                coasting.saw_judged(gained, 2.0, 1.0)
    assert coasting._gained < 0.1 * coasting._tokens


def test_judges_where_that_tells_good_drafts_from_bad():
    seen, rule = decode((0.98, 0.3), 1000, judging=0.05)
    assert share_judged(seen[300:]) > 0.9
    assert rule._coasting[0]._gained > 0.1 * rule._coasting[0]._tokens


def test_judges_again_when_drafts_become_unlike():
    shares = []
    for seed in range(8):
        _, rule = decode((0.75, 0.75), 500, judging=0.05, seed=seed)
        seen, _ = decode((0.98, 0.3), 1500, judging=0.05, rule=rule, seed=seed)
        shares.append(share_judged(seen[750:]))
    assert statistics.median(shares) > 0.8


def test_the_last_texts_of_a_batch_coast_where_it_did():
    batch, learned = decode((0.75, 0.75), 600, judging=0.05, texts=8)
    assert share_judged(batch[300:]) < 0.4 and learned._coasting[3].knows
    learned._coasting[3].coasts = True
    rule = copy.deepcopy(learned)
    rule._coasting_of(2)._better = 1.0  # whatever is thought of so few
    tail, _ = decode((0.75, 0.75), AdaptiveLength.TAIL + 24, judging=0.05, rule=rule, texts=2)
    looks = sum(drafted == 0 for drafted, _ in tail)
    assert sum(judged for _, judged in tail[: AdaptiveLength.TAIL]) <= looks + AdaptiveLength.LEARN_EVERY
    assert share_judged(tail[-12:]) == 1.0  # so long a tail finds out for itself
    rule = copy.deepcopy(learned)
    others, _ = decode((0.75, 0.75), 24, judging=0.05, rule=rule, texts=2, left=1001)
    assert share_judged(others) == 1.0


def test_the_last_text_of_a_batch_coasts_with_as_many_as_the_batch_did():
    """More would be better for it, but it has not found out yet."""
    _, rule = decode((0.75, 0.75), 600, judging=0.05, texts=8)
    rule._coasting[3].coasts = True
    rule._coasting_of(1)._better = 1.0
    tail, _ = decode((0.99, 0.99), AdaptiveLength.TAIL, judging=0.05, rule=rule, texts=1)
    assert rule._best > AdaptiveLength.LEAST
    assert {drafted for drafted, judged in tail if not judged} == {AdaptiveLength.LEAST}


def test_gives_up_what_pays_no_more_while_it_coasts():
    for seed in range(4):
        before, rule = decode((0.75, 0.75), 500, judging=0.05, seed=seed)
        assert share_judged(before[250:]) < 0.5
        seen, _ = decode((0.0, 0.0), 400, judging=0.05, rule=rule, seed=seed)
        assert sum(drafted for drafted, _ in seen[210:]) < 22


def costly() -> Coasting:
    """To judge one text's drafts takes 4% of the time."""
    coasting = Coasting(texts=1)
    coasting.took(False, 0.04)
    coasting.took(True, 0.0)
    return coasting


def test_what_judging_takes_is_what_coasting_does_not():
    coasting = Coasting(texts=1)
    assert coasting.cost == 0.0
    coasting.took(False, 0.04)
    assert coasting.cost == pytest.approx(0.04 * (1.0 - Coasting.COASTS))
    coasting.took(True, 0.01)
    assert coasting.cost == pytest.approx(0.03)
    coasting.took(False, 5.0)  # something else disturbed it
    assert 0.03 < coasting.cost < 0.04


def test_a_batch_judges_only_where_it_gains_more_than_falling_out_of_step_loses():
    for texts, coasts in ((1, False), (8, True)):
        coasting = Coasting(texts)
        for _ in range(Coasting.BLOCK * Coasting.KNOWN_BLOCKS):
            coasting.saw_judged(0.02 * 4.0 * texts, 4.0 * texts, 2.0 * texts)
        assert coasting.coasts == coasts


def share_coasting(gained: float, faster: float, blocks: int) -> float:
    """Of the second half of the blocks, where coasting gives `faster` times the tokens in as much time.

    gained: by a judged cycle of 2 tokens, as reckoned from itself. Blocks vary by a fifth.
    """
    coasting, chance, kinds = costly(), random.Random(0), []
    for _ in range(blocks):
        kinds.append(coasting.coasts)
        tokens = 2.0 * chance.gauss(1.0, 0.2)
        if coasting.coasts:
            coasting.saw_coasted(Coasting.BLOCK, tokens * faster * Coasting.BLOCK, 1.0 * Coasting.BLOCK)
        else:
            for _ in range(Coasting.BLOCK):
                coasting.saw_judged(gained, tokens, 1.0)
    return sum(kinds[blocks // 2 :]) / (blocks - blocks // 2)


def test_does_what_is_reckoned_to_be_better_and_tries_the_other_seldom():
    for faster in (0.99, 1.01):  # hardly to be told apart
        assert share_coasting(-0.1, faster, 200) > 0.8
        assert share_coasting(0.2, faster, 200) < 0.2


def test_blocks_overrule_what_is_reckoned():
    """What a cycle leaves to the next is in no reckoning of one cycle."""
    assert share_coasting(0.2, 1.2, 2000) > 0.8
    assert share_coasting(-0.1, 0.85, 2000) < 0.2


def test_a_trial_that_loses_much_is_made_seldom():
    coasting = costly()
    trials = cycles = 0
    while cycles < 3600:
        if coasting.coasts:
            trials += 1
            n = coasting.left
            coasting.saw_coasted(n, 1.4 * n, 1.0 * n)
        else:
            n = 1
            coasting.saw_judged(0.6, 2.0, 1.0)
        cycles += n
    assert 2 <= trials <= 16


def test_a_text_tells_while_it_coasts_what_judging_would_gain():
    coasting = costly()
    while not coasting.coasts:
        coasting.saw_judged(0.0, 2.0, 1.0)
    cycles = 0
    while coasting.coasts:
        n = coasting.left
        coasting.expects(0.15 * 2.0 * n, 2.0 * n)
        coasting.saw_coasted(n, 2.0 * n, 1.0 * n)
        cycles += n
    assert Coasting.BLOCK < cycles < 8 * Coasting.BLOCK and coasting.worth < 0.0


def test_what_it_expects_of_judging_follows_the_drafts_that_coast():
    _, learned = decode((0.98, 0.3), 500, judging=0.05)
    expected = []
    for logits in (SURE, UNSURE):
        rule = copy.deepcopy(learned)
        rule._coasting[0].coasts, rule._coasting[0]._better, rule._planned = True, -1.0, None
        rule._estimate()
        rule._coast()
        for drafted in range(AdaptiveLength.LEAST):
            assert rule.wants_another(drafted, [60 + drafted], [1000], 1)
            rule.saw_draft(logits, GREEDY)
        assert not rule.wants_another(AdaptiveLength.LEAST, [62], [1000], 1)
        expected += rule._foregone
    assert expected[0] > 0.5 and expected[1] == 0.0


def test_where_nothing_foretells_one_text_has_the_best_number_of_drafts_and_none_is_judged():
    """Three drafts are 2.5% better than two here, and a draft that could be foreseen is all that speaks for fewer."""
    rule, lengths, judged = Costly(), [], 0
    rule.judging = 0.02
    run(lambda _: 0.75, 1000, draft_seconds=0.221, verify=flat, rule=rule)
    for seed in range(1000):
        length, _ = run(lambda _: 0.75, 1, draft_seconds=0.221, verify=flat, rule=rule, seed=seed)
        lengths, judged = lengths + length, judged + (rule._planned is None)
    best, few = (rate([k], 0.75, 0.221, flat) for k in (3, AdaptiveLength.LEAST))
    assert few < 0.98 * best and rate(lengths, 0.75, 0.221, flat) > 0.99 * best
    assert judged == 0


def test_where_nothing_foretells_judging_gains_nothing():
    """Of one text; a batch is judged also by which of its texts lag."""
    for unlike, texts, blind in (((0.75, 0.75), 1, True), ((0.98, 0.3), 1, False), ((0.75, 0.75), 8, False)):
        _, rule = decode(unlike, 600, judging=0.05, texts=texts)
        assert rule._coasting_of(texts).blind == blind
    coasting = Coasting(1)
    coasting.took(False, 0.03)
    coasting.took(True, 0.01)
    for _ in range(100):
        coasting.saw_judged(0.2, 2.0, 1.5)
    assert coasting.worth < -0.05
    coasting.blind = True
    assert coasting.worth == pytest.approx(0.02)
