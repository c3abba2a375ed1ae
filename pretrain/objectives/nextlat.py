"""Next-latent prediction (arXiv 2511.05963, §3.2).

    rollout       ĥ_{t+1} = p_ψ(h_t, x_{t+1}),  ĥ_{t+i} = p_ψ(ĥ_{t+i−1}, x_{t+i})          i = 2..d
    next token    −log p(x_{t+1} | h_t)
    next latent   (1/d) Σ_i SmoothL1(sg[h_{t+i}], ĥ_{t+i})
    KL            (1/d) Σ_i KL(p(· | sg[h_{t+i}]) ‖ p(· | ĥ_{t+i})),  head frozen
    loss          next token + λ_h · next latent + λ_KL · KL

Each term is a mean over its own valid positions of the global batch, rollout step by rollout step. A rollout
counts only if it stays inside one document. A KL term counts only if, besides, the token that its landing
position predicts is a target: prompt tokens are masked out of next-token and KL, and not out of next-latent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import NextLatConfig
from pretrain.latent_dynamics import LatentDynamics
from pretrain.objectives.base import Objective, TokenBatch, mean_weights, next_token_mask
from pretrain.transformer import TrunkStates


class NextLat(Objective):
    """Next-token prediction beside prediction of the trunk's own next hidden states.

    Args:
        config: the run's objective section.
        width: D, the width of the hidden states.
    """

    def __init__(self, config: NextLatConfig, width: int):
        super().__init__()
        self.horizon = config.horizon
        self.next_latent_weight = config.next_latent_weight
        self.kl_weight = config.kl_weight
        self.dynamics = LatentDynamics(width, config.dynamics_width)

    def valid_counts(self, batch: TokenBatch) -> Tensor:
        """(1 + 2d,) float64: next token; next latent for steps 1..d; KL for steps 1..d."""
        latent_dBT = rollout_mask(batch, self.horizon)
        next_token_BT = next_token_mask(batch)
        counts = [next_token_BT.sum()[None], latent_dBT.sum((1, 2)), (latent_dBT & next_token_BT).sum((1, 2))]
        return torch.cat(counts).double()

    def forward(self, states: TrunkStates, batch: TokenBatch, head: nn.Module, counts: Tensor) -> dict[str, Tensor]:
        """See `Objective.forward`; the latent terms are also given per rollout step."""
        d, hidden_BTD = self.horizon, states.hidden
        next_token_count, latent_counts_d, kl_counts_d = counts.split([1, d, d])
        latent_dBT = rollout_mask(batch, d)
        next_token_BT = next_token_mask(batch)

        rollouts_dBTD = self.dynamics(hidden_BTD, states.embeddings, d)
        next_token, kl_d = head(
            hidden_BTD,
            batch.targets,
            mean_weights(next_token_BT, next_token_count),
            rollouts_dBTD,
            mean_weights(latent_dBT & next_token_BT, kl_counts_d[:, None, None]),
        )
        next_latent_d = smooth_l1(
            rollouts_dBTD, hidden_BTD.detach(), mean_weights(latent_dBT, latent_counts_d[:, None, None])
        )
        next_latent, kl = next_latent_d.mean(), kl_d.mean()
        loss = next_token + self.next_latent_weight * next_latent + self.kl_weight * kl
        losses = {"loss": loss, "loss_next_token": next_token, "loss_next_latent": next_latent, "loss_kl": kl}
        if d > 1:
            losses |= {f"loss_next_latent_{i + 1}": next_latent_d[i] for i in range(d)}
            losses |= {f"loss_kl_{i + 1}": kl_d[i] for i in range(d)}
        return {name: value if name == "loss" else value.detach() for name, value in losses.items()}


def rollout_mask(batch: TokenBatch, horizon: int) -> Tensor:
    """(d, B, T) bool: may the rollout over i steps that lands on position s (at [i−1, :, s]) be supervised?

    Yes where it starts inside the window and its start and landing lie in one document: document ids never
    decrease along a row, so then no token of the path opened another document. The whole path is masked, not
    only landings on EOS: that is what the paper's text says.
    """
    documents_BT = batch.document_ids[:, :-1]
    masks = []
    for i in range(1, horizon + 1):
        same_document = (documents_BT[:, i:] == documents_BT[:, :-i]) & (documents_BT[:, i:] >= 0)
        masks.append(F.pad(same_document, (i, 0)))  # landings s < i have no start
    return torch.stack(masks)


def smooth_l1(rollouts_dBTD: Tensor, hidden_BTD: Tensor, weights_dBT: Tensor) -> Tensor:
    """(d,): weighted sums over positions of SmoothL1 (beta 1, mean over features), in at least float32."""
    dtype = torch.promote_types(rollouts_dBTD.dtype, torch.float32)
    targets_dBTD = hidden_BTD.to(dtype).expand(rollouts_dBTD.shape)
    distance_dBT = F.smooth_l1_loss(rollouts_dBTD.to(dtype), targets_dBTD, reduction="none").mean(-1)
    return (distance_dBT * weights_dBT.to(dtype)).sum((1, 2))
