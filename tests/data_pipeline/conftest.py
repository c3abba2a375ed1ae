"""Small data sets that most tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import make_texts, quiet

from data_pipeline.prepare import prepare
from data_pipeline.shards import Dataset, open_dataset, token_dtype, write_manifest, write_shard
from data_pipeline.tokenizers import load_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 200 text files in nested folders."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(make_texts(200)):
        path = folder / f"part{number % 3}" / f"{number:03d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    return folder


@pytest.fixture(scope="session")
def dataset(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The corpus in bytes, in several shards, with a fifth of it for validation."""
    out = tmp_path_factory.mktemp("data") / "set"
    return prepare(str(corpus), "bytes", out, workers=1, validation=0.2, shard_bytes=15_000, console=quiet())


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Dataset]:
    """make_dataset(lengths, prompts=None, shards=1): documents of so many tokens, their EOS counted."""

    def make(lengths: list[int], prompts: list[int] | None = None, shards: int = 1) -> Dataset:
        folder = tmp_path / "made"
        tokenizer = load_tokenizer("bytes")
        chance = np.random.default_rng(0)
        entries = []
        for number, share in enumerate(np.array_split(np.arange(len(lengths)), shards)):
            sizes = np.array(lengths)[share]
            starts = np.cumsum(sizes) - sizes
            tokens = chance.integers(0, 256, sizes.sum()).astype(token_dtype(257))
            tokens[starts] = tokenizer.eos_id
            given = None if prompts is None else np.array(prompts, np.uint32)[share]
            entries.append(write_shard(folder, "train", number, tokens, starts, given, text_bytes=int(sizes.sum())))
        write_manifest(folder, tokenizer, {"train": entries})
        return open_dataset(folder)

    return make
