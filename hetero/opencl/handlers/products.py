"""Matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hetero.opencl import kernels
from hetero.opencl.handlers.registry import as_node, defer, handles
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
    bias, a, b = (as_node(bound[name]) for name in ("self", "mat1", "mat2"))
    alpha, beta = lowering.value(bound["alpha"]), lowering.value(bound["beta"])
    like, result = lowering.value(bias), lowering.value(node)
    is_row = like.dim() > 0 and like.shape[-1] == result.shape[1] and (like.dim() == 1 or like.shape[0] == 1)
    if is_row and alpha == 1 and beta == 1 and result.dtype in kernels.of(lowering.target).gemm_dtypes:
        _gemm(lowering, node, a, b, bias, op="addmm")
        return
    _gemm(lowering, node, a, b, None, op="addmm")
    product, dtype = lowering.peek(node), result.dtype
    if beta == 0:  # what is in the first operand, NaN for example, does not count
        if alpha != 1:
            lowering.pointwise(node, "{0} * {1}", (product, alpha), (dtype, dtype), dtype)
        return
    operands = (product, alpha, lowering.peek(bias), beta)
    lowering.pointwise(node, "{0} * {1} + {2} * {3}", operands, (dtype,) * len(operands), dtype)


def _gemm(lowering: Lowering, node: Node, a: Node, b: Node, bias: Node | None, *, op: str) -> None:
    left, right = lowering.read(a), lowering.read(b)
    row = None if bias is None else lowering.read(bias)
    out = lowering.new(lowering.value(node), str(node))
    if out.dtype not in kernels.of(lowering.target).gemm_dtypes:
        lowering.emit(kernels.of(lowering.target).product(left, right, out, op=op))
        lowering.define(node, out)
        return

    def build(
        left: View, right: View, row: View | None, *, stored: Sequence[View] = (out,), **options: Any
    ) -> list[Launch]:
        local, scratch = lowering.target.local_memory_bytes, lowering.scratch
        return kernels.of(lowering.target).gemm(
            left, right, stored[0], bias=row, local_memory_bytes=local, scratch=scratch, op=op, **options
        )

    takes_epilogue = kernels.of(lowering.target).gemm_takes_epilogue
    defer(lowering, node, build, [left, right, row], [out], residual=0, takes_epilogue=takes_epilogue)
    lowering.define(node, out)
