"""What a sample of a split is, and the order of samples in an epoch: windows of the stream of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.order import ShardOrder, order
from data_pipeline.packing import Allocate, Batch, as_one_document, find_segments, pack
from data_pipeline.splits import Split


class Samples(Protocol):
    """The samples of one source: how many, in which order, and what they hold."""

    @property
    def split(self) -> Split:
        """Where they are read from."""

    @property
    def count(self) -> int:
        """Samples in an epoch."""

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at places of all epochs end to end: int64 of the same shape."""

    def read(self, samples: NDArray[np.int64], with_documents: bool, allocate: Allocate) -> Batch:
        """The batch of these samples (B,)."""

    def documents(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers, in the split, of the documents that the samples touch: sorted, each once."""

    def shards(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shards that each sample (B,) reads: (B, at least 2), some of them repeated to fill a row."""


@dataclass(frozen=True)
class Windows:
    """Sample n is the window stream[n·T : n·T + T + 1], in an order that mixes the whole epoch."""

    split: Split
    seed: int
    sequence_length: int

    @property
    def count(self) -> int:
        """Samples in an epoch."""
        return max(0, self.split.tokens - 1) // self.sequence_length

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at places of all epochs end to end."""
        return order(self.seed, places // self.count, places % self.count, self.count)

    def starts(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each sample begins in the stream."""
        return samples * self.sequence_length

    def read(self, samples: NDArray[np.int64], with_documents: bool, allocate: Allocate) -> Batch:
        """The batch of these samples (B,)."""
        return read_windows(self.split, self.starts(samples), self.sequence_length + 1, with_documents, allocate)

    def documents(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The documents that the samples touch."""
        return np.unique(find_segments(self.split, self.starts(samples), self.sequence_length + 1).document)

    def shards(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shards that each sample reads, the first and the last of them first."""
        starts = self.starts(samples)
        first, last = self.split.shard_of(starts), self.split.shard_of(starts + self.sequence_length)
        between = [np.minimum(first + more, last) for more in range(1, int((last - first).max(initial=0)))]
        return np.stack([first, last, *between], -1)


@dataclass(frozen=True)
class ShardWindows(Windows):
    """Windows that never cross shards, in an order that goes through a few shards at a time.

    Sample i of a shard is shard[i·T : i·T + T + 1]; what is left at its end, at most T tokens, is not read.
    shard_window, groups: see order.ShardOrder.
    """

    shard_window: int
    global_sequences: int
    groups: int = 1

    @property
    def count(self) -> int:
        """Samples in an epoch."""
        return self.order.samples

    @cached_property
    def order(self) -> ShardOrder:
        """The two-level order of these samples."""
        tokens = np.array([shard["tokens"] for shard in self.split.shards], np.int64)
        sizes = np.maximum(tokens - 1, 0) // self.sequence_length
        return ShardOrder(self.seed, sizes, self.shard_window, self.global_sequences, self.groups)

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at places of all epochs end to end."""
        return self.order.samples_at(places)

    def starts(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each sample begins in the stream."""
        first = self.order.first_sample
        shard = np.searchsorted(first, samples, side="right") - 1
        return self.split.shard_starts[shard] + (samples - first[shard]) * self.sequence_length


def read_windows(
    split: Split,
    starts: NDArray[np.int64],
    length: int,
    with_documents: bool = True,
    allocate: Allocate = np.empty,
) -> Batch:
    """The windows [s, s + length) of the split's stream, for each s in `starts`, with their documents.

    Without documents each row counts as one, unless the split has prompts, which are told by their documents.
    """
    tokens = allocate((len(starts), length), np.int64)
    split.windows(starts, length, tokens)
    told_apart = with_documents or split.has_prompts
    batch = pack(tokens, split, starts, allocate) if told_apart else as_one_document(tokens, allocate)
    if not split.has_labels:
        return batch
    labels = allocate((len(starts), length), np.int64)
    split.windows(starts, length, labels, "labels")
    return replace(batch, labels=labels)


def window_samples(
    split: Split,
    seed: int,
    sequence_length: int,
    global_sequences: int,
    shard_window: int | None = None,
    groups: int = 1,
) -> Windows:
    """The samples of a split, in two levels if shard_window is given. Raises UserError if there are none."""
    if shard_window is None:
        if groups > 1:
            raise UserError(f"groups {groups} go through windows of shards: give shard_window too")
        samples = Windows(split, seed, sequence_length)
    else:
        if shard_window < 1 or groups < 1 or global_sequences % groups:
            raise UserError(
                f"shard_window {shard_window} must be 1 or more, and groups {groups} must divide the global "
                f"batch of {global_sequences} sequences"
            )
        samples = ShardWindows(split, seed, sequence_length, shard_window, global_sequences, groups)
    if samples.count < 1:
        raise UserError(
            f"the {split.name} split has {split.tokens:,} tokens, and one sample of sequence "
            f"length {sequence_length:,} needs {sequence_length + 1:,}"
            f"{' in one shard' if shard_window else ''}: use more text or a smaller sequence length"
        )
    return samples
