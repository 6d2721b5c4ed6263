"""The operations that keep whole: each hands its views to a hand-written kernel, or says why it can't."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.fx import Node

from hetero.opencl import kernels
from hetero.opencl.errors import Unsupported
from hetero.opencl.ir import Launch, View
from hetero.opencl.lower import Lowering
from hetero.opencl.pointwise import Index
from hetero.opencl.steps import Deferred, bound_arguments

aten = torch.ops.aten
Handler = Callable[[Lowering, Node], None]
HANDLERS: dict[Any, Handler] = {}


def handles(*operations: Any) -> Callable[[Handler], Handler]:
    """Register the handler of ATen operations."""

    def register(handler: Handler) -> Handler:
        for operation in operations:
            HANDLERS[operation] = handler
        return handler

    return register


# --- matrix products --------------------------------------------------------------------------------------------------


@handles(aten.mm.default, aten.bmm.default)
def _mm(lowering: Lowering, node: Node) -> None:
    a, b = (_node(x) for x in node.args)
    _gemm(lowering, node, a, b, None, op=node.target.overloadpacket.__name__)  # type: ignore[union-attr]


@handles(aten.addmm.default)
def _addmm(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    if bound["alpha"] != 1 or bound["beta"] != 1:
        raise Unsupported("addmm with alpha or beta")
    bias, a, b = (_node(bound[name]) for name in ("self", "mat1", "mat2"))
    is_row = lowering.value(bias).dim() == 1 or lowering.value(bias).shape[0] == 1
    if not is_row or lowering.value(bias).shape[-1] != lowering.value(node).shape[1]:
        raise Unsupported("addmm whose first operand is no bias of the columns")
    _gemm(lowering, node, a, b, bias, op="addmm")


def _gemm(lowering: Lowering, node: Node, a: Node, b: Node, bias: Node | None, *, op: str) -> None:
    _require_float32(lowering, node)
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

    _defer(lowering, node, build, [left, right, row], [out], residual=0)
    lowering.define(node, out)


# --- layer norm, attention --------------------------------------------------------------------------------------------


@handles(aten.native_layer_norm.default)
def _layer_norm(lowering: Lowering, node: Node) -> None:
    x, shape, weight, bias, eps = node.args
    _require_float32(lowering, node)
    outputs = _outputs(lowering, node)
    width = _product(shape)

    def build(x: View, weight: View | None, bias: View | None) -> list[Launch]:
        return kernels.layer_norm(x, weight, bias, *outputs, width=width, eps=_float(eps))

    lowering.emit(_with_plain_inputs(lowering, build, [_read(lowering, a) for a in (x, weight, bias)]))
    lowering.define(node, outputs)


@handles(aten.native_layer_norm_backward.default)
def _layer_norm_backward(lowering: Lowering, node: Node) -> None:
    grad, x, shape, mean, rstd, weight, _bias, mask = node.args
    values, width = lowering.value(node), _product(shape)
    wanted = [bool(m) and v is not None for m, v in zip(mask, values, strict=True)]  # type: ignore[arg-type]
    outputs = [lowering.new(v, str(node)) if w else None for v, w in zip(values, wanted, strict=True)]
    present = [view for view in outputs if view is not None]

    def build(*read: Any, stored: Sequence[View] = present, residual: View | None = None) -> list[Launch]:
        left = iter(stored)
        wished = [next(left) if w else None for w in wanted]
        return kernels.layer_norm_backward(*read, *wished, width=width, residual=residual, scratch=lowering.scratch)

    read = [_read(lowering, a) for a in (grad, x, mean, rstd, weight)]
    if present:
        _defer(lowering, node, build, read, present, residual=0 if wanted[0] else -1)
    lowering.define(node, tuple(outputs))


@handles(aten._scaled_dot_product_flash_attention_for_cpu.default)
def _attention(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    _require_plain_attention(bound)
    outputs = _outputs(lowering, node)
    settings = _attention_settings(lowering, bound)

    def build(*read: Any) -> list[Launch]:
        return kernels.attention(*read, *outputs, **settings)

    read = [lowering.read(bound[name]) for name in ("query", "key", "value")]
    lowering.emit(_with_plain_inputs(lowering, build, read))
    lowering.define(node, outputs)


@handles(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def _attention_backward(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    _require_plain_attention(bound)
    outputs = list(_outputs(lowering, node))
    settings = _attention_settings(lowering, bound)

    def build(*read: Any, stored: Sequence[View] = outputs, residual: View | None = None) -> list[Launch]:
        return kernels.attention_backward(*read, *stored, **settings)

    read = [lowering.read(bound[name]) for name in ("grad_out", "query", "key", "value", "out", "logsumexp")]
    _defer(lowering, node, build, read, outputs, residual=-1)
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


# --- softmax, losses, embedding ---------------------------------------------------------------------------------------

_ROWS: dict[Any, Callable[..., list[Launch]]] = {
    aten._softmax.default: kernels.softmax,
    aten._log_softmax.default: kernels.log_softmax,
    aten._softmax_backward_data.default: kernels.softmax_backward,
    aten._log_softmax_backward_data.default: kernels.log_softmax_backward,
}


@handles(*_ROWS)
def _softmax(lowering: Lowering, node: Node) -> None:
    _require_float32(lowering, node)
    bound, kernel = bound_arguments(node), _ROWS[node.target]
    out = lowering.new(lowering.value(node), str(node))
    inputs = [lowering.read(bound[name]) for name in ("self", "grad_output", "output") if name in bound]
    lowering.emit(_with_plain_inputs(lowering, lambda *read: kernel(*read, out, dim=bound["dim"]), inputs))
    lowering.define(node, out)


_REDUCTIONS: tuple[Literal["none", "mean", "sum"], ...] = ("none", "mean", "sum")


@handles(aten.nll_loss_forward.default)
def _nll_loss(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    if bound["weight"] is not None:
        raise Unsupported("cross-entropy with class weights")
    _require_float32(lowering, node)
    out, total = _outputs(lowering, node)
    lowering.define(node, (out, total))
    reduction, ignored = _REDUCTIONS[bound["reduction"]], bound["ignore_index"]
    x, target = lowering.read(bound["self"]), lowering.read(bound["target"])
    if x.numel == 0:
        lowering.fill(out, float("nan") if reduction == "mean" else 0.0, op="nll_loss_forward")
        lowering.fill(total, 0.0, op="nll_loss_forward")
        return

    def build(x: View, target: View) -> list[Launch]:
        return kernels.nll_loss(x, target, out, total, ignore_index=ignored, reduction=reduction)

    lowering.emit(_with_plain_inputs(lowering, build, [x, target]))


@handles(aten.nll_loss_backward.default)
def _nll_loss_backward(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    if bound["weight"] is not None:
        raise Unsupported("cross-entropy with class weights")
    dx = lowering.new(lowering.value(node), str(node))
    reduction, ignored = _REDUCTIONS[bound["reduction"]], bound["ignore_index"]

    def build(grad: View, target: View, total: View) -> list[Launch]:
        return kernels.nll_loss_backward(grad, target, total, dx, ignore_index=ignored, reduction=reduction)

    read = [lowering.read(bound[name]) for name in ("grad_output", "target", "total_weight")]
    lowering.emit(_with_plain_inputs(lowering, build, read))
    lowering.define(node, dx)


@handles(aten.embedding.default)
def _embedding(lowering: Lowering, node: Node) -> None:
    weight, indices = (lowering.read(_node(a)) for a in node.args[:2])
    out = lowering.new(lowering.value(node), str(node))
    lowering.emit(_with_plain_inputs(lowering, lambda w, i: kernels.embedding(w, i, out), [weight, indices]))
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
        return kernels.embedding_backward(grad, indices, dweight, padding_idx=bound["padding_idx"])

    lowering.emit(_with_plain_inputs(lowering, build, [grad, indices]))


# --- reductions -------------------------------------------------------------------------------------------------------

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
    _require_float32(lowering, node)
    x = lowering.peek(_node(bound["self"]))
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
        view = lowering.read(_node(bound["self"]))
        if view.dtype != torch.float32:
            raise Unsupported(f"{kind} of {view.dtype}")

        def build(x: View) -> list[Launch]:
            return kernels.reduction(kind, x, out, dims=dims, scratch=lowering.scratch)

        lowering.emit(_with_plain_inputs(lowering, build, [view]))


def _without(x: View, dims: Sequence[int], shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a view whose reduced dimensions all have one element."""
    if len(shape) == len(x.shape):
        return shape, x.strides
    keep = [d for d in range(len(x.shape)) if d not in dims]
    return shape, tuple(x.strides[d] for d in keep)


