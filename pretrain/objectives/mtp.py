"""Multi-token prediction with independent heads (Gloeckle et al., arXiv 2404.19737).

    head 0       the trunk's own last block and norm: next token, −log p(x_{t+1} | x_≤t)
    head k       one block and one norm of its own, beside the trunk's last block: −log p_k(x_{t+1+k} | x_≤t)
    loss         L_0 + λ · mean(L_1 … L_d),  one output head for all

Trunk and head 0 are the plain model, which the extra heads only help to train; they draft at inference.

Head k at t counts where x_{t+1+k} is a target and x_{t+1} … x_{t+k} opened no other document, so that the EOS which
ends a document is still predicted. The authors' released code says as much in a comment, and then looks up the
target's document one place too early, so that it never trains on that EOS; we follow the comment.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.config import ModelConfig, MtpConfig
from pretrain.objectives.base import Objective, TokenBatch, ahead_masks, ahead_targets, mean_weights, token_terms
from pretrain.objectives.chunked_loss import cross_entropy_of_streams
from pretrain.transformer import Block, TrunkStates


class PredictionHead(nn.Module):
    """One more last block, with a norm of its own."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.block = Block(model)
        self.norm = nn.RMSNorm(model.width, eps=model.norm_epsilon)

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], mask_B1TT: Tensor) -> Tensor:
        """Residual stream before the trunk's last block to what the output head reads, (B, T, D)."""
        return self.norm(self.block(x_BTD, rotation, mask_B1TT))


class MultiToken(Objective):
    """Next-token prediction beside d heads that each predict one token further ahead.

    Args:
        config: the run's objective section.
        model: the trunk's shape.
    """

    def __init__(self, config: MtpConfig, model: ModelConfig):
        super().__init__()
        self.horizon = config.horizon
        self.weight = config.multi_token_weight
        self.heads = nn.ModuleList(PredictionHead(model) for _ in range(config.horizon))

    def valid_counts(self, batch: TokenBatch) -> Tensor:
        """(1 + d,) float64: positions that count for head 0, 1 … d."""
        return ahead_masks(batch, self.horizon).sum((1, 2)).double()

    def forward(self, states: TrunkStates, batch: TokenBatch, head: nn.Module, counts: Tensor) -> dict[str, Tensor]:
        """See `Objective.forward`; `loss_multi_token` is the mean over the extra heads, `…_k` is head k's."""
        extra = [one(states.before_last_block, states.rotation, states.mask) for one in self.heads]
        streams_GBTD = torch.stack([states.hidden, *extra])
        weights_GBT = mean_weights(ahead_masks(batch, self.horizon), counts[:, None, None])
        targets_GBT = ahead_targets(batch, self.horizon)
        stream_weights_G = counts.new_tensor([1.0] + [self.weight / self.horizon] * self.horizon)

        def loss_of(streams_GBTD: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
            return cross_entropy_of_streams(
                streams_GBTD.flatten(1, 2), head_VD, targets_GBT.flatten(1), weights_GBT.flatten(1), stream_weights_G
            )

        loss, terms_G = head(streams_GBTD, compute=loss_of)
        return token_terms(loss, terms_G, "loss_multi_token")
