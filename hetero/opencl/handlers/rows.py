"""What works on rows: layer norm, softmax, losses, embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from hetero.opencl import kernels
from hetero.opencl.errors import Unsupported
from hetero.opencl.handlers.registry import (
    as_float,
    as_node,
    defer,
    handles,
    new_outputs,
    product,
    read_optional,
    require_float32,
    with_plain_inputs,
)
from hetero.opencl.steps import bound_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.fx import Node

    from hetero.opencl.ir import Launch, View
    from hetero.opencl.lower import Lowering

aten = torch.ops.aten


@handles(aten.native_layer_norm.default)
def _layer_norm(lowering: Lowering, node: Node) -> None:
    x, shape, weight, bias, eps = node.args
    require_float32(lowering, node)
    outputs = new_outputs(lowering, node)
    width = product(shape)

    def build(x: View, weight: View | None, bias: View | None) -> list[Launch]:
        return kernels.of(lowering.target).layer_norm(x, weight, bias, *outputs, width=width, eps=as_float(eps))

    lowering.emit(with_plain_inputs(lowering, build, [read_optional(lowering, a) for a in (x, weight, bias)]))
    lowering.define(node, outputs)


@handles(aten.native_layer_norm_backward.default)
def _layer_norm_backward(lowering: Lowering, node: Node) -> None:
    grad, x, shape, mean, rstd, weight, _bias, mask = node.args
    values, width = lowering.value(node), product(shape)
    wanted = [bool(m) and v is not None for m, v in zip(mask, values, strict=True)]  # type: ignore[arg-type]
    outputs = [lowering.new(v, str(node)) if w else None for v, w in zip(values, wanted, strict=True)]
    present = [view for view in outputs if view is not None]

    def build(*read: Any, stored: Sequence[View] = present, residual: View | None = None) -> list[Launch]:
        left = iter(stored)
        wished = [next(left) if w else None for w in wanted]
        return kernels.of(lowering.target).layer_norm_backward(
            *read, *wished, width=width, residual=residual, scratch=lowering.scratch
        )

    read = [read_optional(lowering, a) for a in (grad, x, mean, rstd, weight)]
    if present:
        defer(lowering, node, build, read, present, residual=0 if wanted[0] else -1)
    lowering.define(node, tuple(outputs))


_ROWS: dict[Any, str] = {
    aten._softmax.default: "softmax",
    aten._log_softmax.default: "log_softmax",
    aten._softmax_backward_data.default: "softmax_backward",
    aten._log_softmax_backward_data.default: "log_softmax_backward",
}


@handles(*_ROWS)
def _softmax(lowering: Lowering, node: Node) -> None:
    require_float32(lowering, node)
    bound = bound_arguments(node)
    kernel: Callable[..., list[Launch]] = getattr(kernels.of(lowering.target), _ROWS[node.target])
    out = lowering.new(lowering.value(node), str(node))
    inputs = [lowering.read(bound[name]) for name in ("self", "grad_output", "output") if name in bound]
    lowering.emit(with_plain_inputs(lowering, lambda *read: kernel(*read, out, dim=bound["dim"]), inputs))
    lowering.define(node, out)


_REDUCTIONS: tuple[Literal["none", "mean", "sum"], ...] = ("none", "mean", "sum")


@handles(aten.nll_loss_forward.default)
def _nll_loss(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    if bound["weight"] is not None:
        raise Unsupported("cross-entropy with class weights")
    require_float32(lowering, node)
    out, total = new_outputs(lowering, node)
    lowering.define(node, (out, total))
    reduction, ignored = _REDUCTIONS[bound["reduction"]], bound["ignore_index"]
    x, target = lowering.read(bound["self"]), lowering.read(bound["target"])
    if x.numel == 0:
        lowering.fill(out, float("nan") if reduction == "mean" else 0.0, op="nll_loss_forward")
        lowering.fill(total, 0.0, op="nll_loss_forward")
        return

    def build(x: View, target: View) -> list[Launch]:
        return kernels.of(lowering.target).nll_loss(x, target, out, total, ignore_index=ignored, reduction=reduction)

    lowering.emit(with_plain_inputs(lowering, build, [x, target]))


@handles(aten.nll_loss_backward.default)
def _nll_loss_backward(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    if bound["weight"] is not None:
        raise Unsupported("cross-entropy with class weights")
    dx = lowering.new(lowering.value(node), str(node))
    reduction, ignored = _REDUCTIONS[bound["reduction"]], bound["ignore_index"]

    def build(grad: View, target: View, total: View) -> list[Launch]:
        return kernels.of(lowering.target).nll_loss_backward(
            grad, target, total, dx, ignore_index=ignored, reduction=reduction
        )

    read = [lowering.read(bound[name]) for name in ("grad_output", "target", "total_weight")]
    lowering.emit(with_plain_inputs(lowering, build, read))
    lowering.define(node, dx)


@handles(aten.embedding.default)
def _embedding(lowering: Lowering, node: Node) -> None:
    weight, indices = (lowering.read(as_node(a)) for a in node.args[:2])
    out = lowering.new(lowering.value(node), str(node))
    lowering.emit(
        with_plain_inputs(lowering, lambda w, i: kernels.of(lowering.target).embedding(w, i, out), [weight, indices])
    )
    lowering.define(node, out)


@handles(aten.embedding_dense_backward.default)
def _embedding_backward(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    if bound["scale_grad_by_freq"]:
        raise Unsupported("embedding with scale_grad_by_freq")
    grad, indices = lowering.read(bound["grad_output"]), lowering.read(bound["indices"])
    dweight = lowering.new(lowering.value(node), str(node))
    lowering.define(node, dweight)
    if indices.numel == 0:
        lowering.fill(dweight, 0.0, op="embedding_dense_backward")
        return

    def build(grad: View, indices: View) -> list[Launch]:
        return kernels.of(lowering.target).embedding_backward(grad, indices, dweight, padding_idx=bound["padding_idx"])

    lowering.emit(with_plain_inputs(lowering, build, [grad, indices]))
