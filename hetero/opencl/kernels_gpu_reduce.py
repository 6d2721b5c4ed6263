"""Sums, means and extrema on GPU-type devices, over any dimensions at once; twice where few results need many."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Literal

import torch

from hetero.opencl.errors import Unsupported
from hetero.opencl.kernels_common import ceil_div, collapse, require_dtype
from hetero.opencl.kernels_gpu_common import GpuLaunches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.opencl.ir import Argument, Launch, View
    from hetero.opencl.kernels_common import Scratch

_KINDS = {"sum": 0, "mean": 0, "amax": 1, "amin": 2}
_MAX_DIMS = 4  # of gpu_reduce.cl
_WANTED_GROUPS = 128  # about what fills a GPU; from the shapes alone, so that sums have one order on all devices
_CHUNK, _CHUNK_ROWS = (
    1024,
    64,
)  # least elements of a chunk, so that the second launch pays: of one result, of each column
_MAX_CHUNKS = 64

_Dims = list[tuple[int, int]]  # (size, stride), outermost first


class GpuReductions(GpuLaunches):
    """Reductions."""

    def reduction(
        self,
        kind: Literal["sum", "mean", "amax", "amin"],
        x: View,
        out: View,
        *,
        dims: Sequence[int],
        scratch: Scratch,
        op: str | None = None,
    ) -> list[Launch]:
        """As `kernels_reduce.reduction`, of which these are the arguments and errors."""
        require_dtype(torch.float32, x, out)
        if not out.is_contiguous:
            raise Unsupported(
                "a reduction into an output that isn't contiguous", remedy="reduce to a contiguous one first"
            )
        rank = len(x.shape)
        over = {d % rank for d in dims} if dims else set(range(rank))
        kept = _dimensions(x, [d for d in range(rank) if d not in over])
        reduced = _dimensions(x, sorted(over))
        scale = 1.0 / _count(reduced) if kind == "mean" else 1.0
        return self._reduce(x, out, kept, reduced, scale, scratch, op or kind, _KINDS[kind])

    def column_sum(self, x: View, out: View, *, scratch: Scratch, op: str = "sum") -> list[Launch]:
        """As `kernels_reduce.column_sum`, of which these are the arguments and errors."""
        require_dtype(torch.float32, x, out)
        last = len(x.shape) - 1
        kept, reduced = _dimensions(x, [last]), _dimensions(x, range(last))
        return self._reduce(x, out, kept, reduced, 1.0, scratch, op, _KINDS["sum"])

    def _reduce(
        self, x: View, out: View, kept: _Dims, reduced: _Dims, scale: float, scratch: Scratch, op: str, kind: int
    ) -> list[Launch]:
        n, size = _count(kept), _count(reduced)
        if _is_along(kept, reduced):
            groups, least = ceil_div(n, self.row_group(size, n)[1]), _CHUNK
        else:
            groups, least = ceil_div(n, self.column_group(n, size)[0]), _CHUNK_ROWS
        wanted = min(ceil_div(_WANTED_GROUPS, groups), size // least, _MAX_CHUNKS)
        chunk = ceil_div(size, max(wanted, 1))
        chunks = ceil_div(size, chunk)
        if chunks == 1:
            return [self._step(x, out, kept, reduced, size, scale, op, kind)]
        partial = scratch(chunks * n * 4, "partial reduction")
        return [
            self._step(x, partial, kept, reduced, chunk, 1.0, op, kind),
            self._step(partial, out, [(n, 1)], [(chunks, n)], chunks, scale, op, kind),
        ]

    def _step(
        self, x: View, out: View, kept: _Dims, reduced: _Dims, chunk: int, scale: float, op: str, kind: int
    ) -> Launch:
        n, size, is_along = _count(kept), _count(reduced), _is_along(kept, reduced)
        group = self.row_group(chunk, n) if is_along else self.column_group(n, chunk)
        groups = ceil_div(n, group[1] if is_along else group[0]), ceil_div(size, chunk)
        defines = {"KIND": kind, "ALONG_X": int(is_along), "KEPT": len(kept), "REDUCED": len(reduced)}
        arguments: tuple[Argument, ...] = (x, out, n, size, chunk, *_padded(kept), *_padded(reduced), scale)
        return self.launch(op, "reduce", "gpu_reduce.cl", arguments, groups, group, (out,), defines)


def _is_along(kept: _Dims, reduced: _Dims) -> bool:
    """Whether neighbouring work-items share a result: what is reduced lies closer together than what is kept."""
    return _count(kept) == 1 or reduced[-1][1] <= kept[-1][1]


def _count(dims: _Dims) -> int:
    return prod(n for n, _ in dims)


def _dimensions(x: View, which: Sequence[int]) -> _Dims:
    """The fewest dimensions that visit the same elements in the same order; at least one."""
    dims = collapse([x.shape[d] for d in which], [x.strides[d] for d in which]) or [(1, 0)]
    if len(dims) > _MAX_DIMS:
        raise Unsupported(f"{len(dims)} dimensions that don't collapse", remedy="make it contiguous first")
    return dims


def _padded(dims: _Dims) -> tuple[int, ...]:
    """Sizes and strides, outermost first, filled up to what the kernel takes."""
    full = [*dims, *[(1, 0)] * (_MAX_DIMS - len(dims))]
    return *(n for n, _ in full), *(s for _, s in full)
