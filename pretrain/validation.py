"""The losses on the validation split, and the one collective that adds losses up over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import deepspeed
import torch
from torch import Tensor

from data_pipeline import Batch
from pretrain.distributed import Ranks, all_reduce_sum
from pretrain.objectives import TokenBatch
from pretrain.run_data import RunData, read_validation

Losses = dict[str, float]


def validate(
    engine: deepspeed.DeepSpeedEngine,
    data: RunData,
    ranks: Ranks,
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
) -> Losses | None:
    """Every loss on the validation splits, a mean over all of a split's positions.

    `val_…` of one data set. Of a mixture `val_NAME_…` for each source, and `val_…`, their mean weighted by the sources'
    shares of the samples that the whole run reads. None if `interrupted`, which is asked before each batch and must
    say the same on every rank, says yes.
    """
    found: dict[str, Losses] = {}
    for name, batches in read_validation(data, ranks).items():
        losses = _mean_losses(engine, batches, device, interrupted)
        if losses is None:
            return None
        found[name] = losses
    weights = {name: data.shares[name] for name in found}
    total = sum(weights.values())
    keys = next(iter(found.values()))
    mean = {f"val_{key}": sum(weights[name] * found[name][key] for name in found) / total for key in keys}
    if not data.is_mixture:
        return mean
    return mean | {f"val_{name}_{key}": value for name in found for key, value in found[name].items()}


def _mean_losses(
    engine: deepspeed.DeepSpeedEngine, batches: Sequence[Batch], device: torch.device, interrupted: Callable[[], bool]
) -> Losses | None:
    """Every loss as a mean over all ranks' batches; None if interrupted."""
    objective = engine.module.objective
    engine.eval()
    with torch.no_grad():
        counts = torch.stack([objective.valid_counts(TokenBatch.from_numpy(b, device)) for b in batches]).sum(0)
        all_reduce_sum(counts)
        sums: dict[str, Tensor] = {}
        for batch in batches:
            if interrupted():
                engine.train()
                return None
            for name, value in engine(TokenBatch.from_numpy(batch, device), counts).items():
                sums[name] = sums.get(name, 0.0) + value
    engine.train()
    return reduce_losses(sums, False)[0]


def reduce_losses(sums: dict[str, Tensor], stop: bool) -> tuple[Losses, bool]:
    """Add up the losses and the wish to stop over all ranks, in one collective."""
    flag = torch.full_like(sums["loss"], float(stop))
    total = all_reduce_sum(torch.stack([*sums.values(), flag]).double()).tolist()
    return dict(zip(sums, total[:-1], strict=True)), total[-1] > 0
