"""Matrix products: which block sizes, and whether the panels of b are packed by a launch of their own.

Panels pay from a handful of rows of a on. Where a work-group goes through some hundred rows of a, it makes its panels
itself: no second launch, no memory. With more rows many groups would make the same panels, so they are packed first.
"""

from __future__ import annotations

import torch

from hetero.opencl.errors import Unsupported
from hetero.opencl.ir import Argument, Epilogue, Launch, View
from hetero.opencl.kernels_common import Scratch, ceil_div, require_dtype

_COLUMN_UNIT = 32  # COLUMN_UNIT of gemm.cl
_ROW_UNIT = 12  # rows of a register tile of 16 lanes, of two tiles of 8 lanes
_KC, _KC_UNIT = 384, 16  # KC of gemm.cl: a panel of 24 KiB in the first-level cache
_KC_COLUMNS = 192  # the same where a is copied: _ROWS of it take half of a second-level cache of 512 KiB
_DEPTH_UNIT = 8  # the chunks of a sum are equal but for rounding up to this
_ROWS, _LEAST_ROWS = 384, 96  # of a that a group goes through, so that its panels cost it little
_PACKED_ROWS = 96  # the same where panels are there already: with _KC a third of the second-level cache
_PACKED_COLS = (512, 128, _COLUMN_UNIT)
_UNPACKED_ROWS = 2 * _ROWS  # up to here packing twice is faster than a second launch
_UNPACKED_FLOP = 4 << 20  # about 40 us: below it a second launch costs more than it saves
_MIN_GROUPS = 16
_GROUP_FLOP = 1 << 20  # about 10 us, what a launch costs


