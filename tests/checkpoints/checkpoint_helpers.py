"""Checkpoints made without training: the files are small, everything else is as a run makes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.manifest import flush_and_hash
from pretrain.checkpoints.publishing import publish
from pretrain.checkpoints.retention import UNFINISHED, name_of
from pretrain.config import Config, load_config


def make_config(folder: Path, data: Path, changes: dict[str, object] | None = None) -> Config:
    from benchmarks.small_run import write_run_config

    return load_config(write_run_config(folder, data, "run", changes or {}))


def write_unfinished(config: Config, step: int, loss: float | None = None) -> Path:
    """The files of a checkpoint of two ranks, before the manifest."""
    unfinished = config.run.folder / "checkpoints" / f"{UNFINISHED}{name_of(step)}"
    unfinished.mkdir(parents=True)
    for rank in range(2):
        torch.save(
            {"step": step, "rank": rank, "weights": torch.full((500,), float(rank))}, unfinished / f"rank{rank}.pt"
        )
    (unfinished / "config.yaml").write_text("run: {}\n")
    (unfinished / "state.json").write_text(json.dumps({"step": step, "metrics_bytes": 0, "validation_loss": loss}))
    return unfinished


def publish_step(config: Config, step: int, loss: float | None = None) -> Path:
    """A whole checkpoint, by the code that a run publishes with."""
    unfinished = write_unfinished(config, step, loss)
    path = unfinished.with_name(name_of(step))
    described: dict[str, Any] = {"step": step}
    publish(unfinished, path, flush_and_hash(unfinished, unfinished.glob("*.pt")), described, config)
    return path


def steps_in(config: Config) -> list[int]:
    return sorted(int(path.name[5:]) for path in (config.run.folder / "checkpoints").glob("step_*"))
