"""From logits to the distribution that is sampled, and the accept-or-resample rule of speculative sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; the filters apply after the temperature.

    Raises UserError for values outside their range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    """Keep the k most probable tokens (and those equal to the k-th)."""
    top_p: float | None = None
    """Keep the fewest most probable tokens whose probabilities sum to at least p."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k {self.top_k} must be at least 1; leave it out to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} must lie in (0, 1]; leave it out to keep every token")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that is actually sampled: (..., V) logits to (..., V) float32 or wider, summing to 1."""
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        descending, order = logits.softmax(-1).sort(dim=-1, descending=True)
        # A token stays if those before it have not reached p yet; so the first always does.
        dropped_in_order = descending.cumsum(-1) - descending >= sampling.top_p
        dropped = torch.empty_like(dropped_in_order).scatter_(-1, order, dropped_in_order)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits.softmax(-1)


def draw(p_V: Tensor, generator: torch.Generator | None = None) -> int:
    """One token id from a distribution (V,): the first to ring of clocks with exponential rates p.

    As torch.multinomial, without its checks, which cost a tenth of a small draft step.
    """
    waiting_V = torch.empty_like(p_V).exponential_(generator=generator)
    return int((p_V / waiting_V).argmax())


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """What is sampled after a draft was refused: max(0, p − q), normalised (Leviathan et al. 2023, alg. 1).

    p, q and the result: (V,). Where p = q nothing is left and, but for rounding, nothing is refused: then p.
    """
    left_V = (p_V - q_V).clamp(min=0)
    total = left_V.sum()
    return left_V / total if total > 0 else p_V


def verify(
    p_kV: Tensor, q_kV: Tensor, drafts: list[int], generator: torch.Generator | None = None
) -> tuple[int, Tensor | None]:
    """How many drafts stand, and the distribution of the token after them if one was refused.

    Draft i stands with probability min(1, p_i / q_i) (Leviathan et al. 2023, alg. 1); the first refusal ends it.

    Args:
        p_kV: what the target samples from at each draft's position.
        q_kV: what each draft was drawn from.
        drafts: k token ids.
        generator: draws k uniform numbers.

    Returns:
        The number of accepted drafts, and the residual distribution (V,) or None where all k stand.
    """
    uniform = torch.rand(len(drafts), generator=generator, device=p_kV.device, dtype=p_kV.dtype)
    chosen = torch.tensor(drafts, device=p_kV.device)[:, None]
    stands = uniform * q_kV.gather(1, chosen)[:, 0] < p_kV.gather(1, chosen)[:, 0]
    accepted = int(stands.long().cumprod(0).sum())
    return accepted, None if accepted == len(drafts) else residual(p_kV[accepted], q_kV[accepted])