# --- data movement and constants --------------------------------------------------------------------------------------


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
    lowering.copy(lowering.peek(_node(bound["grad_output"])), place, op="slice_backward", reader=node)
    lowering.define(node, out)


@handles(aten.constant_pad_nd.default)
def _pad(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    pad, source = [lowering.value(n) for n in bound["pad"]], lowering.peek(_node(bound["self"]))
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


# --- helpers ----------------------------------------------------------------------------------------------------------


def _with_plain_inputs(
    lowering: Lowering, build: Callable[..., list[Launch]], views: Sequence[View | None]
) -> list[Launch]:
    """A kernel's launches; where it can't take the layout of its inputs, those of contiguous copies."""
    try:
        return build(*views)
    except Unsupported:
        if all(view is None or view.is_contiguous for view in views):
            raise
        return build(*_contiguous(lowering, views))


def _defer(
    lowering: Lowering,
    node: Node,
    build: Callable[..., list[Launch]],
    views: Sequence[View | None],
    outputs: list[View],
    *,
    residual: int,
) -> None:
    """Remember a kernel; copies of its inputs are made now if it needs them."""
    try:
        build(*views)
    except Unsupported:
        if all(view is None or view.is_contiguous for view in views):
            raise
        views = _contiguous(lowering, views)

    def emit(stored: Sequence[View], residual: View | None) -> list[Launch]:
        return build(*views, stored=stored, residual=residual)

    lowering.defer(Deferred(outputs, emit, residual))


def _contiguous(lowering: Lowering, views: Sequence[View | None]) -> list[View | None]:
    return [view if view is None or view.is_contiguous else lowering.contiguous(view) for view in views]


def _float(argument: Any) -> float:
    return float(argument)


def _node(argument: Any) -> Node:
    assert isinstance(argument, Node)
    return argument


def _read(lowering: Lowering, argument: Any) -> View | None:
    return lowering.read(argument) if isinstance(argument, Node) else None


def _outputs(lowering: Lowering, node: Node) -> tuple[View, ...]:
    return tuple(lowering.new(value, str(node)) for value in lowering.value(node))


def _product(sizes: Any) -> int:
    result = 1
    for n in sizes:
        result *= int(n)
    return result


def _require_float32(lowering: Lowering, node: Node) -> None:
    value = lowering.value(node)
    dtype = (value if isinstance(value, torch.Tensor) else value[0]).dtype
    if dtype != torch.float32:
        raise Unsupported(f"its kernel is for torch.float32 only, not {dtype}")
