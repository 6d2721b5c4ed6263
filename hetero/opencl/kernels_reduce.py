"""Sums, means and extrema over any dimensions, one dimension a step."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Literal

import torch

from hetero.opencl.errors import Unsupported
from hetero.opencl.ir import Launch, View
from hetero.opencl.kernels_common import Scratch, ceil_div, collapse, require_dtype, split_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

_KINDS = {"sum": 0, "mean": 0, "amax": 1, "amin": 2}
_BLOCK = 64  # BLOCK of reduce.cl: columns of a group
_CHUNKS = 16  # a long dimension is reduced in that many parts where there is little else to divide
_CHUNK_ELEMENTS = 4096


def reduction(
    kind: Literal["sum", "mean", "amax", "amin"],
    x: View,
    out: View,
    *,
    dims: Sequence[int],
    scratch: Scratch,
    op: str | None = None,
) -> list[Launch]:
    """Reduce over dimensions.

    Args:
        kind: what to compute; extrema give NaN if an element is NaN.
        x: float32, any shape.
        out: contiguous; x's shape without `dims`, or with 1 in their place.
        dims: dimensions to reduce; empty: all.
        scratch: gives memory for partial results.
        op: what the launches are counted as; default: kind.

    Raises:
        Unsupported: another dtype, an output that isn't contiguous, or strides that don't collapse.
    """
    require_dtype(torch.float32, x, out)
    if not out.is_contiguous:
        raise Unsupported("a reduction into an output that isn't contiguous", remedy="reduce to a contiguous one first")
    rank = len(x.shape)
    reduced = {d % rank for d in dims} if dims else set(range(rank))
    levels = _levels(x, reduced)
    scale = 1.0 / prod(x.shape[d] for d in reduced) if kind == "mean" else 1.0
    step = _Step(op or kind, _KINDS[kind], scratch)
    source = x
    while True:
        last = sum(r for *_, r in levels) <= 1
        source, levels, is_done = step.reduce(source, levels, out if last else None, scale if last else 1.0)
        if is_done:
            return step.launches


def column_sum(x: View, out: View, *, scratch: Scratch, op: str = "sum") -> list[Launch]:
    """Sum over all dimensions but the last: the gradient of a bias.

    Args:
        x: (..., D) float32.
        out: (D), contiguous.
        scratch: gives memory for partial sums.
        op: what the launches are counted as.

    Raises:
        Unsupported: as `reduction`.
    """
    if len(x.shape) < 2:
        x = View(x.root, x.offset, (1, *x.shape), (0, *x.strides), x.dtype)
    return reduction("sum", x, out, dims=range(len(x.shape) - 1), scratch=scratch, op=op)


_Level = tuple[int, int, bool]  # size, stride, whether it is reduced


def _levels(x: View, reduced: set[int]) -> list[_Level]:
    """Runs of kept and of reduced dimensions, each collapsed as far as its strides allow."""
    levels: list[_Level] = []
    start = 0
    for stop in range(1, len(x.shape) + 1):
        if stop == len(x.shape) or (stop in reduced) != (start in reduced):
            pieces = collapse(x.shape[start:stop], x.strides[start:stop])
            levels += [(size, stride, start in reduced) for size, stride in pieces]
            start = stop
    return levels


class _Step:
    """Reduces the last reduced dimension; its result is contiguous and has one dimension less."""

    def __init__(self, op: str, kind: int, scratch: Scratch) -> None:
        self.op, self.kind, self.scratch = op, kind, scratch
        self.launches: list[Launch] = []

    def reduce(self, x: View, levels: list[_Level], out: View | None, scale: float) -> tuple[View, list[_Level], bool]:
        """One step of `reduction`: (result, its levels, whether it is `out`)."""
        index = max((i for i, level in enumerate(levels) if level[2]), default=None)
        if index is None:  # nothing to reduce: a copy, as a reduction over one element
            index, levels = 0, [(1, 0, True), *levels]
        before, after = levels[:index], levels[index + 1 :]
        size, stride, _ = levels[index]
        outer, inner = _two(before)
        rows = outer[0] * inner[0]
        columns = _two(after)
        if columns[0][0] != 1:
            raise Unsupported("kept dimensions that don't collapse to one", remedy="make it contiguous first")
        width, column = columns[1]
        target = out or self.scratch(rows * width * 4, "partial reduction")
        if after:
            self._columns(x, target, (rows, size, width), (inner[0], outer[1], inner[1], stride, column), scale)
        else:
            self._rows(x, target, (rows, size), (inner[0], outer[1], inner[1], stride), scale)
        remaining = [(n, r) for n, _, r in before] + [(n, r) for n, _, r in after]
        return target, _contiguous(remaining), out is not None

    def _rows(
        self, x: View, out: View, shape: tuple[int, int], layout: tuple[int, int, int, int], scale: float
    ) -> None:
        """Shape (P, C); layout: n_inner and the strides outer, inner, column."""
        rows, size = shape
        groups, share = split_rows(rows, size)
        chunks, chunk = _chunks(size, groups, size * share)
        if chunks > 1:
            partial = self.scratch(rows * chunks * 4, "partial reduction")
            self._emit_rows(x, partial, shape, layout, (groups, share), chunk, 1.0)
            x, shape, layout = partial, (rows, chunks), (1, chunks, 0, 1)
            groups, share = split_rows(rows, chunks)
            chunk = chunks
        self._emit_rows(x, out, shape, layout, (groups, share), chunk, scale)

    def _emit_rows(
        self,
        x: View,
        out: View,
        shape: tuple[int, int],
        layout: tuple[int, int, int, int],
        split: tuple[int, int],
        chunk: int,
        scale: float,
    ) -> None:
        chunks = ceil_div(shape[1], chunk)
        arguments = (x, out, *shape, layout[0], split[1], chunk, *layout[1:], chunks, 1, scale)
        self._emit("reduce_rows", arguments, (split[0], chunks), out)

    def _columns(
        self, x: View, out: View, shape: tuple[int, int, int], layout: tuple[int, int, int, int, int], scale: float
    ) -> None:
        """Shape (P, R, Q); layout: n_inner and the strides outer, inner, row, column."""
        rows, size, width = shape
        groups = rows * ceil_div(width, _BLOCK)
        chunks, chunk = _chunks(size, groups, size * min(width, _BLOCK))
        if chunks > 1:
            partial = self.scratch(rows * chunks * width * 4, "partial reduction")
            self._emit_columns(x, partial, shape, layout, chunk, 1.0)
            x, shape, layout, chunk = partial, (rows, chunks, width), (1, chunks * width, 0, width, 1), chunks
        self._emit_columns(x, out, shape, layout, chunk, scale)

    def _emit_columns(
        self,
        x: View,
        out: View,
        shape: tuple[int, int, int],
        layout: tuple[int, int, int, int, int],
        chunk: int,
        scale: float,
    ) -> None:
        rows, size, width = shape
        chunks = ceil_div(size, chunk)
        arguments = (x, out, size, width, layout[0], chunk, *layout[1:], chunks * width, width, 1, scale)
        self._emit("reduce_columns", arguments, (ceil_div(width, _BLOCK), chunks, rows), out)

    def _emit(self, kernel: str, arguments: tuple[View | int | float, ...], grid: tuple[int, ...], out: View) -> None:
        ones = (1,) * len(grid)
        self.launches.append(Launch(self.op, kernel, "reduce.cl", arguments, grid, ones, (out,), {"KIND": self.kind}))


def _chunks(size: int, groups: int, work: int) -> tuple[int, int]:
    """(parts, size of a part) of a dimension that `groups` groups reduce with `work` elements each."""
    if groups >= _CHUNKS or work <= _CHUNK_ELEMENTS:
        return 1, size
    parts = min(_CHUNKS, ceil_div(work, _CHUNK_ELEMENTS), size)
    chunk = ceil_div(size, parts)
    return ceil_div(size, chunk), chunk


def _two(levels: list[_Level]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two dimensions of (size, stride), outer one first, that visit what all levels do, kept or yet to be reduced."""
    dims = collapse([size for size, _, _ in levels], [stride for _, stride, _ in levels])
    if len(dims) > 2:
        raise Unsupported(f"{len(dims)} dimensions that don't collapse", remedy="make it contiguous first")
    outer, inner = ([(1, 0), (1, 0), *dims])[-2:]
    return outer, inner


def _contiguous(dims: list[tuple[int, bool]]) -> list[_Level]:
    """Levels of a contiguous array of these sizes; neighbours of one sort are merged."""
    merged: list[tuple[int, bool]] = []
    for size, is_reduced in dims:
        if merged and merged[-1][1] == is_reduced:
            merged[-1] = (merged[-1][0] * size, is_reduced)
        else:
            merged.append((size, is_reduced))
    levels: list[_Level] = []
    stride = 1
    for size, is_reduced in reversed(merged):
        levels.insert(0, (size, stride, is_reduced))
        stride *= size
    return levels
