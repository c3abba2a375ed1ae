"""p_psi, the latent dynamics model: the next hidden state from the current one and the next token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LatentDynamics(nn.Module):
    """ĥ_{t+1} = h_t + MLP(RMSNorm([e(x_{t+1}) ; h_t])), three linear layers with GELU between (paper §3.2).

    The norm only scales the joined vector, and the first layer is linear:

        W · RMSNorm([e ; h]) = (W_e · (γ_e ⊙ e) + W_h · (γ_h ⊙ h)) / rms([e ; h])

    so what the embedding contributes, half of that layer's work, is computed once for all of `forward`'s rollout steps.

    Args:
        width: D, the width of hidden states and token embeddings.
        hidden_width: H, inner width of the MLP.
    """

    norm_epsilon = 1e-5  # the authors' value; p_psi's own norm, whatever the trunk's epsilon

    def __init__(self, width: int, hidden_width: int):
        super().__init__()
        self.norm = nn.RMSNorm(2 * width, eps=self.norm_epsilon)
        self.input = nn.Linear(2 * width, hidden_width, bias=False)
        self.hidden = nn.Linear(hidden_width, hidden_width, bias=False)
        self.output = nn.Linear(hidden_width, width, bias=False)

    def step(self, state: Tensor, next_embedding: Tensor) -> Tensor:
        """One transition. state, next_embedding and the result: (..., D)."""
        x = self.input(self.norm(torch.cat([next_embedding, state], dim=-1)))
        return state + self.output(F.gelu(self.hidden(F.gelu(x))))

    def forward(self, hidden_BTD: Tensor, embeddings_BTD: Tensor, horizon: int) -> Tensor:
        """Teacher-forced rollouts from every position.

        Args:
            hidden_BTD: h_t for t = 0..T−1.
            embeddings_BTD: e(x_t), the embeddings that the trunk looked up.
            horizon: d ≥ 1, smaller than T.

        Returns:
            (d, B, T, D): element [i−1, :, s] is ĥ_s, rolled out over i steps from h_{s−i}. The first i
            positions of row i−1 have no start and hold zeros.
        """
        embedding_half_BTH, embedding_square_BT1 = self._half(embeddings_BTD, 0)
        rollouts_dBTD = hidden_BTD.new_empty(horizon, *hidden_BTD.shape)
        states = []
        state = hidden_BTD
        for i in range(1, horizon + 1):
            state = state[:, :-1]  # (B, T−i, D), landing on s = i..T−1
            update = self._update(state, embedding_half_BTH[:, i:], embedding_square_BT1[:, i:])
            state = _AddInto.apply(state, update, rollouts_dBTD[i - 1])
            states.append(state)
        return _Gathered.apply(rollouts_dBTD, *states)

    def _half(self, x: Tensor, half: int) -> tuple[Tensor, Tensor]:
        """The first layer's product with the embedding (half 0) or state (half 1): (..., H); and |x|², (..., 1)."""
        scale_D, weight_HD = self.norm.weight.chunk(2)[half], self.input.weight.chunk(2, dim=1)[half]
        square = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1, keepdim=True)
        return F.linear(x * scale_D, weight_HD), square

    def _update(self, state: Tensor, embedding_half: Tensor, embedding_square: Tensor) -> Tensor:
        """What a transition adds to the state."""
        state_half, state_square = self._half(state, 1)
        mean_square = (embedding_square + state_square) / (2 * state.shape[-1])
        x = (embedding_half + state_half) * (mean_square + self.norm_epsilon).rsqrt().to(state_half.dtype)
        return self.output(F.gelu(self.hidden(F.gelu(x))))


class _AddInto(torch.autograd.Function):
    """state + update, (B, T−i, D), written to the end of a row of the rollouts, (B, T, D), whose start becomes zero."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, update: Tensor, row_BTD: Tensor) -> Tensor:
        # .data: a version of its own, or writing one row would count as changing the rows saved for the backward pass.
        row_BTD = row_BTD.data
        starts = row_BTD.shape[1] - state.shape[1]
        row_BTD[:, :starts] = 0
        return torch.add(state, update, out=row_BTD[:, starts:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, grad, None


class _Gathered(torch.autograd.Function):
    """The rollouts (d, B, T, D), in whose memory the states lie already: gradients go to them as views."""

    @staticmethod
    def forward(ctx: Any, rollouts_dBTD: Tensor, *states: Tensor) -> Tensor:
        return rollouts_dBTD.view_as(rollouts_dBTD)

    @staticmethod
    def backward(ctx: Any, grad_dBTD: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(grad_BTD[:, i:] for i, grad_BTD in enumerate(grad_dBTD, start=1))
