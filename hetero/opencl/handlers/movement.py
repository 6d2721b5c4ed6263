"""Data movement and constants."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from hetero.opencl.c_source import C_TYPES, require_c_types
from hetero.opencl.errors import Unsupported
from hetero.opencl.fuse import is_dense_cover
from hetero.opencl.handlers.registry import as_node, handles, product
from hetero.opencl.ir import View
from hetero.opencl.pointwise import Index
from hetero.opencl.steps import Deferred, bound_arguments, operation_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    require_c_types(out.dtype, *(source.dtype for _, source in parts))
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
    if place.dtype != output.dtype:
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


def _part(view: View, select: Callable[[torch.Tensor], torch.Tensor]) -> View:
    """The part of a view that a view operation selects."""
    whole = torch.empty_strided(view.shape, view.strides, device="meta")
    part = select(whole)
    offset = view.offset + int(part.storage_offset())
    return View(view.root, offset, tuple(part.shape), tuple(part.stride()), view.dtype)


@handles(aten.slice_backward.default, aten.select_backward.default)
def _slice_backward(lowering: Lowering, node: Node) -> None:
    bound, op = bound_arguments(node), operation_name(node)
    out = lowering.new(lowering.value(node), str(node))
    lowering.fill(out, 0.0, op=op)
    place = _part(out, _selection(lowering, node.target, bound))
    lowering.copy(lowering.peek(as_node(bound["grad_output"])), place, op=op, reader=node)
    lowering.define(node, out)


@handles(aten.slice_scatter.default, aten.select_scatter.default, aten.diagonal_scatter.default)
def _part_scatter(lowering: Lowering, node: Node) -> None:
    bound, op = bound_arguments(node), operation_name(node)
    out = lowering.new(lowering.value(node), str(node))
    place = _part(out, _selection(lowering, node.target, bound))
    lowering.copy(lowering.peek(as_node(bound["self"])), out, op=op, reader=node)
    lowering.copy(lowering.peek(as_node(bound["src"])), place, op=op, reader=node)
    lowering.define(node, out)


def _selection(lowering: Lowering, target: Any, bound: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The view operation that gives the part which an operation writes."""
    names, operation = _SELECTIONS[target]
    arguments = [lowering.value(bound[name]) for name in names]
    return lambda whole: operation(whole, *arguments)


_SLICE = ("dim", "start", "end", "step"), aten.slice.Tensor
_SELECT = ("dim", "index"), aten.select.int
_SELECTIONS: dict[Any, tuple[tuple[str, ...], Callable[..., torch.Tensor]]] = {
    aten.slice_backward.default: _SLICE,
    aten.slice_scatter.default: _SLICE,
    aten.select_backward.default: _SELECT,
    aten.select_scatter.default: _SELECT,
    aten.diagonal_scatter.default: (("offset", "dim1", "dim2"), aten.diagonal.default),
}


@handles(aten.as_strided.default)
def _as_strided(lowering: Lowering, node: Node) -> None:
    source = as_node(node.args[0])
    like, value = lowering.value(source), lowering.value(node)
    shift = int(value.storage_offset()) - int(like.storage_offset())
    lowering.define(node, _strided(lowering.read(source), value.shape, value.stride(), shift))


@handles(aten.as_strided_scatter.default)
def _as_strided_scatter(lowering: Lowering, node: Node) -> None:
    bound, op = bound_arguments(node), operation_name(node)
    like = lowering.value(as_node(bound["self"]))
    out = lowering.new(lowering.value(node), str(node))
    if out.strides != tuple(like.stride()):
        raise Unsupported("the result has another layout than the tensor that it is a copy of")
    at = lowering.value(bound["storage_offset"])
    shift = 0 if at is None else int(at) - int(like.storage_offset())
    size, stride = ([int(lowering.value(n)) for n in bound[name]] for name in ("size", "stride"))
    place = _strided(out, size, stride, shift)
    lowering.copy(lowering.peek(as_node(bound["self"])), out, op=op, reader=node)
    lowering.copy(lowering.peek(as_node(bound["src"])), place, op=op, reader=node)
    lowering.define(node, out)


def _strided(view: View, shape: Sequence[int], strides: Sequence[int], shift: int) -> View:
    """Other elements of what a view shows, the first one `shift` elements behind the view's own.

    Raises:
        Unsupported: it would reach out of what the view's root holds.
    """
    offset = view.offset + shift
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if product(shape) and (offset < 0 or (last + 1) * view.dtype.itemsize > view.root.nbytes):
        raise Unsupported("it reaches beyond the tensor that it is given, into the memory around it")
    return View(view.root, offset, tuple(shape), tuple(strides), view.dtype)


