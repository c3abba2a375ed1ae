from __future__ import annotations

import hashlib
import time
import tracemalloc

import numpy as np
import pytest

from data_pipeline.order import ShardOrder, order, permute

POWERS_OF_4 = [4**k + d for k in range(1, 9) for d in (-1, 0, 1)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 65_537, 262_145, 2**16, *POWERS_OF_4])
def test_permutation_reaches_every_place_once(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_order_is_the_same_for_one_place_and_for_many() -> None:
    whole = order(7, 2, np.arange(1000), 1000)
    assert [int(order(7, 2, n, 1000)) for n in range(1000)] == whole.tolist()
    epochs = np.repeat([1, 2], 1000)
    mixed = order(7, epochs, np.tile(np.arange(1000), 2), 1000)
    assert np.array_equal(mixed[1000:], whole) and np.array_equal(mixed[:1000], order(7, 1, np.arange(1000), 1000))


def test_epochs_and_seeds_differ() -> None:
    places = np.arange(10_000)
    orders = [order(seed, epoch, places, 10_000) for seed in (0, 1, -1) for epoch in (0, 1, 2)]
    for a in range(len(orders)):
        for b in range(a):
            # Two independent permutations agree at one place on average.
            assert (orders[a] == orders[b]).sum() < 10


def test_order_is_pinned() -> None:
    """Resuming a run with another version must go on with the same samples."""
    numbers = order(1234, 3, np.arange(10_000), 1_000_003).astype("<i8")
    assert hashlib.sha256(numbers.tobytes()).hexdigest() == (
        "3c23d540b07d7f9e3b200cbff7ed0c633aa52604ec768188950d4ced45db73ba"
    )
    two_level = ShardOrder(1234, np.arange(1, 101) * 37 % 900 + 100, window=8, global_sequences=48, groups=4)
    numbers = two_level.samples_at(two_level.samples + np.arange(10_000)).astype("<i8")
    assert hashlib.sha256(numbers.tobytes()).hexdigest() == (
        "d9cb50cf4ba34bcccdf40fdaa9783e0b6bce667a1ba34b36dfe4f4e33ddd90cf"
    )


def test_where_a_sample_goes_is_uniform() -> None:
    """Chi-square of where places 0 … 9 go over many keys, and of a short prefix over the whole range."""
    for size in (100, 1000, 4097):
        first = np.concatenate([order(seed, 0, np.arange(10), size) for seed in range(2000)])
        counts = np.bincount(first * 20 // size, minlength=20)
        expected = np.bincount(np.arange(size) * 20 // size, minlength=20) * len(first) / size
        assert ((counts - expected) ** 2 / expected).sum() < 50  # 19 degrees of freedom: p < 1e-4 above 53
    prefix = order(5, 0, np.arange(100_000), 10**12)
    counts = np.bincount(prefix // (10**12 // 100), minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < 160  # 99 degrees of freedom


def test_neighbours_are_not_correlated() -> None:
    for size in (10_000, 65_537, 10**12):
        places = np.arange(10_000)
        x = order(11, 0, places, size) / size
        for lag in (1, 2, 64):
            assert abs(np.corrcoef(x[:-lag], x[lag:])[0, 1]) < 0.04  # four standard deviations
        assert abs(np.corrcoef(x, places)[0, 1]) < 0.04


def test_size_costs_neither_time_nor_memory() -> None:
    tracemalloc.start()
    began = time.perf_counter()
    numbers = order(0, 0, np.arange(10**12 - 64, 10**12), 10**12)
    seconds = time.perf_counter() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(numbers.tolist())) == 64 and numbers.min() >= 0 and numbers.max() < 10**12
    assert seconds < 0.1 and peak < 1 << 20


@pytest.mark.parametrize(("index", "size"), [(-1, 10), (10, 10), (0, 0)])
def test_outside_the_range_is_refused(index: int, size: int) -> None:
    with pytest.raises(ValueError):
        permute(index, size, 0)
