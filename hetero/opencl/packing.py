"""Packed weights: panels of matrix products that are made once a step, for all of its micro-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetero.opencl.ir import View

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from hetero.opencl.ir import Launch, Root

_PACKING = "gemm_pack_b"


def split_packing(launches: Sequence[Launch], weights: Container[Root]) -> tuple[list[Launch], list[Launch]]:
    """The launches that pack weights, which depend on nothing else, and all others."""
    packing: list[Launch] = []
    others: list[Launch] = []
    for launch in launches:
        packed = launch.arguments[0] if launch.kernel == _PACKING else None
        is_weight = isinstance(packed, View) and packed.root in weights
        (packing if is_weight else others).append(launch)
    return packing, others
