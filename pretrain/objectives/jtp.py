"""Joint multi-token prediction through Fetch, a small attention over the tokens that were just consumed.

    combine      C(h, e) = LayerNorm(e + γ · h),  γ learned from 0.1
    sequence     [C(h_t, e(x_t)), C(h_t, e(x_{t+1})), …, C(h_t, e(x_{t+d}))],  slots 0 … d, tokens teacher-forced
    Fetch        y = causal attention over the slots, with a learned bias per pair of slots; no MLP, no residual
    next token   −log p(x_{t+1} | norm(y_0))
    slot k ≥ 1   −log p(x_{t+1+k} | norm(y_k + h_t))
    loss         L_0 + λ · mean(L_1 … L_d)

The next token too passes through Fetch, so trunk and output head alone are not the model. Slot k counts at t where
x_{t+1+k} is a target and x_{t+1} … x_{t+k} opened no other document.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import JtpConfig, ModelConfig
from pretrain.objectives.base import Objective, TokenBatch, ahead_masks, ahead_targets, mean_weights, token_terms
from pretrain.objectives.chunked_loss import cross_entropy_of_streams
from pretrain.transformer import TrunkStates


class Fetch(nn.Module):
    """From a hidden state and the tokens consumed since, to what the output head reads for the token after them.

    Args:
        model: the trunk's shape.
        horizon: d, so that there are S = d + 1 slots.
    """

    initial_values: ClassVar = {"gamma": 0.1, "combine_norm.bias": 0.0, "slot_bias": 0.0}
    combine_epsilon = 1e-5  # the authors' value, whatever the trunk's epsilon

    def __init__(self, model: ModelConfig, horizon: int):
        super().__init__()
        width = model.width
        self.attention_heads = model.fetch_heads
        self.gamma = nn.Parameter(torch.empty(1))
        self.combine_norm = nn.LayerNorm(width, eps=self.combine_epsilon)
        self.slot_bias = nn.Parameter(torch.empty(self.attention_heads, horizon + 1, horizon + 1))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.norm = nn.RMSNorm(width, eps=model.norm_epsilon)

    def forward(self, hidden_ND: Tensor, embeddings_NSD: Tensor) -> Tensor:
        """(N, S, D): for each of N hidden states, what the output head reads at each slot.

        embeddings_NSD: of the token whose state it is, and of those that follow; at most d + 1.
        """
        N, S, D = embeddings_NSD.shape
        x_NSD = self.combine_norm(embeddings_NSD + self.gamma * hidden_ND[:, None])
        q, k, v = (
            part.view(N, S, self.attention_heads, -1).transpose(1, 2) for part in self.qkv(x_NSD).split(D, dim=-1)
        )
        future_SS = torch.ones(S, S, dtype=torch.bool, device=x_NSD.device).triu(1)
        bias_HSS = self.slot_bias[:, :S, :S].masked_fill(future_SS, float("-inf"))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_HSS.to(q.dtype)).transpose(1, 2)
        y_NSD = self.output(mixed.reshape(N, S, D))
        return self.norm(torch.cat([y_NSD[:, :1], y_NSD[:, 1:] + hidden_ND[:, None]], dim=1))


class JointToken(Objective):
    """Next-token prediction beside d further tokens, each given those before it.

    Args:
        config: the run's objective section.
        model: the trunk's shape.
    """

    needed_at_inference = True

    def __init__(self, config: JtpConfig, model: ModelConfig):
        super().__init__()
        self.horizon = config.horizon
        self.weight = config.joint_token_weight
        self.fetch = Fetch(model, config.horizon)

    def valid_counts(self, batch: TokenBatch) -> Tensor:
        """(1 + d,) float64: positions that count for slot 0, 1 … d."""
        return ahead_masks(batch, self.horizon).sum((1, 2)).double()

    def forward(self, states: TrunkStates, batch: TokenBatch, head: nn.Module, counts: Tensor) -> dict[str, Tensor]:
        """See `Objective.forward`; `loss_joint_token` is the mean over slots 1 … d, `…_k` is slot k's."""
        T = states.hidden.shape[1]
        padded_BTD = F.pad(states.embeddings, (0, 0, 0, self.horizon))  # past the row's end no slot counts
        embeddings_BTSD = torch.stack([padded_BTD[:, k : k + T] for k in range(self.horizon + 1)], dim=2)
        slots_NSD = self.fetch(states.hidden.flatten(0, 1), embeddings_BTSD.flatten(0, 1))
        weights_SBT = mean_weights(ahead_masks(batch, self.horizon), counts[:, None, None])
        targets_SBT = ahead_targets(batch, self.horizon)
        slot_weights_S = counts.new_tensor([1.0] + [self.weight / self.horizon] * self.horizon)

        def loss_of(slots_NSD: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
            return cross_entropy_of_streams(
                slots_NSD.transpose(0, 1), head_VD, targets_SBT.flatten(1), weights_SBT.flatten(1), slot_weights_S
            )

        loss, terms_S = head(slots_NSD, compute=loss_of)
        return token_terms(loss, terms_S, "loss_joint_token")

    def next_token_states(self, states: TrunkStates, eos_embedding_D: Tensor) -> Tensor:
        """Slot 0 of every position."""
        hidden_BTD = states.hidden
        slots_N1D = self.fetch(hidden_BTD.flatten(0, 1), states.embeddings.flatten(0, 1)[:, None])
        return slots_N1D.view(hidden_BTD.shape)
