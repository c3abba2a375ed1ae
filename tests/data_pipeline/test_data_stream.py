from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data_pipeline import Batch, Dataset, Split, Stream, UserError, validation_batches
from data_pipeline.order import order


def fields(batch: Batch) -> list[np.ndarray[Any, Any]]:
    return [batch.tokens, batch.document_ids, batch.positions, batch.target_mask]


def assert_equal(a: Batch, b: Batch) -> None:
    for x, y in zip(fields(a), fields(b), strict=True):
        assert np.array_equal(x, y)


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(np.concatenate(parts) for parts in zip(*map(fields, batches), strict=True)))


@pytest.fixture
def stream(dataset: Dataset) -> Stream:
    return Stream(dataset.split("train"), seed=3, sequence_length=64, global_sequences=12)


def test_every_sample_exactly_once_per_epoch(stream: Stream) -> None:
    size = stream.samples_per_epoch
    assert size % 12, "the test must cross an epoch inside a batch"
    numbers = np.concatenate([stream.sample_numbers(step) for step in range(2 * size // 12 + 1)])
    for epoch in (0, 1):
        assert sorted(numbers["sample"][numbers["epoch"] == epoch]) == list(range(size))
    assert not np.array_equal(numbers["sample"][:size], numbers["sample"][size : 2 * size])


def test_sample_numbers_are_the_order(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.stream.ORDER_BLOCK", 7)
    size = stream.samples_per_epoch
    for step in (0, 1, size // 12, 5000):
        numbers = stream.sample_numbers(step)
        places = np.arange(step * 12, step * 12 + 12)
        assert np.array_equal(numbers["epoch"], places // size)
        assert np.array_equal(numbers["sample"], order(3, places // size, places % size, size))


def test_batch_holds_the_windows_of_its_sample_numbers(stream: Stream) -> None:
    whole = stream.split.read(0, stream.split.tokens)
    for step in (0, stream.samples_per_epoch // 12, 1000):
        batch = stream.batch(step)
        assert batch.tokens.shape == (12, 65) and batch.tokens.dtype == np.int64
        for row, sample in enumerate(stream.sample_numbers(step)["sample"].tolist()):
            assert np.array_equal(batch.tokens[row], whole[sample * 64 : sample * 64 + 65])


@pytest.mark.parametrize("ranks", [2, 3])
def test_global_batch_does_not_depend_on_ranks(stream: Stream, ranks: int) -> None:
    for step in range(stream.samples_per_epoch // 12 + 2):
        assert_equal(joined([stream.batch(step, rank, ranks) for rank in range(ranks)]), stream.batch(step))


def test_documents_change_where_the_eos_is(dataset: Dataset, stream: Stream) -> None:
    batch = stream.batch(5)
    begins = batch.tokens[:, 1:] == dataset.eos_id
    assert begins.any() and np.array_equal(np.diff(batch.document_ids, axis=1) == 1, begins)
    assert np.array_equal(batch.positions[:, 1:] == 0, begins)


def test_documents_of_a_step_are_named(stream: Stream) -> None:
    starts = stream.split.document_starts
    samples = stream.sample_numbers(4)["sample"]
    expected = {
        int(np.searchsorted(starts, place, side="right")) - 1
        for sample in samples.tolist()
        for place in range(sample * 64, sample * 64 + 65)
    }
    assert stream.documents(4).tolist() == sorted(expected)


@pytest.mark.parametrize("handover", [1, 4 * 65 * 3, 1 << 18])
def test_prefetching_changes_nothing(stream: Stream, handover: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.stream.TOKENS_PER_GROUP", handover)
    got = list(stream.batches(3, 20, rank=1, ranks=3))
    assert len(got) == 17
    for step, batch in enumerate(got, 3):
        assert_equal(batch, stream.batch(step, 1, 3))
    assert list(stream.batches(5, 5)) == []


def prefetching_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("data_pipeline-batches")]


def test_closing_the_iterator_stops_its_thread(stream: Stream) -> None:
    batches: Any = stream.batches(0, 10**9)
    next(batches)
    assert prefetching_threads()
    batches.close()
    assert not prefetching_threads()


def test_an_error_of_the_thread_reaches_the_consumer(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Split.windows

    def windows(self: Split, *arguments: Any) -> None:
        if next(reads, None) is None:
            raise UserError("a bad shard")
        good(self, *arguments)

    reads = iter(range(5))
    monkeypatch.setattr(Split, "windows", windows)
    monkeypatch.setattr("data_pipeline.stream.TOKENS_PER_GROUP", 1)
    got = []
    with pytest.raises(UserError, match="a bad shard"):
        for batch in stream.batches(0, 100):
            got.append(batch)
    assert len(got) == 5 and not prefetching_threads()


def test_batches_are_made_ahead(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.stream.TOKENS_PER_GROUP", 1)
    asked: list[int] = []
    make = Stream._group
    monkeypatch.setattr(Stream, "_group", lambda self, step, *rest: (asked.append(step), make(self, step, *rest))[1])
    batches = stream.batches(0, 100)
    next(batches)
    deadline = time.monotonic() + 5
    while len(asked) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert asked == [0, 1, 2]


def test_reading_crosses_shards(dataset: Dataset) -> None:
    split = dataset.split("train")
    assert len(split.shards) > 2
    whole = np.concatenate([np.fromfile(split.folder / s["files"]["tokens"]["file"], "<u2") for s in split.shards])
    border = split.shards[0]["tokens"]
    for a, b in [(0, 5), (border - 3, border + 3), (border, border + 4), (7, split.tokens), (border, border)]:
        assert np.array_equal(split.read(a, b), whole[a:b])
        assert split.read(a, b).dtype == np.uint16
    assert np.array_equal(split.document_starts, np.flatnonzero(whole == dataset.eos_id))
    for a, b in [(-1, 3), (0, split.tokens + 1)]:
        with pytest.raises(IndexError):
            split.read(a, b)


def test_too_short_a_split_and_odd_ranks_are_refused(make_dataset: Callable[..., Dataset]) -> None:
    split = make_dataset([10, 6]).split("train")
    assert Stream(split, seed=0, sequence_length=15, global_sequences=2).samples_per_epoch == 1
    with pytest.raises(UserError, match=r"16 tokens.*length 16 needs 17"):
        Stream(split, seed=0, sequence_length=16, global_sequences=2)
    with pytest.raises(UserError, match="4 sequences cannot be shared by 3 ranks"):
        Stream(split, seed=0, sequence_length=5, global_sequences=4).batch(0, 0, 3)
    with pytest.raises(UserError, match="must be 1 or more"):
        Stream(split, seed=0, sequence_length=0, global_sequences=4)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("total", "length"), [(101, 10), (102, 10), (97, 32), (2, 8), (41, 8)])
def test_validation_covers_every_target_once(
    make_dataset: Callable[..., Dataset], ranks: int, total: int, length: int
) -> None:
    split = make_dataset([min(7, total - n) for n in range(0, total, 7)]).split("train")
    whole = split.read(0, total)
    shares = [
        validation_batches(split, sequence_length=length, micro_sequences=2, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    targets: list[int] = []
    seen: Counter[int] = Counter()
    for number in range(len(shares[0])):
        for rank, share in enumerate(shares):
            batch = share[number]
            assert batch.tokens.shape == (2, length + 1)
            for row in range(2):
                window = (number * ranks + rank) * 2 + row
                for column in range(1, length + 1):
                    if batch.target_mask[row, column]:
                        place = window * length + column
                        seen[place] += 1
                        targets.append(int(batch.tokens[row, column]))
                        assert batch.tokens[row, column] == whole[place] and batch.document_ids[row, column] >= 0
                    else:
                        assert batch.document_ids[row, column] == -1
    assert seen == Counter(range(1, total)) and targets == whole[1:].tolist()


def test_validation_limit_and_sequence(dataset: Dataset) -> None:
    split = dataset.split("validation")
    every = validation_batches(split, sequence_length=32, micro_sequences=4)
    few = validation_batches(split, sequence_length=32, micro_sequences=4, limit=6)
    assert len(few) == 2 and len(list(few)) == 2 < len(every)
    assert_equal(few[0], every[0])
    assert_equal(few[1].rows(0, 2), every[1].rows(0, 2))
    assert (few[1].document_ids[2:] == -1).all()
    assert_equal(every[-1], list(every)[-1])
    with pytest.raises(IndexError):
        every[len(every)]
    with pytest.raises(UserError, match="nothing to predict"):
        validation_batches(replace(split, tokens=1), sequence_length=8, micro_sequences=1)
    with pytest.raises(UserError, match="limit of at least 1"):
        validation_batches(split, sequence_length=8, micro_sequences=1, limit=0)
