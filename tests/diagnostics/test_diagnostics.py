"""Diagnostics against what they are defined as, position by position."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from objectives.reference import make_batch
from torch import Tensor

from pretrain.config import Config, load_config
from pretrain.diagnostics import (
    DRAFT_TOKENS,
    effective_rank,
    measure,
    summarise,
    warn_if_nothing_is_predicted,
)
from pretrain.model import PretrainingModel, initialise
from pretrain.objectives import TokenBatch

VOCAB = 17
CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def make(objective: str) -> tuple[Config, PretrainingModel]:
    overrides = ["model.width=16", "model.heads=4", "model.kv_heads=2", "model.layers=1", f"objective={objective}"]
    config = load_config(CONFIG, overrides)
    model = PretrainingModel(config, VOCAB)
    initialise(model, seed=1, std=0.4)
    return config, model.eval()


NEXTLAT = "{name: nextlat, horizon: 2, next_latent_weight: 1.0, kl_weight: 1.0, dynamics_width: 24}"


def batches() -> list[TokenBatch]:
    return [make_batch([[9, 4], [13]], 13, VOCAB, [[2, 0], [3]], 0), make_batch([[6, 5]], 13, VOCAB, None, 1)]


@pytest.mark.parametrize(("singular", "rank"), [([1, 1, 1, 1], 4.0), ([1, 0, 0, 0], 1.0), ([3, 1, 0, 0], None)])
def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values(singular: list[float], rank: float | None):
    shares = [s / sum(singular) for s in singular if s]
    by_hand = math.exp(-sum(share * math.log(share) for share in shares))
    left, right = (torch.linalg.qr(torch.randn(n, 4, generator=torch.Generator().manual_seed(n)))[0] for n in (9, 5))
    states = left @ torch.diag(torch.tensor(singular, dtype=torch.float32)) @ right.T
    assert effective_rank(7 * states).item() == pytest.approx(by_hand, rel=1e-4)
    assert rank is None or by_hand == pytest.approx(rank)


def by_definition(model: PretrainingModel, horizon: int) -> dict[str, float]:
    """Variances, cosines and draft acceptance from lists of vectors, gathered position by position."""
    targets: list[list[Tensor]] = [[] for _ in range(horizon)]
    predictions: list[list[Tensor]] = [[] for _ in range(horizon)]
    accepted = starts = 0
    for batch in batches():
        states = model.trunk_states(batch)
        for b, documents in enumerate(batch.document_ids[:, :-1].tolist()):
            for t in range(len(documents)):
                state, stands = states.hidden[b, t], True
                inside = [d for d in documents[t:] if d == documents[t] >= 0]
                for i in range(1, min(len(inside), max(horizon + 1, DRAFT_TOKENS + 1))):
                    state = model.objective.dynamics.step(state, states.embeddings[b, t + i])
                    if i <= horizon:
                        targets[i - 1].append(states.hidden[b, t + i])
                        predictions[i - 1].append(state)
                    if len(inside) > DRAFT_TOKENS and i <= DRAFT_TOKENS:
                        trunk = model.lm_head(states.hidden[b, t + i]).argmax()
                        stands = stands and bool(model.lm_head(state).argmax() == trunk)
                        accepted += stands
                starts += len(inside) > DRAFT_TOKENS
    found = {"draft_acceptance": accepted / (starts * DRAFT_TOKENS)}
    for i in range(horizon):
        target, prediction = torch.stack(targets[i]), torch.stack(predictions[i])
        found[f"latent_target_variance_{i + 1}"] = target.var(0, correction=0).mean().item()
        found[f"latent_prediction_variance_{i + 1}"] = prediction.var(0, correction=0).mean().item()
        found[f"latent_cosine_{i + 1}"] = torch.cosine_similarity(target, prediction, -1).mean().item()
    return found


def test_diagnostics_are_what_they_are_defined_as():
    _, model = make(NEXTLAT)
    model.lm_head.weight.data[3:] = 0  # few tokens to choose from, so that some drafts stand
    with torch.no_grad():
        values = summarise([measure(model, batch) for batch in batches()])
        expected = by_definition(model, 2)
        hidden = torch.cat([model.trunk_states(batch).hidden.flatten(0, 1) for batch in batches()])
    assert 0.02 < expected["draft_acceptance"] < 0.98
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-4), name
    assert values["hidden_norm"] == pytest.approx(hidden.norm(dim=-1).mean().item(), rel=1e-2)  # some are padding
    targets = sum(batch.target_mask[:, 1:].sum().item() for batch in batches())
    assert values["masked_next_token"] == pytest.approx(1 - targets / 36)  # 3 rows of 12 inputs
    assert 0 < values["masked_next_latent"] < values["masked_kl"] < 1


def test_a_trunk_that_drafts_for_itself_has_every_draft_accepted():
    """With a p_psi that adds nothing and a trunk whose states do not move, draft and choice are one."""
    _, model = make(NEXTLAT)
    for parameter in model.trunk.layers.parameters():
        parameter.data.zero_()
    model.objective.dynamics.output.weight.data.zero_()
    batch = make_batch([[12]], 13, VOCAB)
    batch = TokenBatch(torch.full_like(batch.tokens, 3), batch.document_ids, batch.positions, batch.target_mask)
    with torch.no_grad():
        values = summarise([measure(model, batch)])
    assert values["draft_acceptance"] == 1.0
    assert values["latent_cosine"] == pytest.approx(1.0) and values["latent_target_variance"] == pytest.approx(
        0, abs=1e-9
    )


def test_an_objective_without_p_psi_has_the_diagnostics_of_its_states():
    _, model = make("{name: next_token}")
    with torch.no_grad():
        values = summarise([measure(model, batch) for batch in batches()])
    assert set(values) == {"hidden_norm", "hidden_effective_rank", "masked_next_token"}


def test_a_batch_without_targets_is_warned_of_in_one_line(capsys: pytest.CaptureFixture[str]):
    warn_if_nothing_is_predicted(torch.tensor([5.0, 0.0]), 6, is_first=True)
    warn_if_nothing_is_predicted(torch.tensor([0.0, 3.0]), 6, is_first=False)
    assert capsys.readouterr().err == ""
    warn_if_nothing_is_predicted(torch.tensor([0.0, 3.0]), 6, is_first=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: step 7: no token of the batch is a target")
