"""Cross-entropy and the rollouts' token loss, chunk of positions by chunk, with no (tokens × vocabulary) tensor.

The teacher of a rollout that lands on position s is the next-token distribution at s, which cross-entropy computes
anyway. So a chunk's teachers and students go through the head in one product; their logits are turned in place into
gradients, block by block while a block is in the cache; and one product with the head gives the gradients of all
states. The backward pass only scales what is there.

Shapes: N positions, D width, V vocabulary, d rollout steps, of which the first M positions have one each; a chunk
has C positions, its buffer (C, 1 + d, V): per position the teacher, then the students.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

HEADS_PER_CHUNK = 1.5
"""Memory for logits, in sizes of the head's weight. A chunk reads the head and updates its gradient: one not much
smaller than the head would spend its time on that."""
LEAST_BUDGET_BYTES = 8 * 2**20
BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
"""Memory for probabilities in float32: what two cores' caches hold; on a GPU, enough to keep it busy."""

RolloutLoss = Literal["kl", "cross_entropy"]


def fused_cross_entropy_kl(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    ce_weights_N: Tensor,
    rollouts_dMD: Tensor | None = None,
    kl_weights_dM: Tensor | None = None,
    *,
    rollout_loss: RolloutLoss = "kl",
    freeze_head: bool = True,
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
        ce_weights_N, kl_weights_dM: float weights, 0 for masked positions; they fold in the 1/count of a mean.
        rollouts_dMD: predicted hidden states, row i landing on the first M ≤ N of the positions; None for none.
        rollout_loss: "cross_entropy" puts Σ_n kl_weights_in · −log q_in[targets_n] in the place of KL.
        freeze_head: False lets the rollouts' loss train the head too (never the teacher). The gradient that reaches
            the result must then be the same for every step, as that of their mean is.
        memory_budget_bytes: bound on the memory of logits; None for `HEADS_PER_CHUNK` times the head's.

    Returns:
        Cross-entropy, a scalar, and KL, one value per rollout step (d,), in nats, summed in float32 (float64
        where the inputs are). Their gradients can be taken once: the backward pass gives them out and keeps none.
    """
    if rollouts_dMD is None or kl_weights_dM is None:
        rollouts_dMD = hidden_ND.new_zeros(0, 0, hidden_ND.shape[-1])
        kl_weights_dM = ce_weights_N.new_zeros(0, 0)
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_ND, head_VD, rollouts_dMD = (x.to(dtype) for x in (hidden_ND, head_VD, rollouts_dMD))
    if memory_budget_bytes is None:
        memory_budget_bytes = max(LEAST_BUDGET_BYTES, int(HEADS_PER_CHUNK * head_VD.nbytes))
    options = _Options(rollout_loss, freeze_head, memory_budget_bytes, torch.is_grad_enabled())
    with torch.autocast(device, enabled=False):
        return _FusedCrossEntropyKL.apply(
            hidden_ND, head_VD, targets_N, ce_weights_N, rollouts_dMD, kl_weights_dM, options
        )


def positions_per_chunk(vocab_size: int, rollout_steps: int, bytes_per_value: int, memory_budget_bytes: int) -> int:
    """How many positions' logits fit the budget: a (V,) row for the teacher and one for each student."""
    return max(1, memory_budget_bytes // (vocab_size * (1 + rollout_steps) * bytes_per_value))


@dataclass(frozen=True)
class _Options:
    rollout_loss: RolloutLoss
    freeze_head: bool
    memory_budget_bytes: int
    form_gradients: bool


class _FusedCrossEntropyKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        targets_N: Tensor,
        ce_weights_N: Tensor,
        rollouts_dMD: Tensor,
        kl_weights_dM: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        sum_dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        steps, landings = rollouts_dMD.shape[:2]
        sums = torch.zeros(1 + steps, dtype=sum_dtype, device=hidden_ND.device)
        gradients = _Gradients(hidden_ND, head_VD, rollouts_dMD, options) if options.form_gradients else None
        logits = _LogitsBuffer(head_VD)
        for begin, end, d in ((0, landings, steps), (landings, len(hidden_ND), 0)):
            chunk = positions_per_chunk(len(head_VD), d, head_VD.itemsize, options.memory_budget_bytes)
            for start in range(begin, end, chunk):
                here = slice(start, min(start + chunk, end))
                states_C1dD = torch.stack([hidden_ND[here], *rollouts_dMD[:d, here]], 1)
                weights_C1d = torch.stack([ce_weights_N[here], *kl_weights_dM[:d, here]], 1).to(sum_dtype)
                logits_C1dV = logits.of(states_C1dD)
                sums[: 1 + d] += _losses(logits_C1dV, targets_N[here], weights_C1d, options, sum_dtype)
                if gradients is not None:
                    gradients.add(here, states_C1dD, logits_C1dV)
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return sums[0], sums[1:]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_ND, head_VD, rollouts_dMD = ctx.gradients.give_out(*upstream)
        return hidden_ND, head_VD, None, None, rollouts_dMD, None, None


class _LogitsBuffer:
    """Room for one chunk's logits, made once: fresh memory costs about as much time as a softmax over it."""

    def __init__(self, head_VD: Tensor):
        self.head_VD = head_VD
        self.buffer = head_VD.new_empty(0)

    def of(self, states_C1dD: Tensor) -> Tensor:
        """(C, 1+d, V): overwritten by the next chunk."""
        rows, vocab = states_C1dD.shape[:2], len(self.head_VD)
        values = rows.numel() * vocab
        if values > self.buffer.numel():
            self.buffer = self.head_VD.new_empty(values)
        logits_KV = self.buffer[:values].view(rows.numel(), vocab)
        torch.mm(states_C1dD.flatten(0, 1), self.head_VD.T, out=logits_KV)
        return logits_KV.view(*rows, vocab)


def _losses(
    logits_C1dV: Tensor, targets_C: Tensor, weights_C1d: Tensor, options: _Options, sum_dtype: torch.dtype
) -> Tensor:
    """(1 + d,): the weighted sums over a chunk's positions; the logits become their gradients, where those are wanted.

    Block by block: `row` below is one of r positions' 1 + d distributions.
    """
    steps, vocab = logits_C1dV.shape[1] - 1, logits_C1dV.shape[-1]
    block = positions_per_chunk(vocab, steps, sum_dtype.itemsize, BLOCK_BYTES.get(logits_C1dV.device.type, 2**28))
    sums = []
    for start in range(0, len(logits_C1dV), block):
        logits_r1dV = logits_C1dV[start : start + block]
        targets_r1d1 = targets_C[start : start + block, None, None].expand(-1, 1 + steps, 1)
        weights_r1d = weights_C1d[start : start + block]
        exact_r1dV = logits_r1dV.to(sum_dtype)
        softmax_r1dV = torch.softmax(exact_r1dV, -1)
        # log Σ exp, told by the likeliest token: log p = logit − normaliser there, and its p is never tiny.
        normaliser_r1d = exact_r1dV.amax(-1) - softmax_r1dV.amax(-1).log()
        losses_r1d = normaliser_r1d - exact_r1dV.gather(-1, targets_r1d1).squeeze(-1)
        if steps and options.rollout_loss == "kl":
            advantage_rdV = exact_r1dV[:, :1] - exact_r1dV[:, 1:]
            expected_rd = advantage_rdV.mul_(softmax_r1dV[:, :1]).sum(-1)
            losses_r1d[:, 1:] = expected_rd + normaliser_r1d[:, 1:] - normaliser_r1d[:, :1]
        sums.append((losses_r1d * weights_r1d).sum(0))
        if options.form_gradients:  # ∂KL/∂(student logits) = q − p;  ∂(cross-entropy)/∂(logits) = p − onehot(target)
            towards_target = 1 + steps
            if options.rollout_loss == "kl":
                softmax_r1dV[:, 1:] -= softmax_r1dV[:, :1]
                towards_target = 1
            ones_r = softmax_r1dV.new_tensor(-1.0).expand(len(softmax_r1dV), towards_target, 1)
            softmax_r1dV.scatter_add_(-1, targets_r1d1[:, :towards_target], ones_r)
            torch.mul(softmax_r1dV, weights_r1d[..., None], out=logits_r1dV)
    return torch.stack(sums).sum(0)


class _Gradients:
    """The gradients of both losses, formed chunk by chunk, for upstream gradients of one."""

    def __init__(self, hidden_ND: Tensor, head_VD: Tensor, rollouts_dMD: Tensor, options: _Options):
        sum_dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        self.head_VD = head_VD
        self.hidden_ND = torch.empty_like(hidden_ND)
        self.rollouts_dMD = torch.empty_like(rollouts_dMD)
        self.of_head_VD = torch.zeros_like(head_VD, dtype=sum_dtype)
        trained_by_rollouts = len(rollouts_dMD) > 0 and not options.freeze_head
        self.of_head_by_rollouts_VD = torch.zeros_like(self.of_head_VD) if trained_by_rollouts else None
        self.given_out: set[str] = set()

    def add(self, here: slice, states_C1dD: Tensor, grad_C1dV: Tensor) -> None:
        """Take a chunk's states and the gradients of their logits."""
        grad_C1dD = (grad_C1dV.flatten(0, 1) @ self.head_VD).view(states_C1dD.shape)
        self.hidden_ND[here] = grad_C1dD[:, 0]
        _add_product(self.of_head_VD, grad_C1dV[:, 0].T, states_C1dD[:, 0])
        steps = states_C1dD.shape[1] - 1
        if steps:
            self.rollouts_dMD[:, here] = grad_C1dD[:, 1:].transpose(0, 1)
        if self.of_head_by_rollouts_VD is not None:
            for i in range(1, 1 + steps):
                _add_product(self.of_head_by_rollouts_VD, grad_C1dV[:, i].T, states_C1dD[:, i])

    def give_out(self, grad_ce: Tensor | None, grad_kl_d: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """For hidden states, head and rollouts: scaled in place, since copies of them would be the peak of memory."""
        hidden_ND, head_VD = self._share(grad_ce, "cross-entropy", self.hidden_ND, self.of_head_VD)
        per_step_d11, mean = (None, None) if grad_kl_d is None else (grad_kl_d[:, None, None], grad_kl_d.mean())
        (rollouts_dMD,) = self._share(per_step_d11, "the rollouts' loss", self.rollouts_dMD)
        if self.of_head_by_rollouts_VD is not None and mean is not None:
            head_VD = head_VD.add_(self.of_head_by_rollouts_VD.mul_(mean))
        return hidden_ND, head_VD.to(self.head_VD.dtype), rollouts_dMD

    def _share(self, upstream: Tensor | None, what: str, *gradients: Tensor) -> list[Tensor]:
        """The gradients times the one that came from upstream; zeros where none did."""
        if upstream is None:
            return [torch.zeros_like(gradient) for gradient in gradients]
        if what in self.given_out:
            raise RuntimeError(f"the gradients of {what} were taken before, and can be taken once")
        self.given_out.add(what)
        return [gradient.mul_(upstream) for gradient in gradients]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
