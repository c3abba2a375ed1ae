"""Command: read every byte of a data set and check it against the manifest and the rules of the format.

python -m data_pipeline.verify DIR
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from data_pipeline.damage import BLOCK, REMEDY, DamagedFile, find_damage
from data_pipeline.errors import UserError, run_command
from data_pipeline.shards import SPLITS, Dataset, open_dataset
from data_pipeline.splits import DTYPES, Split


def verify(
    path: str | os.PathLike[str],
    console: Console | None = None,
    *,
    workers: int | None = None,
    tokenizer: str | None = None,
) -> Dataset:
    """Check every size, checksum, token and document start; returns the data set.

    workers: threads that read, by default one for each core; checksums do not hold the interpreter's lock.
    tokenizer: of a foreign file. Raises UserError that names the first bad file.
    """
    dataset = open_dataset(path, tokenizer=tokenizer)
    dataset.tokenizer()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    total = sum(entry["bytes"] for entry in dataset.files())
    with Progress(TextColumn("verifying"), *columns, console=console or Console(stderr=True)) as bar:
        task = bar.add_task("verifying", total=total)
        shards = [
            (dataset.split(name), number)
            for name in SPLITS
            for number in range(len(dataset.manifest["splits"][name]["shards"]))
        ]

        def check(shard: tuple[Split, int]) -> None:
            split, number = shard
            for entry in split.shards[number]["files"].values():
                if problem := find_damage(dataset.path / entry["file"], entry, lambda n: bar.advance(task, n)):
                    raise DamagedFile(f"{dataset.path / entry['file']}: {problem}: {REMEDY}")
            _check_shard(dataset, split, number)

        pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
        try:
            for _ in pool.map(check, shards):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
    for name in SPLITS:
        content = dataset.manifest["splits"][name]
        for key in ("documents", "tokens", "text_bytes"):
            if content[key] != sum(shard[key] for shard in content["shards"]):
                raise UserError(f"{dataset.path}: the manifest's {name} {key} is not its shards' sum: {REMEDY}")
    return dataset


def _check_shard(dataset: Dataset, split: Split, number: int) -> None:
    """Check what a checksum cannot: that the content keeps the rules that readers rely on."""
    shard = split.shards[number]
    for kind, entry in shard["files"].items():
        width = DTYPES.get(kind, split.dtype).itemsize
        if kind != "names" and "count" not in entry and entry["bytes"] != width * _expected(shard, kind):
            entries = f"{entry['bytes'] / width:g} entries"
            raise _broken(dataset, entry, f"{entries} where the manifest counts {_expected(shard, kind)}")
        if kind == "names" and (dataset.path / entry["file"]).read_bytes().count(b"\n") != shard["documents"]:
            raise _broken(dataset, entry, f"not one line for each of {shard['documents']} documents")
    tokens, starts = split.file(number, "tokens"), split.file(number, "documents")
    bad, eos = _scan(tokens, dataset.vocab_size, dataset.eos_id)
    if bad is not None:
        what = f"token {tokens[bad]} at place {bad}, of a vocabulary of {dataset.vocab_size}"
        raise _broken(dataset, shard["files"]["tokens"], what)
    if not dataset.foreign and (starts[:1].tolist() != [0] or not np.array_equal(eos, starts)):
        what = "its document starts are not where the end-of-text tokens are, the first of them at 0"
        raise _broken(dataset, shard["files"]["documents"], what)
    if "labels" in shard["files"] and (split.file(number, "labels") >= dataset.vocab_size).any():
        raise _broken(dataset, shard["files"]["labels"], f"a label outside the vocabulary of {dataset.vocab_size}")
    lengths = np.diff(starts, append=len(tokens))
    if "prompts" in shard["files"] and (split.file(number, "prompts") > lengths - 1).any():
        raise _broken(dataset, shard["files"]["prompts"], "a prompt is longer than its document")


def _expected(shard: Mapping[str, Any], kind: str) -> int:
    return int(shard["tokens" if kind in ("tokens", "labels") else "documents"])


def _scan(tokens: NDArray[Any], vocab_size: int, eos_id: int) -> tuple[int | None, NDArray[np.int64]]:
    """The place of the first token that is none, and the places of EOS, a block at a time."""
    places = [np.empty(0, np.int64)]
    for start in range(0, len(tokens), BLOCK):
        block = tokens[start : start + BLOCK]
        if block.max() >= vocab_size:
            return start + int(np.argmax(block >= vocab_size)), np.concatenate(places)
        places.append(np.flatnonzero(block == eos_id) + start)
    return None, np.concatenate(places)


def _broken(dataset: Dataset, entry: Mapping[str, Any], what: str) -> UserError:
    return UserError(f"{dataset.path / entry['file']}: {what}: {REMEDY}")


def main(argv: list[str] | None = None) -> None:
    """The command; argv without the program's name, by default sys.argv's."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.verify", description="Check every byte of a data set."
    )
    parser.add_argument("path", metavar="DIR", help="folder of the data set")
    parser.add_argument("--workers", type=int, help="threads that read (default: one for each core)")
    parser.add_argument("--tokenizer", help="what made the tokens of a .bin file of another program")
    options = parser.parse_args(argv)
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers}: give 1 or more")
    dataset = verify(options.path, workers=options.workers, tokenizer=options.tokenizer)
    tokens = sum(dataset.split(name).tokens for name in SPLITS)
    print(f"{dataset.path}: whole, {len(dataset.files()):,} files, {tokens:,} tokens")


if __name__ == "__main__":
    run_command(main)
