"""The joint distribution of four tokens, drafted and verified, against the exact one; and mutations that must fail."""

from __future__ import annotations

import itertools

import pytest
import torch
from decoding_helpers import AtSetCosts, TableModel

from data_pipeline import UserError
from pretrain.decoding import DecodingStatistics, FixedLength, Sampling, generate_batch
from pretrain.decoding import speculative as speculative_module
from pretrain.decoding.sampling import distribution, draw, probabilities, residual, verify, verify_greedy

VOCAB, LENGTH, SAMPLES = 3, 4, 8000
PROMPT = [1, 2]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def joint(model: TableModel, sampling: Sampling) -> torch.Tensor:
    """The exact probability of each of VOCAB ** LENGTH continuations, in float64."""
    result = []
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        probability, tokens = 1.0, list(PROMPT)
        for token in text:
            state = model.states[tokens[-2], tokens[-1]].double()
            probability *= float(probabilities(state @ model.head.double(), sampling)[token])
            tokens.append(token)
        result.append(probability)
    return torch.tensor(result, dtype=torch.float64)


def sampled(model: TableModel, sampling: Sampling, drafts: int | str) -> torch.Tensor:
    """How often each continuation came in SAMPLES texts."""
    generator = torch.Generator().manual_seed(0)
    # The adaptive rule decides from what it saw in earlier batches; all at once would be over before it has begun.
    length, batch = (AtSetCosts(), 40) if drafts == "auto" else (FixedLength(drafts), SAMPLES)
    counts, total = torch.zeros(VOCAB**LENGTH, dtype=torch.float64), DecodingStatistics()
    for _ in range(SAMPLES // batch):
        texts, statistics = generate_batch(
            model, [PROMPT] * batch, LENGTH, draft_step=model.draft_step, draft_length=length,
            sampling=sampling, generator=generator,
        )  # fmt: skip
        total.add(statistics)
        for tokens in texts:
            counts[sum(token * VOCAB ** (LENGTH - 1 - place) for place, token in enumerate(tokens))] += 1
    assert total.accepted > SAMPLES / 4 and total.tokens == total.cycles + total.accepted == SAMPLES * LENGTH
    return counts


def p_value(model: TableModel, sampling: Sampling, drafts: int | str) -> float:
    """Chi-square test of generated texts against the exact distribution; cells below 5 are pooled."""
    counts, samples = sampled(model, sampling, drafts), SAMPLES
    expected = joint(model, sampling) * samples
    if bool(counts[expected == 0].any()):
        return 0.0  # a text that cannot be
    rare = expected < 5
    observed, wanted = counts[~rare], expected[~rare]
    if float(expected[rare].sum()) >= 5:
        observed = torch.cat([observed, counts[rare].sum()[None]])
        wanted = torch.cat([wanted, expected[rare].sum()[None]])
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2).double(), statistic / 2))


@pytest.mark.parametrize("drafts", [1, 2, 3, "auto"])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.6),
        Sampling(1.0),
        Sampling(1.5),
        Sampling(1.5, top_p=0.7),
        Sampling(0.9, top_p=0.8),
        Sampling(2.0, top_p=0.7),
        Sampling(1.5, top_k=2),
    ],
    ids=lambda s: f"T={s.temperature},p={s.top_p},k={s.top_k}",
)
def test_joint_distribution_of_four_tokens(sampling, drafts):
    assert p_value(TableModel(VOCAB), sampling, drafts) > 1e-3


def test_a_trimmed_draft_vocabulary_leaves_the_distribution_as_it_is(monkeypatch):
    model = TableModel(VOCAB)
    model.draft_step = trimmed(model.draft_step)
    assert p_value(model, Sampling(0.8), 3) > 1e-3
    monkeypatch.setattr(speculative_module, "verify", resample_from_p)
    assert p_value(model, Sampling(0.8), 3) < 1e-6


def trimmed(step):
    """Token 0 is never drafted."""

    def without_0(state, token):
        state, logits = step(state, token)
        return state, logits.index_fill(1, torch.tensor([0]), float("-inf"))

    return without_0


def raw_q(model, patch):
    """Drafts are drawn as they should be, and judged as if the draft model's bare softmax had drawn them."""
    raw, step = [], model.draft_step

    def recorded(state, token):
        state, logits = step(state, token)
        raw.append(logits.softmax(-1))
        return state, logits

    def wrong(p_BTV, q_BKV, drafts, counts, generator):
        return verify(p_BTV, torch.stack(raw[-drafts.shape[1] :], 1), drafts, counts, generator)

    model.draft_step = recorded
    patch.setattr(speculative_module, "verify", wrong)


