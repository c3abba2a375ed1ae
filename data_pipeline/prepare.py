"""Command: documents → a data set of token shards.

    python -m data_pipeline.prepare --source SRC --tokenizer TOK --out DIR [--part i/n]

The documents are grouped, in their order, into shards of about --shard-bytes of text. Each shard is encoded
by one worker and leaves its files and a record of them in DIR/.preparing; a shard with a record is not
encoded again. The manifest is written last. The bytes depend on the documents and the settings alone, not on
the number of workers. Of n machines each may make a part, every n-th shard; data_pipeline.merge puts them together.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import heapq
import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from data_pipeline.documents import Document, Fields, Source, open_source
from data_pipeline.errors import UserError, run_command
from data_pipeline.filters import Filters
from data_pipeline.shards import (
    FORMAT,
    MANIFEST,
    SPLITS,
    Dataset,
    open_dataset,
    write_file,
    write_json,
    write_manifest,
    write_shard,
)
from data_pipeline.tasks import Task, open_task
from data_pipeline.tasks.randomness import random_bits
from data_pipeline.tokenizers import Tokenizer, load_tokenizer, tokenizer_file, train_sentencepiece
from data_pipeline.workers import Workers

WORK = ".preparing"
PART = "part.json"
NO_FILTERS = Filters()
SHARD_BYTES = 4 << 20
SHARD_SAMPLES = 1 << 14  # of a task
VALIDATION = 99  # the purpose of a task's random bits that choose the validation split
SAMPLE_BYTES = 8 << 20  # text that a vocabulary is trained on; four times as much improves bytes per token by < 1%
SAMPLE_WINDOW = 1 << 30  # source text that the sample is chosen from
SAMPLE_DOCUMENT = 1 << 18  # characters of one document, so that no single one fills the sample


@dataclass(frozen=True)
class Shard:
    """The documents of one shard. sha256: of all their text, by which a later run knows them again.

    texts: of a task's samples, their places in the task's split.
    """

    number: int
    texts: dict[str, list[Any]]
    names: dict[str, list[str]]
    text_bytes: dict[str, int]
    source_bytes: int
    sha256: str


def prepare(
    source: str,
    tokenizer: str | None,
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    field: str = "text",
    validation: float = 0.01,
    limit: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    filters: Filters = NO_FILTERS,
    invalid: str = "error",
    part: str | None = None,
    console: Console | None = None,
) -> Dataset | None:
    """Prepare a data set in `out`, or go on with one that was stopped, or return it if it is complete.

    tokenizer: None for a task, which has a vocabulary of its own. workers: processes that encode, by default one for
    each core. field: of records that holds the text.
    validation: fraction of documents, chosen by content hash. limit: first documents only. shard_bytes: text in a
    shard. invalid: "error", or "skip" to leave out and count records that are not text. part: "i/n" to make the
    i-th of n parts, in which case there is no data set yet and None is returned. Raises UserError for whatever a
    user can mend; what is finished stays for the next run.
    """
    console = console or Console(stderr=True)
    workers = _available_cores() if workers is None else workers
    _check_options(workers, validation, limit, shard_bytes, invalid)
    filters.check()
    part_number, parts = _parse_part(part)
    folder = Path(out)
    task = _open_task(source, tokenizer, filters)
    if task:
        documents = Source(task.identity, min(task.count, limit or task.count), lambda _: iter(()))
        kind, file = hashlib.sha256(task.vocabulary.tokenizer_json()).hexdigest(), None
    else:
        documents = open_source(source, Fields(field, filters.language_field, invalid == "skip"))
        unfiltered = documents.read
        documents = replace(documents, read=lambda skipped: filters.apply(unfiltered(skipped), skipped))
        kind, file = _tokenizer_spec(tokenizer or "")
    settings = {
        "format": FORMAT,
        "source": documents.identity,
        "tokenizer": kind,
        "validation": validation,
        "limit": limit,
        "shard_bytes": shard_bytes,
        "filters": filters.record(),
    }
    claimed = settings | ({"part": part} if part else {})
    if (folder / MANIFEST).exists() and not part:
        return _already_complete(folder, settings, console)
    if (folder / PART).exists():
        _part_already_complete(folder, claimed, console)
        return None
    with _claim(folder, claimed):
        bar = _progress(console)
        with bar:
            made = _tokenizer(folder, file or tokenizer or "", documents, validation, limit, bar, task)
            records, skipped, count = _encode_all(
                folder, made, documents, settings, workers, bar, lambda number: number % parts == part_number, task
            )
        if not count:
            shutil.rmtree(folder / WORK)
            raise UserError(f"source {source}: it has no text at all: check --source and --field, and the filters")
        about = {"settings": settings, "source": source, "skipped": dict(skipped), "software": _software()}
        if task:
            about["task"] = task.spec
        if part:
            by_number = {str(number): record for number, record in records.items()}
            write_json(folder / PART, {"part": part, "count": count, "records": by_number, "about": about})
        else:
            write_manifest(folder, made, collect_shards(records), **about)
        shutil.rmtree(folder / WORK)
    if part:
        console.print(f"{folder}: part {part} is complete: {len(records)} of {count} shards", soft_wrap=True)
        return None
    dataset = open_dataset(folder)
    console.print(_summary(dataset, records, skipped))
    return dataset


def _open_task(source: str, tokenizer: str | None, filters: Filters) -> Task | None:
    """The task that the source names, if it does. Raises UserError for options that do not go with the source."""
    if not source.startswith("task:"):
        if tokenizer is None:
            raise UserError("--tokenizer: give a .model or .json file, train:sentencepiece:VOCAB, or bytes")
        return None
    if tokenizer is not None:
        raise UserError(f"--tokenizer {tokenizer}: {source} has a vocabulary of its own: leave --tokenizer out")
    if filters != NO_FILTERS:
        raise UserError(f"{source}: filters are for text: leave them out")
    return open_task(source.removeprefix("task:"))


def collect_shards(records: Mapping[int, Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The shards' entries of each split, in stream order, from the records of all tasks."""
    ordered = [records[number]["shards"] for number in sorted(records)]
    return {split: [shards[split] for shards in ordered if split in shards] for split in SPLITS}


