"""Matrix products: which block sizes, and whether b is packed first."""

from __future__ import annotations

import torch

from hetero.opencl.errors import Unsupported
from hetero.opencl.ir import Argument, Launch, View
from hetero.opencl.kernels_common import Scratch, ceil_div, require_dtype

COLUMN_UNIT = 32
_ROW_UNIT = 14  # rows of a register tile of 16 lanes; for the tiles of 6 rows any number will do
_MAX_BLOCK_ROWS = 84  # MAX_BLOCK_ROWS of gemm.cl
_KC, _KC_UNIT = 384, 16  # KC of gemm.cl, less where a block of a doesn't fit the local memory
_BLOCK_COLS = (512, 128, COLUMN_UNIT)
_MIN_GROUPS = 16
_GROUP_FLOP = 1 << 20  # about 10 us, what a launch costs
_UNPACKED_BYTES = 1 << 19  # a b that small stays in the second-level cache: packing it costs more than it saves


def gemm(
    a: View,
    b: View,
    out: View,
    *,
    bias: View | None = None,
    residual: View | None = None,
    local_memory_bytes: int,
    scratch: Scratch,
    op: str = "mm",
) -> list[Launch]:
    """Out = a @ b [+ bias] [+ residual].

    Args:
        a: (M, K) or (B, M, K), any strides.
        b: (K, N) or (B, K, N), any strides.
        out: (M, N) or (B, M, N), any strides without overlap.
        bias: (N,) or (1, N).
        residual: out's shape, any strides; may be `out` itself: then the product is added to what is there.
        local_memory_bytes: what a work-group may have on the device [B].
        scratch: gives memory for packed panels of b.
        op: what the launches are counted as.

    Raises:
        Unsupported: another dtype than float32, or hardly any local memory.
    """
    require_dtype(torch.float32, a, b, out, bias, residual)
    defines = {"KC": _depth(local_memory_bytes)}
    (M, K), N = a.shape[-2:], b.shape[-1]
    n_batch = out.shape[0] if len(out.shape) == 3 else 1
    launches = []
    if K == 0:  # an empty buffer is no argument, and out's is never read as a
        a = out
    panels, b_batch, b_column, b_row = b, _strides(b)[0], 1, _strides(b)[1]
    is_repeated = K > 1 and b.strides[-2] == 0  # a row stride of 0 means packed to the kernel
    if b.strides[-1] != 1 or is_repeated or N % COLUMN_UNIT or K * N * 4 > _UNPACKED_BYTES:
        n_packed = 1 if b_batch == 0 else n_batch
        units = ceil_div(N, COLUMN_UNIT)
        panels = scratch(max(n_packed * units * COLUMN_UNIT * K, 1) * 4, "packed panels")
        if K:
            packing = (b, panels, K, N, *_strides(b))
            grid = (units, n_packed)
            launches.append(Launch(op, "gemm_pack_b", "gemm.cl", packing, grid, (1, 1), (panels,), defines))
        b_batch, b_column, b_row = (0 if b_batch == 0 else units * COLUMN_UNIT * K), K, 0
    block_rows, block_cols = _blocks(M, N, K, n_batch)
    arguments: tuple[Argument, ...] = (
        *(a, panels, bias or a, residual or a, out, M, N, K, block_rows, block_cols),
        *(*_strides(a), b_batch, b_column, b_row, *_strides(out)),
        *(int(bias is not None), bias.strides[-1] if bias else 0),
        *(int(residual is not None), *(_strides(residual) if residual else (0, 0, 0))),
    )
    groups = (ceil_div(M, block_rows), ceil_div(N, block_cols), n_batch)
    launches.append(Launch(op, "gemm", "gemm.cl", arguments, groups, (1, 1, 1), (out,), defines))
    return launches


def _depth(local_memory_bytes: int) -> int:
    """The largest KC with which a block of a fits."""
    depth = min(_KC, local_memory_bytes // (4 * _MAX_BLOCK_ROWS) // _KC_UNIT * _KC_UNIT)
    if depth == 0:
        least = 4 * _MAX_BLOCK_ROWS * _KC_UNIT
        raise Unsupported(f"it needs {least} bytes of local memory, the device has {local_memory_bytes}")
    return depth


def _strides(view: View) -> tuple[int, int, int]:
    """Strides of batch, row and column; of dimensions that aren't there or have one element: 0."""
    strides = [0 if size == 1 else stride for size, stride in zip(view.shape, view.strides, strict=True)]
    batch, row, column = (0, *strides)[-3:]
    return batch, row, column


def _blocks(M: int, N: int, K: int, n_batch: int) -> tuple[int, int]:
    """Rows and columns of out that a work-group computes: from the shapes alone.

    Enough groups for the cores, but each worth its start; rows in equal shares, so that no group has a small rest.
    """
    wanted = max(1, min(_MIN_GROUPS, 2 * M * N * K * n_batch // _GROUP_FLOP))
    for block_cols in _BLOCK_COLS:
        column_blocks = ceil_div(N, block_cols) * n_batch
        row_blocks = max(ceil_div(M, _MAX_BLOCK_ROWS), ceil_div(wanted, column_blocks))
        block_rows = ceil_div(ceil_div(M, row_blocks), _ROW_UNIT) * _ROW_UNIT
        if 2 * ceil_div(M, block_rows) * column_blocks >= wanted:
            return block_rows, block_cols
    return _ROW_UNIT, COLUMN_UNIT
