"""Drafts of MTP's heads and of JTP's Fetch: greedy text stays plain greedy text; states are the trained ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from decoding_helpers import AtSetCosts

from data_pipeline import UserError
from pretrain.decoding import FixedLength, Sampling, generate
from pretrain.decoding.continuation import continue_text
from pretrain.decoding.loading import Export, load_checkpoint_as_llama
from pretrain.objectives import TokenBatch

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))

from export_helpers import MemoryCheckpoint, bytes_tokenizer

MTP = {"name": "mtp", "horizon": 3, "multi_token_weight": 1.0}
JTP = {"name": "jtp", "horizon": 3, "joint_token_weight": 1.0}
EACH = pytest.mark.parametrize("objective", [MTP, JTP], ids=["mtp", "jtp"])
SHAPES = [{}, {"kv_heads": 2, "rope_theta": 50.0}, {"layers": 1, "tie_embeddings": True}]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(objective: dict, agreeable: bool = True, **shape) -> tuple[MemoryCheckpoint, Export]:
    """A checkpoint, and the same to decode with. agreeable: a residual stream so weak that drafts often stand."""
    checkpoint = MemoryCheckpoint(bytes_tokenizer(), objective, **shape)
    if agreeable:
        for name, weight in checkpoint.weights.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight *= 0.3
        if objective is JTP:  # slots that look at themselves alone, past a hidden state that counts for little
            bias = checkpoint.weights["objective.fetch.slot_bias"]
            bias += 4 * torch.eye(bias.shape[1])
            checkpoint.weights["objective.fetch.norm.weight"].fill_(1.0)
    return checkpoint, load_checkpoint_as_llama(checkpoint)


def one_document(tokens: list[int]) -> TokenBatch:
    row = torch.tensor([[*tokens, 0]])
    return TokenBatch(row, torch.zeros_like(row), torch.arange(row.shape[1])[None], torch.ones_like(row).bool())


@EACH
@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "grouped", "one layer, tied"])
@torch.no_grad()
def test_plain_greedy_text_is_the_trained_models_own(objective: dict, shape: dict):
    checkpoint, export = make(objective, **shape)
    prompt = [256, 5, 77, 130]
    text, _ = continue_text(export, prompt, 20, 0, Sampling())
    for end in range(20):
        batch = one_document(prompt + text[:end])
        logits = checkpoint.model.lm_head(checkpoint.model.next_token_states(batch, 256))[0, -1]
        assert logits.max() - logits[text[end]] < 1e-4
        if text[end] == 256:
            break


@EACH
@pytest.mark.parametrize("draft", [1, 2, 3, 9, "auto"])
def test_text_with_drafts_equals_plain_text_and_no_cycle_drafts_more_than_the_horizon(
    objective: dict, draft: int | str
):
    accepted = refused = 0
    for shape in SHAPES:
        _, export = make(objective, **shape)
        vars(export)["adaptive_length"] = AtSetCosts(export.adaptive_length._longest)
        assert export.adaptive_length._longest == 3
        for prompt in ([256], [256, 9, 9, 3], list(range(20))):
            plain, _ = continue_text(export, prompt, 26, 0, Sampling())
            text, statistics = continue_text(export, prompt, 26, draft, Sampling())
            assert text == plain
            assert statistics.tokens == statistics.cycles + statistics.accepted == len(text)
            assert len(statistics.alive_by_position) <= min(3, draft if isinstance(draft, int) else 3)
            accepted += statistics.accepted
            refused += sum(statistics.alive_by_position) - statistics.accepted
    assert refused > 10
    assert accepted > 3


@torch.no_grad()
def test_mtp_drafts_from_all_heads_at_the_last_token_that_stood():
    checkpoint, export = make(MTP)
    prompt, starts, cycles = [256, 4, 8], [], []
    width = checkpoint.config.model.width

    def spy(state, token):
        if state.shape[-1] == 4 * width:
            starts.append(state.flatten())
        return export.model.draft_step(state, token)

    text, _ = generate(
        export.model, prompt, 16, draft_step=spy, draft_length=FixedLength(3), on_tokens=lambda new: cycles.append(new)
    )
    states = checkpoint.model.trunk_states(one_document(prompt + text))
    heads = [head(states.before_last_block, states.rotation, states.mask) for head in checkpoint.model.objective.heads]
    expected = torch.cat([states.hidden, *heads], dim=-1)[0]
    end = len(prompt)
    assert len(starts) > 2
    for start, new in zip(starts, cycles, strict=False):
        torch.testing.assert_close(start, expected[end - 1], rtol=1e-4, atol=1e-4)
        end += len(new)


@torch.no_grad()
def test_jtp_drafts_each_token_given_those_before_it():
    checkpoint, export = make(JTP)
    tokens, fed = [256, 4, 8], [7, 30, 2]
    states = checkpoint.model.trunk_states(one_document(tokens))
    embedding = checkpoint.model.trunk.embed_tokens.weight
    state = torch.cat([states.hidden[0, -1], embedding[8]])
    for k, token in enumerate(fed, start=1):
        state, logits = export.model.draft_step(state, token)
        slots = checkpoint.model.objective.fetch(states.hidden[0, -1:], embedding[[8, *fed[:k]]][None])
        torch.testing.assert_close(logits, checkpoint.model.lm_head(slots)[0, k])


def test_bst_is_refused_for_decoding():
    with pytest.raises(UserError, match=r"objective\.name=bst cannot be decoded with; evaluate its perplexity"):
        load_checkpoint_as_llama(MemoryCheckpoint(bytes_tokenizer(), {"name": "bst"}))