def _parse_part(part: str | None) -> tuple[int, int]:
    """Part "i/n" as (i − 1, n); (0, 1) for the whole."""
    if part is None:
        return 0, 1
    number, _, parts = part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise UserError(f"--part {part}: write i/n, for example 1/4 to 4/4")
    return int(number) - 1, int(parts)


def _part_already_complete(folder: Path, claimed: dict[str, Any], console: Console) -> None:
    made = _read_json(folder / PART)
    if made["about"]["settings"] | {"part": made["part"]} != claimed:
        raise UserError(
            f"{folder}: holds part {made['part']} of a data set made with other options: remove it or choose "
            "another --out"
        )
    shutil.rmtree(folder / WORK, ignore_errors=True)
    console.print(f"{folder}: part {made['part']} is already complete", soft_wrap=True)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_options(workers: int, validation: float, limit: int | None, shard_bytes: int, invalid: str) -> None:
    if invalid not in ("error", "skip"):
        raise UserError(f"--invalid {invalid}: write error or skip")
    if workers < 1:
        raise UserError(f"--workers {workers}: give 1 or more")
    if not 0 <= validation < 1:
        raise UserError(f"--validation {validation}: give a fraction from 0 up to, but not including, 1")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: give 1 document or more")
    if shard_bytes < 1:
        raise UserError(f"--shard-bytes {shard_bytes}: give 1 or more")


# ---- the folder while it is being filled


def _already_complete(folder: Path, settings: dict[str, Any], console: Console) -> Dataset:
    dataset = open_dataset(folder)
    if dataset.manifest.get("settings") != settings:
        raise UserError(
            f"{folder}: holds a data set made from another source or with other options: remove it or choose "
            "another --out"
        )
    shutil.rmtree(folder / WORK, ignore_errors=True)  # of a run killed between the manifest and this
    console.print(f"{folder} is already complete: {dataset.split('train').tokens:,} training tokens", soft_wrap=True)
    return dataset


