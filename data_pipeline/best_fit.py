"""Command: pack whole documents into sequences, best fit first, and record where each piece went.

    python -m data_pipeline.best_fit DIR --sequence-length T

Concatenating cuts documents wherever a window ends. Here a document is cut only if it is longer than a row of T + 1
tokens: into windows that overlap by one, so that each of its tokens is a target once. Pieces go, longest first, into
the fullest row that still has room. The result is written beside the shards and read by `PackedSamples`:

    packing/SPLIT-T/packing.json     counts, shares and checksums
    packing/SPLIT-T/rows             int64 (R + 1): where each row's pieces begin among the pieces
    packing/SPLIT-T/pieces           int64 (P, 2): where a piece begins in the stream, and its tokens
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.damage import find_damage
from data_pipeline.errors import UserError, run_command
from data_pipeline.order import order
from data_pipeline.packing import Allocate, Batch, Segments, lay_out
from data_pipeline.shards import SPLITS, Dataset, open_dataset, write_file, write_json
from data_pipeline.splits import Split, map_file


def cut_documents(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents as pieces of at most `capacity` tokens: where each begins in the stream, and its tokens.

    A longer document becomes windows that overlap by one token.
    """
    step = capacity - 1
    counts = np.maximum(1, -(-(lengths - 1) // step))
    document = np.repeat(np.arange(len(starts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = starts[document] + number * step
    return begin, np.minimum(capacity, starts[document] + lengths[document] - begin)


def best_fit(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The row of each piece, longest first into the fullest row with room: (P,) int64, rows numbered from 0.

    Rows of equal room are interchangeable, so they are kept in one pile for each amount of room; a tree of maxima
    over the piles finds the smallest room that is enough in O(log capacity).
    """
    rows = np.empty(len(lengths), np.int64)
    piles: list[list[int]] = [[] for _ in range(capacity + 1)]
    leaves = 1 << capacity.bit_length()
    filled = [False] * (2 * leaves)  # over the amounts of room, whether any pile below is not empty
    count = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        room = _first_filled(filled, leaves, length)
        if room is None:
            row, room, count = count, capacity, count + 1
        else:
            row = piles[room].pop()
            _mark(filled, leaves + room, bool(piles[room]))
        rows[piece] = row
        if room > length:
            piles[room - length].append(row)
            _mark(filled, leaves + room - length, True)
    return rows


def _first_filled(filled: list[bool], leaves: int, least: int) -> int | None:
    """The smallest filled leaf that is not below `least`."""
    node = leaves + least
    if filled[node]:
        return least
    while node > 1:
        if node % 2 == 0 and filled[node + 1]:
            node += 1
            while node < leaves:
                node = 2 * node if filled[2 * node] else 2 * node + 1
            return node - leaves
        node //= 2
    return None


def _mark(filled: list[bool], node: int, value: bool) -> None:
    filled[node] = value
    while node > 1:
        node //= 2
        value = filled[2 * node] or filled[2 * node + 1]
        if filled[node] == value:
            return
        filled[node] = value


def pack_split(dataset: Dataset, split_name: str, sequence_length: int) -> dict[str, Any]:
    """Pack one split, write the result beside its shards, and return its record. Raises UserError."""
    split = dataset.split(split_name)
    if sequence_length < 1:
        raise UserError(f"--sequence-length {sequence_length}: give 1 or more")
    _check_local(dataset)
    if split.has_labels:
        raise UserError(f"{dataset.path}: its tokens have labels, which packing does not keep: read it end to end")
    if not split.documents:
        raise UserError(f"the {split_name} split has no documents: nothing to pack")
    lengths = np.diff(split.document_starts, append=split.tokens)
    begin, tokens = cut_documents(split.document_starts, lengths, sequence_length + 1)
    row = best_fit(tokens, sequence_length + 1)
    # Rows in the order of their first piece, pieces in that of the stream, so that neighbours are read together.
    by_row = np.lexsort((begin, row))
    rows = np.searchsorted(row[by_row], np.arange(int(row.max()) + 2)).astype("<i8")
    pieces = np.stack([begin, tokens], -1)[by_row].astype("<i8")
    folder = _folder(dataset, split_name, sequence_length)
    repeated = int(tokens.sum()) - split.tokens
    space = (len(rows) - 1) * (sequence_length + 1)
    record = {
        "fingerprint": dataset.fingerprint,
        "split": split_name,
        "sequence_length": sequence_length,
        "rows": len(rows) - 1,
        "pieces": len(pieces),
        "documents": split.documents,
        "documents_cut": int((lengths > sequence_length + 1).sum()),
        "tokens": split.tokens,
        "tokens_lost": 0,
        "tokens_repeated": repeated,
        "share_repeated": repeated / space,
        "share_padded": 1 - int(tokens.sum()) / space,
        "files": {
            "rows": {"file": "rows"} | write_file(folder / "rows", rows.tobytes()),
            "pieces": {"file": "pieces"} | write_file(folder / "pieces", pieces.tobytes()),
        },
    }
    write_json(folder / "packing.json", record)
    return record


def is_packed(dataset: Dataset, split_name: str, sequence_length: int) -> bool:
    """Whether `pack_split` has packed this very data for this sequence length; its files are not read."""
    try:
        record = json.loads((_folder(dataset, split_name, sequence_length) / "packing.json").read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return bool(record.get("fingerprint") == dataset.fingerprint)


def _folder(dataset: Dataset, split_name: str, sequence_length: int) -> Path:
    return dataset.path / "packing" / f"{split_name}-{sequence_length}"


def _check_local(dataset: Dataset) -> None:
    if dataset.remote or dataset.foreign:
        raise UserError(f"{dataset.path}: packing is kept beside a local set's shards: copy or prepare the data first")


@dataclass(frozen=True)
class PackedSamples:
    """The samples of a packed split: row n of its packing, filled up with padding. Give it to Stream(samples=…)."""

    split: Split
    seed: int
    sequence_length: int
    rows: NDArray[np.int64]
    pieces: NDArray[np.int64]

    @property
    def count(self) -> int:
        """Samples in an epoch."""
        return len(self.rows) - 1

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at places of all epochs end to end."""
        return order(self.seed, places // self.count, places % self.count, self.count)

    def read(self, samples: NDArray[np.int64], with_documents: bool, allocate: Allocate) -> Batch:
        """The batch of these samples (B,). Padding is told apart by document ids, so they are always made."""
        width = self.sequence_length + 1
        segments, pieces = self._segments(samples)
        tokens = allocate((len(samples), width), np.int64)
        flat, ends = tokens.reshape(-1), segments.begin + segments.length
        for start, begin, end in zip(pieces.tolist(), segments.begin.tolist(), ends.tolist(), strict=True):
            flat[begin:end] = self.split.read(start, start + end - begin)
        padding = self._padding(segments, len(samples), width)
        flat[padding] = 0
        batch = lay_out(tokens, _until_next(segments, tokens.size), self.split, allocate)
        # A piece that begins inside its document follows tokens of another one, which say nothing of it.
        batch.target_mask.reshape(-1)[segments.begin[segments.skipped > 0]] = False
        for array, value in ((batch.document_ids, -1), (batch.positions, 0), (batch.target_mask, False)):
            array.reshape(-1)[padding] = value
        return batch

    def documents(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The documents that the samples touch."""
        return np.unique(self._segments(samples)[0].document)

    def shards(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shards of each sample's pieces: (B, 2 · most pieces of a row), shorter rows repeating their first."""
        counts = self.rows[samples + 1] - self.rows[samples]
        column = np.arange(max(1, int(counts.max(initial=1))))
        place = self.rows[samples][:, None] + np.where(column < counts[:, None], column, 0)
        begin, tokens = self.pieces[place, 0], self.pieces[place, 1]
        return np.concatenate([self.split.shard_of(begin), self.split.shard_of(begin + tokens - 1)], -1)

    def _segments(self, samples: NDArray[np.int64]) -> tuple[Segments, NDArray[np.int64]]:
        """The pieces of the rows, and where each begins in the stream."""
        counts = self.rows[samples + 1] - self.rows[samples]
        row = np.repeat(np.arange(len(samples)), counts)
        within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        place = self.rows[samples][row] + within
        start, length = self.pieces[place, 0], self.pieces[place, 1]
        before = np.cumsum(length) - length
        first = np.cumsum(counts) - counts
        begin = row * (self.sequence_length + 1) + before - before[first][row]
        document = self.split.document_at(start)
        return Segments(document, within, begin, length, start - self.split.document_start(document)), start

    @staticmethod
    def _padding(segments: Segments, rows: int, width: int) -> NDArray[np.bool_]:
        used = np.zeros(rows * width + 1, np.int64)
        used[segments.begin] += 1
        np.subtract.at(used, segments.begin + segments.length, 1)
        return np.asarray(np.cumsum(used[:-1]) == 0)


def _until_next(segments: Segments, size: int) -> Segments:
    """The same pieces, each going on to where the next one begins, so that they cover everything."""
    length = np.diff(segments.begin, append=size)
    return Segments(segments.document, segments.within, segments.begin, length, segments.skipped)


def open_packed(dataset: Dataset, split_name: str, *, seed: int, sequence_length: int) -> PackedSamples:
    """The packing that `best_fit` recorded. Raises UserError if there is none, or it is not of this data."""
    _check_local(dataset)
    folder = _folder(dataset, split_name, sequence_length)
    command = f"python -m data_pipeline.best_fit {dataset.path} --sequence-length {sequence_length}"
    try:
        record = json.loads((folder / "packing.json").read_text(encoding="utf-8"))
        files: Mapping[str, Any] = record["files"]
        if record["fingerprint"] != dataset.fingerprint:
            raise UserError(f"{folder}: a packing of other data: run {command}")
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not packed for this sequence length: run {command}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: damaged ({error!r}): run {command}") from error
    for name, entry in files.items():
        if problem := find_damage(folder / name, entry):
            raise UserError(f"{folder / name}: {problem}: run {command}")
    rows, pieces = (map_file(folder / name, np.dtype("<i8")) for name in ("rows", "pieces"))
    return PackedSamples(dataset.split(split_name), seed, sequence_length, rows, pieces.reshape(-1, 2))


def main(argv: list[str] | None = None) -> None:
    """The command; argv without the program's name, by default sys.argv's."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.best_fit", description="Pack whole documents into sequences."
    )
    parser.add_argument("path", metavar="DIR", help="folder of the data set")
    parser.add_argument("--sequence-length", type=int, required=True, metavar="T", help="a row has T + 1 tokens")
    parser.add_argument("--split", choices=SPLITS, default="train")
    options = parser.parse_args(argv)
    record = pack_split(open_dataset(Path(options.path)), options.split, options.sequence_length)
    print(
        f"{record['documents']:,} documents in {record['rows']:,} rows: {record['share_padded']:.2%} padding, "
        f"{record['share_repeated']:.2%} repeated, {record['documents_cut']:,} documents cut, no token lost"
    )


if __name__ == "__main__":
    run_command(main)
