"""Philox4x32-10 in numpy, as its authors define it: what the kernels' random numbers are compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]


def philox(counter: tuple[Words, Words, Words, Words], key: int) -> tuple[Words, Words, Words, Words]:
    """Four random words of 32 bits for each counter of four.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11, section 3.3.
    """
    x0, x1, x2, x3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    low = np.uint64(0xFFFFFFFF)
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = (
            (b >> np.uint64(32)) ^ x1 ^ np.uint64(k0),
            b & low,
            (a >> np.uint64(32)) ^ x3 ^ np.uint64(k1),
            a & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x0, x1, x2, x3


def words(n: int, key: int, stream: int) -> Words:
    """Word i % 4 of the block with counter (i / 4, stream), for i < n."""
    block = np.arange(-(-n // 4), dtype=np.uint64)
    low, high = stream & 0xFFFFFFFF, stream >> 32
    counter = block, np.zeros_like(block), np.full_like(block, low), np.full_like(block, high)
    return np.stack(philox(counter, key), -1).reshape(-1)[:n]


def attention_words(heads: int, queries: int, keys: int, key: int, stream: int) -> Words:
    """Words of weights (heads, queries, keys): word j / 4 % 4 of the block (j / 16 * 4 + j % 4, i, h, stream)."""
    h, i, j = np.meshgrid(*(np.arange(n, dtype=np.uint64) for n in (heads, queries, keys)), indexing="ij")
    four, sixteen = np.uint64(4), np.uint64(16)
    block = philox((j // sixteen * four + j % four, i, h, np.full_like(i, stream)), key)
    return np.choose((j // four % four).astype(np.int64), block)