@contextmanager
def _claim(folder: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Hold the folder for this process and these settings. Raises UserError if it is someone else's."""
    work = folder / WORK
    try:
        if folder.exists() and not work.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder}: not empty and not a data set in the making: choose another --out")
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")  # held until the end of the block below
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}): choose another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{folder}: another process is preparing it: wait for it or choose another --out"
            ) from error
        record = work / "settings.json"
        if not record.exists() or _read_json(record) != settings:
            if any(work.glob("[0-9]*.json")):
                raise UserError(
                    f"{folder}: begun with another source or other options: remove it or choose another --out"
                )
            # Nothing is finished, as after a source that was refused and mended: begin afresh.
            (folder / "tokenizer.model").unlink(missing_ok=True)
            write_json(record, settings)
        yield


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged: remove the folder it is in and prepare again") from error


# ---- the tokenizer


def _tokenizer_spec(spec: str) -> tuple[str, str | None]:
    """What identifies a tokenizer in the settings, and its file, if any. Raises UserError if it is none."""
    if spec == "bytes":
        return spec, None
    if spec.startswith("train:"):
        _vocabulary_to_train(spec)
        return f"{spec} with sentencepiece {sentencepiece.__version__}", None
    return load_tokenizer(spec).fingerprint, spec


def _vocabulary_to_train(spec: str) -> int:
    kind, _, size = spec.removeprefix("train:").partition(":")
    if kind != "sentencepiece" or not size.isdecimal():
        raise UserError(f"tokenizer {spec}: write train:sentencepiece:VOCAB, for example train:sentencepiece:4096")
    return int(size)


def _tokenizer(
    folder: Path,
    spec: str,
    source: Source,
    validation: float,
    limit: int | None,
    bar: Progress,
    task: Task | None = None,
) -> Tokenizer:
    """The tokenizer that the data set keeps: copied into its folder, or trained there unless that is done."""
    if task:
        write_file(folder / "tokenizer.json", task.vocabulary.tokenizer_json())
        return load_tokenizer(folder / "tokenizer.json", eos_id=task.vocabulary.eos_id)
    if spec == "bytes":
        return load_tokenizer(spec)
    if not spec.startswith("train:"):
        name, content = tokenizer_file(spec)
        write_file(folder / name, content)
        return load_tokenizer(folder / name, eos_id=load_tokenizer(spec).eos_id)
    kept = folder / "tokenizer.model"
    if not kept.exists():
        texts = _sample(source, validation, limit, bar)
        shown = bar.add_task(f"training {_vocabulary_to_train(spec):,} pieces", total=None, rates="")
        write_file(kept, train_sentencepiece(texts, _vocabulary_to_train(spec)))
        bar.update(shown, total=1, completed=1, visible=False)
    return load_tokenizer(kept)


def _sample(source: Source, validation: float, limit: int | None, bar: Progress) -> list[str]:
    """Training documents for a vocabulary: of lowest hash, up to SAMPLE_BYTES, in the source's order."""
    task = bar.add_task("sampling text for the vocabulary", total=source.total_bytes, rates="")
    heap: list[tuple[int, int, int, str]] = []
    kept = seen = 0
    for number, document in enumerate(islice(source.read(Counter()), limit)):
        content = document.text.encode()
        bar.advance(task, document.source_bytes)
        digest = hashlib.sha256(content).digest()
        if not _is_validation(digest, validation):
            text = document.text[:SAMPLE_DOCUMENT]
            size = len(text.encode())
            heapq.heappush(heap, (-int.from_bytes(digest[8:16], "big"), number, size, text))
            kept += size
            while kept > SAMPLE_BYTES:
                kept -= heapq.heappop(heap)[2]
        seen += len(content)
        if seen >= SAMPLE_WINDOW:
            break
    bar.update(task, visible=False)
    if not heap:
        raise UserError("the source has no training text to make a vocabulary from: check --source and --field")
    return [text for _, _, _, text in sorted(heap, key=lambda entry: entry[1])]


# ---- shards


def _is_validation(digest: bytes, fraction: float) -> bool:
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


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
            split = SPLITS[_is_validation(digest, validation)]
            texts[split].append(document.text)
            names[split].append(_one_line(document.name.removeprefix(root)))
            sizes[split] += len(content)
            source_bytes += document.source_bytes
            sha256.update(digest)
        if not any(texts.values()):
            return
        yield Shard(number, texts, names, sizes, source_bytes, sha256.hexdigest())
        number += 1


