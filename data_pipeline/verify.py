"""Command: read every byte of a data set and check it against the manifest and the rules of the format.

python -m data_pipeline.verify DIR
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from data_pipeline.errors import UserError, run_command
from data_pipeline.shards import SPLITS, Dataset, open_dataset

BLOCK = 1 << 20  # bytes
REMEDY = "restore the file or prepare the data set again"


def verify(path: str, console: Console | None = None) -> Dataset:
    """Check every size, checksum, token and document start; returns the data set.

    Raises UserError that names the first bad file.
    """
    dataset = open_dataset(path)
    dataset.tokenizer()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    total = sum(entry["bytes"] for entry in dataset.files())
    with Progress(TextColumn("verifying"), *columns, console=console or Console(stderr=True)) as bar:
        task = bar.add_task("verifying", total=total)
        for name in SPLITS:
            content = dataset.manifest["splits"][name]
            for shard in content["shards"]:
                for entry in shard["files"].values():
                    _check_sum(
                        dataset.path / entry["file"], entry["sha256"], lambda done: bar.advance(task, done)
                    )
                _check_shard(dataset, shard)
            for key in ("documents", "tokens", "text_bytes"):
                if content[key] != sum(shard[key] for shard in content["shards"]):
                    raise UserError(
                        f"{dataset.path}: the manifest's {name} {key} is not its shards' sum: {REMEDY}"
                    )
    return dataset


def _check_sum(path: Path, expected: str, advance: Callable[[int], None]) -> None:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
            advance(len(block))
    if sha256.hexdigest() != expected:
        raise UserError(f"{path}: its content is not what was written (sha256 differs): {REMEDY}")


def _check_shard(dataset: Dataset, shard: Mapping[str, Any]) -> None:
    """Check what a checksum cannot: that the content keeps the rules that readers rely on."""
    arrays = {}
    dtypes = {
        "tokens": dataset.split("train").dtype,
        "documents": np.dtype("<i8"),
        "prompts": np.dtype("<u4"),
    }
    for kind, entry in shard["files"].items():
        arrays[kind] = np.fromfile(dataset.path / entry["file"], dtype=dtypes[kind])
        expected = shard["tokens" if kind == "tokens" else "documents"]
        if len(arrays[kind]) * dtypes[kind].itemsize != entry["bytes"] or len(arrays[kind]) != expected:
            raise _broken(dataset, entry, f"{len(arrays[kind])} entries where the manifest counts {expected}")
    tokens, starts = arrays["tokens"], arrays["documents"]
    if (bad := np.flatnonzero(tokens >= dataset.vocab_size)).size:
        raise _broken(
            dataset,
            shard["files"]["tokens"],
            f"token {tokens[bad[0]]} at place {bad[0]}, of a vocabulary of {dataset.vocab_size}",
        )
    if starts[:1].tolist() != [0] or not np.array_equal(np.flatnonzero(tokens == dataset.eos_id), starts):
        what = "its document starts are not where the end-of-text tokens are, the first of them at 0"
        raise _broken(dataset, shard["files"]["documents"], what)
    lengths = np.diff(starts, append=len(tokens))
    if "prompts" in arrays and (arrays["prompts"] > lengths - 1).any():
        raise _broken(dataset, shard["files"]["prompts"], "a prompt is longer than its document")


def _broken(dataset: Dataset, entry: Mapping[str, Any], what: str) -> UserError:
    return UserError(f"{dataset.path / entry['file']}: {what}: {REMEDY}")


def main(argv: list[str] | None = None) -> None:
    """The command; argv without the program's name, by default sys.argv's."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.verify", description="Check every byte of a data set."
    )
    parser.add_argument("path", metavar="DIR", help="folder of the data set")
    dataset = verify(parser.parse_args(argv).path)
    tokens = sum(dataset.split(name).tokens for name in SPLITS)
    print(f"{dataset.path}: whole, {len(dataset.files()):,} files, {tokens:,} tokens")


if __name__ == "__main__":
    run_command(main)
