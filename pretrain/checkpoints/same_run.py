"""Is what starts now the run that the checkpoint is of?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline import UserError
from pretrain.checkpoints.state import CONFIG, read_state
from pretrain.config import Config, load_config
from pretrain.distributed import Ranks
from pretrain.run_data import RunData
from pretrain.same_data import check_same_data


def check_same_run(path: Path, new: Config, data: RunData, ranks: Ranks) -> int:
    """The checkpoint's step; UserError where the run has become another one: its earlier steps would have differed.

    The number of ranks, the ZeRO stage, micro-batches, learning rate, schedule and intervals may have changed.
    """
    saved, old = read_state(path), load_config(path / CONFIG)
    check_same_data(saved["dataset"], data, saved["step"], path)
    differences = [(key, before, after) for key, before, after in _compared(old, new) if before != after]
    if differences:
        key, before, after = differences[0]
        more = "".join(f"; {key} was {before}, is {after}" for key, before, after in differences[1:])
        raise UserError(
            f"{key}={after}, but {path} was trained with {before}{more}; set it back, or choose another run.name"
        )
    return int(saved["step"])


def _compared(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """The keys that the steps done so far depend on, each with its value before and now."""
    pairs = [
        ("run.seed", old.run.seed, new.run.seed),
        ("data.sequence_length", old.data.sequence_length, new.data.sequence_length),
        ("batch.global_sequences", old.batch.global_sequences, new.batch.global_sequences),
        ("optimizer.name", old.optimizer.name, new.optimizer.name),
    ]
    for section in ("model", "objective"):
        before, after = getattr(old, section).model_dump(), getattr(new, section).model_dump()
        pairs += [(f"{section}.{key}", before.get(key), after.get(key)) for key in sorted({*before, *after})]
    return pairs
