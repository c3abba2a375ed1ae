"""Checkpoints: written beside, flushed, listed with checksums, and only then given their name.

    checkpoints/step_00001000/   DeepSpeed's files, config.yaml, state.json, the tokenizer, manifest.json
    checkpoints/latest           the name of the newest one

A folder named `step_…` is whole: it got its name by one rename after everything in it was on disk. Loading checks
every size and sha256 all the same, and falls back to the newest whole checkpoint, saying so.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline import Dataset, Tokenizer, UserError, load_tokenizer
from pretrain.config import Config, dump_config, load_config
from pretrain.distributed import Ranks, barrier
from pretrain.sharded_weights import ShardedWeights

MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.yaml"
FORMAT = 1


@dataclass
class TrainState:
    """All that the next step depends on besides DeepSpeed's own files and the config.

    The order of the data, the schedule and the initial weights are pure functions of the config and the step, and
    a step draws no random numbers: there is no generator to save.
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


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint records of its data set."""
    return {
        "path": str(dataset.path),
        "fingerprint": dataset.fingerprint,
        "tokenizer_kind": dataset.tokenizer().kind,
        "tokenizer_fingerprint": dataset.tokenizer_fingerprint,
        "vocab_size": dataset.vocab_size,
        "eos_id": dataset.eos_id,
    }


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    state: TrainState,
    config: Config,
    dataset: Dataset,
    vocab_size: int,
    ranks: Ranks,
) -> Path:
    """Write `folder`/step_… on all ranks, then remove the oldest beyond `checkpoint.keep`.

    Raises UserError before anything is written where the disk has too little room.
    """
    path = folder / f"step_{state.step:08d}"
    unfinished = folder / f".writing_{path.name}"
    _check_room(folder, engine)
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
    barrier()
    engine.save_checkpoint(str(folder), tag=unfinished.name, save_latest=False)
    if ranks.is_first:
        for script in folder.glob("zero_to_*.py"):  # DeepSpeed's converters, which unpickle with full trust
            script.unlink()
        (unfinished / CONFIG).write_text(dump_config(config), encoding="utf-8")
        described = asdict(state) | {
            "ranks": ranks.world,
            "zero_stage": config.zero_stage,
            "vocab_size": vocab_size,
            "dataset": describe_dataset(dataset),
            "versions": _versions(),
        }
        (unfinished / STATE).write_text(json.dumps(described, indent=2), encoding="utf-8")
        tokenizer_file = dataset.tokenizer().path
        if tokenizer_file:
            shutil.copyfile(tokenizer_file, unfinished / Path(tokenizer_file).name)
    barrier()
    files = _gather(_flush_and_hash(unfinished, ranks))
    if ranks.is_first:
        _write_durably(unfinished / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=2))
        if path.exists():  # left by an earlier start and found damaged, else this step would not come again
            shutil.rmtree(path)
        unfinished.rename(path)
        _write_durably(folder / "latest", path.name)
        _prune(folder, config.checkpoint.keep)
    barrier()
    return path


def find_whole(folder: Path, ranks: Ranks, every: int = 1) -> Path | None:
    """The newest checkpoint under `folder` whose every file is as recorded; None where there is none.

    Only those at multiples of `every` steps count. All ranks share the hashing and come to the same answer. Damaged
    checkpoints are named on stderr.
    """
    for path in sorted(folder.glob("step_*"), reverse=True):
        if int(path.name.removeprefix("step_")) % every:
            continue
        problems = [problem for found in _gather_list(_problems(path, ranks)) for problem in found]
        if not problems:
            return path
        if ranks.is_first:
            print(f"warning: leaving damaged checkpoint {path}: {problems[0]}", file=sys.stderr, flush=True)
    return None


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, path: Path) -> TrainState:
    """Load weights and optimizer into the engine from a checkpoint that `check_same_run` has accepted."""
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise UserError(f"{path}: DeepSpeed could not load it; see its messages above")
    saved = json.loads((path / STATE).read_text(encoding="utf-8"))
    return TrainState(**{one.name: saved[one.name] for one in fields(TrainState) if one.name in saved})


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint, readable without an engine."""

    path: Path
    config: Config
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return int(self.state["tokens"])

    @property
    def dataset(self) -> dict[str, Any]:
        """Path, fingerprint, tokenizer_fingerprint, vocab_size and eos_id of the data set."""
        return dict(self.state["dataset"])

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.state["vocab_size"])

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer's file inside the checkpoint; None for tokenizers without a file."""
        return next((p for p in sorted(self.path.glob("tokenizer.*"))), None)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the data was made with."""
        spec = str(self.tokenizer_file or self.dataset["tokenizer_kind"])
        return load_tokenizer(spec, eos_id=self.dataset["eos_id"])

    @cached_property
    def weights(self) -> ShardedWeights:
        """The weights by name, memory-mapped."""
        return ShardedWeights(self.path)

    @property
    def weight_names(self) -> list[str]:
        """Every parameter once; a tied head under the embedding's name alone."""
        return self.weights.names

    def weight(self, name: str) -> Tensor:
        """One whole parameter in float32."""
        return self.weights[name]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a run's newest whole checkpoint, or one checkpoint folder, without an engine.

    Raises UserError where there is none, or where the one that was named is damaged.
    """
    path = Path(path)
    alone = Ranks(0, 1, 0, 1)
    if (path / MANIFEST).exists() or path.name.startswith("step_"):
        problems = _problems(path, alone)
        if problems:
            raise UserError(f"{path}: damaged checkpoint: {problems[0]}; give the run's folder to use a whole one")
        chosen = path
    else:
        found = find_whole(path / "checkpoints", alone)
        if found is None:
            raise UserError(f"{path}: no whole checkpoint here; give a run's folder or a checkpoint folder")
        chosen = found
    state = json.loads((chosen / STATE).read_text(encoding="utf-8"))
    return Checkpoint(chosen, load_config(chosen / CONFIG), state)


def check_same_run(path: Path, new: Config, dataset: Dataset, ranks: Ranks) -> int:
    """The checkpoint's step; UserError where the run has become another one: its earlier steps would have differed."""
    saved, old = json.loads((path / STATE).read_text(encoding="utf-8")), load_config(path / CONFIG)
    if saved["dataset"]["fingerprint"] != dataset.fingerprint:
        raise UserError(
            f"data.path={new.data.path}: fingerprint {dataset.fingerprint[:12]}, but {path} was trained on "
            f"{saved['dataset']['fingerprint'][:12]}; give that data, or choose another run.name"
        )
    if saved["ranks"] != ranks.world or saved["zero_stage"] != new.zero_stage:
        raise UserError(
            f"{path}: written by {saved['ranks']} ranks at ZeRO stage {saved['zero_stage']}, and this start has "
            f"{ranks.world} ranks at stage {new.zero_stage}; start it as it was"
        )
    pairs = [
        ("run.seed", old.run.seed, new.run.seed),
        ("data.sequence_length", old.data.sequence_length, new.data.sequence_length),
        ("batch.global_sequences", old.batch.global_sequences, new.batch.global_sequences),
    ]
    for section in ("model", "objective"):
        before, after = getattr(old, section).model_dump(), getattr(new, section).model_dump()
        pairs += [(f"{section}.{key}", before.get(key), after.get(key)) for key in sorted({*before, *after})]
    for key, before, after in pairs:
        if before != after:
            raise UserError(
                f"{key}={after}, but {path} was trained with {before}; set it back, or choose another run.name"
            )
    return int(saved["step"])


