from __future__ import annotations

import pytest
import torch
from decoding_helpers import EOS, AtSetCosts, make_llama

from data_pipeline import UserError
from pretrain.decoding import DecodingStatistics, FixedLength, draft_with_latent_dynamics, generate
from pretrain.decoding.trunk import CachedTrunk

PROMPTS = [[1], [1, 2, 3], [4, 4, 4, 4, 6], [0, 5, 2, 6, 3, 3, 2, 5], list(range(7)) * 4]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def decode(model, dynamics, prompt, length, eos_id=None, new=40):
    cycles = []
    step = draft_with_latent_dynamics(model, dynamics) if length else None
    tokens, statistics = generate(
        model, prompt, new, eos_id=eos_id, draft_step=step, draft_length=length, on_tokens=cycles.append
    )
    assert [token for cycle in cycles for token in cycle] == tokens
    check_accounting(statistics, tokens)
    return tokens, statistics, cycles


def check_accounting(statistics: DecodingStatistics, tokens: list[int]) -> None:
    assert statistics.tokens == len(tokens) == statistics.cycles + statistics.accepted
    assert statistics.accepted <= statistics.drafted
    assert sum(statistics.accepted_by_position) == statistics.accepted
    alive, accepted = statistics.alive_by_position, statistics.accepted_by_position
    assert all(a <= b for a, b in zip(accepted, alive, strict=True))
    assert all(later <= earlier for earlier, later in zip(accepted, alive[1:], strict=False))


def test_plain_text_equals_that_of_transformers_generate():
    model, dynamics = make_llama()
    texts = set()
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, pad_token_id=0
        )[0, len(prompt) :].tolist()
        tokens, _, _ = decode(model, dynamics, prompt, None, eos_id=EOS)
        assert tokens == expected
        texts.add(tuple(tokens))
    assert len(texts) == len(PROMPTS)


@pytest.mark.parametrize("length", [3, 11, "auto"])
def test_text_with_drafts_equals_plain_text(length):
    accepted = refused = ended_inside_a_draft = 0
    rule = AtSetCosts() if length == "auto" else FixedLength(length)
    for seed in range(3):
        model, dynamics = make_llama(seed=seed)
        for prompt in PROMPTS:
            for eos_id in (None, EOS, 3):
                expected, plain, _ = decode(model, dynamics, prompt, None, eos_id)
                assert plain.drafted == 0
                tokens, statistics, cycles = decode(model, dynamics, prompt, rule, eos_id)
                assert tokens == expected
                accepted += statistics.accepted
                refused += sum(statistics.alive_by_position[:1]) - sum(statistics.accepted_by_position[:1])
                ended_inside_a_draft += len(cycles[-1]) > 1 and cycles[-1][-1] == eos_id
    assert accepted > 50 and refused > 50
    assert ended_inside_a_draft > 0


def test_a_cache_that_keeps_refused_drafts_would_be_seen(monkeypatch):
    """The equality above is not vacuous."""
    right = CachedTrunk.read
    monkeypatch.setattr(CachedTrunk, "read", lambda self, tokens, starts: right(self, tokens, starts + (starts > 9)))
    model, dynamics = make_llama()
    same = [decode(model, dynamics, p, None)[0] == decode(model, dynamics, p, FixedLength(3))[0] for p in PROMPTS]
    assert not all(same)


def test_every_cycle_drafts_from_the_true_state_of_the_last_token_that_stood():
    model, dynamics = make_llama()
    step, prompt = draft_with_latent_dynamics(model, dynamics), [1, 2, 3]
    starts, fresh = [], [True]

    def spy(state, token):
        if fresh[0]:
            starts.append((state[0].clone(), int(token)))
        fresh[0] = False
        return step(state, token)

    cycles = []

    def on_tokens(new):
        cycles.append(new)
        fresh[0] = True

    tokens, statistics = generate(model, prompt, 40, draft_step=spy, draft_length=FixedLength(3), on_tokens=on_tokens)
    assert 0 < statistics.accepted < statistics.drafted
    with torch.no_grad():
        hidden = model.model(torch.tensor([prompt + tokens])).last_hidden_state[0]
    end = len(prompt)
    for (state, token), new in zip(starts, cycles, strict=False):
        torch.testing.assert_close(state, hidden[end - 1], rtol=1e-4, atol=1e-5)
        assert token == new[0]
        end += len(new)


def test_drafts_never_run_past_the_end_of_the_text():
    model, dynamics = make_llama()
    for new in (1, 2, 3):
        tokens, statistics, _ = decode(model, dynamics, [1, 2], FixedLength(9), new=new)
        assert len(tokens) == new
        assert statistics.drafted <= new * (new - 1) // 2


def test_a_perfect_draft_model_is_always_accepted():
    """With weights that make every state follow from the last token alone, p_psi can be exact."""
    model, _ = make_llama(num_hidden_layers=1)
    torch.nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    torch.nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)

    def exact_step(state, token):
        state = model.model.norm(model.model.embed_tokens.weight[token])
        return state, model.lm_head(state)

    tokens, statistics = generate(model, [1], 41, draft_step=exact_step, draft_length=FixedLength(4))
    assert statistics.cycles == 9 and statistics.accepted == statistics.drafted == 32
    assert statistics.acceptance_by_position == [1.0] * 4
    assert statistics.accepted_per_cycle == pytest.approx(32 / 9)
    assert tokens == generate(model, [1], 41)[0]


def test_statistics_refuse_more_accepted_than_drafted_and_add_up():
    statistics, other = DecodingStatistics(), DecodingStatistics()
    with pytest.raises(AssertionError, match="3 accepted of 2 drafted"):
        statistics.count_cycle(2, 3)
    statistics.count_cycle(3, 1)
    statistics.count_cycle(0, 0)
    other.count_cycle(2, 2)
    statistics.add(other)
    assert (statistics.cycles, statistics.drafted, statistics.accepted, statistics.tokens) == (3, 5, 3, 6)
    assert statistics.alive_by_position == [2, 2]
    assert statistics.accepted_by_position == [2, 1]


def test_refuses_an_empty_prompt_and_one_beyond_the_context(monkeypatch):
    model, _ = make_llama(max_position_embeddings=16)
    with pytest.raises(UserError, match="no tokens"):
        generate(model, [], 4)
    monkeypatch.setattr(CachedTrunk, "read", lambda *_: pytest.fail("work before the check"))
    with pytest.raises(UserError, match="a prompt of 10 tokens and 7 new ones exceed the model's context of 16"):
        generate(model, [2] * 10, 7)
