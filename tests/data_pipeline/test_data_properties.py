"""What must hold for any sizes, seeds and ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import Dataset, Stream
from data_pipeline.order import ShardOrder, order, permute

SEEDS = st.integers(-(2**63), 2**63 - 1)
GROUPED = st.integers(1, 4).flatmap(
    lambda groups: st.tuples(st.integers(1, 16).map(lambda rows: rows * groups), st.just(groups))
)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(size=st.integers(1, 2**62), seed=SEEDS, epoch=st.integers(0, 10**6), data=st.data())
def test_order_stays_inside_and_is_injective_at_any_size(size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, size - 1), unique=True, min_size=1, max_size=30))
    found = order(seed, epoch, np.array(places), size)
    assert len(set(found.tolist())) == len(places) and found.min() >= 0 and found.max() < size
    assert [int(order(seed, epoch, place, size)) for place in places] == found.tolist()


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any),
    window=st.integers(1, 5),
    grouped=GROUPED,
    seed=SEEDS,
)
@settings(deadline=None, max_examples=150)
def test_two_level_order_visits_each_sample_once_per_epoch(
    sizes: list[int], window: int, grouped: tuple[int, int], seed: int
) -> None:
    array = np.array(sizes)
    two_level = ShardOrder(seed, array, window, *grouped)
    total = int(array.sum())
    found = two_level.samples_at(np.arange(3 * total))
    for epoch in range(3):
        assert np.array_equal(np.sort(found[epoch * total : (epoch + 1) * total]), np.arange(total))
    jumps = np.array([0, total, 3 * total - 1, total // 2])
    assert np.array_equal(two_level.samples_at(jumps), found[jumps])


@given(
    sizes=st.lists(st.integers(20, 60), min_size=8, max_size=20),
    window=st.integers(1, 4),
    grouped=GROUPED,
)
@settings(deadline=None, max_examples=60)
def test_two_level_order_opens_each_shard_once_and_few_at_a_time(
    sizes: list[int], window: int, grouped: tuple[int, int]
) -> None:
    array = np.array(sizes)
    batch, groups = grouped
    two_level = ShardOrder(1, array, window, batch, groups)
    total, rows = int(array.sum()), batch // groups
    steps = total // batch
    shard = np.searchsorted(np.cumsum(array), two_level.samples_at(np.arange(steps * batch)), side="right")
    by_group = shard.reshape(steps, groups, rows).transpose(1, 0, 2).reshape(groups, -1)
    for seen in by_group:
        spans = [np.flatnonzero(seen == number)[[0, -1]] for number in np.unique(seen)]
        open_at = [sum(a <= place <= b for a, b in spans) for place in range(0, len(seen), 7)]
        # A window may begin and end inside shards, and shards are not all of the mean size.
        assert max(open_at) <= 2 * (window * 3 + 2)
        assert max(b - a for a, b in spans) < 2 * two_level.window + max(sizes)
    # Beside those that two groups meet in, no shard is read by two groups.
    readers = [int((by_group == number).any(axis=1).sum()) for number in range(len(sizes))]
    assert sum(readers) <= len(sizes) + groups


def test_two_level_order_is_mixed_anew_in_every_window_and_epoch() -> None:
    """The places within a window that its samples go to: uniform, uncorrelated, and not those of another window."""
    sizes = np.full(64, 500)
    two_level = ShardOrder(7, sizes, 4, 1)
    found = two_level.samples_at(np.arange(2 * 32_000)).reshape(2, 16, 2000)
    ranks = np.argsort(np.argsort(found, axis=-1), axis=-1)
    for window in ranks.reshape(-1, 2000):
        assert abs(np.corrcoef(window, np.arange(2000))[0, 1]) < 0.1
        assert abs(np.corrcoef(window[1:], window[:-1])[0, 1]) < 0.1
        counts = np.bincount(window[:500] * 10 // 2000, minlength=10)
        assert ((counts - 50) ** 2 / 50).sum() < 35  # 9 degrees of freedom: p < 1e-4 above
    flat = ranks.reshape(-1, 2000)
    for a in range(len(flat)):
        for b in range(a):
            assert (flat[a] == flat[b]).sum() < 15  # one on average
    shards = found // 500
    assert all(len(set(window.tolist())) == 4 for window in shards.reshape(-1, 2000))
    assert not np.array_equal(shards[0, :, 0], shards[1, :, 0])


@given(step=st.integers(0, 10**12), rows=st.integers(1, 3), window=st.sampled_from([None, 2]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
def test_the_global_batch_is_the_same_for_1_to_64_ranks(
    dataset: Dataset, step: int, rows: int, window: int | None
) -> None:
    for ranks in range(1, 65):
        options = {"global_sequences": rows * ranks, "shard_window": window, "groups": 1}
        stream = Stream(dataset.split("train"), seed=5, sequence_length=16, **options)
        whole = stream.batch(step)
        parts = [stream.batch(step, rank, ranks) for rank in range(ranks)]
        for name in ("tokens", "document_ids", "positions", "target_mask"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            assert np.array_equal(joined, getattr(whole, name))


def test_any_step_reached_directly_equals_walking_there(make_dataset: Callable[..., Dataset]) -> None:
    split = make_dataset([40, 33, 71, 5, 90] * 6, shards=5).split("train")
    for options in ({}, {"shard_window": 2, "groups": 2}, {"documents": False}):
        walked = Stream(split, seed=1, sequence_length=9, global_sequences=6, **options)
        batches = list(walked.batches(0, 200, rank=1, ranks=2))
        for step in (0, 1, 57, 199):
            fresh = Stream(split, seed=1, sequence_length=9, global_sequences=6, **options)
            direct = fresh.batch(step, 1, 2)
            assert np.array_equal(direct.tokens, batches[step].tokens)
            assert np.array_equal(direct.document_ids, batches[step].document_ids)


@pytest.mark.parametrize("lengths", [[30, 17, 64, 8, 51, 22, 40, 13], [14, 7, 21, 7, 28, 14, 35, 7]])
def test_shard_windows_never_cross_shards_and_cover_them(
    make_dataset: Callable[..., Dataset], lengths: list[int]
) -> None:
    """Also where a shard's tokens are a multiple of the sequence length: the last one is a target at most."""
    split = make_dataset(lengths, shards=4).split("train")
    stream = Stream(split, seed=1, sequence_length=7, global_sequences=4, shard_window=2)
    samples = stream.samples[0]
    assert samples.count == sum((shard["tokens"] - 1) // 7 for shard in split.shards)
    shards = samples.shards(np.arange(samples.count))
    assert np.array_equal(shards[:, 0], shards[:, 1])
    targets = np.concatenate([np.arange(s + 1, s + 8) for s in samples.starts(np.arange(samples.count))])  # type: ignore[attr-defined]
    assert len(set(targets.tolist())) == len(targets)
