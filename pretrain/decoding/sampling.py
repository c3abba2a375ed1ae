"""From logits to the distribution that is sampled, and the accept-or-resample rule of speculative sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """What a token is drawn from, by logits (..., V).

    Greedy: the one token that can come, (...), so that nothing of the vocabulary's size is formed or compared. Else
    `probabilities`.
    """
    if sampling.temperature == 0:
        return logits.max(-1).indices  # on a CPU in half of argmax's time
    return probabilities(logits, sampling)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities that are actually sampled: (..., V) logits to (..., V) float32 or wider, summing to 1.

    Where the temperature is not 0.
    """
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


def draw(chances: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Token ids (...) from what `distribution` gives.

    One uniform number finds its place among the cumulated probabilities: a tenth of the time of torch.multinomial,
    which draws a number for every token. In float64, where a token of probability 0 takes no room.
    """
    if not chances.is_floating_point():
        return chances
    cumulated = chances.double().cumsum(-1)
    place = torch.rand((*chances.shape[:-1], 1), dtype=torch.float64, device=chances.device, generator=generator).mul_(
        cumulated[..., -1:]
    )
    return torch.searchsorted(cumulated, place, right=True)[..., 0].clamp_(max=chances.shape[-1] - 1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What is sampled after a draft was refused: max(0, p − q), normalised (Leviathan et al. 2023, alg. 1).

    p, q and the result: (..., V). Where p = q nothing is left and, but for rounding, nothing is refused: then p.
    """
    left = (p - q).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total, p)


def verify(
    p_BTV: Tensor, q_BKV: Tensor, drafts_BK: Tensor, counts_B: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """How many drafts of each text stand, and the distribution of the token after them.

    Draft i stands with probability min(1, p_i / q_i) (Leviathan et al. 2023, alg. 1); the first refusal ends it.

    Args:
        p_BTV: what the target samples from at each draft's position and at the one after, T = K + 1.
        q_BKV: what each draft was drawn from.
        drafts_BK: token ids.
        counts_B: how many of a row's K drafts are drafts; the others are padding.
        generator: draws B · K uniform numbers.

    Returns:
        Accepted drafts (B,) and the next distribution (B, V): the residual after a refusal, else the target's own.
    """
    rows_B, K = torch.arange(len(p_BTV), device=p_BTV.device), drafts_BK.shape[1]
    chosen_BK1 = drafts_BK[..., None]
    uniform_BK = torch.rand(drafts_BK.shape, generator=generator, device=p_BTV.device, dtype=p_BTV.dtype)
    stands_BK = uniform_BK * q_BKV.gather(2, chosen_BK1)[..., 0] < p_BTV[:, :K].gather(2, chosen_BK1)[..., 0]
    accepted_B = _before_the_first_refusal(stands_BK, counts_B)
    next_BV = p_BTV[rows_B, accepted_B]
    left_BV = residual(next_BV, q_BKV[rows_B, accepted_B.clamp(max=K - 1)])
    return accepted_B, torch.where((accepted_B < counts_B)[:, None], left_BV, next_BV)


def verify_greedy(p_BT: Tensor, drafts_BK: Tensor, counts_B: Tensor) -> tuple[Tensor, Tensor]:
    """`verify` where p is the one token that can come: a draft stands if it is that token. Returns (B,) and (B,)."""
    accepted_B = _before_the_first_refusal(drafts_BK == p_BT[:, : drafts_BK.shape[1]], counts_B)
    return accepted_B, p_BT[torch.arange(len(p_BT), device=p_BT.device), accepted_B]


def _before_the_first_refusal(stands_BK: Tensor, counts_B: Tensor) -> Tensor:
    """How many of a row's first counts_B drafts stand before one that does not."""
    is_draft_BK = torch.arange(stands_BK.shape[1], device=stands_BK.device) < counts_B[:, None]
    return (stands_BK & is_draft_BK).long().cumprod(1).sum(1)
