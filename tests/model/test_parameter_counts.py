from __future__ import annotations

import pytest
import torch

from pretrain.config import Config, ModelConfig
from pretrain.model import PretrainingModel, parameter_counts

LARGE = {"layers": 22, "heads": 16, "width": 2048}


def counts(
    layers: int,
    heads: int,
    width: int,
    vocab_size: int,
    dynamics_width: int | None = None,
    objective: dict[str, object] | None = None,
) -> dict[str, int]:
    """Of an untied model without storage."""
    if dynamics_width is not None:
        objective = {"name": "nextlat", "horizon": 2, "next_latent_weight": 1.0, "kl_weight": 1.0}
        objective |= {"dynamics_width": dynamics_width}
    config = Config.model_validate(
        {
            "run": {"name": "test"},
            "model": {"layers": layers, "heads": heads, "width": width},
            "objective": objective or {"name": "next_token"},
            "data": {"path": "nowhere", "sequence_length": 1024},
            "batch": {"global_sequences": 1, "micro_sequences": 1},
            "optimizer": {"learning_rate": 0.001, "weight_decay": 0.0, "gradient_clip": None},
            "schedule": {"name": "constant", "steps": 1},
        }
    )
    with torch.device("meta"):
        return parameter_counts(PretrainingModel(config, vocab_size))


def test_the_papers_large_model_has_1_32_and_1_40_billion_parameters():
    large = counts(**LARGE, vocab_size=50_257, dynamics_width=6528)
    assert large == {"inference": 1_319_008_256, "training": 1_401_735_168}
    assert {name: round(count / 1e9, 2) for name, count in large.items()} == {
        "inference": 1.32,
        "training": 1.40,
    }


@pytest.mark.parametrize(
    ("objective", "inference", "training"),
    [
        ({"name": "mtp", "horizon": 1, "multi_token_weight": 1.0}, 1.32, 1.37),
        ({"name": "mtp", "horizon": 2, "multi_token_weight": 1.0}, 1.32, 1.42),
        ({"name": "mtp", "horizon": 8, "multi_token_weight": 1.0}, 1.32, 1.72),
        ({"name": "jtp", "horizon": 2, "joint_token_weight": 1.0}, 1.34, 1.34),
        ({"name": "bst"}, 2.57, 2.57),
    ],
    ids=["mtp 1", "mtp 2", "mtp 8", "jtp", "bst"],
)
def test_the_rivals_large_models_have_the_papers_parameters(
    objective: dict[str, object], inference: float, training: float
):
    large = counts(**LARGE, vocab_size=50_257, objective=objective)
    assert {name: round(count / 1e9, 2) for name, count in large.items()} == {
        "inference": inference,
        "training": training,
    }


def test_the_papers_path_star_model():
    path_star = counts(layers=12, heads=6, width=384, vocab_size=106, dynamics_width=384)
    assert path_star == {"inference": 21_324_672, "training": 21_915_264}


def test_next_token_training_adds_no_parameter():
    gpt = counts(layers=12, heads=6, width=384, vocab_size=106, dynamics_width=None)
    assert gpt == {"inference": 21_324_672, "training": 21_324_672}


@pytest.mark.parametrize(("width", "inner"), [(384, 1024), (512, 1408), (768, 2048), (2048, 5504), (8, 128), (32, 128)])
def test_the_inner_width_of_swiglu_is_the_papers(width: int, inner: int):
    assert ModelConfig(layers=1, width=width, heads=1).inner_width == inner
    assert ModelConfig(layers=1, width=width, heads=1, mlp_width=7).inner_width == 7
