"""Matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hetero.opencl import kernels
from hetero.opencl.errors import Unsupported
from hetero.opencl.handlers.registry import as_node, defer, handles, require_float32
from hetero.opencl.steps import bound_arguments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import Node

    from hetero.opencl.ir import Launch, View
    from hetero.opencl.lower import Lowering

aten = torch.ops.aten


@handles(aten.mm.default, aten.bmm.default)
def _mm(lowering: Lowering, node: Node) -> None:
    a, b = (as_node(x) for x in node.args)
    _gemm(lowering, node, a, b, None, op=node.target.overloadpacket.__name__)  # type: ignore[union-attr]


@handles(aten.addmm.default)
def _addmm(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    if bound["alpha"] != 1 or bound["beta"] != 1:
        raise Unsupported("addmm with alpha or beta")
    bias, a, b = (as_node(bound[name]) for name in ("self", "mat1", "mat2"))
    is_row = lowering.value(bias).dim() == 1 or lowering.value(bias).shape[0] == 1
    if not is_row or lowering.value(bias).shape[-1] != lowering.value(node).shape[1]:
        raise Unsupported("addmm whose first operand is no bias of the columns")
    _gemm(lowering, node, a, b, bias, op="addmm")


def _gemm(lowering: Lowering, node: Node, a: Node, b: Node, bias: Node | None, *, op: str) -> None:
    require_float32(lowering, node)
    left, right = lowering.read(a), lowering.read(b)
    row = None if bias is None else lowering.read(bias)
    out = lowering.new(lowering.value(node), str(node))

    def build(
        left: View, right: View, row: View | None, *, stored: Sequence[View] = (out,), residual: View | None = None
    ) -> list[Launch]:
        local, scratch = lowering.target.local_memory_bytes, lowering.scratch
        return kernels.gemm(
            left, right, stored[0], bias=row, residual=residual, local_memory_bytes=local, scratch=scratch, op=op
        )

    defer(lowering, node, build, [left, right, row], [out], residual=0)
    lowering.define(node, out)
