"""Sorting along a dimension. What the kernels do: the head of sort.cl."""

from __future__ import annotations

from math import prod

import torch

from hetero.opencl.c_source import C_TYPES, require_c_types
from hetero.opencl.errors import Unsupported
from hetero.opencl.ir import Argument, Launch, View
from hetero.opencl.kernels_common import Scratch, one_dimension, split_rows

_MAX_SELECTED = 64  # more than that are found faster by sorting everything


def sort(
    x: View,
    values: View,
    indices: View,
    *,
    dim: int,
    is_descending: bool,
    keep: int | None = None,
    scratch: Scratch,
    op: str = "sort",
) -> list[Launch]:
    """The elements of x in order along a dimension, stable, or the first of them.

    Args:
        x: any shape but (), not empty.
        values: x's shape with `keep` elements in the dimension; x's dtype.
        indices: like values, int64: where they were.
        dim: the dimension.
        is_descending: largest first.
        keep: how many elements, at least 1; None: all.
        scratch: gives memory for positions.
        op: what the launch is counted as.

    Raises:
        Unsupported: no C type for the dtype; the dimensions before, or after, `dim` have no common stride.
    """
    require_c_types(x.dtype)
    if indices.dtype != torch.int64:
        raise Unsupported(f"indices of {indices.dtype}")
    dim %= len(x.shape)
    n, n_inner = x.shape[dim], prod(x.shape[dim + 1 :])
    rows, keep = prod(x.shape[:dim]) * n_inner, n if keep is None else keep
    is_selection = keep < n and keep <= _MAX_SELECTED
    groups, share = split_rows(rows, n)
    positions = scratch(groups * (keep if is_selection else 2 * n) * 4, "positions")
    positions = View(positions.root, positions.offset, positions.shape, positions.strides, torch.int32)
    strides = [stride for view in (x, values, indices) for stride in _strides(view, dim)]
    arguments: tuple[Argument, ...] = (x, values, indices, positions, rows, n, keep, n_inner, share, *strides)
    kernel = "select_rows" if is_selection else "sort_rows"
    defines: dict[str, int | float | str] = {"T": C_TYPES[x.dtype], "DESCENDING": int(is_descending)}
    return [Launch(op, kernel, "sort.cl", arguments, (groups,), (1,), (values, indices, positions), defines)]


def _strides(view: View, dim: int) -> tuple[int, int, int]:
    """Of the dimensions before `dim`, of `dim`, and of those after it."""
    outer = one_dimension(view.shape[:dim], view.strides[:dim])[1]
    inner = one_dimension(view.shape[dim + 1 :], view.strides[dim + 1 :])[1]
    return outer, view.strides[dim], inner
