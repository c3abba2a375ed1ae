"""Documents → shards: grouped in their order, encoded by workers, written, and known again by a later run."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from data_pipeline.claim import WORK, read_json
from data_pipeline.documents import Document, Source
from data_pipeline.errors import UserError
from data_pipeline.shards import SPLITS, write_json, write_shard
from data_pipeline.tasks import Task
from data_pipeline.tasks.randomness import random_bits
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import is_validation
from data_pipeline.workers import Workers

SHARD_SAMPLES = 1 << 14  # of a task
VALIDATION = 99  # the purpose of a task's random bits that choose the validation split


@dataclass(frozen=True)
class Shard:
    """The documents of one shard. sha256: of all their text, by which a later run knows them again.

    texts: of a task, the places of its samples.
    """

    number: int
    texts: dict[str, list[Any]]
    names: dict[str, list[str]]
    text_bytes: dict[str, int]
    source_bytes: int
    sha256: str


def encode_all(
    folder: Path,
    tokenizer: Tokenizer,
    source: Source,
    settings: dict[str, Any],
    workers: int,
    bar: Progress,
    is_ours: Callable[[int], bool],
    task: Task | None = None,
) -> tuple[dict[int, dict[str, Any]], Counter[str], int]:
    """Write every shard of ours that is not finished.

    task: whose samples are made, where the source is one.
    Returns the records of ours by shard number, what was skipped in the source, and how many shards there are in all.
    """
    skipped: Counter[str] = Counter()
    documents = islice(source.read(skipped), settings["limit"])
    if task:
        grouped = _group_samples(task, settings["validation"], settings["limit"])
    else:
        grouped = _group(iter(documents), source.root, settings["validation"], settings["shard_bytes"])
    shown = bar.add_task("documents → shards", total=source.total_bytes, rates="")
    records: dict[int, dict[str, Any]] = {}
    count = 0

    def ours() -> Iterator[Shard]:
        nonlocal count
        for shard in grouped:
            count += 1
            if is_ours(shard.number):
                yield shard
            else:
                bar.advance(shown, shard.source_bytes)

    shards, began = ours(), time.monotonic()
    with Workers(tokenizer, workers, task) as processes, ThreadPoolExecutor(workers) as threads:
        running: dict[Future[dict[str, Any]], Shard] = {}
        try:
            while True:
                # One shard more than there are workers is held in memory, so that none waits for text.
                for shard in islice(shards, workers + 1 - len(running)):
                    running[threads.submit(_encode_shard, folder, processes, shard)] = shard
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    shard = running.pop(future)
                    records[shard.number] = future.result()
                    bar.update(shown, advance=shard.source_bytes, rates=_rates(records, began))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
    bar.update(shown, completed=source.total_bytes or 0)
    return records, skipped, count


def _rates(records: Mapping[int, Mapping[str, Any]], began: float) -> str:
    """Documents and tokens per second so far, those that an earlier run has finished counted too."""
    entries = [entry for record in records.values() for entry in record["shards"].values()]
    seconds = max(time.monotonic() - began, 1e-9)
    documents, tokens = (sum(entry[key] for entry in entries) / seconds for key in ("documents", "tokens"))
    return f"{documents:,.0f} documents/s  {tokens / 1e6:.2f} Mtok/s"


def _encode_shard(folder: Path, workers: Workers, shard: Shard) -> dict[str, Any]:
    """Encode and write one shard, or find it finished by an earlier run; returns its record."""
    path = folder / WORK / f"{shard.number:05d}.json"
    if path.exists():
        record: dict[str, Any] = read_json(path)
        if record["sha256"] != shard.sha256:
            raise UserError(f"{folder}: the source has changed since it was begun: remove it or choose another --out")
        if all(_is_whole(folder, file) for entry in record["shards"].values() for file in entry["files"].values()):
            return record
    entries, seconds = {}, {}
    for split in SPLITS:
        if texts := shard.texts[split]:
            encoded = workers.encode(texts)
            seconds[split] = encoded.seconds
            entries[split] = write_shard(
                folder,
                split,
                shard.number,
                encoded.tokens,
                encoded.document_starts,
                encoded.prompt_lengths,
                text_bytes=shard.text_bytes[split],
                names=shard.names.get(split),
                labels=encoded.labels,
            )
    record = {"sha256": shard.sha256, "shards": entries, "seconds": seconds}
    write_json(path, record)
    return record


def _is_whole(folder: Path, file: dict[str, Any]) -> bool:
    path = folder / file["file"]
    return path.is_file() and path.stat().st_size == file["bytes"]


def _group_samples(task: Task, validation: float, limit: int | None) -> Iterator[Shard]:
    """The samples of a task, so many to a shard; which are of the validation split is drawn for each."""
    count = min(task.count, limit or task.count)
    for number, first in enumerate(range(0, count, SHARD_SAMPLES)):
        places = np.arange(first, min(first + SHARD_SAMPLES, count))
        drawn = random_bits(task.seed, places, 1, VALIDATION)[:, 0] < validation * 2.0**64
        texts = {"train": places[~drawn].tolist(), "validation": places[drawn].tolist()}
        yield Shard(number, texts, {}, dict.fromkeys(SPLITS, 0), len(places), f"{task.identity} {first} {len(places)}")


def _group(documents: Iterator[Document], root: str, validation: float, shard_bytes: int) -> Iterator[Shard]:
    """Documents in their order, cut after the one with which a shard reaches shard_bytes of text.

    root: what names begin with and need not be kept.
    """
    number = 0
    while True:
        texts: dict[str, list[str]] = {split: [] for split in SPLITS}
        names: dict[str, list[str]] = {split: [] for split in SPLITS}
        sizes = dict.fromkeys(SPLITS, 0)
        source_bytes, sha256 = 0, hashlib.sha256()
        while sum(sizes.values()) < shard_bytes and (document := next(documents, None)) is not None:
            content = document.text.encode()
            digest = hashlib.sha256(content).digest()
            split = SPLITS[is_validation(digest, validation)]
            texts[split].append(document.text)
            names[split].append(_one_line(document.name.removeprefix(root)))
            sizes[split] += len(content)
            source_bytes += document.source_bytes
            sha256.update(digest)
        if not any(texts.values()):
            return
        yield Shard(number, texts, names, sizes, source_bytes, sha256.hexdigest())
        number += 1


def _one_line(name: str) -> str:
    return name.encode(errors="backslashreplace").decode().replace("\n", "\\n").replace("\r", "\\r")
