"""Reductions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from hetero.opencl import kernels
from hetero.opencl.errors import Unsupported
from hetero.opencl.handlers.registry import as_node, handles, require_float32, with_plain_inputs
from hetero.opencl.ir import Launch, View
from hetero.opencl.steps import bound_arguments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import Node

    from hetero.opencl.lower import Lowering

aten = torch.ops.aten


_KINDS: dict[Any, Literal["sum", "mean", "amax", "amin"]] = {
    aten.sum.default: "sum",
    aten.sum.dim_IntList: "sum",
    aten.mean.default: "mean",
    aten.mean.dim: "mean",
    aten.amax.default: "amax",
    aten.amin.default: "amin",
    aten.max.default: "amax",
    aten.min.default: "amin",
}
_EMPTY = {"sum": 0.0, "mean": float("nan")}


@handles(*_KINDS)
def _reduction(lowering: Lowering, node: Node) -> None:
    bound, kind = bound_arguments(node), _KINDS[node.target]
    require_float32(lowering, node)
    x = lowering.peek(as_node(bound["self"]))
    rank = len(x.shape)
    dims = sorted({d % rank for d in bound.get("dim") or range(rank)}) if rank else []
    out = lowering.new(lowering.value(node), str(node))
    lowering.define(node, out)
    if x.numel == 0:
        if kind not in _EMPTY:
            raise Unsupported(f"{kind} of nothing")
        lowering.fill(out, _EMPTY[kind], op=kind)
    elif all(x.shape[d] == 1 for d in dims):
        source = View(x.root, x.offset, *_without(x, dims, out.shape), x.dtype)
        lowering.copy(source, out, op=kind, reader=node)
    else:
        view = lowering.read(as_node(bound["self"]))
        if view.dtype != torch.float32:
            raise Unsupported(f"{kind} of {view.dtype}")

        def build(x: View) -> list[Launch]:
            return kernels.reduction(kind, x, out, dims=dims, scratch=lowering.scratch)

        lowering.emit(with_plain_inputs(lowering, build, [view]))


def _without(x: View, dims: Sequence[int], shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a view whose reduced dimensions all have one element."""
    if len(shape) == len(x.shape):
        return shape, x.strides
    keep = [d for d in range(len(x.shape)) if d not in dims]
    return shape, tuple(x.strides[d] for d in keep)
