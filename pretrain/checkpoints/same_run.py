"""Is what starts now the run that the checkpoint is of?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline import Dataset, UserError
from pretrain.checkpoints.state import CONFIG, describe_dataset, read_state
from pretrain.config import Config, load_config
from pretrain.distributed import Ranks


def check_same_run(path: Path, new: Config, dataset: Dataset, ranks: Ranks) -> int:
    """The checkpoint's step; UserError where the run has become another one: its earlier steps would have differed.

    The number of ranks, the ZeRO stage, micro-batches, learning rate, schedule and intervals may have changed.
    """
    saved, old = read_state(path), load_config(path / CONFIG)
    _check_data(path, saved["dataset"], describe_dataset(dataset), new.data.path)
    differences = [(key, before, after) for key, before, after in _compared(old, new) if before != after]
    if differences:
        key, before, after = differences[0]
        more = "".join(f"; {key} was {before}, is {after}" for key, before, after in differences[1:])
        raise UserError(
            f"{key}={after}, but {path} was trained with {before}{more}; set it back, or choose another run.name"
        )
    return int(saved["step"])


def _check_data(path: Path, saved: dict[str, Any], now: dict[str, Any], given: str) -> None:
    if saved["tokenizer_fingerprint"] != now["tokenizer_fingerprint"]:
        raise UserError(
            f"data.path={given}: made with tokenizer {now['tokenizer_fingerprint'][:12]} ({now['tokenizer_kind']}), "
            f"but {path} was trained with {saved['tokenizer_fingerprint'][:12]} ({saved['tokenizer_kind']}); give that "
            "data, or choose another run.name"
        )
    if saved["fingerprint"] != now["fingerprint"]:
        raise UserError(
            f"data.path={given}: fingerprint {now['fingerprint'][:12]}, but {path} was trained on "
            f"{saved['fingerprint'][:12]} ({saved['path']}); give that data, or choose another run.name"
        )


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
