"""The order of samples as pure arithmetic: no state, no memory, no IO.

`order(seed, epoch, n, size)` is a pseudo-random permutation of 0 … size−1, another one for each epoch, that
is evaluated at any place in constant time. It is a keyed Feistel network over the smallest power of two that
holds `size`, with cycle walking: a value that falls outside is sent through the network again until it falls
inside, fewer than two passes on average. All mixing is done here, so that no library's generator can change
the order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 6
GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


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
    start = mix(np.full(1, (seed * GOLDEN) & MASK, dtype=np.uint64))
    keys = mix(start + np.atleast_1d(np.asarray(epoch, dtype=np.uint64)))
    return permute(n, size, keys if np.ndim(epoch) else keys[0])
