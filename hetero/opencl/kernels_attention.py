"""Attention: local memory and work-groups. Formulas and layouts: the head of attention.cl."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from hetero.opencl.errors import Unsupported
from hetero.opencl.ir import Argument, Launch, LocalMemory, View
from hetero.opencl.kernels_common import Scratch, ceil_div, require_dtype

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class _Blocks:
    """Sizes of blocks, named as in attention.cl: queries and keys of a block, queries of a group."""

    BQ: int
    BK: int
    GROUP_QUERIES: int


_BLOCKS = (_Blocks(32, 64, 128), _Blocks(16, 32, 64), _Blocks(16, 16, 32), _Blocks(8, 16, 16))  # the best one first


def attention(
    q: View,
    k: View,
    v: View,
    out: View,
    lse: View,
    *,
    scale: float,
    is_causal: bool,
    local_memory_bytes: int,
    scratch: Scratch | None = None,
    op: str = "_scaled_dot_product_flash_attention_for_cpu",
) -> list[Launch]:
    """Scaled dot-product attention. All views may have any strides.

    Args:
        q: (B, H, T, E) float32.
        k: (B, H, S, E).
        v: (B, H, S, F).
        out: (B, H, T, F).
        lse: (B, H, T): logarithm of the sum of the exponentials of each row of scores.
        scale: factor of the scores.
        is_causal: query i sees keys j <= i.
        local_memory_bytes: what a work-group may have on the device [B].
        scratch: not needed; there so that all kernels are called alike.
        op: what the launch is counted as.

    Raises:
        Unsupported: another dtype than float32, or heads too wide for the local memory.
    """
    require_dtype(torch.float32, q, k, v, out, lse)
    (n_batch, n_head, T, E), S, F = q.shape, k.shape[2], v.shape[3]
    width = _padded(E) + _padded(F)
    blocks, memory = _fitting(
        lambda b: b.BK * width + b.GROUP_QUERIES * (width + 2) + b.BQ * b.BK, max(E, F), local_memory_bytes
    )
    arguments: tuple[Argument, ...] = (
        *(q, k, v, out, lse, memory, n_head, T, S, E, F, float(scale), int(is_causal)),
        *(*q.strides, *k.strides, *v.strides, *out.strides, *lse.strides),
    )
    grid = (ceil_div(T, blocks.GROUP_QUERIES), n_batch * n_head)
    return [Launch(op, "attention", "attention.cl", arguments, grid, (1, 1), (out, lse), asdict(blocks))]


def attention_backward(
    grad: View,
    q: View,
    k: View,
    v: View,
    out: View,
    lse: View,
    dq: View,
    dk: View,
    dv: View,
    *,
    scale: float,
    is_causal: bool,
    local_memory_bytes: int,
    scratch: Scratch | None = None,
    op: str = "_scaled_dot_product_flash_attention_for_cpu_backward",
) -> list[Launch]:
    """Gradients of `attention`. All views may have any strides; dq, dk, dv may interleave in one root.

    Args:
        grad: (B, H, T, F), gradient of out.
        q: as forward.
        k: as forward.
        v: as forward.
        out: what `attention` gave.
        lse: what `attention` gave.
        dq: (B, H, T, E).
        dk: (B, H, S, E).
        dv: (B, H, S, F).
        scale: as forward.
        is_causal: as forward.
        local_memory_bytes: as forward.
        scratch: not needed, as forward.
        op: what the launch is counted as.

    Raises:
        Unsupported: another dtype than float32, or heads too wide for the local memory.
    """
    require_dtype(torch.float32, grad, q, k, v, out, lse, dq, dk, dv)
    (n_batch, n_head, T, E), S, F = q.shape, k.shape[2], v.shape[3]
    e, f = _padded(E), _padded(F)
    blocks, memory = _fitting(
        lambda b: b.BK * (3 * e + 2 * f) + b.BQ * (2 * e + f) + 2 * b.BQ * b.BK, max(E, F), local_memory_bytes
    )
    arguments: tuple[Argument, ...] = (
        *(grad, q, k, v, out, lse, dq, dk, dv, memory, n_head, T, S, E, F, float(scale), int(is_causal)),
        *(*grad.strides, *q.strides, *k.strides, *v.strides, *out.strides, *lse.strides),
        *(*dq.strides, *dk.strides, *dv.strides),
    )
    grid = (n_batch * n_head,)
    return [Launch(op, "attention_backward", "attention.cl", arguments, grid, (1,), (dq, dk, dv), asdict(blocks))]


def _fitting(floats: Callable[[_Blocks], int], width: int, local_memory_bytes: int) -> tuple[_Blocks, LocalMemory]:
    """The best blocks that fit, and their local memory; `floats` says how much some blocks need."""
    for blocks in _BLOCKS:
        if 4 * floats(blocks) <= local_memory_bytes:
            return blocks, LocalMemory(4 * floats(blocks))
    needed = 4 * floats(_BLOCKS[-1])
    raise Unsupported(
        f"attention of {width} wide heads needs {needed} bytes of local memory, the device has {local_memory_bytes}"
    )


def _padded(width: int) -> int:
    return ceil_div(width, 16) * 16