def gemm(
    a: View,
    b: View,
    out: View,
    *,
    bias: View | None = None,
    residual: View | None = None,
    epilogue: Epilogue | None = None,
    local_memory_bytes: int,
    compute_units: int = 1,
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
        epilogue: what is done on each block of `out` when it is finished; then `out` is contiguous.
        local_memory_bytes: what a work-group may have on the device [B].
        compute_units: of the device. A product is only split where that costs something if they need it; its bits don't
            depend on it.
        scratch: gives memory for packed panels of b.
        op: what the launches are counted as.

    Raises:
        Unsupported: another dtype than float32, or hardly any local memory.
    """
    require_dtype(torch.float32, a, b, out, bias, residual)
    (M, K), N = a.shape[-2:], b.shape[-1]
    n_batch = out.shape[0] if len(out.shape) == 3 else 1
    if K == 0:  # an empty buffer is no argument, and out's is never read as a or b
        a = b = out
    has_rows = a.strides[-1] == 1 or K <= 1
    flop = 2 * M * N * K * n_batch
    is_packed = has_rows and M > _UNPACKED_ROWS and flop >= _UNPACKED_FLOP
    kc, most_rows = _local_sizes(local_memory_bytes, has_rows=has_rows)
    defines = {"HAS_ROWS": int(has_rows), "IS_PACKED": int(is_packed), "KC": kc, "BLOCK_ROWS": most_rows}
    launches, panels, b_batch = [], b, _strides(b)[0]
    if is_packed:
        n_packed, units = 1 if b_batch == 0 else n_batch, ceil_div(N, _COLUMN_UNIT)
        panels = scratch(n_packed * units * _COLUMN_UNIT * K * 4, "packed panels")
        packing = (b, panels, K, N, *_strides(b))
        grid = (units, n_packed)
        launches.append(Launch(op, "gemm_pack_b", "gemm.cl", packing, grid, (1, 1), (panels,), defines))
        b_batch = 0 if b_batch == 0 else units * _COLUMN_UNIT * K
    wanted = ceil_div(max(1, min(_MIN_GROUPS, flop // _GROUP_FLOP)), n_batch)
    if is_packed:
        block_rows, block_cols = _packed_blocks(M, N, wanted)
    elif has_rows:
        block_rows, block_cols = _split_columns(M, N, most_rows, wanted)
    else:
        block_rows, block_cols = _split_longer(M, N, most_rows, min(wanted, ceil_div(compute_units, n_batch)))
    arguments: tuple[Argument, ...] = (
        *(a, panels, bias or a, residual or a, out, M, N, K, _chunk(K, kc), block_rows, block_cols),
        *(*_strides(a), b_batch, *_strides(b)[1:], *_strides(out)),
        *(int(bias is not None), bias.strides[-1] if bias else 0),
        *(int(residual is not None), *(_strides(residual) if residual else (0, 0, 0))),
    )
    groups = (ceil_div(M, block_rows), ceil_div(N, block_cols), n_batch)
    if epilogue is None:
        launches.append(Launch(op, "gemm", "gemm.cl", arguments, groups, (1, 1, 1), (out,), defines))
        return launches
    arguments, writes = (*arguments, *epilogue.arguments), (out, *epilogue.writes)
    op, text = f"{op}+{epilogue.op}", epilogue.source
    launches.append(Launch(op, "gemm", "gemm.cl", arguments, groups, (1, 1, 1), writes, defines, epilogue=text))
    return launches


def _local_sizes(local_memory_bytes: int, *, has_rows: bool) -> tuple[int, int]:
    """KC and the most rows of a in a block, so that a panel of b and, unless a `has_rows`, a block of a fit."""
    columns = _COLUMN_UNIT if has_rows else _COLUMN_UNIT + _LEAST_ROWS
    depth = local_memory_bytes // (4 * columns) // _KC_UNIT * _KC_UNIT
    if depth == 0:
        least = 4 * columns * _KC_UNIT
        raise Unsupported(f"it needs {least} bytes of local memory, the device has {local_memory_bytes}")
    if has_rows:
        return min(_KC, depth), _ROWS
    kc = min(_KC_COLUMNS, depth)
    rows = local_memory_bytes // (4 * kc) - _COLUMN_UNIT
    return kc, min(_ROWS, rows // _ROW_UNIT * _ROW_UNIT)


def _chunk(K: int, kc: int) -> int:
    """How many of K products are summed at a time: in equal chunks."""
    n_chunks = max(1, ceil_div(K, kc))
    return min(kc, _rounded(ceil_div(K, n_chunks), _DEPTH_UNIT))


def _strides(view: View) -> tuple[int, int, int]:
    """Strides of batch, row and column; of dimensions that aren't there or have one element: 0."""
    strides = [0 if size == 1 else stride for size, stride in zip(view.shape, view.strides, strict=True)]
    batch, row, column = (0, *strides)[-3:]
    return batch, row, column


def _rounded(n: int, unit: int) -> int:
    """The next multiple; at least one unit."""
    return max(1, ceil_div(n, unit)) * unit


# --- rows and columns of out that a work-group computes -------------------------------------------------------------
# Rows come in equal shares, so that no group has a small rest. `wanted`: groups that would be welcome.


def _packed_blocks(M: int, N: int, wanted: int) -> tuple[int, int]:
    """Nothing is done twice, however out is split."""
    for block_cols in _PACKED_COLS:
        column_blocks = ceil_div(N, block_cols)
        row_blocks = max(ceil_div(M, _PACKED_ROWS), ceil_div(wanted, column_blocks))
        block_rows = _rounded(ceil_div(M, row_blocks), _ROW_UNIT)
        if 2 * ceil_div(M, block_rows) * column_blocks >= wanted:
            return block_rows, block_cols
    return _ROW_UNIT, _COLUMN_UNIT


def _split_columns(M: int, N: int, most_rows: int, wanted: int) -> tuple[int, int]:
    """Groups of the same columns pack the same panels; groups of the same rows share nothing."""
    row_blocks = ceil_div(M, most_rows)
    column_blocks = ceil_div(wanted, row_blocks)
    return _rounded(ceil_div(M, row_blocks), _ROW_UNIT), _rounded(ceil_div(N, column_blocks), _COLUMN_UNIT)


def _split_longer(M: int, N: int, most_rows: int, wanted: int) -> tuple[int, int]:
    """Groups of the same columns pack the same panels, those of the same rows the same block of a."""
    row_blocks, column_blocks = ceil_div(M, most_rows), 1
    if M >= N:
        row_blocks = max(row_blocks, wanted)
    else:
        column_blocks = ceil_div(wanted, row_blocks)
    return _rounded(ceil_div(M, row_blocks), _ROW_UNIT), _rounded(ceil_div(N, column_blocks), _COLUMN_UNIT)
