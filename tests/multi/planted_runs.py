"""Runs several configs in one start of the ranks, with something planted into each: NaN, spikes, updates left out.

One argument per run, as JSON: `config`, `overrides`, and any of `nan_loss`, `nan_gradient`, `spike` (a rank and the
steps, counted from 0), `without_update` (steps, on every rank).
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline import UserError
from pretrain import train
from pretrain.config import load_config
from pretrain.distributed import first_to_say, leave
from pretrain.model import PretrainingModel

plan: dict[str, Any] = {}
step = -1
forward, optimizer_step, update = PretrainingModel.forward, train.optimizer_step, torch.optim.AdamW.step


class NanGradient(torch.autograd.Function):
    """Adds nothing to a loss, and NaN to all of its gradients."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(loss)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


def planted(name: str) -> bool:
    rank, steps = plan.get(name, (None, []))
    return rank == dist.get_rank() and step in steps


def planted_forward(self: PretrainingModel, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    losses = dict(forward(self, *args, **kwargs))
    if self.training and planted("nan_loss"):
        losses["loss"] = losses["loss"] * float("nan")
    if self.training and planted("nan_gradient"):
        losses["loss"] = losses["loss"] + NanGradient.apply(losses["loss"])
    if self.training and planted("spike"):
        losses["loss"] = losses["loss"] * 100
    return losses


def counting_step(run: train.Run, batch: Any) -> Any:
    global step
    step = run.state.step
    return optimizer_step(run, batch)


def update_unless_planted(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
    return None if step in plan.get("without_update", []) else update(self, *args, **kwargs)


if __name__ == "__main__":
    PretrainingModel.forward, train.optimizer_step = planted_forward, counting_step
    torch.optim.AdamW.step = update_unless_planted
    for argument in sys.argv[1:]:
        if argument.startswith("--local_rank"):
            continue
        plan = json.loads(argument)
        config = load_config(plan["config"], plan.get("overrides", []))
        try:
            train.train(config)
        except UserError as error:
            said = first_to_say(str(error))
            (config.run.folder / f"error_{dist.get_rank()}").write_text(str(error))
            (config.run.folder / f"said_{dist.get_rank()}").write_text(str(said))
    dist.destroy_process_group()
    leave(0)
