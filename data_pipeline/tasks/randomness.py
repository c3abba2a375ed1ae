"""Random numbers that are a function of (seed, sample number, column): no generator, no state, any part at any time.

All mixing is done here, as in order.py, so that no library's generator can change a data set.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_pipeline.order import GOLDEN, MASK, mix


def random_bits(seed: int, numbers: NDArray[np.int64], columns: int, purpose: int = 0) -> NDArray[np.uint64]:
    """64 random bits for each sample and column: (N, columns). purpose: sets independent draws of one sample apart."""
    key = mix(mix(np.full(1, seed * GOLDEN & MASK, np.uint64)) + np.uint64(purpose * GOLDEN & MASK))
    rows = mix(numbers.astype(np.uint64) + key)
    column_keys = np.arange(1, columns + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return mix(rows[:, None] + column_keys)


def below(bits: NDArray[np.uint64], bound: ArrayLike) -> NDArray[np.int64]:
    """Integers 0 … bound − 1, bound < 2^31, from random bits; off from uniform by less than bound / 2^32."""
    return ((bits >> np.uint64(32)) * np.asarray(bound, np.uint64) >> np.uint64(32)).astype(np.int64)


def unit(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) from random bits."""
    return np.asarray((bits >> np.uint64(11)) * 2.0**-53, np.float64)


def permutations(bits: NDArray[np.uint64]) -> NDArray[np.int64]:
    """A random permutation of the columns for each row, the same shape."""
    return np.argsort(bits, axis=1, kind="stable")
