"""A checkpoint without an engine: its config, its counters, its weights and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from data_pipeline import Tokenizer, UserError, load_tokenizer
from pretrain.checkpoints.loading import find_whole
from pretrain.checkpoints.manifest import MANIFEST, find_problems
from pretrain.checkpoints.retention import hold
from pretrain.checkpoints.shards import WEIGHT, ShardedState
from pretrain.checkpoints.state import CONFIG, read_state
from pretrain.config import Config, load_config
from pretrain.distributed import Ranks


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint, readable without an engine."""

    path: Path
    config: Config
    state: dict[str, Any]
    lease: IO[bytes] | None = field(default=None, repr=False, compare=False)
    """As long as it is open, no run removes the checkpoint."""

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
    def weights(self) -> ShardedState:
        """The weights by name, memory-mapped."""
        return ShardedState(self.path)

    @property
    def weight_names(self) -> list[str]:
        """Every parameter once; a tied head under the embedding's name alone."""
        return self.weights.names

    def shape(self, name: str) -> tuple[int, ...]:
        """One parameter's shape."""
        return tuple(self.weights.shapes[name])

    def weight(self, name: str) -> Tensor:
        """One whole parameter in float32."""
        return self.weights.weight(name)

    def read(self, name: str, first: int, length: int) -> Tensor:
        """`length` values of a flattened parameter, from `first` on, in float32."""
        return self.weights.read(name, WEIGHT, first, length)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a run's newest whole checkpoint, or one checkpoint folder, without an engine.

    Raises UserError where there is none, or where the one that was named is damaged.
    """
    path = Path(path)
    alone = Ranks(0, 1, 0, 1)
    if (path / MANIFEST).exists() or path.name.startswith("step_"):
        problems = find_problems(path, alone)
        if problems:
            raise UserError(f"{path}: damaged checkpoint: {problems[0]}; give the run's folder to use a whole one")
        chosen = path
    else:
        found = find_whole(path / "checkpoints", alone)
        if found is None:
            raise UserError(f"{path}: no whole checkpoint here; give a run's folder or a checkpoint folder")
        chosen = found
    lease = hold(chosen)
    return Checkpoint(chosen, load_config(chosen / CONFIG), read_state(chosen), lease)
