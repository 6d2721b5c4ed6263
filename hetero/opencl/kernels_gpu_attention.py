"""Attention on GPU-type devices: blocks that fit the local memory. Formulas and layouts: gpu_attention.cl."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from hetero.opencl.errors import Unsupported
from hetero.opencl.kernels_attention import optional
from hetero.opencl.kernels_common import ceil_div, require_dtype
from hetero.opencl.kernels_gpu_common import GpuLaunches, Group

if TYPE_CHECKING:
    from collections.abc import Callable

    from hetero.opencl.ir import Argument, Launch, View
    from hetero.opencl.kernels_attention import Dropout
    from hetero.opencl.kernels_common import Scratch

_SOURCE = "gpu_attention.cl"
_WIDE = 64  # heads wider than this have more work-items side by side, so that each keeps few columns in registers


@dataclass(frozen=True)
class _Blocks:
    """Queries and keys of a block, named as in gpu_attention.cl."""

    BQ: int
    BK: int


_BLOCKS = (_Blocks(32, 32), _Blocks(16, 32), _Blocks(16, 16), _Blocks(8, 16), _Blocks(8, 8))  # the best one first


class GpuAttention(GpuLaunches):
    """Attention, forward and backward."""

    def attention(
        self,
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
        """As `kernels_attention.attention`, of which these are the arguments and errors."""
        require_dtype(torch.float32, q, k, v, out, lse, mask)
        (n_batch, n_head, T, E), (_, n_shared_head, S, _), F = q.shape, k.shape, v.shape[3]

        def floats(b: _Blocks, x: int) -> int:
            return b.BQ * (E + 1) + b.BK * (max(E, F) + 1) + b.BQ * (b.BK + 1 + x)

        group = self._group(E, F)
        blocks = _fitting(floats, group, max(E, F), local_memory_bytes)
        extra, constants = optional(mask, dropout)
        arguments: tuple[Argument, ...] = (
            *(q, k, v, out, lse, n_head, n_head // n_shared_head, T, S, float(scale), int(is_causal)),
            *(*q.strides, *k.strides, *v.strides, *out.strides, *lse.strides, *extra),
        )
        groups = n_batch * n_head * ceil_div(T, blocks.BQ), 1
        defines = {"E": E, "F": F, **asdict(blocks), **constants}
        return [self.launch(op, "attention", _SOURCE, arguments, groups, group, (out, lse), defines)]

    def attention_backward(
        self,
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
        """As `kernels_attention.attention_backward`, of which these are the arguments and errors."""
        require_dtype(torch.float32, grad, q, k, v, out, lse, dq, dk, dv, mask, dmask)
        if dmask is not None and is_causal:
            raise Unsupported("the gradient of a mask beside is_causal")
        (n_batch, n_head, T, E), (_, n_shared_head, S, _), F = q.shape, k.shape, v.shape[3]

        def floats(b: _Blocks, x: int) -> int:
            return (b.BQ + b.BK) * (E + F + 2) + b.BQ * (2 * b.BK + 2 + x)

        group = self._group(E, F)
        blocks = _fitting(floats, group, max(E, F), local_memory_bytes)
        extra, constants = optional(mask, dropout)
        defines = {"BACKWARD": 1, "E": E, "F": F, **asdict(blocks), **constants}
        read = (grad, q, k, v, out, lse)
        settings: tuple[Argument, ...] = (
            *(n_head, n_head // n_shared_head, T, S, float(scale), int(is_causal)),
            *(*grad.strides, *q.strides, *k.strides, *v.strides, *out.strides, *lse.strides),
        )
        by_query: tuple[Argument, ...] = (*read, dq, *settings, *dq.strides, *extra)
        by_key: tuple[Argument, ...] = (*read, dk, dv, *settings, *dk.strides, *dv.strides, *extra)
        written: tuple[View, ...] = (dq,)
        with_mask = defines
        if dmask is not None:
            by_query, written = (*by_query, dmask, *dmask.strides), (dq, dmask)
            with_mask = {**defines, "HAS_MASK_GRADIENT": 1}
        groups = n_batch * n_head * ceil_div(T, blocks.BQ), 1
        key_groups = n_batch * n_shared_head * ceil_div(S, blocks.BK), 1
        return [
            self.launch(op, "attention_queries", _SOURCE, by_query, groups, group, written, with_mask),
            self.launch(op, "attention_keys", _SOURCE, by_key, key_groups, group, (dk, dv), defines),
        ]

    def _group(self, E: int, F: int) -> Group:
        """Work-items side by side and below each other: as many as a head's width has use for."""
        groups = ((16, 8), (8, 8), (4, 4), (2, 2), (1, 1))
        return next(group for group in groups[int(max(E, F) <= _WIDE) :] if group[0] * group[1] <= self.group_items)


def _fitting(floats: Callable[[_Blocks, int], int], group: Group, width: int, local_memory_bytes: int) -> _Blocks:
    """The best blocks that fit; `floats` says what blocks need with so many work-items side by side."""
    legal = [blocks for blocks in _BLOCKS if blocks.BK % group[0] == 0]
    for blocks in legal:
        if 4 * floats(blocks, group[0]) <= local_memory_bytes:
            return blocks
    raise Unsupported(
        f"attention of {width} wide heads needs {4 * floats(legal[-1], group[0])} bytes of local memory, "
        f"the device has {local_memory_bytes}"
    )
