"""Dense linear algebra of the sweeps: matrix products, and sums of Z on single wires without a 2**n table.

numpy's BLAS takes every core of the machine at almost any size; beside a stage that has one of them, threads that wait
for each other make a product many times slower. torch keeps to the number of threads that the calling thread was given.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Real = npt.NDArray[np.float64]

_ALIGNMENT = 64  # of torch's own memory [B]; a product may sum in another order elsewhere, and differ in its last bits


def product(a: Any, b: Any, *, conjugate: bool = False) -> Any:
    """Matrix product of two arrays, of the first one's conjugate if asked; one result for one number of threads."""
    left, right = _aligned(a), _aligned(b)
    return ((left.conj() if conjugate else left) @ right).resolve_conj().numpy()


def _aligned(array: Any) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def z_sums(weights: Real, n_wires: int) -> Real:
    """sum_y weights[y] z_i(y) for every wire i: `(..., 2**n)` to `(..., n)`; z_i(y) = +-1 is Z_i's eigenvalue.

    Wires are taken in two halves: what belongs to one half is summed over the other first.
    """
    high, low = _halves(n_wires)
    square = weights.reshape(*weights.shape[:-1], 1 << high, 1 << low)
    parts = (product(square.sum(axis=-1), _signs(high)), product(square.sum(axis=-2), _signs(low)))
    return np.concatenate(parts, axis=-1)


def z_combination(coefficients: Real, n_wires: int) -> Real:
    """Diagonal of sum_i c_i Z_i: `(B, n)` to `(B, 2**n)`; the transpose of `z_sums`."""
    high, low = _halves(n_wires)
    a = product(coefficients[:, :high], _signs(high).T)
    b = product(coefficients[:, high:], _signs(low).T)
    return np.asarray((a[:, :, None] + b[:, None, :]).reshape(len(coefficients), -1))


def _halves(n_wires: int) -> tuple[int, int]:
    return (n_wires + 1) // 2, n_wires // 2


@functools.cache
def _signs(n: int) -> Real:
    """Eigenvalues of Z_i in the computational basis: `(2**n, n)`, wire 0 the most significant bit."""
    bits = np.arange(1 << n)[:, None] >> np.arange(n - 1, -1, -1)[None, :]
    return np.asarray(1.0 - 2.0 * (bits & 1))
