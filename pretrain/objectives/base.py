"""What every objective shares: its batch, the output head, and how a mean over the global batch is formed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
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
    row_seeds: tuple[int, ...] | None = None
    """B seeds, see `row_seeds`, for what is chosen at random in a row; None where nothing is (validation)."""
    labels: Tensor | None = None
    """(B, T+1) int64: what each token is to be answered with; None where that is the next token."""

    @property
    def targets(self) -> Tensor:
        """(B, T) int64: what the model is to answer at each position that it reads."""
        return self.tokens[:, 1:] if self.labels is None else self.labels[:, :-1]

    @classmethod
    def from_numpy(
        cls, batch: Batch, device: torch.device | str = "cpu", row_seeds: tuple[int, ...] | None = None
    ) -> TokenBatch:
        """The data pipeline's batch as tensors on `device`."""
        arrays = (batch.tokens, batch.document_ids, batch.positions, batch.target_mask)
        tokens, documents, positions, targets = (torch.from_numpy(a).to(device, non_blocking=True) for a in arrays)
        labels = None if batch.labels is None else torch.from_numpy(batch.labels).to(device, non_blocking=True)
        return cls(tokens, documents, positions, targets, row_seeds, labels)


def row_seeds(seed: int, samples: Iterable[int]) -> tuple[int, ...]:
    """A seed for each sample of a run, counted from its first step on: the same whichever rank reads it, and when."""
    digests = (hashlib.sha256(f"row {seed} {sample}".encode()).digest() for sample in samples)
    return tuple(int.from_bytes(digest[:8], "little") >> 1 for digest in digests)


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
        compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V); or with targets, the weighted sums of cross-entropy () and of KL (d,).

        compute: a loss of another form, called with the states, of whatever shape, and the weight.
        options: of `fused_cross_entropy_kl`.
        """
        if compute is not None:
            return compute(hidden_BTD, self.weight)
        if targets_BT is None or ce_weights_BT is None:
            return hidden_BTD @ self.weight.T
        return fused_cross_entropy_kl(
            hidden_BTD.flatten(0, 1),
            self.weight,
            targets_BT.flatten(),
            ce_weights_BT.flatten(),
            None if rollouts_dBTD is None else rollouts_dBTD.flatten(1, 2),
            None if kl_weights_dBT is None else kl_weights_dBT.flatten(1, 2),
            **options,
        )


class Objective(nn.Module):
    """Turns hidden states into losses that sum, over micro-batches and ranks, to means over the global batch.

    A term's mean divides by the number of its valid positions in the *whole* global batch. So the caller first
    adds up `valid_counts` over all micro-batches and ranks, then passes the result to `forward`, whose values
    are this micro-batch's share of each mean.
    """

    needed_at_inference: ClassVar[bool] = False
    """Whether the next token cannot be predicted without the objective's own modules."""

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

    def next_token_states(self, states: TrunkStates, eos_embedding_D: Tensor) -> Tensor:
        """(B, T, D): what the output head reads to predict the next token, when nothing after it is known.

        For inference: the weights must be whole. eos_embedding_D: for an objective that reads what follows, too.
        """
        return states.hidden


def next_token_mask(batch: TokenBatch) -> Tensor:
    """(B, T) bool: positions t whose next token x_{t+1} is a target."""
    return batch.target_mask[:, 1:]


def mean_weights(mask: Tensor, count: Tensor) -> Tensor:
    """1/count where `mask`, 0 elsewhere, float32 or wider; an empty term (count 0) weighs nothing."""
    return mask * (1.0 / count.clamp(min=1.0))


def ahead_masks(batch: TokenBatch, horizon: int) -> Tensor:
    """(d+1, B, T) bool: may x_{t+1+k} (at [k, :, t]) be predicted from position t?

    Yes where it is a target, and the tokens between lie in the document of x_t: it may be the EOS that ends it.
    """
    documents_BT, targets_BT = batch.document_ids[:, :-1], next_token_mask(batch)
    masks = [targets_BT]
    for k in range(1, horizon + 1):
        inside = documents_BT[:, k:] == documents_BT[:, :-k]
        masks.append(F.pad(targets_BT[:, k:] & inside, (0, k)))
    return torch.stack(masks)


def ahead_targets(batch: TokenBatch, horizon: int) -> Tensor:
    """(d+1, B, T) int64: x_{t+1+k} at [k, :, t], 0 past the row's end."""
    tokens = F.pad(batch.tokens, (0, horizon))
    length = batch.tokens.shape[1] - 1
    return torch.stack([tokens[:, 1 + k : 1 + k + length] for k in range(horizon + 1)])


def token_terms(loss: Tensor, terms_G: Tensor, name: str) -> dict[str, Tensor]:
    """Losses by name from the next token's term and those of d tokens further ahead, terms (d+1,)."""
    ahead_d = terms_G[1:]
    losses = {"loss": loss, "loss_next_token": terms_G[0], name: ahead_d.mean()}
    if len(ahead_d) > 1:
        losses |= {f"{name}_{k}": term for k, term in enumerate(ahead_d, start=1)}
    return losses
