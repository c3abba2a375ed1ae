"""Cross-entropy and KL in one pass over chunks of positions, with no (tokens × vocabulary) tensor.

The teacher of a rollout that lands on position s is the next-token distribution at s, which cross-entropy
computes anyway: one head product per chunk serves both, whatever the horizon. Gradients are formed chunk by
chunk while the logits are at hand, so the backward pass only scales them.

Shapes: N positions, D width, V vocabulary, d rollout steps, C positions in a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HEADS_PER_CHUNK = 2
"""Memory for logits, in sizes of the head's weight. A chunk reads the head and updates its gradient: one not much
smaller than the head would spend its time on that."""
LEAST_BUDGET_BYTES = 16 * 2**20


def fused_cross_entropy_kl(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    ce_weights_N: Tensor,
    rollouts_dND: Tensor | None = None,
    kl_weights_dN: Tensor | None = None,
    memory_budget_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sums of cross-entropy and of KL(teacher ‖ student).

    With p_n = softmax(head · hidden_n) and q_in = softmax(head · rollouts_in):

        cross-entropy = Σ_n ce_weights_n · −log p_n[targets_n]
        kl_i          = Σ_n kl_weights_in · Σ_v p_n[v] (log p_n[v] − log q_in[v])

    Cross-entropy sends gradients to `hidden` and `head`; KL to `rollouts` alone: the teacher is detached and
    the head frozen (paper, eq. 4).

    Args:
        hidden_ND: final hidden states.
        head_VD: the output head's weight.
        targets_N: token ids; any valid id where the weight is 0.
        ce_weights_N, kl_weights_dN: float weights, 0 for masked positions; they fold in the 1/count of a mean.
        rollouts_dND: predicted hidden states, row i landing on the same positions as `hidden_ND`; None for no KL.
        memory_budget_bytes: bound on the memory of logits; None for `HEADS_PER_CHUNK` times the head's.

    Returns:
        Cross-entropy, a scalar, and KL, one value per rollout step (d,), in nats, summed in float32 (float64
        where the inputs are).
    """
    if rollouts_dND is None or kl_weights_dN is None:
        rollouts_dND = hidden_ND.new_zeros(0, *hidden_ND.shape)
        kl_weights_dN = ce_weights_N.new_zeros(0, *ce_weights_N.shape)
    if memory_budget_bytes is None:
        memory_budget_bytes = max(LEAST_BUDGET_BYTES, HEADS_PER_CHUNK * head_VD.nbytes)
    form_gradients = torch.is_grad_enabled()
    return _FusedCrossEntropyKL.apply(
        hidden_ND, head_VD, targets_N, ce_weights_N, rollouts_dND, kl_weights_dN, memory_budget_bytes, form_gradients
    )


def positions_per_chunk(vocab_size: int, rollout_steps: int, bytes_per_value: int, memory_budget_bytes: int) -> int:
    """How many positions' logits fit the budget: about two (V,) rows live per teacher, and three per student."""
    bytes_per_position = vocab_size * (2 + 3 * rollout_steps) * bytes_per_value
    return max(1, memory_budget_bytes // bytes_per_position)


class _FusedCrossEntropyKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        targets_N: Tensor,
        ce_weights_N: Tensor,
        rollouts_dND: Tensor,
        kl_weights_dN: Tensor,
        memory_budget_bytes: int,
        form_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        sum_dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        steps, positions = rollouts_dND.shape[:2]
        ce_sum = torch.zeros((), dtype=sum_dtype, device=hidden_ND.device)
        kl_sums_d = torch.zeros(steps, dtype=sum_dtype, device=hidden_ND.device)
        if form_gradients:
            grad_hidden_ND = torch.empty_like(hidden_ND)
            grad_rollouts_dND = torch.empty_like(rollouts_dND)
            grad_head_VD = torch.zeros_like(head_VD, dtype=sum_dtype)

        chunk = positions_per_chunk(head_VD.shape[0], steps, sum_dtype.itemsize, memory_budget_bytes)
        for start in range(0, positions, chunk):
            here = slice(start, min(start + chunk, positions))
            hidden_CD, targets_C1 = hidden_ND[here], targets_N[here, None]
            ce_weights_C1 = ce_weights_N[here, None].to(sum_dtype)

            log_p_CV = _log_softmax(hidden_CD, head_VD, sum_dtype)
            ce_sum -= (log_p_CV.gather(1, targets_C1) * ce_weights_C1).sum()
            p_CV = log_p_CV.exp()

            if steps:
                kl_weights_dC1 = kl_weights_dN[:, here, None].to(sum_dtype)
                log_q_dCV = _log_softmax(rollouts_dND[:, here], head_VD, sum_dtype)
                kl_dC = ((log_p_CV - log_q_dCV) * p_CV).sum(-1)
                kl_sums_d += (kl_dC * kl_weights_dC1[..., 0]).sum(-1)
                if form_gradients:  # ∂KL/∂(student logits) = q − p
                    grad_dCV = log_q_dCV.exp_().sub_(p_CV).mul_(kl_weights_dC1).to(head_VD.dtype)
                    grad_rollouts_dND[:, here] = grad_dCV @ head_VD
                    del grad_dCV
                del log_q_dCV

            if form_gradients:  # ∂CE/∂(logits) = p − onehot(target)
                grad_CV = p_CV.mul_(ce_weights_C1).scatter_add_(1, targets_C1, -ce_weights_C1).to(head_VD.dtype)
                grad_hidden_ND[here] = grad_CV @ head_VD
                if grad_head_VD.dtype == grad_CV.dtype:
                    grad_head_VD.addmm_(grad_CV.T, hidden_CD)
                else:
                    grad_head_VD += grad_CV.T @ hidden_CD

        if form_gradients:
            ctx.save_for_backward(grad_hidden_ND, grad_head_VD.to(head_VD.dtype), grad_rollouts_dND)
        return ce_sum, kl_sums_d

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_ce, grad_kl_d = grads
        grad_hidden_ND, grad_head_VD, grad_rollouts_dND = ctx.saved_tensors
        scale_kl_d11 = grad_kl_d[:, None, None].to(grad_rollouts_dND.dtype)
        return (
            grad_hidden_ND * grad_ce.to(grad_hidden_ND.dtype),
            grad_head_VD * grad_ce.to(grad_head_VD.dtype),
            None,
            None,
            grad_rollouts_dND * scale_kl_d11,
            None,
            None,
            None,
        )


def _log_softmax(states: Tensor, head_VD: Tensor, sum_dtype: torch.dtype) -> Tensor:
    """log softmax(head · state) over the vocabulary, in `sum_dtype`; states (..., D) → (..., V)."""
    return torch.log_softmax(states @ head_VD.T, dim=-1, dtype=sum_dtype)
