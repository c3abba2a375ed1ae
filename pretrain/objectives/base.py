"""What every objective shares: its batch, the output head, and how a mean over the global batch is formed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_pipeline import Batch
from pretrain.objectives.fused_loss import fused_cross_entropy_kl
from pretrain.transformer import TrunkStates


@dataclass(frozen=True)
class TokenBatch:
    """B rows of T + 1 tokens: the model reads the first T, the last is a target only."""

    tokens: Tensor
    """(B, T+1) int64."""
    document_ids: Tensor
    """(B, T+1) int: equal for tokens of one document, −1 for padding."""
    positions: Tensor
    """(B, T+1) int: position in the document."""
    target_mask: Tensor
    """(B, T+1) bool: the token counts as a target (prompt tokens and padding do not)."""
    labels: Tensor | None = None
    """(B, T+1) int64: what each token is to be answered with; None where that is the next token."""

    @property
    def targets(self) -> Tensor:
        """(B, T) int64: what the model is to answer at each position that it reads."""
        return self.tokens[:, 1:] if self.labels is None else self.labels[:, :-1]

    @classmethod
    def from_numpy(cls, batch: Batch, device: torch.device | str = "cpu") -> TokenBatch:
        """The data pipeline's batch as tensors on `device`."""
        given = (batch.tokens, batch.document_ids, batch.positions, batch.target_mask, batch.labels)
        arrays = (array for array in given if array is not None)
        return cls(*(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays))


class LanguageModelHead(nn.Module):
    """The output head, a (V, D) matrix that also computes the losses which read it.

    The losses live here because under ZeRO-3 a weight is whole only inside the forward of its own module.

    Args:
        width: D.
        vocab_size: V.
        tied_to: the token embedding whose weight is the head's, or None for a weight of its own.
    """

    def __init__(self, width: int, vocab_size: int, tied_to: nn.Embedding | None = None):
        super().__init__()
        self.weight = tied_to.weight if tied_to else nn.Parameter(torch.empty(vocab_size, width))

    def forward(
        self,
        hidden_BTD: Tensor,
        targets_BT: Tensor | None = None,
        ce_weights_BT: Tensor | None = None,
        rollouts_dBTD: Tensor | None = None,
        kl_weights_dBT: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V); or with targets, the weighted sums of cross-entropy () and of KL (d,)."""
        if targets_BT is None or ce_weights_BT is None:
            return hidden_BTD @ self.weight.T
        return fused_cross_entropy_kl(
            hidden_BTD.flatten(0, 1),
            self.weight,
            targets_BT.flatten(),
            ce_weights_BT.flatten(),
            None if rollouts_dBTD is None else rollouts_dBTD.flatten(1, 2),
            None if kl_weights_dBT is None else kl_weights_dBT.flatten(1, 2),
        )


class Objective(nn.Module):
    """Turns hidden states into losses that sum, over micro-batches and ranks, to means over the global batch.

    A term's mean divides by the number of its valid positions in the *whole* global batch. So the caller first
    adds up `valid_counts` over all micro-batches and ranks, then passes the result to `forward`, whose values
    are this micro-batch's share of each mean.
    """

    def valid_counts(self, batch: TokenBatch) -> Tensor:
        """(terms,) float64: how many positions of this micro-batch enter each term."""
        raise NotImplementedError

    def forward(self, states: TrunkStates, batch: TokenBatch, head: nn.Module, counts: Tensor) -> dict[str, Tensor]:
        """Losses by name: `loss`, which carries the gradient, and each detached `loss_…` term.

        Args:
            states: what the trunk made of the first T tokens.
            batch: the micro-batch.
            head: the output head.
            counts: `valid_counts` summed over the global batch.
        """
        raise NotImplementedError


def next_token_mask(batch: TokenBatch) -> Tensor:
    """(B, T) bool: positions t whose next token x_{t+1} is a target."""
    return batch.target_mask[:, 1:]


def mean_weights(mask: Tensor, count: Tensor) -> Tensor:
    """1/count where `mask`, 0 elsewhere, float32 or wider; an empty term (count 0) weighs nothing."""
    return mask * (1.0 / count.clamp(min=1.0))
