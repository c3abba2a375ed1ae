"""Next-latent prediction (arXiv 2511.05963, §3.2).

    rollout       ĥ_{t+1} = p_ψ(h_t, x_{t+1}),  ĥ_{t+i} = p_ψ(ĥ_{t+i−1}, x_{t+i})          i = 2..d
    next token    −log p(x_{t+1} | h_t)
    next latent   (1/d) Σ_i SmoothL1(sg[h_{t+i}], ĥ_{t+i})
    KL            (1/d) Σ_i KL(p(· | sg[h_{t+i}]) ‖ p(· | ĥ_{t+i})),  head frozen
    loss          next token + λ_h · next latent + λ_KL · KL

Each term is a mean over its own valid positions of the global batch, rollout step by rollout step. A rollout
counts only if it stays inside one document. A KL term counts only if, besides, the token that its landing
position predicts is a target: prompt tokens are masked out of next-token and KL, and not out of next-latent.

The section's other keys change one thing each (docs/objective.md); with none of them set, this is the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        self.config = config
        self.horizon = config.horizon
        self.next_latent_weight = config.next_latent_weight
        self.kl_weight = config.kl_weight
        self.dynamics = LatentDynamics(width, config.dynamics_width)
        self.dynamics_only = False
        """Set by the trainer in the first `dynamics_only_steps` steps: no gradient leaves p_ψ."""

    def valid_counts(self, batch: TokenBatch) -> Tensor:
        """(1 + 2d,) float64: next token; next latent for steps 1..d; KL for steps 1..d."""
        latent_dBT = rollout_mask(batch, self.horizon)
        next_token_BT = next_token_mask(batch)
        counts = [next_token_BT.sum()[None], latent_dBT.sum((1, 2)), (latent_dBT & next_token_BT).sum((1, 2))]
        return torch.cat(counts).double()

    def forward(self, states: TrunkStates, batch: TokenBatch, head: nn.Module, counts: Tensor) -> dict[str, Tensor]:
        """See `Objective.forward`; the latent terms are also given per rollout step."""
        d, hidden_BTD, embeddings_BTD = self.horizon, states.hidden, states.embeddings
        if self.dynamics_only:
            # Cut off from the trunk, yet with gradients: ZeRO-3 gathers weights for the backward pass by its inputs'.
            wanted = torch.is_grad_enabled()
            hidden_BTD, embeddings_BTD = (x.detach().requires_grad_(wanted) for x in (hidden_BTD, embeddings_BTD))
        next_token_count, latent_counts_d, kl_counts_d = counts.split([1, d, d])
        latent_dBT = rollout_mask(batch, d)
        next_token_BT = next_token_mask(batch)

        rollouts_dBTD = self.dynamics(hidden_BTD, embeddings_BTD, d)
        next_token, kl_d = self._token_losses(
            head,
            hidden_BTD,
            batch,
            mean_weights(next_token_BT, next_token_count),
            rollouts_dBTD,
            mean_weights(latent_dBT & next_token_BT, kl_counts_d[:, None, None]),
        )
        next_latent_d = latent_distances(
            rollouts_dBTD,
            hidden_BTD.detach() if self.config.stop_gradient_target else hidden_BTD,
            mean_weights(latent_dBT, latent_counts_d[:, None, None]),
            self.config.latent_loss,
        )
        next_latent, kl = next_latent_d.mean(), kl_d.mean()
        trunks_share = next_token.detach() if self.dynamics_only else next_token
        loss = trunks_share + self.next_latent_weight * next_latent + self.kl_weight * kl
        kl_name = {"kl": "loss_kl", "cross_entropy": "loss_rollout_cross_entropy"}[self.config.rollout_loss]
        losses = {"loss": loss, "loss_next_token": next_token, "loss_next_latent": next_latent, kl_name: kl}
        if d > 1:
            losses |= {f"loss_next_latent_{i + 1}": next_latent_d[i] for i in range(d)}
            losses |= {f"{kl_name}_{i + 1}": kl_d[i] for i in range(d)}
        return {name: value if name == "loss" else value.detach() for name, value in losses.items()}

    def _token_losses(
        self,
        head: nn.Module,
        hidden_BTD: Tensor,
        batch: TokenBatch,
        ce_weights_BT: Tensor,
        rollouts_dBTD: Tensor,
        kl_weights_dBT: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Weighted sums of cross-entropy () and of the rollouts' token loss (d,), from all or some of the positions."""
        targets_BT = batch.targets
        freeze_head = self.config.stop_gradient_head or self.dynamics_only
        options = {"rollout_loss": self.config.rollout_loss, "freeze_head": freeze_head}
        if self.config.kl_positions == 1.0 or batch.row_seeds is None:
            return head(hidden_BTD, targets_BT, ce_weights_BT, rollouts_dBTD, kl_weights_dBT, **options)
        # The chosen positions first, which get rollouts; then the others. One row of B·T positions, and one of M.
        chosen_BT = chosen_positions(batch.row_seeds, targets_BT.shape[1], self.config.kl_positions)
        order_N = chosen_BT.flatten().argsort(descending=True, stable=True).to(hidden_BTD.device)
        order_M = order_N[: int(chosen_BT.sum())]
        return head(
            hidden_BTD.flatten(0, 1)[None, order_N],
            targets_BT.flatten()[None, order_N],
            ce_weights_BT.flatten()[None, order_N],
            rollouts_dBTD.flatten(1, 2)[:, None, order_M],
            kl_weights_dBT.flatten(1, 2)[:, None, order_M] * (len(order_N) / len(order_M)),
            **options,
        )


def chosen_positions(seeds: Sequence[int], positions: int, fraction: float) -> Tensor:
    """(B, T) bool on the CPU: `fraction` of T positions, at least one, drawn in each row from its seed alone.

    Each position is as likely as any other, so sums over the chosen ones, times T over their number, are unbiased.
    """
    number = max(1, round(fraction * positions))
    chosen_BT = torch.zeros(len(seeds), positions, dtype=torch.bool)
    for row, seed in enumerate(seeds):
        draw = torch.randperm(positions, generator=torch.Generator().manual_seed(seed))
        chosen_BT[row, draw[:number]] = True
    return chosen_BT


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


def latent_distances(rollouts_dBTD: Tensor, targets_BTD: Tensor, weights_dBT: Tensor, loss: str) -> Tensor:
    """(d,): weighted sums over positions of SmoothL1 (beta 1) or squared error, means over features.

    In at least float32, and of the landings alone: row i − 1 of the rollouts has none before position i.
    """
    distance = {"smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss}[loss]
    dtype = torch.promote_types(rollouts_dBTD.dtype, torch.float32)
    sums = []
    for i, (rollout_BTD, weights_BT) in enumerate(zip(rollouts_dBTD.unbind(), weights_dBT, strict=True), start=1):
        errors = distance(rollout_BTD[:, i:].to(dtype), targets_BTD[:, i:].to(dtype), reduction="none").mean(-1)
        sums.append((errors * weights_BT[:, i:].to(dtype)).sum())
    return torch.stack(sums)
