"""FLOPs per token agree with what torch counts while a step runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import load_config
from pretrain.flops import flops_per_token
from pretrain.model import PretrainingModel, initialise
from pretrain.objectives import TokenBatch

VOCABULARY, T, ROWS = 311, 64, 2


@pytest.mark.parametrize(
    "objective",
    [
        "{name: next_token}",
        "{name: nextlat, horizon: 1, next_latent_weight: 1.0, kl_weight: 1.0, dynamics_width: 160}",
        "{name: nextlat, horizon: 5, next_latent_weight: 1.0, kl_weight: 1.0, dynamics_width: 160}",
        "{name: nextlat, horizon: 5, next_latent_weight: 1.0, kl_weight: 1.0, dynamics_width: 160, kl_positions: 0.25}",
        "{name: nextlat, horizon: 5, next_latent_weight: 1.0, kl_weight: 1.0, dynamics_width: 160, "
        "stop_gradient_head: false, rollout_loss: cross_entropy, latent_loss: mse}",
    ],
)
def test_flops_agree_with_the_counter_of_torch(objective: str) -> None:
    overrides = ["model.width=64", "model.heads=4", "model.kv_heads=2", f"data.sequence_length={T}"]
    path = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    config = load_config(path, [*overrides, f"objective={objective}"])
    model = PretrainingModel(config, VOCABULARY)
    initialise(model, 0, 0.02)
    columns = torch.arange(T + 1).expand(ROWS, -1)
    whole_row = torch.zeros(ROWS, T + 1, dtype=torch.int32)
    tokens = torch.randint(0, VOCABULARY, (ROWS, T + 1), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(tokens, whole_row, columns, torch.ones(ROWS, T + 1, dtype=torch.bool), tuple(range(ROWS)))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch, model.objective.valid_counts(batch))["loss"].backward()
    counted = sum(counter.flop_counts["Global"].values())
    # The head's gradient is an addmm_, which torch leaves out: the trunk's, and that of rollouts which train the head.
    products = 1 if getattr(config.objective, "stop_gradient_head", True) else 1 + config.objective.horizon
    counted += 2 * VOCABULARY * config.model.width * products * ROWS * T
    attention = sum(flops for op, flops in counter.flop_counts["Global"].items() if "bmm" in str(op))
    ours = flops_per_token(config, VOCABULARY) * ROWS * T
    ours_attention = 3 * 2 * config.model.layers * config.model.width * (T + 1) * ROWS * T
    assert ours - ours_attention == pytest.approx(counted - attention, rel=0.01)
    # torch computes all T × T scores, where a causal kernel and ours count (T + 1) / 2 for each of T queries.
    assert ours_attention == pytest.approx(attention * (T + 1) / (2 * T), rel=0.01)
