"""Every objective's checkpoint is evaluated as it predicts the next token itself."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import pytest
import torch
from rich.console import Console

from data_pipeline import Dataset, UserError
from pretrain.evals.subject import open_subject
from pretrain.evaluate import evaluate
from pretrain.export import export
from pretrain.objectives import TokenBatch

MTP = {"name": "mtp", "horizon": 2, "multi_token_weight": 1.0}
JTP = {"name": "jtp", "horizon": 2, "joint_token_weight": 1.0}
BST = {"name": "bst"}


@pytest.fixture
def make_run(data: Dataset, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """make_run(objective): a checkpoint in memory, which `evaluate(tmp_path, …)` opens."""
    from export_helpers import MemoryCheckpoint, bytes_tokenizer

    def make(objective: dict):
        checkpoint = MemoryCheckpoint(bytes_tokenizer(), objective)
        checkpoint.dataset["path"] = str(data.path)
        monkeypatch.setattr("pretrain.checkpoints.open_checkpoint", lambda path: checkpoint)
        return checkpoint

    return make


def one_document(tokens: torch.Tensor) -> TokenBatch:
    row = torch.cat([tokens, tokens[:1]])[None]
    return TokenBatch(row, torch.zeros_like(row), torch.arange(row.shape[1])[None], torch.ones_like(row).bool())


@torch.no_grad()
def log_probabilities(checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    """Of the next token after each of one document's: written out for each objective."""
    model, objective = checkpoint.model, checkpoint.config.objective.name
    states = model.trunk_states(one_document(tokens))
    hidden = states.hidden[0]
    if objective == "jtp":
        pairs = zip(hidden, states.embeddings[0], strict=True)
        hidden = torch.stack([model.objective.fetch(h[None], e[None, None])[0, 0] for h, e in pairs])
    if objective == "bst":
        eos = checkpoint.dataset["eos_id"]
        zero = torch.zeros(1, 1, dtype=torch.long)
        suffix = model.objective.backward_encoder(model.trunk.embed_tokens(torch.tensor([[eos]])), zero, zero)[0, 0]
        z = torch.cat([hidden, suffix.expand_as(hidden)], dim=-1)
        head = model.objective.pair_head
        z = z + (torch.nn.functional.silu(z @ head.gate.T) * (z @ head.up.T)) @ head.down.T
        z = z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt() * head.norm
        hidden = z[:, : hidden.shape[1]]
    return (hidden @ model.lm_head.weight.T).double().log_softmax(-1)


@pytest.mark.parametrize("objective", [MTP, JTP, BST], ids=["mtp", "jtp", "bst"])
def test_perplexity_equals_a_direct_computation(objective: dict, make_run, data: Dataset, tmp_path):
    checkpoint, length = make_run(objective), 48
    split = data.split("validation")
    stream = torch.from_numpy(split.read(0, split.tokens).astype("int64"))
    last, nats, count = len(stream) - 1, 0.0, 0
    for start in range(0, last, length):
        stop = min(start + length, last)
        for a, b in pairwise([start, *(int(d) for d in split.document_starts if start < d < stop), stop]):
            nats -= float(log_probabilities(checkpoint, stream[a:b]).gather(1, stream[a + 1 : b + 1, None]).sum())
            count += b - a
    result = evaluate(tmp_path, ["perplexity"], tmp_path / "out", console=Console(file=io.StringIO()))["perplexity"]
    assert (result["kind"], result["tokens"]) == ("checkpoint", count)
    assert result["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)


@pytest.mark.parametrize("objective", [MTP, JTP], ids=["mtp", "jtp"])
def test_drafting_is_measured_from_a_checkpoint(objective: dict, make_run, tmp_path):
    make_run(objective)
    out = tmp_path / "out"
    result = evaluate(tmp_path, ["speculative"], out, limit=2, console=Console(file=io.StringIO()))["speculative"]
    assert result["texts_equal"] is True and result["drafted"] > 0
    assert len(result["alive_by_position"]) <= 2  # as far as it was trained


@pytest.mark.parametrize("objective", [MTP, JTP, BST], ids=["mtp", "jtp", "bst"])
@torch.no_grad()
def test_trunk_states_are_those_before_what_the_objective_adds(objective: dict, make_run, tmp_path):
    checkpoint = make_run(objective)
    batch = one_document(torch.arange(40) * 5 % 256)
    trunk = checkpoint.model.trunk
    whole = trunk(batch.tokens[:, :-1], batch.document_ids[:, :-1], batch.positions[:, :-1])
    expected = whole.hidden
    if objective is MTP:  # the last block and the norm are head 0's own
        shared = trunk.embed_tokens(batch.tokens[:, :-1])
        for layer in trunk.layers[:-1]:
            shared = layer(shared, whole.rotation, whole.mask)
        expected = shared / (shared.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        folder = export(checkpoint, tmp_path / "mtp", console=Console(file=io.StringIO()))
        torch.testing.assert_close(open_subject(folder).trunk_states(batch), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(open_subject(tmp_path).trunk_states(batch), expected, rtol=1e-5, atol=1e-6)


def test_bst_has_nothing_to_draft_with(make_run, tmp_path):
    make_run(BST)
    with pytest.raises(UserError, match=r"no latent dynamics model to draft with.*nextlat, mtp or jtp"):
        evaluate(tmp_path, ["speculative"], tmp_path / "out", console=Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()
