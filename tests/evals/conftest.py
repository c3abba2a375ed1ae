"""A checkpoint in memory, its export, and a data set in its tokens."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from data_pipeline import Dataset, load_tokenizer, open_dataset
from data_pipeline.shards import token_dtype, write_manifest, write_shard
from pretrain.export import export

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))

TEXTS = ["def f(x):\n    return x + 1\n" * 4, "naïve: 東京 🙂 and so on, " * 3, "a = [1, 2, 3]\n" * 9, "short\n"]


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def make_data(tmp_path_factory):
    """make_data(texts, prompts=None, train=[]): a data set in bytes whose validation split holds `texts`."""

    def make(texts: list[str], prompts: list[int] | None = None, train: Sequence[str] = ()) -> Dataset:
        folder, tokenizer = tmp_path_factory.mktemp("data") / "set", load_tokenizer("bytes")
        entries = {}
        for split, (contents, given) in {"validation": (texts, prompts), "train": (train, None)}.items():
            documents = [[tokenizer.eos_id, *tokenizer.encode(text)] for text in contents]
            tokens = np.array([token for document in documents for token in document], token_dtype(257))
            starts = np.cumsum([0, *map(len, documents)])[:-1].astype(np.int64)
            prompt_lengths = None if given is None else np.array(given, np.uint32)
            size = sum(len(text.encode()) for text in contents)
            if documents:
                entries[split] = [write_shard(folder, split, 0, tokens, starts, prompt_lengths, text_bytes=size)]
        write_manifest(folder, tokenizer, entries)
        return open_dataset(folder)

    return make


@pytest.fixture(scope="package")
def data(make_data) -> Dataset:
    return make_data(TEXTS)


@pytest.fixture(scope="package")
def checkpoint(data):
    from export_helpers import MemoryCheckpoint, bytes_tokenizer

    made = MemoryCheckpoint(bytes_tokenizer(), kv_heads=2)
    made.dataset["path"] = str(data.path)
    return made


@pytest.fixture(scope="package")
def exported(checkpoint, tmp_path_factory) -> Path:
    return export(checkpoint, tmp_path_factory.mktemp("exports") / "model", console=Console(file=io.StringIO()))


@pytest.fixture(scope="package")
def gpt(data, tmp_path_factory) -> Path:
    """An export with no latent dynamics model."""
    from export_helpers import MemoryCheckpoint, bytes_tokenizer

    made = MemoryCheckpoint(bytes_tokenizer(), {"name": "next_token"})
    made.dataset["path"] = str(data.path)
    return export(made, tmp_path_factory.mktemp("exports") / "gpt", console=Console(file=io.StringIO()))


@pytest.fixture
def run_folder(checkpoint, tmp_path, monkeypatch) -> Path:
    """A folder that `open_checkpoint` opens as the checkpoint in memory."""
    monkeypatch.setattr("pretrain.checkpoints.open_checkpoint", lambda path: checkpoint)
    return tmp_path
