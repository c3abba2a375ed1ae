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
import hashlib
import os
import platform
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
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

from data_pipeline.claim import PART, WORK, already_complete, claim, part_already_complete
from data_pipeline.documents import Fields, Source, open_source
from data_pipeline.encode import encode_all
from data_pipeline.errors import UserError, run_command
from data_pipeline.filters import Filters
from data_pipeline.shards import FORMAT, MANIFEST, SPLITS, Dataset, open_dataset, write_json, write_manifest
from data_pipeline.tasks import Task, open_task
from data_pipeline.vocabulary import provide_tokenizer, tokenizer_identity

NO_FILTERS = Filters()
SHARD_BYTES = 4 << 20


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
    each core. field: of records that holds the text. validation: fraction of documents, chosen by content hash. limit:
    first documents only. shard_bytes: text in a shard. invalid: "error", or "skip" to leave out and count records that
    are not text. part: "i/n" to make the i-th of n parts, in which case there is no data set yet and None is returned.
    Raises UserError for whatever a user can mend; what is finished stays for the next run.
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
        kind, file = tokenizer_identity(tokenizer or "")
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
        return already_complete(folder, settings, console)
    if (folder / PART).exists():
        part_already_complete(folder, claimed, console)
        return None
    with claim(folder, claimed):
        bar = _progress(console)
        with bar:
            made = provide_tokenizer(folder, task or file or tokenizer or "", documents, validation, limit, bar)
            records, skipped, count = encode_all(
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


def collect_shards(records: Mapping[int, Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The shards' entries of each split, in stream order, from the records of all tasks."""
    ordered = [records[number]["shards"] for number in sorted(records)]
    return {split: [shards[split] for shards in ordered if split in shards] for split in SPLITS}


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


def _parse_part(part: str | None) -> tuple[int, int]:
    """Part "i/n" as (i − 1, n); (0, 1) for the whole."""
    if part is None:
        return 0, 1
    number, _, parts = part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise UserError(f"--part {part}: write i/n, for example 1/4 to 4/4")
    return int(number) - 1, int(parts)


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
        "numpy": numpy.__version__,
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
