"""Windows of the token stream with their documents: ids, positions and target masks, a batch at once.

The stream is documents laid end to end, each opened by one EOS; where each begins is the document index. Ids
and positions come from that index, never from looking for EOS among the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# Makes an array of a shape and type; the trainer may give one that makes page-locked ("pinned") memory.
Allocate = Callable[[tuple[int, ...], Any], NDArray[Any]]
# What stands where there is no token, in each of a batch's arrays.
PADDING = (0, -1, 0, False, 0)


@dataclass(frozen=True)
class Batch:
    """B rows of T + 1 tokens; column t predicts column t + 1, so T is the sequence length.

    tokens        (B, T+1) int64   0 where padding
    document_ids  (B, T+1) int32   0, 1, 2, … counted within each row; −1 where padding
    positions     (B, T+1) int32   since the document's EOS, or since the row's first column
    target_mask   (B, T+1) bool    whether the token may be a target: False for prompt tokens and padding
    labels        (B, T+1) int64   what each token is to be answered with; None where that is the next token
    """

    tokens: NDArray[np.int64]
    document_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    target_mask: NDArray[np.bool_]
    labels: NDArray[np.int64] | None = None

    def rows(self, a: int, b: int) -> Batch:
        """Rows a … b−1, as views."""
        return Batch(*(array[a:b] for array in arrays(self)))


@dataclass(frozen=True)
class Segments:
    """The pieces of documents that B windows of one length consist of; S pieces, in the order of rows.

    document  (S,) int64  the document's number in the split
    within    (S,) int64  its number within the row, from 0
    begin     (S,) int64  where the piece begins in the flattened (B · length) windows
    length    (S,) int64  tokens
    skipped   (S,) int64  tokens of the document before the piece
    """

    document: NDArray[np.int64]
    within: NDArray[np.int64]
    begin: NDArray[np.int64]
    length: NDArray[np.int64]
    skipped: NDArray[np.int64]


class Documents(Protocol):
    """Where documents lie in a stream; a Split is one. Arrays in, int64 arrays of the same shape out."""

    def document_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The document that each place lies in."""

    def document_start(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each document begins."""

    def prompt_length(self, documents: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Tokens of each document, after its EOS, that are never targets; None if there are no such tokens."""


def find_segments(documents: Documents, starts: NDArray[np.int64], length: int) -> Segments:
    """Cut the windows [s, s + length) of the stream, one for each s in `starts` (B,), at document borders."""
    first = documents.document_at(starts)
    last = documents.document_at(starts + (length - 1))
    counts = last - first + 1
    row = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    document = first[row] + within
    document_start = documents.document_start(document)
    piece_start = np.maximum(document_start, starts[row])
    begin = piece_start - starts[row] + row * length
    lengths = np.diff(begin, append=len(starts) * length)
    return Segments(document, within, begin, lengths, piece_start - document_start)


def pack(
    tokens: NDArray[np.int64], documents: Documents, starts: NDArray[np.int64], allocate: Allocate = np.empty
) -> Batch:
    """The batch of windows that begin at the stream offsets `starts` (B,) and hold `tokens` (B, T+1)."""
    return lay_out(tokens, find_segments(documents, starts, tokens.shape[1]), documents, allocate)


def lay_out(tokens: NDArray[np.int64], pieces: Segments, documents: Documents, allocate: Allocate = np.empty) -> Batch:
    """The batch of `tokens` (B, T+1) that consist of the pieces. allocate: np.empty or what stands in for it."""
    shape, size = tokens.shape, tokens.size
    ids, positions = allocate(shape, np.int32), allocate(shape, np.int32)
    mask = allocate(shape, np.bool_)
    # np.repeat copies a value many times at memory speed, so two repeats cost less than one cumulative sum.
    ids.reshape(-1)[:] = np.repeat(pieces.within.astype(np.int32), pieces.length)
    begin = np.repeat(pieces.begin.astype(np.int32), pieces.length)
    np.subtract(np.arange(size, dtype=np.int32), begin, out=positions.reshape(-1))
    prompt = documents.prompt_length(pieces.document)
    if prompt is None:
        mask[...] = True
    else:
        offset = positions.reshape(-1) + np.repeat(pieces.skipped, pieces.length)
        mask.reshape(-1)[:] = (offset == 0) | (offset > np.repeat(prompt, pieces.length))
    return Batch(tokens, ids, positions, mask)


def as_one_document(tokens: NDArray[np.int64], allocate: Allocate = np.empty) -> Batch:
    """The batch of `tokens` (B, T+1) whose rows are each one document, whatever they hold."""
    ids, positions = allocate(tokens.shape, np.int32), allocate(tokens.shape, np.int32)
    mask = allocate(tokens.shape, np.bool_)
    ids[...], mask[...] = 0, True
    positions[...] = np.arange(tokens.shape[1], dtype=np.int32)
    return Batch(tokens, ids, positions, mask)


def scatter(
    parts: Sequence[Batch], rows: Sequence[NDArray[np.int64]], total: int, allocate: Allocate = np.empty
) -> Batch:
    """A batch of `total` rows: those of each part go to the rows named for it; what is left is padding."""
    whole = Batch(*(allocate((total, array.shape[1]), array.dtype) for array in arrays(parts[0])))
    for target, padding in zip(arrays(whole), PADDING, strict=False):
        if sum(map(len, rows)) < total:
            target[...] = padding
    for part, places in zip(parts, rows, strict=True):
        for target, source in zip(arrays(whole), arrays(part), strict=True):
            target[places] = source
    return whole


def arrays(batch: Batch) -> tuple[NDArray[Any], ...]:
    """The batch's four arrays, and its labels where it has any, in the order of its fields."""
    labels = () if batch.labels is None else (batch.labels,)
    return batch.tokens, batch.document_ids, batch.positions, batch.target_mask, *labels


def join(batches: Sequence[Batch]) -> Batch:
    """The rows of all the batches."""
    return Batch(*(np.concatenate(parts) for parts in zip(*map(arrays, batches), strict=True)))


def pad(batch: Batch, rows: int, length: int) -> Batch:
    """The batch filled up with padding at the right and below, to `rows` rows of `length` tokens."""
    missing = ((0, rows - batch.tokens.shape[0]), (0, length - batch.tokens.shape[1]))
    filled = zip(arrays(batch), PADDING, strict=False)
    return Batch(*(np.pad(array, missing, constant_values=value) for array, value in filled))
