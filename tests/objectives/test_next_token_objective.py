from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import make_batch, rows_of

from pretrain.config import Config
from pretrain.objectives import (
    BeliefState,
    JointToken,
    LanguageModelHead,
    MultiToken,
    NextLat,
    NextToken,
    Objective,
    TokenBatch,
    build_objective,
)
from pretrain.transformer import TrunkStates

VOCAB, COLUMNS, WIDTH = 11, 13, 8


def states(hidden: torch.Tensor) -> TrunkStates:
    """Only the final hidden states: the objective reads nothing else."""
    nothing = torch.zeros(())
    return TrunkStates(hidden, nothing, nothing, (nothing, nothing), nothing)


def make_case() -> tuple[TokenBatch, torch.Tensor, LanguageModelHead]:
    batch = make_batch([[4, 1, 8], [13], [5, 2], []], COLUMNS, VOCAB, [[2, 0, 3], [6], [0, 1], []])
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, COLUMNS - 1, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    head = LanguageModelHead(WIDTH, VOCAB)
    head.weight.data = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    return batch, hidden, head


@pytest.mark.parametrize("rows", [[4], [1, 2, 1]], ids=["one micro-batch", "three micro-batches"])
def test_next_token_loss_and_gradients_equal_torchs_cross_entropy_over_the_valid_targets(rows: list[int]):
    batch, hidden, head = make_case()
    targets = torch.where(batch.target_mask, batch.tokens, -100)[:, 1:]
    assert 0 < (targets >= 0).sum() < targets.numel()
    expected = F.cross_entropy((hidden @ head.weight.T).flatten(0, 1), targets.flatten(), ignore_index=-100)
    expected_gradients = torch.autograd.grad(expected, [hidden, head.weight])

    objective = NextToken()
    parts = [slice(end - size, end) for size, end in zip(rows, torch.tensor(rows).cumsum(0), strict=True)]
    counts = sum(objective.valid_counts(rows_of(batch, part)) for part in parts)
    assert counts.tolist() == [(targets >= 0).sum()]
    shares = [objective(states(hidden[part]), rows_of(batch, part), head, counts) for part in parts]
    loss = sum(share["loss"] for share in shares)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(share["loss_next_token"] for share in shares), expected.detach())
    for actual, wanted in zip(torch.autograd.grad(loss, [hidden, head.weight]), expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-14)


def test_next_token_with_no_target_at_all_is_zero():
    batch, hidden, head = make_case()
    nothing = TokenBatch(batch.tokens, batch.document_ids, batch.positions, torch.zeros_like(batch.target_mask))
    objective = NextToken()
    losses = objective(states(hidden), nothing, head, objective.valid_counts(nothing))
    losses["loss"].backward()
    assert losses["loss"] == 0 and (hidden.grad == 0).all() and (head.weight.grad == 0).all()


def test_the_head_alone_gives_logits():
    _, hidden, head = make_case()
    torch.testing.assert_close(head(hidden), torch.einsum("btd,vd->btv", hidden, head.weight))


def build(objective: dict[str, object]) -> Objective:
    """The objective that a config with this section gets."""
    return build_objective(
        Config.model_validate(
            {
                "run": {"name": "test"},
                "model": {"layers": 3, "width": WIDTH, "heads": 2},
                "objective": objective,
                "data": {"path": "nowhere", "sequence_length": COLUMNS - 1},
                "batch": {"global_sequences": 1, "micro_sequences": 1},
                "optimizer": {"learning_rate": 0.001, "weight_decay": 0.0, "gradient_clip": None},
                "schedule": {"name": "constant", "steps": 1},
            }
        )
    )


def test_the_objective_section_chooses_the_objective():
    assert type(build({"name": "next_token"})) is NextToken
    objective = build(
        {"name": "nextlat", "horizon": 3, "next_latent_weight": 0.25, "kl_weight": 0.75, "dynamics_width": 5}
    )
    assert type(objective) is NextLat
    assert (objective.horizon, objective.next_latent_weight, objective.kl_weight) == (3, 0.25, 0.75)
    assert objective.dynamics.hidden.weight.shape == (5, 5)
    assert objective.dynamics.input.weight.shape == (5, 2 * WIDTH)
    heads = build({"name": "mtp", "horizon": 3, "multi_token_weight": 0.25})
    assert type(heads) is MultiToken
    assert (len(heads.heads), heads.weight) == (3, 0.25)
    joint = build({"name": "jtp", "horizon": 3, "joint_token_weight": 0.25})
    assert type(joint) is JointToken
    assert (joint.horizon, joint.weight, joint.fetch.slot_bias.shape) == (3, 0.25, (2, 4, 4))
    belief = build({"name": "bst", "pair_fraction": 0.5})
    assert type(belief) is BeliefState
    assert (belief.fraction, len(belief.backward_encoder.layers)) == (0.5, 3)
