"""The order of samples as pure arithmetic: no state, no memory, no IO.

`order(seed, epoch, n, size)` is a pseudo-random permutation of 0 … size−1, another one for each epoch, that
is evaluated at any place in constant time. It is a keyed Feistel network over the smallest power of two that
holds `size`, with cycle walking: a value that falls outside is sent through the network again until it falls
inside, fewer than two passes on average. All mixing is done here, so that no library's generator can change
the order.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 6
GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
SHARDS = 0x5348415244  # sets the order of shards apart from the order of samples


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit integers by splitmix64's finaliser, a bijection. Any shape but a scalar."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: ArrayLike, size: int, key: ArrayLike) -> NDArray[np.int64]:
    """Send each index in 0 … size−1 to its place under the permutation that `key` selects.

    index: integers of any shape; key: one 64-bit integer, or one for each index. They broadcast; int64 of
    their common shape. Time and memory do not depend on `size` (at most 2**63). Raises ValueError for an
    index outside the range.
    """
    places, keys = np.broadcast_arrays(np.asarray(index), np.asarray(key, dtype=np.uint64))
    shape, places, keys = places.shape, np.atleast_1d(places), np.atleast_1d(keys)
    if size < 1 or size > 1 << 63:
        raise ValueError(f"a permutation needs a size between 1 and 2**63, not {size}")
    if places.size and (int(places.min()) < 0 or int(places.max()) >= size):
        raise ValueError(f"an index lies outside 0 … {size - 1}")
    width = (size - 1).bit_length()
    values = _feistel(places.astype(np.uint64), width, keys)
    while (outside := values >= np.uint64(size)).any():
        values[outside] = _feistel(values[outside], width, keys[outside])
    return values.astype(np.int64).reshape(shape)


def _feistel(x: NDArray[np.uint64], width: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 0 … 2**width − 1. The halves may differ by a bit: a round only XORs into one of them."""
    low_bits = width - width // 2
    shift, low_mask = np.uint64(low_bits), np.uint64((1 << low_bits) - 1)
    high_mask = np.uint64((1 << (width // 2)) - 1)
    high, low = x >> shift, x & low_mask
    for number in range(ROUNDS):
        round_keys = keys + np.uint64((number + 1) * GOLDEN & MASK)
        if number % 2 == 0:
            low = low ^ (mix(high + round_keys) & low_mask)
        else:
            high = high ^ (mix(low + round_keys) & high_mask)
    return (high << shift) | low


def order(seed: int, epoch: ArrayLike, n: ArrayLike, size: int) -> NDArray[np.int64]:
    """The sample at place `n` of `epoch`, among `size` samples.

    epoch and n broadcast against each other; int64 of their common shape. Each epoch visits every sample
    once.
    """
    keys = _epoch_keys(seed, epoch)
    return permute(n, size, keys if np.ndim(epoch) else keys[0])


class ShardOrder:
    """A two-level order: shards are permuted, and samples within a window of shards.

    sizes: (K,) samples of each shard; window: how many shards are mixed. Read in this order each shard is opened
    once per epoch, and little more than `window` of them are open at a time. Rows of the global batch form
    `groups` (a number that divides it, fixed for a run) that go through different shards, so that a node which
    reads the rows of a group fetches its shards alone. Every epoch visits every sample once, whatever the number
    of ranks. Memory is that of `sizes`, not of the samples.
    """

    def __init__(
        self, seed: int, sizes: NDArray[np.int64], window: int, global_sequences: int, groups: int = 1
    ) -> None:
        if window < 1 or groups < 1 or global_sequences % groups:
            raise ValueError(f"{window} shards in a window, {groups} groups of {global_sequences} sequences")
        self.seed = seed
        self.sizes = sizes
        self.samples = int(sizes.sum())
        self.global_sequences = global_sequences
        self.groups = groups
        # Samples in a window, at least one.
        self.window = max(1, window * self.samples // max(1, len(sizes)))
        self.first_sample = np.cumsum(sizes) - sizes
        self._shards = lru_cache(maxsize=4)(self._make_shards)

    def samples_at(self, place: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at places (N,) of all epochs end to end, int64 of the same shape."""
        epochs = place // self.samples
        found = np.empty(place.shape, np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            found[here] = self._samples(epoch, place[here])
        return found

    def _samples(self, epoch: int, place: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at places of one epoch: its shards laid end to end in their order, shared by the groups."""
        position, chunk_start, chunk_size = self._positions(epoch, place)
        within = position - chunk_start
        window = within // self.window
        # The last window of a chunk is shorter than the others.
        sizes = np.minimum(self.window, chunk_size - window * self.window)
        keys = mix(mix(_epoch_keys(self.seed, epoch) + chunk_start.astype(np.uint64)) ^ window.astype(np.uint64))
        shuffled = np.empty(place.shape, np.int64)
        for size in np.unique(sizes).tolist():
            here = sizes == size
            shuffled[here] = permute(within[here] % self.window, size, keys[here])
        shards, ends = self._shards(epoch)
        position = chunk_start + window * self.window + shuffled
        number = np.searchsorted(ends, position, side="right")
        shard = shards[number]
        return self.first_sample[shard] + position - (ends[number] - self.sizes[shard])

    def _positions(self, epoch: int, place: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """For each place its position among the epoch's samples, and the start and size of its group's chunk.

        Whole global batches in the epoch are shared by rows; what is left at its two ends, less than two
        batches, comes from the last chunk.
        """
        rows = self.global_sequences // self.groups
        head = -epoch * self.samples % self.global_sequences
        steps = max(0, self.samples - head) // self.global_sequences
        per_group = steps * rows
        row = place % self.global_sequences
        offset = place - epoch * self.samples - head
        step = offset // self.global_sequences
        inside = (step >= 0) & (step < steps)
        group = row // rows
        position = np.where(inside, group * per_group + step * rows + row % rows, 0)
        rest = self.groups * per_group
        position = np.where(offset < 0, rest + head + offset, position)
        position = np.where(step >= steps, rest + offset - steps * self.global_sequences + head, position)
        chunk_start = np.where(inside, group * per_group, rest)
        chunk_size = np.where(inside, per_group, self.samples - rest)
        return position, chunk_start, chunk_size

    def _make_shards(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's order of the shards, and where each of them ends in it: both (K,)."""
        shards = order(self.seed ^ SHARDS, epoch, np.arange(len(self.sizes)), len(self.sizes))
        return shards, np.cumsum(self.sizes[shards])


def _epoch_keys(seed: int, epoch: ArrayLike) -> NDArray[np.uint64]:
    """The key of each epoch: (1,) for a number, else of the epochs' shape."""
    start = mix(np.full(1, (seed * GOLDEN) & MASK, dtype=np.uint64))
    return mix(start + np.atleast_1d(np.asarray(epoch, dtype=np.uint64)))
