"""p_psi's fast form is the function that its formula states, and its rollouts share one piece of memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pretrain.latent_dynamics import LatentDynamics

B, T, D, H = 2, 12, 6, 10


def make(dtype: torch.dtype) -> tuple[LatentDynamics, Tensor, Tensor]:
    """p_psi, hidden states and embeddings of another size, so that the joined norm matters."""
    generator = torch.Generator().manual_seed(0)
    dynamics = LatentDynamics(D, H)
    for parameter in dynamics.parameters():
        parameter.data = 0.5 + 0.5 * torch.randn(parameter.shape, generator=generator)
    hidden, embeddings = (scale * torch.randn(B, T, D, generator=generator) for scale in (1.0, 0.1))
    return dynamics.to(dtype), hidden.to(dtype).requires_grad_(), embeddings.to(dtype).requires_grad_()


def as_stated(dynamics: LatentDynamics, state: Tensor, embedding: Tensor) -> Tensor:
    x = dynamics.norm(torch.cat([embedding, state], -1))
    return state + dynamics.output(F.gelu(dynamics.hidden(F.gelu(dynamics.input(x)))))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str
)
@pytest.mark.parametrize("horizon", [1, 3, 8])
def test_rollouts_and_gradients_are_those_of_the_stated_formula(dtype: torch.dtype, tolerance: float, horizon: int):
    dynamics, hidden, embeddings = make(dtype)
    expected, state = [], hidden
    for i in range(1, horizon + 1):
        state = as_stated(dynamics, state[:, :-1], embeddings[:, i:])
        expected.append(F.pad(state, (0, 0, i, 0)))
    rollouts = dynamics(hidden, embeddings, horizon)
    leaves = [hidden, embeddings, *dynamics.parameters()]
    upstream = torch.randn(rollouts.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(rollouts, leaves, upstream)
    wanted = torch.autograd.grad(torch.stack(expected), leaves, upstream)
    for actual, right in zip((rollouts, *gradients), (torch.stack(expected), *wanted), strict=True):
        assert (actual - right).abs().max() <= tolerance * right.abs().max()


def test_a_step_is_a_rollout_of_one():
    dynamics, hidden, embeddings = make(torch.float64)
    step = dynamics.step(hidden[:, :-1], embeddings[:, 1:])
    torch.testing.assert_close(step, dynamics(hidden, embeddings, 1)[0, :, 1:], rtol=1e-13, atol=0)
    torch.testing.assert_close(step, as_stated(dynamics, hidden[:, :-1], embeddings[:, 1:]), rtol=1e-12, atol=0)


def test_the_embeddings_half_of_the_first_layer_is_computed_once():
    dynamics, hidden, embeddings = make(torch.float32)
    with FlopCounterMode(display=False) as counter:
        dynamics(hidden, embeddings, 8)
    landings = sum(T - i for i in range(1, 9))
    assert counter.get_total_flops() == 2 * B * (T * D * H + landings * (D * H + H * H + H * D))


def test_the_first_positions_of_a_row_hold_zeros_whatever_the_memory_held(monkeypatch: pytest.MonkeyPatch):
    dynamics, hidden, embeddings = make(torch.float32)
    original = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *shape: original(self, *shape).fill_(float("nan")))
    rollouts = dynamics(hidden, embeddings, 5)
    assert rollouts.isfinite().all() and all((rollouts[i - 1, :, :i] == 0).all() for i in range(1, 6))
