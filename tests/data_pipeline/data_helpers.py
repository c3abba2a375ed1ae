"""Text to prepare, short ways to prepare it and to read it back, and documents that are only a list of starts."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from data_pipeline import Dataset, Stream, open_dataset
from data_pipeline.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "über",
    "naïve",
    "东京",
    "🙂",
    "def",
    "return\n",
    "",
    "",
    "",
    "pass\n",
]


def quiet() -> Console:
    return Console(file=io.StringIO())


def make_texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, words))) + f" {n}" for n in range(count)]


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make(source: Path | str, out: Path, tokenizer: str | Path = "bytes", **options: Any) -> Dataset:
    """The source prepared by one worker, a fifth of it for validation."""
    usual = {"workers": 1, "validation": 0.2, "console": quiet()}
    made = prepare(str(source), str(tokenizer), out, **(usual | options))
    return made if made is not None else open_dataset(out)


def make_whole(source: Path | str, out: Path, tokenizer: str | Path = "bytes", **options: Any) -> Dataset:
    """The source prepared by one worker, all of it for training."""
    return make(source, out, tokenizer, **({"validation": 0.0} | options))


def decoded(dataset: Dataset, name: str = "train") -> list[str]:
    """The text of each document of a split."""
    split, tokenizer = dataset.split(name), dataset.tokenizer()
    borders = [*split.document_starts.tolist(), split.tokens]
    pieces = [split.read(a, b) for a, b in pairwise(borders)]
    assert all(piece[0] == dataset.eos_id for piece in pieces)
    return [tokenizer.decode(piece) for piece in pieces]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m` with these arguments, to its end."""
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, **options
    )


def used(folder: Path) -> int:
    """Bytes of the files in a folder that others may be changing."""
    total = 0
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):  # removed meanwhile
            total += entry.stat().st_size
    return total


REMOTE_SIZES: dict[str, Any] = {"seed": 3, "sequence_length": 64, "global_sequences": 12}


def same_batches(dataset: Dataset, remote: Dataset, steps: int = 30) -> None:
    """Assert that a data set and its remote copy give the same batches."""
    near = Stream(dataset.split("train"), shard_window=2, **REMOTE_SIZES)
    far = Stream(remote.split("train"), shard_window=2, **REMOTE_SIZES)
    for a, b in zip(near.batches(0, steps), far.batches(0, steps), strict=True):
        for name in ("tokens", "document_ids", "positions", "target_mask"):
            assert np.array_equal(getattr(a, name), getattr(b, name))


@dataclass
class DocumentList:
    """Documents of a stream by where they start, as packing asks for them."""

    starts: NDArray[np.int64]
    prompts: NDArray[np.int64] | None = None

    def document_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.starts, places, side="right") - 1

    def document_start(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.starts[documents]

    def prompt_length(self, documents: NDArray[np.int64]) -> NDArray[np.int64] | None:
        return None if self.prompts is None else self.prompts[documents]
