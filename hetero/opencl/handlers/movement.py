"""Data movement and constants."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from hetero.opencl.errors import Unsupported
from hetero.opencl.handlers.registry import as_node, handles
from hetero.opencl.ir import View
from hetero.opencl.pointwise import Index
from hetero.opencl.steps import Deferred, bound_arguments

if TYPE_CHECKING:
    from torch.fx import Node

    from hetero.opencl.lower import Lowering

aten = torch.ops.aten


@handles(aten.cat.default)
def _cat(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    out = lowering.new(lowering.value(node), str(node))
    dim, at = bound["dim"] % len(out.shape), 0
    parts = [(part, lowering.peek(part)) for part in bound["tensors"]]
    parts = [(part, source) for part, source in parts if source.numel]
    if any(source.dtype != out.dtype for _, source in parts):
        raise Unsupported("cat of several types")
    uses = Counter(source.root for _, source in parts)
    copies: list[tuple[View, View]] = []
    for part, source in parts:
        place = View(out.root, out.offset + at * out.strides[dim], source.shape, out.strides, out.dtype)
        at += source.shape[dim]
        deferred = lowering.deferred(source.root)
        # A kernel that writes into the output writes nowhere else: not if another part is read from there.
        is_alone = uses[source.root] == 1 and lowering.readers_of(part) == {node}
        if deferred is None or not is_alone or not _redirect(deferred, source, place):
            copies.append((source, place))
    for part, source in parts:
        if lowering.deferred(source.root) is not None:
            lowering.read(part)
    for source, place in copies:
        lowering.copy(source, place, op="cat", reader=node)
    lowering.define(node, out)


def _redirect(deferred: Deferred, seen: View, place: View) -> bool:
    """Let a kernel write an output, that a view shows whole, where that view is to be copied to."""
    i = next(i for i, view in enumerate(deferred.outputs) if view.root is seen.root)
    output = deferred.outputs[i]
    if deferred.stored[i] is not output or output.numel != seen.numel or seen.offset != output.offset:
        return False
    layout = sorted(
        ((s, n, t) for s, n, t in zip(seen.strides, seen.shape, place.strides, strict=True) if n != 1), reverse=True
    )
    strides = []
    for n, stride in zip(output.shape, output.strides, strict=True):
        if n == 1:
            strides.append(0)
            continue
        step, size, target = next((entry for entry in layout if entry[0] <= stride), (0, 0, 0))
        if not step or stride % step or stride * n > step * size:
            return False
        strides.append(stride // step * target)
    deferred.stored[i] = View(place.root, place.offset, output.shape, tuple(strides), output.dtype)
    return True


@handles(aten.slice_backward.default, aten.select_backward.default)
def _slice_backward(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    out = lowering.new(lowering.value(node), str(node))
    lowering.fill(out, 0.0, op=str(node.target.overloadpacket.__name__))  # type: ignore[union-attr]
    whole = torch.empty_strided(out.shape, out.strides, device="meta")
    if node.target is aten.select_backward.default:
        part = aten.select.int(whole, bound["dim"], lowering.value(bound["index"]))
    else:
        limits = (lowering.value(bound[name]) for name in ("start", "end", "step"))
        part = aten.slice.Tensor(whole, bound["dim"], *limits)
    place = View(out.root, int(part.storage_offset()), tuple(part.shape), tuple(part.stride()), out.dtype)
    lowering.copy(lowering.peek(as_node(bound["grad_output"])), place, op="slice_backward", reader=node)
    lowering.define(node, out)


@handles(aten.constant_pad_nd.default)
def _pad(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    pad, source = [lowering.value(n) for n in bound["pad"]], lowering.peek(as_node(bound["self"]))
    if any(p < 0 for p in pad):
        raise Unsupported("negative padding")
    out = lowering.new(lowering.value(node), str(node))
    lowering.fill(out, bound["value"], op="constant_pad_nd")
    before = pad[::2] + [0] * (len(out.shape) - len(pad) // 2)
    offset = sum(n * s for n, s in zip(before, reversed(out.strides), strict=True))
    place = View(out.root, offset, source.shape, out.strides, out.dtype)
    lowering.copy(source, place, op="constant_pad_nd", reader=node)
    lowering.define(node, out)


@handles(
    aten.full.default,
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.zeros.default,
    aten.ones.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.scalar_tensor.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
)
def _full(lowering: Lowering, node: Node) -> None:
    bound, name = bound_arguments(node), node.target.overloadpacket.__name__  # type: ignore[union-attr]
    value = bound.get("fill_value", bound.get("s", 1 if "ones" in name else 0))
    dtype = lowering.value(node).dtype
    lowering.pointwise(node, "{0}", (lowering.value(value),), (dtype,), dtype)


@handles(aten.arange.start_step, aten.arange.start, aten.arange.default)
def _arange(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    dtype = lowering.value(node).dtype
    index = Index(lowering.value(bound.get("start", 0)), lowering.value(bound.get("step", 1)))
    lowering.pointwise(node, "{0}", (index,), (dtype,), dtype)
