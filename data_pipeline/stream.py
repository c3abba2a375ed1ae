"""(step, rank) → batch: what the trainer sees. All is a function of the step; there is no state to save."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import overload

import numpy as np
from numpy.typing import NDArray

from data_pipeline.damage import BackgroundCheck, ShardCheck
from data_pipeline.errors import UserError
from data_pipeline.mixture import Mixture, by_weights
from data_pipeline.packing import Allocate, Batch, join, pad, scatter
from data_pipeline.samples import Samples, read_windows, window_samples
from data_pipeline.splits import Split

# Making many rows at once costs far less than making them batch by batch, and handing one small batch to another
# thread costs more than making it, so batches are made in groups of about this many tokens.
TOKENS_PER_GROUP = 1 << 17
# The order costs 150 µs for a call and 50 ns for a place, so it is computed for many places at a time.
ORDER_BLOCK = 4096
# Shards that are mixed where they are fetched from elsewhere.
REMOTE_SHARD_WINDOW = 8
PREFETCH_THREADS = 4
SAMPLE = np.dtype([("epoch", np.int64), ("sample", np.int64), ("source", np.int64)])


class Stream:
    """The endless, shuffled sequence of global batches of one split, or of a mixture of several.

    Global batch s holds the samples at places s·B … s·B + B − 1 of the order, which runs through epoch after
    epoch, each with a permutation of its own. A sample is a window of the split's stream, or what `samples` says.

    split: one, or several with a `mixture`. shard_window: mix so many shards at a time (order.ShardOrder), by
    default 8 for remote splits and all for local ones; groups: see there. documents: whether rows are told apart
    into documents. on_damage: "stop", or "skip" to make padding of every sample of a damaged shard; `skipped`
    counts them. samples: in place of windows, for example packed ones (best_fit.py), one for each split.
    Raises UserError for splits without a single sample, and for numbers that do not fit.
    """

    def __init__(
        self,
        split: Split | Sequence[Split],
        *,
        seed: int,
        sequence_length: int,
        global_sequences: int,
        mixture: Mixture | None = None,
        shard_window: int | None = None,
        groups: int = 1,
        documents: bool = True,
        on_damage: str = "stop",
        samples: Sequence[Samples] | None = None,
    ) -> None:
        if sequence_length < 1 or global_sequences < 1:
            raise UserError(f"sequence length {sequence_length} and global batch {global_sequences} must be 1 or more")
        if on_damage not in ("stop", "skip"):
            raise UserError(f"on_damage {on_damage!r}: write stop or skip")
        splits = (split,) if isinstance(split, Split) else tuple(split)
        skip = on_damage == "skip"
        self.splits = tuple(replace(one, whole_index=False) for one in splits) if skip else splits
        self.mixture = mixture or by_weights([1.0] * len(self.splits))
        if self.mixture.sources != len(self.splits) or (groups > 1 and len(self.splits) > 1):
            raise UserError(
                f"{len(self.splits)} sources, a mixture of {self.mixture.sources} and {groups} groups: give one "
                "weight for each source, and groups only with a single one"
            )
        self.split = self.splits[0]
        self.seed = seed
        self.sequence_length = sequence_length
        self.global_sequences = global_sequences
        self.with_documents = documents
        self.samples: Sequence[Samples] = samples or [
            window_samples(
                one,
                seed + number,
                sequence_length,
                global_sequences,
                shard_window or (REMOTE_SHARD_WINDOW if one.remote else None),
                groups,
            )
            for number, one in enumerate(self.splits)
        ]
        self.samples_per_epoch = sum(one.count for one in self.samples)
        self.skipped: Counter[str] = Counter()
        self._checks = [ShardCheck(one) for one in self.splits] if skip else None
        self._order_block = lru_cache(maxsize=4)(self._make_order_block)

    def sample_numbers(self, step: int) -> NDArray[np.void]:
        """The samples of a global batch: structured (global_sequences,), fields `epoch`, `sample`, `source`."""
        return self._samples(step * self.global_sequences, self.global_sequences)

    def documents(self, step: int) -> NDArray[np.int64]:
        """The numbers of the documents that a global batch touches: sorted, each once.

        Numbers are those of the split; of several, each split's follow those of the one before.
        """
        numbers = self.sample_numbers(step)
        found, before = [np.empty(0, np.int64)], 0
        for source, samples in enumerate(self.samples):
            wanted = numbers["sample"][numbers["source"] == source]
            if len(wanted):
                found.append(samples.documents(wanted) + before)
            before += samples.split.documents
        return np.concatenate(found)

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Rank r's share of a global batch: its r-th contiguous slice, global_sequences / ranks rows.

        Raises UserError if the ranks do not divide the global batch.
        """
        return self._group(step, step + 1, rank, ranks, np.empty)[0]

    def batches(
        self, first_step: int, last_step: int, rank: int = 0, ranks: int = 1, allocate: Allocate = np.empty
    ) -> Iterator[Batch]:
        """The batches of steps first_step … last_step − 1, made ahead by a background thread.

        allocate: makes the arrays, for example in page-locked memory. An error of the thread, and damage that a
        check of the shards finds meanwhile, is raised here, at the step that it concerns or a little before.
        Closing the iterator stops the threads.
        """
        group = max(1, TOKENS_PER_GROUP // (self._rows(rank, ranks) * (self.sequence_length + 1)))

        def make(a: int, b: int) -> list[Batch]:
            return self._group(a, b, rank, ranks, allocate)

        def jobs() -> Iterator[tuple[int, int]]:
            # The first group is a single batch, so that the first step does not wait for a whole group.
            a, b = first_step, first_step + 1
            while a < last_step:
                yield a, min(b, last_step)
                a, b = b, b + group

        local = [] if self._checks else [one for one in self.splits if not one.remote]
        check = BackgroundCheck(local, rank, ranks)
        with ShardPrefetch(self, rank, ranks) as prefetch:
            try:
                yield from _ahead(make, prefetch.along(jobs()), check.raise_damage)
            finally:
                check.stop()

    def shards(self, first: int, last: int, rank: int = 0, ranks: int = 1) -> list[tuple[int, int]]:
        """(source, shard) of every shard that a rank reads in steps first … last − 1, sorted, each once."""
        numbers = self._rank_samples(first, last, rank, ranks)
        return sorted(
            (source, shard)
            for source, samples in enumerate(self.samples)
            for shard in np.unique(samples.shards(numbers["sample"][numbers["source"] == source])).tolist()
        )

    def _rows(self, rank: int, ranks: int) -> int:
        if ranks < 1 or self.global_sequences % ranks:
            raise UserError(
                f"a global batch of {self.global_sequences} sequences cannot be shared by "
                f"{ranks} ranks: choose a multiple of the number of ranks"
            )
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks}")
        return self.global_sequences // ranks

    def _group(self, a: int, b: int, rank: int, ranks: int, allocate: Allocate) -> list[Batch]:
        """A rank's batches of steps a … b − 1, made together: all are views of the same four arrays."""
        rows = self._rows(rank, ranks)
        together = self._read(self._rank_samples(a, b, rank, ranks), allocate)
        return [together.rows(first, first + rows) for first in range(0, rows * (b - a), rows)]

    def _rank_samples(self, a: int, b: int, rank: int, ranks: int) -> NDArray[np.void]:
        """A rank's samples of steps a … b − 1: (rows · (b − a),) of SAMPLE."""
        rows = self._rows(rank, ranks)
        if ranks == 1:
            return self._samples(a * rows, (b - a) * rows)
        steps = [self._samples(step * self.global_sequences + rank * rows, rows) for step in range(a, b)]
        return np.concatenate(steps)

    def _read(self, numbers: NDArray[np.void], allocate: Allocate) -> Batch:
        good = np.ones(len(numbers), np.bool_)
        if self._checks:
            for source, samples in enumerate(self.samples):
                here = np.flatnonzero(numbers["source"] == source)
                good[here] = self._checks[source].are_whole(samples.shards(numbers["sample"][here]))
            self.skipped["samples"] += int((~good).sum())
        if len(self.samples) == 1 and good.all():
            return self.samples[0].read(numbers["sample"], self.with_documents, allocate)
        parts, places = [], []
        for source, samples in enumerate(self.samples):
            rows = np.flatnonzero((numbers["source"] == source) & good)
            parts.append(samples.read(numbers["sample"][rows], self.with_documents, np.empty))
            places.append(rows)
        return scatter(parts, places, len(numbers), allocate)

    def _samples(self, first: int, count: int) -> NDArray[np.void]:
        """The samples at places first … first + count − 1 of all epochs end to end: (count,) of SAMPLE."""
        block = first // ORDER_BLOCK
        blocks = range(block, (first + count - 1) // ORDER_BLOCK + 1)
        samples = np.concatenate([self._order_block(number) for number in blocks])
        return samples[first - block * ORDER_BLOCK :][:count]

    def _make_order_block(self, number: int) -> NDArray[np.void]:
        places = np.arange(number * ORDER_BLOCK, (number + 1) * ORDER_BLOCK, dtype=np.int64)
        block = np.zeros(ORDER_BLOCK, dtype=SAMPLE)
        block["source"], index = self.mixture.locate(places)
        for source, samples in enumerate(self.samples):
            here = block["source"] == source
            block["epoch"][here] = index[here] // samples.count
            block["sample"][here] = samples.at(index[here])
        return block


class ShardPrefetch:
    """Fetches the remote shards of a stream's coming steps while it is read. A context manager."""

    def __init__(self, stream: Stream, rank: int, ranks: int) -> None:
        self.stream, self.rank, self.ranks = stream, rank, ranks
        remote = [one for one in stream.splits if one.remote]
        self.pool = ThreadPoolExecutor(PREFETCH_THREADS, "data_pipeline-fetch") if remote else None
        self._asked: set[tuple[int, int]] = set()
        # A shard's worth of samples is long enough to fetch the next one.
        shards = sum(len(one.shards) for one in remote)
        self.steps = max(1, sum(one.count for one in stream.samples) // max(1, shards * stream.global_sequences))

    def __enter__(self) -> ShardPrefetch:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def along(self, jobs: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The jobs, each announced before it is handed out."""
        for a, b in jobs:
            if self.pool:
                wanted = self.stream.shards(a, b + self.steps, self.rank, self.ranks)
                for one in wanted:
                    if one not in self._asked:
                        self.pool.submit(self._fetch, *one)
                self._asked = set(wanted)
            yield a, b

    def _fetch(self, source: int, shard: int) -> None:
        split = self.stream.splits[source]
        for kind in split.shards[shard]["files"]:
            split.file(shard, kind)  # an error is met again, and told, by the thread that needs the file


def _ahead(
    make: Callable[[int, int], list[Batch]], jobs: Iterator[tuple[int, int]], check: Callable[[], None]
) -> Iterator[Batch]:
    """The batches of make(a, b) for each job, in order, two jobs ahead of the consumer on one thread."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="data_pipeline-batches")
    try:
        pending: deque[Future[list[Batch]]] = deque(pool.submit(make, *job) for job in islice(jobs, 2))
        while pending:
            group = pending.popleft().result()
            check()
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
            whole = join([whole, pad(last, 1, length)])
        return pad(whole, self.micro_sequences, length)


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
