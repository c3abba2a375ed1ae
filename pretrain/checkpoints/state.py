"""What a checkpoint holds besides DeepSpeed's files: the run's counters, its data set, and random number generators."""

from __future__ import annotations

import json
import platform
import random
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch

from pretrain.checkpoints.unpickling import load_data_only
from pretrain.config import Config
from pretrain.distributed import Ranks
from pretrain.run_data import RunData
from pretrain.same_data import describe_data

STATE, CONFIG = "state.json", "config.yaml"


@dataclass
class TrainState:
    """All that the next step depends on besides DeepSpeed's files, the config and the random number generators.

    The order of the data, the schedule and the initial weights are pure functions of the config and the step.
    """

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens read."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl; what was written after the checkpoint is cut off and written again."""
    skipped_steps: int = 0
    """Steps whose batches left no trace in the weights: skipped, or lost by going back to a checkpoint."""
    skipped_in_a_row: int = 0
    """How many steps before the next one were not applied."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last applied steps, by which the next one's is judged; empty where nothing is judged."""
    line: dict[str, Any] | None = None
    """The last step's line of metrics, if the run was told to stop before its validation was done; else written."""


def read_state(path: Path) -> dict[str, Any]:
    """The content of a verified checkpoint's state.json."""
    return dict(json.loads((path / STATE).read_text(encoding="utf-8")))


def read_train_state(path: Path) -> TrainState:
    """The run's counters in a verified checkpoint."""
    saved = read_state(path)
    return TrainState(**{one.name: saved[one.name] for one in fields(TrainState) if one.name in saved})


def describe_run(
    state: TrainState, config: Config, data: RunData, vocab_size: int, ranks: Ranks, dtype: torch.dtype
) -> dict[str, Any]:
    """What state.json says: the counters, and what the next start is compared with."""
    return asdict(state) | {
        "ranks": ranks.world,
        "zero_stage": config.zero_stage,
        "precision": str(dtype).removeprefix("torch."),
        "vocab_size": vocab_size,
        "dataset": describe_data(data),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
        },
    }


def generators_file(rank: int) -> str:
    """Name of the file that holds a rank's random number generators."""
    return f"generators_rank_{rank:05d}.pt"


def generators() -> dict[str, Any]:
    """The state of this process's random number generators, as plain data."""
    numpy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = numpy
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_generators(path: Path, ranks: Ranks) -> None:
    """Set this rank's generators as they were at the save; a rank that was not there then keeps its own."""
    file = path / generators_file(ranks.rank)
    if not file.exists():
        return
    saved = load_data_only(file, mmap=False)
    random.setstate(saved["python"])
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
