"""Cross-entropy of several streams of states that read one output head, in chunks of positions.

As in `fused_loss`, no (positions × vocabulary) tensor exists, and gradients are formed chunk by chunk while the logits
are at hand. Here the states may besides be made chunk by chunk, so that what they are made by leaves nothing behind.

Shapes: G streams, N positions, C of them in a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.objectives.fused_loss import HEADS_PER_CHUNK, LEAST_BUDGET_BYTES

MakeStates = Callable[..., Tensor]
"""(slice of positions, *sources) → states (G, C, D)."""


def cross_entropy_of_streams(
    states_GND: Tensor,
    head_VD: Tensor,
    targets_GN: Tensor,
    mean_weights_GN: Tensor,
    stream_weights_G: Tensor,
    memory_budget_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The streams' weighted sums of cross-entropy, and the sum of those.

        terms_g = Σ_n mean_weights_gn · −log softmax(head · states_gn)[targets_gn]
        loss    = Σ_g stream_weights_g · terms_g

    Args:
        states_GND: what the head reads.
        head_VD: its weight.
        targets_GN: token ids; any valid id where the weight is 0.
        mean_weights_GN: 0 for masked positions; they fold in the 1/count of a mean.
        stream_weights_G: float weights.
        memory_budget_bytes: bound on the memory of logits; None for that of `fused_loss`.

    Returns:
        loss (), with gradients to states and head, and terms (G,), without; in nats, in float32 or wider.
    """
    return _chunked(None, head_VD, targets_GN, mean_weights_GN, stream_weights_G, memory_budget_bytes, [states_GND])


def cross_entropy_of_made_streams(
    make_states: MakeStates,
    sources: Sequence[Tensor],
    head_VD: Tensor,
    targets_GN: Tensor,
    mean_weights_GN: Tensor,
    stream_weights_G: Tensor,
    memory_budget_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `cross_entropy_of_streams`, of states that `make_states` makes for a chunk at a time.

    Args:
        make_states: differentiable in each of the sources, and in nothing else.
        sources: the tensors that it reads, which get gradients, added up over chunks in float32 or wider.
    """
    return _chunked(
        make_states, head_VD, targets_GN, mean_weights_GN, stream_weights_G, memory_budget_bytes, list(sources)
    )


def _chunked(
    make_states: MakeStates | None,
    head_VD: Tensor,
    targets_GN: Tensor,
    mean_weights_GN: Tensor,
    stream_weights_G: Tensor,
    memory_budget_bytes: int | None,
    sources: list[Tensor],
) -> tuple[Tensor, Tensor]:
    if memory_budget_bytes is None:
        memory_budget_bytes = max(LEAST_BUDGET_BYTES, int(HEADS_PER_CHUNK * head_VD.nbytes))
    sum_dtype = torch.promote_types(head_VD.dtype, torch.float32)
    bytes_per_position = 2 * len(targets_GN) * head_VD.shape[0] * sum_dtype.itemsize  # logits and probabilities
    chunk = max(1, memory_budget_bytes // bytes_per_position)
    return _ChunkedCrossEntropy.apply(
        make_states, targets_GN, mean_weights_GN, stream_weights_G, chunk, torch.is_grad_enabled(), head_VD, *sources
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        make_states: MakeStates | None,
        targets_GN: Tensor,
        mean_weights_GN: Tensor,
        stream_weights_G: Tensor,
        chunk: int,
        form_gradients: bool,
        head_VD: Tensor,
        *sources: Tensor,
    ) -> tuple[Tensor, Tensor]:
        sum_dtype = torch.promote_types(head_VD.dtype, torch.float32)
        streams, positions = targets_GN.shape
        terms_G = torch.zeros(streams, dtype=sum_dtype, device=head_VD.device)
        stream_weights_G = stream_weights_G.to(sum_dtype)
        if form_gradients:
            grad_head_VD = torch.zeros_like(head_VD, dtype=sum_dtype)
            # States that are given are each of one chunk, so nothing adds up; sources are read by many.
            grads = [torch.zeros_like(s, dtype=None if make_states is None else sum_dtype) for s in sources]

        for start in range(0, positions, chunk):
            here = slice(start, min(start + chunk, positions))
            if make_states is None:
                states_GCD = sources[0][:, here]
            else:
                leaves = [source.detach().requires_grad_(form_gradients) for source in sources]
                with torch.set_grad_enabled(form_gradients):
                    made_GCD = make_states(here, *leaves)
                states_GCD = made_GCD.detach()

            mean_weights_GC1 = mean_weights_GN[:, here, None].to(sum_dtype)
            targets_GC1 = targets_GN[:, here, None]
            log_p_GCV = torch.log_softmax(states_GCD @ head_VD.T, dim=-1, dtype=sum_dtype)
            terms_G -= (log_p_GCV.gather(2, targets_GC1) * mean_weights_GC1).sum((1, 2))
            if not form_gradients:
                continue
            # ∂loss/∂(logits) = (p − onehot(target)) · weight
            weights_GC1 = mean_weights_GC1 * stream_weights_G[:, None, None]
            grad_GCV = log_p_GCV.exp_().mul_(weights_GC1).scatter_add_(2, targets_GC1, -weights_GC1).to(head_VD.dtype)
            grad_states_GCD = grad_GCV @ head_VD
            grad_CV, states_CD = grad_GCV.flatten(0, 1), states_GCD.flatten(0, 1)
            if grad_head_VD.dtype == grad_CV.dtype:
                grad_head_VD.addmm_(grad_CV.T, states_CD)
            else:
                grad_head_VD += grad_CV.T @ states_CD
            del log_p_GCV, grad_GCV, grad_CV
            if make_states is None:
                grads[0][:, here] = grad_states_GCD
            else:
                for total, part in zip(grads, torch.autograd.grad(made_GCD, leaves, grad_states_GCD), strict=True):
                    total += part

        loss = (terms_G * stream_weights_G).sum()
        if form_gradients:
            grads = [grad.to(source.dtype) for grad, source in zip(grads, sources, strict=True)]
            ctx.save_for_backward(grad_head_VD.to(head_VD.dtype), *grads)
        ctx.mark_non_differentiable(terms_G)
        return loss, terms_G

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_loss = grads[0]
        return (None,) * 6 + tuple(saved * grad_loss.to(saved.dtype) for saved in ctx.saved_tensors)