def _group_samples(task: Task, validation: float, limit: int | None) -> Iterator[Shard]:
    """The samples of a task, so many to a shard; which are of the validation split is drawn for each."""
    count = min(task.count, limit or task.count)
    for number, first in enumerate(range(0, count, SHARD_SAMPLES)):
        places = np.arange(first, min(first + SHARD_SAMPLES, count))
        drawn = random_bits(task.seed, places, 1, VALIDATION)[:, 0] < validation * 2.0**64
        texts = {"train": places[~drawn].tolist(), "validation": places[drawn].tolist()}
        yield Shard(number, texts, {}, dict.fromkeys(SPLITS, 0), len(places), f"{task.identity} {first} {len(places)}")


def _one_line(name: str) -> str:
    return name.encode(errors="backslashreplace").decode().replace("\n", "\\n").replace("\r", "\\r")


def _encode_all(
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
        record: dict[str, Any] = _read_json(path)
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


# ---- what the user sees


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[rates]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _software() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "sentencepiece": sentencepiece.__version__,
    }


def _summary(dataset: Dataset, records: Mapping[int, Mapping[str, Any]], skipped: Counter[str]) -> Table:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    table = Table(
        title=f"{dataset.path}: {dataset.vocab_size:,} token vocabulary",
        caption=f"skipped documents: {reasons or 'none'}; seconds are of encoding, added over workers",
    )
    for column in ("split", "documents", "tokens", "bytes", "bytes/token", "seconds", "MB/s"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for name in SPLITS:
        split = dataset.split(name)
        seconds = sum(record["seconds"].get(name, 0.0) for record in records.values())
        table.add_row(
            name,
            f"{split.documents:,}",
            f"{split.tokens:,}",
            f"{split.text_bytes:,}",
            f"{split.text_bytes / max(split.tokens, 1):.3f}",
            f"{seconds:.1f}",
            f"{split.text_bytes / 1e6 / max(seconds, 1e-9):.2f}",
        )
    return table


def main(argv: list[str] | None = None) -> None:
    """The command; argv without the program's name, by default sys.argv's."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare", description="Turn documents into a data set of token shards."
    )
    parser.add_argument(
        "--source",
        required=True,
        help="stdlib, a path, glob or fsspec URL, hub:NAME[:CONFIG[:SPLIT]], or task:NAME,key=value,…",
    )
    parser.add_argument(
        "--tokenizer", help="a .model or .json file, train:sentencepiece:VOCAB, or bytes; none for a task"
    )
    parser.add_argument("--out", required=True, help="folder of the data set; the same command again goes on with it")
    parser.add_argument("--workers", type=int, help="processes that encode (default: one for each core)")
    parser.add_argument("--field", default="text", help="field of records that holds the text (default: text)")
    parser.add_argument("--validation", type=float, default=0.01, help="fraction of documents (default: 0.01)")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT documents")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="text in a shard (default: %(default)s)")
    add = parser.add_argument
    add("--part", metavar="I/N", help="make the I-th of N parts on this machine; see data_pipeline.merge")
    add("--invalid", default="error", help="error, or skip and count records that are not text (default: error)")
    add("--min-characters", type=int, metavar="N", help="leave out shorter documents")
    add("--max-characters", type=int, metavar="N", help="leave out longer documents")
    add("--language", dest="languages", action="append", default=[], metavar="CODE", help="keep it; may be repeated")
    add("--language-field", metavar="NAME", help="field that holds the language (default: py3langid tells)")
    add("--deduplicate", action="store_true", help="keep only the first of documents with the same text")
    options = vars(parser.parse_args(argv))
    given = {field.name: options.pop(field.name) for field in dataclasses.fields(Filters)}
    options["filters"] = Filters(**given | {"languages": tuple(given["languages"])})
    prepare(options.pop("source"), options.pop("tokenizer"), options.pop("out"), **options)


if __name__ == "__main__":
    run_command(main)