def _check_room(folder: Path, engine: deepspeed.DeepSpeedEngine) -> None:
    """Weights and two moments in float32, and the weights once more: 16 bytes a parameter, over all ranks."""
    needed = 16 * sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder}: no room for a checkpoint of about {needed / 1e6:,.0f} MB ({free / 1e6:,.0f} MB free); "
            "free some space, or lower checkpoint.keep, and start the same command again"
        )


def _flush_and_hash(folder: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Flush this rank's share of the files to disk; their sizes and sha256."""
    result = {}
    for path in _share(folder, ranks):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        result[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return result


def _problems(folder: Path, ranks: Ranks) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed: dict[str, dict[str, Any]] = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    problems = []
    for name in sorted(listed)[ranks.rank :: ranks.world]:
        path = folder / name
        if not path.exists():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != listed[name]["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {listed[name]['bytes']}")
        else:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != listed[name]["sha256"]:
                    problems.append(f"{name} does not have the recorded sha256")
    return problems


def _share(folder: Path, ranks: Ranks) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())[ranks.rank :: ranks.world]


def _gather(mine: dict[str, Any]) -> dict[str, Any]:
    return {key: value for part in _gather_list(mine) for key, value in sorted(part.items())}


def _gather_list(mine: Any) -> list[Any]:
    """One object from every rank, on every rank."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _write_durably(path: Path, text: str) -> None:
    """Replace a file's content at once and for good: written beside, flushed, renamed, and its folder flushed."""
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _prune(folder: Path, keep: int) -> None:
    for path in sorted(folder.glob("step_*"))[:-keep]:
        doomed = folder / f".removing_{path.name}"
        path.rename(doomed)  # from here on it is no checkpoint, even if removing it is interrupted
        shutil.rmtree(doomed)


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "deepspeed": deepspeed.__version__}
