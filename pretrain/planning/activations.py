"""The memory of one micro-batch, found by running the model itself on the meta device: shapes, and no numbers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.config import Config
from pretrain.model import PretrainingModel, parameter_counts
from pretrain.objectives import TokenBatch
from pretrain.transformer import TrunkStates


@dataclass(frozen=True)
class ModelSizes:
    """What a run's model is, in numbers."""

    parameters: int
    """In training, with the objective's modules."""
    small_parameters: int
    """Those of tensors that ZeRO-3 keeps whole on each rank, at its default threshold of 100,000 elements."""
    activation_bytes: int
    """What the trunk keeps of a micro-batch for the backward pass."""
    loss_bytes: int
    """What objective and head add to that at their peak: rollouts, a chunk of logits, the head's gradient."""
    loss_is_whole: bool = True
    """False where the objective's sizes depend on the data: then this is the head's next-token loss alone."""


def model_sizes(config: Config, vocab_size: int, dtype: torch.dtype) -> ModelSizes:
    """Build the model without storage, and count what a forward pass keeps, and holds at its peak."""
    B, T = config.batch.micro_sequences, config.data.sequence_length
    with torch.device("meta"):
        model = PretrainingModel(config, vocab_size).to(dtype)
        numbers = torch.zeros(B, T + 1, dtype=torch.long)
        batch = TokenBatch(numbers, numbers, numbers, torch.ones(B, T + 1, dtype=torch.bool))
        with gpu_kernels(), LiveBytes(model) as live:
            states = model.trunk_states(batch)
            activations = live.now
            loss_is_whole = _run_loss(model, states, batch)
    small = sum(p.numel() for p in model.parameters() if p.numel() < 100_000)
    total = parameter_counts(model)["training"]
    return ModelSizes(total, small, activations, live.highest - activations, loss_is_whole)


def _run_loss(model: PretrainingModel, states: TrunkStates, batch: TokenBatch) -> bool:
    """Run the objective; the head alone, and False, where shapes depend on values, which there are none of here."""
    try:
        model.objective(states, batch, model.lm_head, model.objective.valid_counts(batch))
    except NotImplementedError:
        targets = batch.tokens[:, 1:]
        model.lm_head(states.hidden, targets, torch.zeros(targets.shape))
        return False
    return True


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and their peak; those of the model's own are left out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.highest = 0
        self._seen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and count the storage of what it makes."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.highest = max(self.highest, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Attention and RMSNorm keep what their fused GPU kernels keep, not what plain formulas would.

    And torch's autocast, which knows no meta device, is off. By setattr: a checker knows these names as functions.
    """
    attention, norm = F.scaled_dot_product_attention, F.rms_norm
    is_autocast, autocast = torch.is_autocast_enabled, torch.autocast
    setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: _Attention.apply(q, k, v))  # noqa: B010
    setattr(F, "rms_norm", lambda x, shape, weight, eps: _Norm.apply(x, weight))  # noqa: B010
    setattr(torch, "is_autocast_enabled", lambda device: False)  # noqa: B010
    setattr(torch, "autocast", lambda device, enabled: nullcontext())  # noqa: B010
    try:
        yield
    finally:
        setattr(torch, "is_autocast_enabled", is_autocast)  # noqa: B010
        setattr(torch, "autocast", autocast)  # noqa: B010
        F.scaled_dot_product_attention, F.rms_norm = attention, norm


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor) -> Tensor:
        out_BHTC = torch.empty_like(q_BHTC)
        ctx.save_for_backward(q_BHTC, k_BKTC, v_BKTC, out_BHTC, q_BHTC.new_empty(q_BHTC.shape[:-1], dtype=torch.float))
        return out_BHTC


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float))
        return torch.empty_like(x)
