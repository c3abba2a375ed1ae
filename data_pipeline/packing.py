"""Windows of the token stream with their documents: ids, positions and target masks, a batch at once.

The stream is documents laid end to end, each opened by one EOS; where each begins is the document index. Ids
and positions come from that index, never from looking for EOS among the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """B rows of T + 1 tokens; column t predicts column t + 1, so T is the sequence length.

    tokens        (B, T+1) int64   0 where padding
    document_ids  (B, T+1) int32   0, 1, 2, … counted within each row; −1 where padding
    positions     (B, T+1) int32   since the document's EOS, or since the row's first column
    target_mask   (B, T+1) bool    whether the token may be a target: False for prompt tokens and padding
    """

    tokens: NDArray[np.int64]
    document_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    target_mask: NDArray[np.bool_]

    def rows(self, a: int, b: int) -> Batch:
        """Rows a … b−1, as views."""
        return Batch(self.tokens[a:b], self.document_ids[a:b], self.positions[a:b], self.target_mask[a:b])


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


def find_segments(document_starts: NDArray[np.int64], starts: NDArray[np.int64], length: int) -> Segments:
    """Cut the windows [s, s + length) of the stream, one for each s in `starts` (B,), at document borders.

    document_starts: (D,) sorted stream offsets, the first of them 0.
    """
    first = np.searchsorted(document_starts, starts, side="right") - 1
    last = np.searchsorted(document_starts, starts + (length - 1), side="right") - 1
    counts = last - first + 1
    row = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    document = first[row] + within
    document_start = np.asarray(document_starts[document])
    piece_start = np.maximum(document_start, starts[row])
    begin = piece_start - starts[row] + row * length
    lengths = np.diff(begin, append=len(starts) * length)
    return Segments(document, within, begin, lengths, piece_start - document_start)


def pack(
    tokens: NDArray[np.int64],
    document_starts: NDArray[np.int64],
    starts: NDArray[np.int64],
    prompt_lengths: NDArray[np.uint32] | None = None,
) -> Batch:
    """The batch of windows that begin at the stream offsets `starts` (B,) and hold `tokens` (B, T+1).

    prompt_lengths: (D,) tokens of each document, after its EOS, that are given and never targets.
    """
    rows, length = tokens.shape
    pieces = find_segments(document_starts, starts, length)
    document_ids = np.repeat(pieces.within.astype(np.int32), pieces.length)
    positions = np.arange(rows * length, dtype=np.int32)
    positions -= np.repeat(pieces.begin.astype(np.int32), pieces.length)
    mask = np.ones(rows * length, dtype=np.bool_)
    if prompt_lengths is not None:
        prompt = prompt_lengths[pieces.document].astype(np.int64)
        offset = positions + np.repeat(pieces.skipped, pieces.length)
        mask = (offset == 0) | (offset > np.repeat(prompt, pieces.length))
    shape = (rows, length)
    return Batch(tokens, document_ids.reshape(shape), positions.reshape(shape), mask.reshape(shape))


def pad(batch: Batch, rows: int, length: int) -> Batch:
    """The batch filled up with padding at the right and below, to `rows` rows of `length` tokens."""
    missing = ((0, rows - batch.tokens.shape[0]), (0, length - batch.tokens.shape[1]))
    return Batch(
        np.pad(batch.tokens, missing),
        np.pad(batch.document_ids, missing, constant_values=-1),
        np.pad(batch.positions, missing),
        np.pad(batch.target_mask, missing),
    )
