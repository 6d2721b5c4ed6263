"""Attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hetero.opencl import kernels, operators
from hetero.opencl.errors import Unsupported
from hetero.opencl.handlers.registry import defer, handles, new_outputs, read_optional, with_plain_inputs
from hetero.opencl.ir import View
from hetero.opencl.steps import bound_arguments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import Node

    from hetero.opencl.ir import Launch
    from hetero.opencl.lower import Lowering

aten = torch.ops.aten


@handles(aten._scaled_dot_product_flash_attention_for_cpu.default)
def _flash_attention(lowering: Lowering, node: Node) -> None:
    _forward(lowering, node, _bound(node), None)


@handles(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def _flash_attention_backward(lowering: Lowering, node: Node) -> None:
    outputs = list(new_outputs(lowering, node))
    _backward(lowering, node, _bound(node), None, outputs)
    lowering.define(node, tuple(outputs))


@handles(operators.attention)
def _attention(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    _forward(lowering, node, bound, _dropout(lowering, bound))


@handles(operators.attention_backward)
def _attention_backward(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    outputs = list(new_outputs(lowering, node))
    wanted = outputs if bound["with_mask"] else outputs[:3]
    _backward(lowering, node, bound, _dropout(lowering, bound), wanted)
    lowering.define(node, tuple(outputs))


def _forward(lowering: Lowering, node: Node, bound: dict[str, Any], dropout: kernels.Dropout | None) -> None:
    outputs = new_outputs(lowering, node)
    settings = _settings(lowering, node, bound, dropout)

    def build(q: View, k: View, v: View, mask: View | None) -> list[Launch]:
        table = kernels.of(lowering.target)
        return table.attention(q, k, v, *outputs, **_with_mask(settings, q, k, mask))

    read = [read_optional(lowering, bound[name]) for name in ("query", "key", "value", "mask")]
    lowering.emit(with_plain_inputs(lowering, build, read))
    lowering.define(node, outputs)


def _backward(
    lowering: Lowering, node: Node, bound: dict[str, Any], dropout: kernels.Dropout | None, outputs: list[View]
) -> None:
    """`outputs` are dq, dk, dv and, if it is wanted, dmask."""
    settings = _settings(lowering, node, bound, dropout)

    def build(*read: Any, stored: Sequence[View] = outputs, residual: View | None = None) -> list[Launch]:
        (grad, q, k, v, out, lse, mask), (dq, dk, dv, *dmask) = read, stored
        options = _with_mask(settings, q, k, mask) | ({"dmask": dmask[0]} if dmask else {})
        table = kernels.of(lowering.target)
        return table.attention_backward(grad, q, k, v, out, lse, dq, dk, dv, **options)

    names = ("grad", "query", "key", "value", "out", "lse", "mask")
    defer(lowering, node, build, [read_optional(lowering, bound[name]) for name in names], outputs, residual=-1)


def _bound(node: Node) -> dict[str, Any]:
    """Arguments of PyTorch's operators, named as those of ours."""
    bound = bound_arguments(node)
    if bound["dropout_p"]:
        raise Unsupported("dropout in PyTorch's operator for attention")
    names = {"attn_mask": "mask", "grad_out": "grad", "logsumexp": "lse"}
    return {names.get(name, name): value for name, value in bound.items()}


def _dropout(lowering: Lowering, bound: dict[str, Any]) -> kernels.Dropout | None:
    if bound["seed"] is None:
        return None
    return kernels.Dropout(p=bound["dropout_p"], seed=lowering.read(bound["seed"]), stream=0)


def _settings(lowering: Lowering, node: Node, bound: dict[str, Any], dropout: kernels.Dropout | None) -> dict[str, Any]:
    width = lowering.value(bound["query"]).shape[-1]
    settings = {
        "scale": float(width**-0.5 if bound["scale"] is None else bound["scale"]),
        "is_causal": bool(bound["is_causal"]),
        "local_memory_bytes": lowering.target.local_memory_bytes,
        "scratch": lowering.scratch,
        "op": str(node.target.overloadpacket.__name__),  # type: ignore[union-attr]
    }
    return settings if dropout is None else settings | {"dropout": dropout}


def _with_mask(settings: dict[str, Any], q: View, k: View, mask: View | None) -> dict[str, Any]:
    """The settings, with the mask broadcast to (B, H, T, S)."""
    if mask is None:
        return settings
    shape = (*q.shape[:3], k.shape[2])
    pad = 4 - len(mask.shape)
    strides = (*[0] * pad, *(0 if n == 1 else s for n, s in zip(mask.shape, mask.strides, strict=True)))
    return settings | {"mask": View(mask.root, mask.offset, shape, strides, mask.dtype)}
