"""(step, rank) → batch: what the trainer sees. All is a function of the step; there is no state to save."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import overload

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.order import order
from data_pipeline.packing import Batch, find_segments, pack, pad
from data_pipeline.shards import Split

# Handing one small batch to another thread costs more than making it, so the prefetching thread hands over
# groups of about this many tokens.
TOKENS_PER_HANDOVER = 1 << 18
# The order costs 150 µs for a call and 50 ns for a place, so it is computed for many places at a time.
ORDER_BLOCK = 4096
SAMPLE = np.dtype([("epoch", np.int64), ("sample", np.int64)])


def read_windows(split: Split, starts: NDArray[np.int64], length: int) -> Batch:
    """The windows [s, s + length) of the split's stream, for each s in `starts`, with their documents."""
    tokens = np.empty((len(starts), length), dtype=np.int64)
    for row, start in enumerate(starts.tolist()):
        tokens[row] = split.read(start, start + length)
    return pack(tokens, split.document_starts, starts, split.prompt_lengths)


class Stream:
    """The endless, shuffled sequence of global batches of a split.

    Sample n is the window stream[n·T : n·T + T + 1]. Global batch s holds the samples at places s·B … s·B + B
    − 1 of the order, which runs through epoch after epoch, each with a permutation of its own. Raises
    UserError if the split is shorter than one sample.
    """

    def __init__(self, split: Split, *, seed: int, sequence_length: int, global_sequences: int) -> None:
        if sequence_length < 1 or global_sequences < 1:
            raise UserError(
                f"sequence length {sequence_length} and global batch {global_sequences} must be 1 or more"
            )
        self.split = split
        self.seed = seed
        self.sequence_length = sequence_length
        self.global_sequences = global_sequences
        self.samples_per_epoch = (split.tokens - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise UserError(
                f"the {split.name} split has {split.tokens:,} tokens, and one sample of sequence "
                f"length {sequence_length:,} needs {sequence_length + 1:,}: use more text or a smaller "
                "sequence length"
            )
        self._order_block = lru_cache(maxsize=4)(self._make_order_block)

    def sample_numbers(self, step: int) -> NDArray[np.void]:
        """The samples of a global batch: structured (global_sequences,) with fields `epoch` and `sample`."""
        return self._samples(step * self.global_sequences, self.global_sequences)

    def documents(self, step: int) -> NDArray[np.int64]:
        """The numbers, in the split, of the documents that a global batch touches: sorted, each once."""
        starts = self.sample_numbers(step)["sample"] * self.sequence_length
        return np.unique(find_segments(self.split.document_starts, starts, self.sequence_length + 1).document)

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Rank r's share of a global batch: its r-th contiguous slice, global_sequences / ranks rows.

        Raises UserError if the ranks do not divide the global batch.
        """
        rows = self._rows(rank, ranks)
        first = step * self.global_sequences + rank * rows
        samples = self._samples(first, rows)["sample"]
        return read_windows(self.split, samples * self.sequence_length, self.sequence_length + 1)

    def batches(self, first_step: int, last_step: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """The batches of steps first_step … last_step − 1, made ahead by a background thread.

        An error of the thread is raised here, at the step that it concerns or a little before. Closing the
        iterator stops the thread.
        """
        rows = self._rows(rank, ranks)
        group = max(1, TOKENS_PER_HANDOVER // (rows * (self.sequence_length + 1)))

        def make(a: int, b: int) -> list[Batch]:
            return [self.batch(step, rank, ranks) for step in range(a, b)]

        def jobs() -> Iterator[tuple[int, int]]:
            # The first group is a single batch, so that the first step does not wait for a whole group.
            a, b = first_step, first_step + 1
            while a < last_step:
                yield a, min(b, last_step)
                a, b = b, b + group

        return _ahead(make, jobs())

    def _rows(self, rank: int, ranks: int) -> int:
        if ranks < 1 or self.global_sequences % ranks:
            raise UserError(
                f"a global batch of {self.global_sequences} sequences cannot be shared by "
                f"{ranks} ranks: choose a multiple of the number of ranks"
            )
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks}")
        return self.global_sequences // ranks

    def _samples(self, first: int, count: int) -> NDArray[np.void]:
        """The samples at places first … first + count − 1 of all epochs end to end: (count,) of SAMPLE."""
        block = first // ORDER_BLOCK
        blocks = range(block, (first + count - 1) // ORDER_BLOCK + 1)
        samples = np.concatenate([self._order_block(number) for number in blocks])
        return samples[first - block * ORDER_BLOCK :][:count]

    def _make_order_block(self, number: int) -> NDArray[np.void]:
        places = np.arange(number * ORDER_BLOCK, (number + 1) * ORDER_BLOCK, dtype=np.int64)
        block = np.empty(ORDER_BLOCK, dtype=SAMPLE)
        block["epoch"], place = np.divmod(places, self.samples_per_epoch)
        block["sample"] = order(self.seed, block["epoch"], place, self.samples_per_epoch)
        return block


def _ahead(make: Callable[[int, int], list[Batch]], jobs: Iterator[tuple[int, int]]) -> Iterator[Batch]:
    """The batches of make(a, b) for each job, in order, two jobs ahead of the consumer on one thread."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="data_pipeline-batches")
    try:
        pending: deque[Future[list[Batch]]] = deque(pool.submit(make, *job) for job in islice(jobs, 2))
        while pending:
            group = pending.popleft().result()
            pending.extend(pool.submit(make, *job) for job in islice(jobs, 1))
            yield from group
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class ValidationBatches(Sequence[Batch]):
    """One rank's batches of consecutive windows, read when asked for. See validation_batches."""

    split: Split
    sequence_length: int
    micro_sequences: int
    rank: int
    ranks: int
    windows: int

    def __len__(self) -> int:
        return -(-self.windows // (self.micro_sequences * self.ranks))

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        first = (range(len(self))[index] * self.ranks + self.rank) * self.micro_sequences
        numbers = np.arange(first, min(first + self.micro_sequences, self.windows), dtype=np.int64)
        starts = numbers * self.sequence_length
        length = self.sequence_length + 1
        whole = read_windows(self.split, starts[starts + length <= self.split.tokens], length)
        if len(whole.tokens) < len(starts):  # the split's last window is cut short by the stream's end
            last = read_windows(self.split, starts[-1:], self.split.tokens - int(starts[-1]))
            whole = _stack(whole, pad(last, 1, length))
        return pad(whole, self.micro_sequences, length)


def _stack(a: Batch, b: Batch) -> Batch:
    return Batch(
        np.concatenate([a.tokens, b.tokens]),
        np.concatenate([a.document_ids, b.document_ids]),
        np.concatenate([a.positions, b.positions]),
        np.concatenate([a.target_mask, b.target_mask]),
    )


def validation_batches(
    split: Split,
    *,
    sequence_length: int,
    micro_sequences: int,
    rank: int = 0,
    ranks: int = 1,
    limit: int | None = None,
) -> ValidationBatches:
    """A split in file order: every token but the very first EOS is a target once, over all ranks together.

    Window k is stream[k·T : k·T + T + 1]; `limit` keeps the first that many windows. Every rank gets the same
    number of batches, each of micro_sequences rows of T + 1 tokens; what is missing is padding. Raises
    UserError for a split with nothing to predict and for numbers below 1.
    """
    numbers = {
        "sequence_length": sequence_length,
        "micro_sequences": micro_sequences,
        "ranks": ranks,
        "limit": limit,
    }
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"validation needs {name} of at least 1, not {value}")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks}")
    if split.tokens < 2:
        raise UserError(
            f"the {split.name} split has {split.tokens} tokens, nothing to predict: prepare the data "
            "again with more text or a larger --validation fraction"
        )
    windows = -(-(split.tokens - 1) // sequence_length)
    windows = windows if limit is None else min(windows, limit)
    return ValidationBatches(split, sequence_length, micro_sequences, rank, ranks, windows)