def resample_from_p(p_BTV, q_BKV, drafts, counts, generator=None):
    accepted, _ = verify(p_BTV, q_BKV, drafts, counts, generator)
    return accepted, p_BTV[torch.arange(len(p_BTV)), accepted]


def wrong_residual(model, patch):
    patch.setattr(speculative_module, "verify", resample_from_p)


def accept_one_too_many(model, patch):
    def wrong(p_BTV, q_BKV, drafts, counts, generator):
        accepted, _ = verify(p_BTV, q_BKV, drafts, counts, generator)
        accepted = (accepted + 1).minimum(counts)
        return accepted, p_BTV[torch.arange(len(p_BTV)), accepted]

    patch.setattr(speculative_module, "verify", wrong)


def discard_unlikely_drafts(model, patch):
    """A draft's length that is decided when its last token has been seen."""
    right = speculative_module._draft

    def wrong(way, state, token, *lengths):
        drafts, q, counts, seconds = right(way, state, token, *lengths)
        for row, count in enumerate(counts):
            counts[row] -= bool(count) and bool(q[row, count - 1, drafts[row, count - 1]] < 0.5)
        return drafts, q, counts, seconds

    patch.setattr(speculative_module, "_draft", wrong)


@pytest.mark.parametrize(
    "mutation", [raw_q, wrong_residual, accept_one_too_many, discard_unlikely_drafts], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("sampling", [Sampling(0.5), Sampling(1.5, top_p=0.8)], ids=str)
def test_wrong_rules_fail_the_same_test(mutation, sampling, monkeypatch):
    model = TableModel(VOCAB)
    mutation(model, monkeypatch)
    assert p_value(model, sampling, 3) < 1e-6


def test_greedy_drafts_stand_while_they_are_the_targets_tokens():
    p_BT, drafts_BK = torch.tensor([[4, 5, 6], [4, 5, 6], [1, 2, 3]]), torch.tensor([[4, 5], [4, 0], [1, 2]])
    accepted, following = verify_greedy(p_BT, drafts_BK, torch.tensor([2, 2, 1]))
    assert accepted.tolist() == [2, 1, 1] and following.tolist() == [6, 5, 2]


def test_a_padded_row_accepts_no_more_than_it_drafted():
    p_BTV = torch.full((2, 4, 3), 1 / 3)
    accepted, next_BV = verify(p_BTV, p_BTV[:, :3], torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 1]))
    assert accepted.tolist() == [3, 1]
    torch.testing.assert_close(next_BV, torch.full((2, 3), 1 / 3))


def test_residual_is_what_the_target_has_more_of_and_p_where_nothing_is_left():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.6, 0.3])
    torch.testing.assert_close(residual(p, q), torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(residual(p, p), p)


def test_filters_keep_the_tokens_they_name():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    base = logits.softmax(-1)
    assert distribution(logits, Sampling()).tolist() == [0]
    assert torch.equal(distribution(logits, Sampling(0.5)), probabilities(logits, Sampling(0.5)))
    torch.testing.assert_close(probabilities(logits, Sampling(0.5)), (2 * logits).softmax(-1))
    kept = torch.tensor([[True, False, True, False]])
    expected = (base * kept) / (base * kept).sum()
    torch.testing.assert_close(probabilities(logits, Sampling(1.0, top_k=2)), expected)
    # the first token holds 0.64, the first two 0.88
    torch.testing.assert_close(probabilities(logits, Sampling(1.0, top_p=0.7)), expected)
    torch.testing.assert_close(probabilities(logits, Sampling(1.0, top_p=0.6)), torch.tensor([[1.0, 0, 0, 0]]))
    torch.testing.assert_close(probabilities(logits, Sampling(1.0, top_k=9, top_p=1.0)), base)


def test_draws_follow_the_distribution_and_never_what_is_impossible():
    p = torch.tensor([0.5, 0.0, 0.2, 0.3])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(draw(p.expand(8000, 4), generator), minlength=4) / 8000
    assert counts[1] == 0
    assert (counts - p).abs().max() < 0.02
    assert draw(distribution(torch.tensor([0.0, 5.0, 4.0]), Sampling()), generator) == 1
    never_last = draw(torch.tensor([0.25, 0.75, 0.0]).expand(8000, 3), generator)
    assert int(never_last.max()) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1 must be"),
        ({"temperature": float("nan")}, "temperature nan must be"),
        ({"top_k": 0}, "top-k 0 must be"),
        ({"top_p": 0.0}, "top-p 0.0 must lie"),
        ({"top_p": 1.2}, "top-p 1.2 must lie"),
    ],
)
def test_refuses_settings_out_of_range(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(**values)
