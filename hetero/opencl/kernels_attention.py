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


@dataclass(frozen=True)
class Dropout:
    """Dropout of the weights: with probability p they are 0, else divided by 1 - p.

    Attributes:
        p: inside (0, 1).
        seed: (2,) int64: key, and number of the stream that `stream` is added to.
        stream: what tells this operation's random numbers from those of others with the same seed; 32 bits.
    """

    p: float
    seed: View
    stream: int


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
    mask: View | None = None,
    dropout: Dropout | None = None,
    scratch: Scratch | None = None,
    op: str = "_scaled_dot_product_flash_attention_for_cpu",
) -> list[Launch]:
    """Scaled dot-product attention. All views may have any strides.

    Args:
        q: (B, H, T, E) float32.
        k: (B, H / g, S, E): g neighbouring heads of q share one of k and v.
        v: (B, H / g, S, F).
        out: (B, H, T, F).
        lse: (B, H, T): logarithm of the sum of the exponentials of each row of scores; 0 if all are -inf.
        scale: factor of the scores.
        is_causal: query i sees keys j <= i.
        local_memory_bytes: what a work-group may have on the device [B].
        mask: (B, H, T, S) float32, added to the scores.
        dropout: of the weights.
        scratch: not needed; there so that all kernels are called alike.
        op: what the launch is counted as.

    Raises:
        Unsupported: another dtype than float32, or heads too wide for the local memory.
    """
    require_dtype(torch.float32, q, k, v, out, lse, mask)
    (n_batch, n_head, T, E), (_, n_shared_head, S, _), F = q.shape, k.shape, v.shape[3]
    width = _padded(E) + _padded(F)
    blocks, memory = _fitting(
        lambda b: b.BK * width + b.GROUP_QUERIES * (width + 2) + b.BQ * b.BK, max(E, F), local_memory_bytes
    )
    extra, defines = optional(mask, dropout)
    arguments: tuple[Argument, ...] = (
        *(q, k, v, out, lse, memory, n_head, n_head // n_shared_head, T, S, E, F, float(scale), int(is_causal)),
        *(*q.strides, *k.strides, *v.strides, *out.strides, *lse.strides, *extra),
    )
    grid = (ceil_div(T, blocks.GROUP_QUERIES), n_batch * n_head)
    constants = asdict(blocks) | defines
    return [Launch(op, "attention", "attention.cl", arguments, grid, (1, 1), (out, lse), constants)]


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
    mask: View | None = None,
    dropout: Dropout | None = None,
    dmask: View | None = None,
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
        dk: (B, H / g, S, E).
        dv: (B, H / g, S, F).
        scale: as forward.
        is_causal: as forward.
        local_memory_bytes: as forward.
        mask: as forward.
        dropout: as forward.
        dmask: (B, H, T, S), gradient of the mask if it is wanted; not with `is_causal`.
        scratch: not needed, as forward.
        op: what the launch is counted as.

    Raises:
        Unsupported: another dtype than float32, or heads too wide for the local memory.
    """
    require_dtype(torch.float32, grad, q, k, v, out, lse, dq, dk, dv, mask, dmask)
    if dmask is not None and is_causal:
        raise Unsupported("the gradient of a mask beside is_causal")
    (n_batch, n_head, T, E), (_, n_shared_head, S, _), F = q.shape, k.shape, v.shape[3]
    e, f = _padded(E), _padded(F)
    blocks, memory = _fitting(
        lambda b: b.BK * (3 * e + 2 * f) + b.BQ * (2 * e + f) + 2 * b.BQ * b.BK, max(E, F), local_memory_bytes
    )
    extra, defines = optional(mask, dropout)
    if dmask is not None:
        extra, defines = (*extra, dmask, *dmask.strides), defines | {"HAS_MASK_GRADIENT": 1}
    arguments: tuple[Argument, ...] = (
        *(grad, q, k, v, out, lse, dq, dk, dv, memory, n_head, n_head // n_shared_head, T, S, E, F),
        *(float(scale), int(is_causal), *grad.strides, *q.strides, *k.strides, *v.strides, *out.strides, *lse.strides),
        *(*dq.strides, *dk.strides, *dv.strides, *extra),
    )
    written = (dq, dk, dv) if dmask is None else (dq, dk, dv, dmask)
    grid, constants = (n_batch * n_shared_head,), asdict(blocks) | defines
    return [Launch(op, "attention_backward", "attention.cl", arguments, grid, (1,), written, constants)]


def optional(mask: View | None, dropout: Dropout | None) -> tuple[tuple[Argument, ...], dict[str, int]]:
    """Arguments and build constants of mask and dropout."""
    arguments: tuple[Argument, ...] = ()
    defines = {}
    if mask is not None:
        arguments, defines["HAS_MASK"] = (mask, *mask.strides), 1
    if dropout is not None:
        threshold = drop_threshold(dropout.p)
        bits = threshold - (threshold >> 31 << 32)  # as a signed int
        arguments = (*arguments, dropout.seed, dropout.stream, bits, 1 / (1 - dropout.p))
        defines["HAS_DROPOUT"] = 1
    return arguments, defines


def drop_threshold(p: float) -> int:
    """Random words of 32 bits below it are dropped: p to 32 bits, p inside (0, 1) at least one word and not all."""
    return min(max(round(p * 2**32), 1), 2**32 - 1)


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
