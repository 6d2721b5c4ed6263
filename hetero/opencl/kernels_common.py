"""What the modules of kernels share: how dimensions collapse, how rows are split over work-groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from hetero.opencl.errors import Unsupported
from hetero.opencl.ir import View

if TYPE_CHECKING:
    import torch

Scratch = Callable[[int, str], View]
"""(size [B], name) -> contiguous float32 view of one dimension that lives until the launches have run."""

_MAX_GROUPS = 64  # of a launch over rows: several a core on anything this project meets
_GROUP_ELEMENTS = 4096  # a work-group's least share; starting one costs about as much as 500 elements


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def require_dtype(dtype: torch.dtype, *views: View | None) -> None:
    """Raise Unsupported unless all views have the dtype."""
    for view in views:
        if view is not None and view.dtype != dtype:
            raise Unsupported(f"dtype {view.dtype} instead of {dtype}", remedy="convert it first")


def collapse(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of the fewest dimensions that visit the same elements in the same order."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def one_dimension(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """(size, stride) of dimensions that collapse to one.

    Raises:
        Unsupported: they don't.
    """
    merged = collapse(shape, strides) or [(1, 0)]
    if len(merged) > 1:
        raise Unsupported(
            f"dimensions {tuple(shape)} with strides {tuple(strides)} are not one", remedy="make it contiguous first"
        )
    return merged[0]


@dataclass(frozen=True)
class Matrix:
    """A view as rows and columns: sizes and strides in elements."""

    rows: int
    row: int
    columns: int
    column: int


def as_matrix(view: View, width: int) -> Matrix:
    """The view with its trailing dimensions of `width` elements as columns and all others as rows.

    Raises:
        Unsupported: rows or columns have no common stride.
    """
    split = len(view.shape)
    while split and prod(view.shape[split:]) < width:
        split -= 1
    row = one_dimension(view.shape[:split], view.strides[:split])
    column = one_dimension(view.shape[split:], view.strides[split:])
    return Matrix(*row, *column)


def split_rows(rows: int, width: int) -> tuple[int, int]:
    """(work-groups, rows of each) for rows of `width` elements; from the shape alone, so the same everywhere."""
    groups = max(1, min(_MAX_GROUPS, rows, rows * width // _GROUP_ELEMENTS))
    share = ceil_div(rows, groups)
    return ceil_div(rows, share), share
