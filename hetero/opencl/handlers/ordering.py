"""Sorting and what follows from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hetero.opencl import kernels
from hetero.opencl.handlers.registry import as_node, handles, new_outputs, with_plain_inputs
from hetero.opencl.ir import View
from hetero.opencl.steps import bound_arguments, operation_name

if TYPE_CHECKING:
    from torch.fx import Node

    from hetero.opencl.ir import Launch
    from hetero.opencl.lower import Lowering

aten = torch.ops.aten


@handles(aten.sort.default, aten.sort.stable, aten.topk.default)
def _sort(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    outputs = new_outputs(lowering, node)
    lowering.define(node, outputs)
    is_descending = bound["largest" if node.target is aten.topk.default else "descending"]
    _order(lowering, node, outputs, dim=bound["dim"], is_descending=bool(is_descending))


@handles(aten.kthvalue.default)
def _kthvalue(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    x, k = lowering.value(as_node(bound["self"])), int(lowering.value(bound["k"]))
    outputs = new_outputs(lowering, node)
    lowering.define(node, outputs)
    dim = bound["dim"] % max(x.dim(), 1)
    shape = [k if d == dim else n for d, n in enumerate(x.shape or (1,))]
    firsts = tuple(lowering.new(torch.empty(shape, dtype=v.dtype, device="meta"), str(node)) for v in outputs)
    _order(lowering, node, firsts, dim=dim, is_descending=False)
    for first, out in zip(firsts, outputs, strict=True):
        at = first.strides[dim] * (k - 1)
        rest = [d for d in range(len(shape)) if d != dim or len(out.shape) == len(shape)]
        steps = tuple(0 if d == dim else first.strides[d] for d in rest) if out.shape else ()
        lowering.copy(View(first.root, at, out.shape, steps, first.dtype), out, op="kthvalue", reader=node)


def _order(lowering: Lowering, node: Node, outputs: tuple[View, ...], *, dim: int, is_descending: bool) -> None:
    """Launch the sort of the first operand; as many elements as the outputs have."""
    x = lowering.read(as_node(node.args[0]))
    x, values, indices = (_with_dimension(view) for view in (x, *outputs))
    keep = values.shape[dim % len(x.shape)]

    def build(x: View) -> list[Launch]:
        settings: dict[str, Any] = {"dim": dim, "is_descending": is_descending, "keep": keep}
        return kernels.of(lowering.target).sort(
            x, values, indices, scratch=lowering.scratch, op=operation_name(node), **settings
        )

    lowering.emit(with_plain_inputs(lowering, build, [x]))


def _with_dimension(view: View) -> View:
    return view if view.shape else View(view.root, view.offset, (1,), (0,), view.dtype)
