"""p_psi, the latent dynamics model: the next hidden state from the current one and the next token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LatentDynamics(nn.Module):
    """ĥ_{t+1} = h_t + MLP(RMSNorm([e(x_{t+1}) ; h_t])), three linear layers with GELU between (paper §3.2).

    Args:
        width: D, the width of hidden states and token embeddings.
        hidden_width: inner width of the MLP.
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
        x = self.norm(torch.cat([next_embedding, state], dim=-1))
        x = F.gelu(self.input(x))
        x = F.gelu(self.hidden(x))
        return state + self.output(x)

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
        rollouts = []
        state = hidden_BTD
        for i in range(1, horizon + 1):
            state = self.step(state[:, :-1], embeddings_BTD[:, i:])  # (B, T−i, D), landing on s = i..T−1
            rollouts.append(F.pad(state, (0, 0, i, 0)))
        return torch.stack(rollouts)
