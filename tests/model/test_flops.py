"""FLOPs per token agree with what torch counts while a step runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import Config, load_config
from pretrain.flops import flops_per_token
from pretrain.model import PretrainingModel, initialise
from pretrain.objectives import TokenBatch

VOCABULARY, T, ROWS = 311, 64, 2


# Each: the blocks of a training step, and its head products per token.
LAYERS = 4
OPENINGS, OTHERS = T - 1, (T - 1) * (T - 2) / 2  # a row's pairs with and without the first token as the prefix
CASES = [
    ("{name: next_token}", LAYERS, 1),
    ("{name: nextlat, horizon: 1, next_latent_weight: 1.0, kl_weight: 1.0, dynamics_width: 160}", LAYERS, 1),
    ("{name: nextlat, horizon: 5, next_latent_weight: 1.0, kl_weight: 1.0, dynamics_width: 160}", LAYERS, 1),
    (
        "{name: nextlat, horizon: 5, next_latent_weight: 1.0, kl_weight: 1.0, dynamics_width: 160, kl_positions: 0.25}",
        LAYERS,
        1,
    ),
    (
        "{name: nextlat, horizon: 5, next_latent_weight: 1.0, kl_weight: 1.0, dynamics_width: 160, "
        "stop_gradient_head: false, rollout_loss: cross_entropy, latent_loss: mse}",
        LAYERS,
        1 + 5,
    ),
    ("{name: mtp, horizon: 1, multi_token_weight: 1.0}", LAYERS + 1, 2),
    ("{name: mtp, horizon: 5, multi_token_weight: 1.0}", LAYERS + 5, 6),
    ("{name: jtp, horizon: 1, joint_token_weight: 1.0}", LAYERS, 2),
    ("{name: jtp, horizon: 5, joint_token_weight: 1.0}", LAYERS, 6),
    ("{name: bst}", 2 * LAYERS, 2 * (OPENINGS + OTHERS) / T),
]


def test_flops_agree_with_the_counter_of_torch_where_bst_keeps_a_part_of_its_pairs() -> None:
    _, model, batch = build("{name: bst, pair_fraction: 0.3}")
    kept = float(model.objective.valid_counts(batch)) / ROWS
    realised = (kept - OPENINGS) / OTHERS
    assert realised == pytest.approx(0.3, rel=0.1)
    check(f"{{name: bst, pair_fraction: {realised}}}", model, batch, 2 * LAYERS, 2 * kept / T)


@pytest.mark.parametrize(("objective", "blocks", "head_products"), CASES, ids=[case[0] for case in CASES])
def test_flops_agree_with_the_counter_of_torch(objective: str, blocks: int, head_products: float) -> None:
    _, model, batch = build(objective)
    check(objective, model, batch, blocks, head_products)


def build(objective: str) -> tuple[Config, PretrainingModel, TokenBatch]:
    overrides = [
        "model.width=64",
        "model.heads=4",
        "model.kv_heads=2",
        f"model.layers={LAYERS}",
        f"data.sequence_length={T}",
    ]
    path = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    config = load_config(path, [*overrides, f"objective={objective}"])
    model = PretrainingModel(config, VOCABULARY)
    initialise(model, 0, 0.02)
    columns = torch.arange(T + 1).expand(ROWS, -1)
    whole_row = torch.zeros(ROWS, T + 1, dtype=torch.int32)
    tokens = torch.randint(0, VOCABULARY, (ROWS, T + 1), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(tokens, whole_row, columns, torch.ones(ROWS, T + 1, dtype=torch.bool), tuple(range(ROWS)))
    return config, model, batch


def check(objective: str, model: PretrainingModel, batch: TokenBatch, blocks: int, head_products: float) -> None:
    """`flops_per_token` with this objective against what is counted while `model` does a step on `batch`."""
    config, _, _ = build(objective)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch, model.objective.valid_counts(batch))["loss"].backward()
    counted = sum(counter.flop_counts["Global"].values())
    # Gradients of the trained head are an addmm_, which torch leaves out.
    counted += 2 * VOCABULARY * config.model.width * head_products * ROWS * T
    attention = sum(flops for op, flops in counter.flop_counts["Global"].items() if "bmm" in str(op))
    ours = flops_per_token(config, VOCABULARY) * ROWS * T
    slots = config.objective.horizon + 1 if config.objective.name == "jtp" else 0
    fetch_attention = 3 * 2 * 2 * config.model.width * slots**2 * ROWS * T
    ours_attention = 3 * 2 * blocks * config.model.width * (T + 1) * ROWS * T
    assert ours - ours_attention - fetch_attention == pytest.approx(counted - attention, rel=0.01)
    # torch computes all T × T scores, where a causal kernel and ours count (T + 1) / 2 for each of T queries.
    assert ours_attention == pytest.approx((attention - fetch_attention) * (T + 1) / (2 * T), rel=0.01)