@handles(aten.constant_pad_nd.default)
def _pad(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    source = lowering.peek(as_node(bound["self"]))
    pads = [int(lowering.value(n)) for n in bound["pad"]]
    out = lowering.new(lowering.value(node), str(node))
    place = out
    lowering.fill(out, lowering.value(bound["value"]), op="constant_pad_nd")
    for d, before, after in zip(reversed(range(len(out.shape))), pads[::2], pads[1::2], strict=False):
        source = _narrowed(source, d, max(0, -before), max(0, -after))
        place = _narrowed(place, d, max(0, before), max(0, after))
    lowering.copy(source, place, op="constant_pad_nd", reader=node)
    lowering.define(node, out)


def _narrowed(view: View, dim: int, before: int, after: int) -> View:
    """A view without some elements at both ends of a dimension; empty if there aren't as many."""
    size = max(0, view.shape[dim] - before - after)
    shape = (*view.shape[:dim], size, *view.shape[dim + 1 :])
    return View(view.root, view.offset + before * view.strides[dim], shape, view.strides, view.dtype)


@handles(aten.repeat.default)
def _repeat(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    source = lowering.peek(as_node(bound["self"]))
    out = lowering.new(lowering.value(node), str(node))
    missing = len(out.shape) - len(source.shape)
    sizes, steps = (1,) * missing + source.shape, (0,) * missing + source.strides
    shape = tuple(n for pair in zip(map(int, bound["repeats"]), sizes, strict=True) for n in pair)
    read = tuple(s for step in steps for s in (0, step))
    write = tuple(s for n, step in zip(sizes, out.strides, strict=True) for s in (n * step, step))
    lowering.copy(
        View(source.root, source.offset, shape, read, source.dtype),
        View(out.root, out.offset, shape, write, out.dtype),
        op="repeat",
        reader=node,
    )
    lowering.define(node, out)


@handles(aten.flip.default)
def _flip(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    source = lowering.peek(as_node(bound["self"]))
    offset, strides = source.offset, list(source.strides)
    for d in {int(d) % len(source.shape) for d in bound["dims"] if source.shape}:
        offset += (source.shape[d] - 1) * strides[d]
        strides[d] = -strides[d]
    flipped = View(source.root, offset, source.shape, tuple(strides), source.dtype)
    lowering.pointwise(node, "{0}", (flipped,), (source.dtype,), source.dtype)


@handles(aten.copy.default, torch.ops.prims.copy_strided.default)
def _copy(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    source, like = lowering.peek(as_node(bound["src" if "src" in bound else "a"])), lowering.value(node)
    if is_dense_cover(like.shape, like.stride(), like.numel()):
        lowering.pointwise(node, "{0}", (source,), (source.dtype,), source.dtype)
        return
    out = lowering.new(like, str(node))
    pad = len(out.shape) - len(source.shape)
    strides = (0,) * pad + tuple(0 if n == 1 else s for n, s in zip(source.shape, source.strides, strict=True))
    lowering.copy(View(source.root, source.offset, out.shape, strides, source.dtype), out, op="copy", reader=node)
    lowering.define(node, out)


@handles(aten.view.dtype)
def _view_as_type(lowering: Lowering, node: Node) -> None:
    source, dtype = lowering.peek(as_node(node.args[0])), lowering.value(node).dtype
    if source.dtype.itemsize != dtype.itemsize or torch.bool in (source.dtype, dtype):
        raise Unsupported(f"{source.dtype} seen as {dtype}")
    require_c_types(source.dtype, dtype)
    lowering.pointwise(node, f"as_{C_TYPES[dtype]}({{0}})", (source,), (source.dtype,), dtype)


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
    aten.empty_strided.default,
    aten.new_empty_strided.default,
    aten.empty_permuted.default,
)
def _full(lowering: Lowering, node: Node) -> None:
    bound, op, like = bound_arguments(node), operation_name(node), lowering.value(node)
    value = lowering.value(bound.get("fill_value", bound.get("s", 1 if "ones" in op else 0)))
    if is_dense_cover(like.shape, like.stride(), like.numel()):
        lowering.pointwise(node, "{0}", (value,), (like.dtype,), like.dtype)
        return
    out = lowering.new(like, str(node))
    lowering.fill(out, value, op=op)
    lowering.define(node, out)


@handles(aten.arange.start_step, aten.arange.start, aten.arange.default)
def _arange(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    dtype = lowering.value(node).dtype
    index = Index(lowering.value(bound.get("start", 0)), lowering.value(bound.get("step", 1)))
    lowering.pointwise(node, "{0}", (index,), (dtype,), dtype)
