"""Matrix products of float64 and of integers: right, not fast. float32 has gemm."""

from __future__ import annotations

import torch

from hetero.opencl.c_source import C_TYPES, require_c_types
from hetero.opencl.errors import Unsupported
from hetero.opencl.ir import Launch, View
from hetero.opencl.kernels_common import require_dtype, split_rows

_WORD_BYTES = 4


def product(a: View, b: View, out: View, *, op: str = "mm") -> list[Launch]:
    """Out = a @ b.

    Args:
        a: (M, K) or (B, M, K), any strides.
        b: (K, N) or (B, K, N), any strides.
        out: (M, N) or (B, M, N), any strides without overlap.
        op: what the launch is counted as.

    Raises:
        Unsupported: several dtypes, bool, or one that has no C type.
    """
    require_c_types(out.dtype)
    require_dtype(out.dtype, a, b)
    if out.dtype == torch.bool:
        raise Unsupported("matrix products of bool")
    (M, K), N = a.shape[-2:], b.shape[-1]
    n_batch = out.shape[0] if len(out.shape) == 3 else 1
    if K == 0:  # an empty buffer is no argument
        a = b = out
    groups, share = split_rows(n_batch * M, N * max(K, 1))
    arguments = (a, b, out, n_batch, M, N, K, share, *_strides(a), *_strides(b), *_strides(out))
    return [Launch(op, "product", "product.cl", arguments, (groups,), (1,), (out,), _types(out.dtype))]


def _types(dtype: torch.dtype) -> dict[str, str]:
    c_type = C_TYPES[dtype]
    if not dtype.is_floating_point and not c_type.startswith("u"):
        c_type = f"u{c_type}"
    return {"T": c_type, "W": "uint" if dtype.itemsize < _WORD_BYTES else c_type}


def _strides(view: View) -> tuple[int, int, int]:
    batch, row, column = (0, *view.strides)[-3:]
    return batch, row, column
