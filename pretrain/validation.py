"""The losses on the validation split, and the one collective that adds losses up over the ranks."""

from __future__ import annotations

from collections.abc import Callable

import deepspeed
import torch
from torch import Tensor

from data_pipeline import Dataset
from pretrain.config import Config
from pretrain.distributed import Ranks, all_reduce_sum
from pretrain.objectives import TokenBatch
from pretrain.run_data import read_validation

Losses = dict[str, float]


def validate(
    engine: deepspeed.DeepSpeedEngine,
    config: Config,
    dataset: Dataset,
    ranks: Ranks,
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
) -> Losses | None:
    """Every loss on the validation split, as `val_…`, a mean over all of its positions.

    None if `interrupted`, which is asked before each batch and must say the same on every rank, says yes.
    """
    batches = read_validation(config, dataset, ranks)
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
    means, _ = reduce_losses(sums, False)
    return {f"val_{name}": value for name, value in means.items()}


def reduce_losses(sums: dict[str, Tensor], stop: bool) -> tuple[Losses, bool]:
    """Add up the losses and the wish to stop over all ranks, in one collective."""
    flag = torch.full_like(sums["loss"], float(stop))
    total = all_reduce_sum(torch.stack([*sums.values(), flag]).double()).tolist()
    return dict(zip(sums, total[:-1], strict=True)), total[-1] > 0
