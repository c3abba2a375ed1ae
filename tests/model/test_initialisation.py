from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from pretrain.config import Config
from pretrain.model import PretrainingModel, initialise, parameter_counts

NEXTLAT = {"name": "nextlat", "horizon": 1, "next_latent_weight": 1.0, "kl_weight": 1.0, "dynamics_width": 64}


def make_model(tied: bool = False, objective: dict[str, object] = NEXTLAT) -> PretrainingModel:
    config = Config.model_validate(
        {
            "run": {"name": "test"},
            "model": {"layers": 2, "width": 64, "heads": 4, "tie_embeddings": tied},
            "objective": objective,
            "data": {"path": "nowhere", "sequence_length": 16},
            "batch": {"global_sequences": 2, "micro_sequences": 2},
            "optimizer": {"learning_rate": 0.001, "weight_decay": 0.0, "gradient_clip": None},
            "schedule": {"name": "constant", "steps": 1},
        }
    )
    return PretrainingModel(config, 200)


def initialised(seed: int = 0, std: float = 0.02) -> dict[str, torch.Tensor]:
    model = make_model()
    initialise(model, seed, std)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_every_matrix_is_normal_with_the_given_deviation_and_every_norm_is_one(std: float):
    matrices = 0
    for name, value in initialised(std=std).items():
        if value.ndim == 1:
            assert "norm" in name and (value == 1).all(), name
            continue
        matrices += 1
        n = value.numel()
        assert abs(value.mean().item()) < 5 * std / math.sqrt(n), name
        assert value.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name
        tail = (value.abs() > 2 * std).double().mean().item()  # 4.55% of a normal, none of a uniform
        assert tail == pytest.approx(0.0455, abs=5 * math.sqrt(0.0455 / n)), name
    assert matrices == 2 + 2 * 7 + 3  # embedding, head; blocks; p_psi


def test_the_same_seed_gives_the_same_weights_whatever_the_global_generator_and_leaves_that_alone():
    torch.manual_seed(1)
    first = initialised()
    torch.manual_seed(2)
    model = make_model()
    state = torch.get_rng_state()
    initialise(model, 0, 0.02)
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, first[name]), name


def test_another_seed_gives_other_weights_in_every_matrix():
    first, second = initialised(0), initialised(1)
    assert all(not torch.equal(first[name], second[name]) for name in first if first[name].ndim > 1)


def test_no_two_parameters_share_their_numbers():
    heads = [tuple(value.flatten()[:8].tolist()) for value in initialised().values() if value.ndim > 1]
    assert len(set(heads)) == len(heads)
    assert len({abs(number) for head in heads for number in head}) > 0.99 * 8 * len(heads)


def test_values_depend_on_the_name_and_not_on_the_order_of_construction():
    forwards, backwards = nn.Module(), nn.Module()
    for module, names in ((forwards, "abc"), (backwards, "cba")):
        for name in names:
            module.register_module(name, nn.Linear(5, 3, bias=False))
        initialise(module, 7, 0.02)
    for name in "abc":
        assert torch.equal(forwards.get_parameter(f"{name}.weight"), backwards.get_parameter(f"{name}.weight"))


def test_partitioned_parameters_get_the_same_values_as_whole_ones():
    """A parameter whose storage is away, as under ZeRO-3, has its shape only inside the gathering context."""
    model, gathered = make_model(), {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    shapes = {parameter: parameter.shape for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)

    @contextmanager
    def whole(parameter: nn.Parameter) -> Iterator[None]:
        parameter.data = torch.full(shapes[parameter], torch.nan)
        yield
        gathered[names[parameter]] = parameter.data
        parameter.data = torch.empty(0)

    initialise(model, 0, 0.02, whole)
    expected = initialised()
    assert gathered.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(gathered[name], value), name
    assert parameter_counts(model) == parameter_counts(make_model())


def test_a_modules_own_initial_values_come_before_the_rule():
    model = make_model(objective={"name": "jtp", "horizon": 2, "joint_token_weight": 1.0})
    initialise(model, 0, 0.02)
    fetch = model.objective.fetch
    assert fetch.gamma.item() == pytest.approx(0.1)
    assert (fetch.slot_bias == 0).all() and (fetch.combine_norm.bias == 0).all()
    assert (fetch.combine_norm.weight == 1).all() and (fetch.norm.weight == 1).all()
    for name in ("qkv", "output"):
        assert fetch.get_parameter(f"{name}.weight").std().item() == pytest.approx(0.02, rel=0.05)


def test_a_tied_matrix_is_counted_once():
    untied, tied = parameter_counts(make_model()), parameter_counts(make_model(tied=True))
    assert untied["inference"] - tied["inference"] == 200 * 64
    assert untied["training"] - tied["training"] == 200 * 64
