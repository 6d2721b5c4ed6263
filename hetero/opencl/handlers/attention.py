"""Attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hetero.opencl import kernels
from hetero.opencl.errors import Unsupported
from hetero.opencl.handlers.registry import defer, handles, new_outputs, with_plain_inputs
from hetero.opencl.steps import bound_arguments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import Node

    from hetero.opencl.ir import Launch, View
    from hetero.opencl.lower import Lowering

aten = torch.ops.aten


@handles(aten._scaled_dot_product_flash_attention_for_cpu.default)
def _attention(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    _require_plain_attention(bound)
    outputs = new_outputs(lowering, node)
    settings = _attention_settings(lowering, bound)

    def build(*read: Any) -> list[Launch]:
        return kernels.attention(*read, *outputs, **settings)

    read = [lowering.read(bound[name]) for name in ("query", "key", "value")]
    lowering.emit(with_plain_inputs(lowering, build, read))
    lowering.define(node, outputs)


@handles(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def _attention_backward(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    _require_plain_attention(bound)
    outputs = list(new_outputs(lowering, node))
    settings = _attention_settings(lowering, bound)

    def build(*read: Any, stored: Sequence[View] = outputs, residual: View | None = None) -> list[Launch]:
        return kernels.attention_backward(*read, *stored, **settings)

    read = [lowering.read(bound[name]) for name in ("grad_out", "query", "key", "value", "out", "logsumexp")]
    defer(lowering, node, build, read, outputs, residual=-1)
    lowering.define(node, tuple(outputs))


def _require_plain_attention(bound: dict[str, Any]) -> None:
    if bound["dropout_p"] or bound["attn_mask"] is not None:
        raise Unsupported("attention with a mask or dropout inside")


def _attention_settings(lowering: Lowering, bound: dict[str, Any]) -> dict[str, Any]:
    width = lowering.value(bound["query"]).shape[-1]
    return {
        "scale": float(width**-0.5 if bound["scale"] is None else bound["scale"]),
        "is_causal": bool(bound["is_causal"]),
        "local_memory_bytes": lowering.target.local_memory_bytes,
        "scratch": lowering.scratch,
    }
