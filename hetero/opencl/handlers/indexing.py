"""Indexing: reading and writing where index tensors say."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hetero.opencl import kernels
from hetero.opencl.errors import Unsupported
from hetero.opencl.handlers.registry import as_node, handles
from hetero.opencl.ir import View
from hetero.opencl.kernels import Along
from hetero.opencl.steps import bound_arguments, module_path, operation_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import Node

    from hetero.opencl.kernels import Combine
    from hetero.opencl.lower import Lowering

aten = torch.ops.aten

_log = logging.getLogger(__name__)

_DEPENDS_ON_DATA = "how many elements a mask selects depends on data"
_REDUCTIONS: dict[str, Combine] = {
    "sum": "sum",
    "prod": "prod",
    "amax": "amax",
    "amin": "amin",
    "add": "sum",
    "multiply": "prod",
    "mean": "sum",
}


@handles(aten.gather.default)
def _gather(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    x, index = _with_dimension(_read(lowering, bound["self"])), _with_dimension(_read(lowering, bound["index"]))
    out = lowering.new(lowering.value(node), str(node))
    lowering.define(node, out)
    d = bound["dim"] % len(x.shape)
    along = [Along(index, x.shape[d], x.strides[d])]
    _emit_gather(lowering, node, _moving(x, index.shape, {d}), along, _with_dimension(out), wraps=False)


@handles(aten.index_select.default)
def _index_select(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    x, index = _with_dimension(_read(lowering, bound["self"])), _with_dimension(_read(lowering, bound["index"]))
    out = lowering.new(lowering.value(node), str(node))
    lowering.define(node, out)
    d, loop = bound["dim"] % len(x.shape), _with_dimension(out).shape
    strides = tuple(index.strides[0] if e == d else 0 for e in range(len(loop)))
    along = [Along(_view(index, loop, strides), x.shape[d], x.strides[d])]
    _emit_gather(lowering, node, _moving(x, loop, {d}), along, _with_dimension(out), wraps=False)


@handles(aten.index.Tensor)
def _index(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    x, indices = _read(lowering, bound["self"]), _indices(lowering, bound["indices"])
    out = lowering.new(lowering.value(node), str(node))
    lowering.define(node, out)
    layout = _advanced(x, indices)
    assert layout.loop.shape == out.shape
    _emit_gather(lowering, node, layout.loop, layout.along, out, wraps=True)


def _emit_gather(lowering: Lowering, node: Node, x: View, along: Sequence[Along], out: View, *, wraps: bool) -> None:
    build = kernels.of(lowering.target).gather
    lowering.emit(build(x, along, out, wraps=wraps, op=operation_name(node)))


@handles(aten.index_put.default)
def _index_put(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    indices = [None if i is None else as_node(i) for i in bound["indices"]]
    if any(i is not None and lowering.value(i).dtype in (torch.bool, torch.uint8) for i in indices):
        _masked_put(lowering, node, indices, bound)
        return
    out = _copied(lowering, node, bound["self"])
    layout = _advanced(out, _indices(lowering, indices))
    values = _read(lowering, bound["values"])
    combine: Combine = "sum" if bound["accumulate"] else "assign"
    _emit_scatter(
        lowering, node, _broadcast(values, layout.loop.shape), layout.along, layout.loop, layout.ordered, combine, True
    )


def _masked_put(lowering: Lowering, node: Node, indices: Sequence[Node | None], bound: dict[str, Any]) -> None:
    """`self[mask] = values` as a choice, where the values are the same for every element that the mask selects."""
    like, mask = lowering.value(node), indices[-1]
    if mask is None or any(i is not None for i in indices[:-1]):
        raise Unsupported(_DEPENDS_ON_DATA, remedy="use torch.where")
    chosen, values = lowering.peek(mask), lowering.peek(as_node(bound["values"]))
    before, at = len(indices) - 1, len(chosen.shape)
    after = len(like.shape) - before - at
    selected = len(values.shape) - after - 1  # where among the dimensions of the values the selected ones are
    if selected >= 0 and values.shape[selected] != 1:
        raise Unsupported(_DEPENDS_ON_DATA, remedy="use torch.where")
    compact = (*like.shape[:before], 1, *like.shape[before + at :])
    own = _broadcast(values, compact).strides
    values = _view(values, like.shape, own[:before] + (0,) * at + own[before + 1 :])
    chosen = _view(chosen, like.shape, (0,) * before + chosen.strides + (0,) * after)
    operands = (chosen, values, lowering.peek(as_node(bound["self"])))
    template = "{0} ? {2} + {1} : {2}" if bound["accumulate"] else "{0} ? {1} : {2}"
    lowering.pointwise(node, template, operands, (torch.bool, like.dtype, like.dtype), like.dtype)


@handles(aten.scatter.src, aten.scatter.value, aten.scatter.reduce, aten.scatter.value_reduce, aten.scatter_add.default)
def _scatter(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    combine: Combine = "sum" if node.target is aten.scatter_add.default else "assign"
    if "reduce" in bound:
        combine = _REDUCTIONS[bound["reduce"]]
    out = _copied(lowering, node, bound["self"])
    source = lowering.value(bound["value"]) if "value" in bound else _read(lowering, bound["src"])
    _scatter_along(lowering, node, out, bound, source, combine)


@handles(aten.scatter_reduce.two)
def _scatter_reduce(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    kind, like = bound["reduce"], lowering.value(node)
    if kind == "mean":
        raise Unsupported("scatter_reduce with mean")
    out = _copied(lowering, node, bound["self"])
    if not bound["include_self"]:
        _scatter_along(lowering, node, out, bound, _neutral(kind, like.dtype), "assign")
    _scatter_along(lowering, node, out, bound, _read(lowering, bound["src"]), _REDUCTIONS[kind])


def _neutral(kind: str, dtype: torch.dtype) -> float | int:
    """What changes nothing when it is combined."""
    if kind in ("sum", "prod"):
        return 0 if kind == "sum" else 1
    if dtype.is_floating_point:
        return float("-inf") if kind == "amax" else float("inf")
    if dtype == torch.bool:
        return kind == "amin"
    limits = torch.iinfo(dtype)
    return limits.min if kind == "amax" else limits.max


def _scatter_along(
    lowering: Lowering, node: Node, out: View, bound: dict[str, Any], source: View | float, combine: Combine
) -> None:
    """Write elements into `out`, each where an index tensor says in one dimension."""
    index, whole = _with_dimension(_read(lowering, bound["index"])), _with_dimension(out)
    d = bound["dim"] % len(whole.shape)
    if isinstance(source, View):
        source = _view(source, index.shape, _with_dimension(source).strides)
    along = [Along(index, whole.shape[d], whole.strides[d])]
    _emit_scatter(lowering, node, source, along, _moving(whole, index.shape, {d}), {d}, combine, False)


def _emit_scatter(
    lowering: Lowering,
    node: Node,
    source: View | float,
    along: Sequence[Along],
    out: View,
    ordered: set[int],
    combine: Combine,
    wraps: bool,
) -> None:
    if out.numel:
        build = kernels.of(lowering.target).scatter
        lowering.emit(build(source, along, out, ordered=ordered, combine=combine, wraps=wraps, op=operation_name(node)))


def _copied(lowering: Lowering, node: Node, source: Any) -> View:
    """A copy of an operand, as what a node yields."""
    out = lowering.new(lowering.value(node), str(node))
    lowering.copy(lowering.peek(as_node(source)), out, op=operation_name(node), reader=node)
    lowering.define(node, out)
    return out


@handles(aten._assert_async.default, aten._assert_async.msg)
def _assert(lowering: Lowering, node: Node) -> None:
    """A check of data, such as the range of one_hot's classes: said to be left out.

    Launches can't fail half-way. Kernels stay in bounds without it: see kernels_index.py.
    """
    message = node.args[1] if len(node.args) > 1 else "no message"
    _log.warning("%s: a check of data is not made on OpenCL devices: %s", module_path(node) or "graph", message)
    lowering.define(node, None)


# --- how index tensors and a tensor become a loop ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Advanced:
    """Advanced indexing of a tensor: NumPy's rules.

    Attributes:
        loop: the tensor as it moves with the loop, which has the shape of the result.
        along: the index tensors.
        ordered: the dimensions of the loop that the index tensors have.
    """

    loop: View
    along: list[Along]
    ordered: set[int]


def _advanced(x: View, indices: Sequence[View | None]) -> _Advanced:
    """Index tensors broadcast; their dimensions stand where the first was if they are neighbours, else in front."""
    present = [d for d, index in enumerate(indices) if index is not None]
    shapes = [index.shape for index in indices if index is not None]
    shape = tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    at = present[0] if present[-1] - present[0] == len(present) - 1 else 0
    kept = [d for d in range(len(x.shape)) if d not in present]
    before, after = kept[:at], kept[at:]
    loop = tuple(x.shape[d] for d in before) + tuple(shape) + tuple(x.shape[d] for d in after)
    strides = tuple(x.strides[d] for d in before) + (0,) * len(shape) + tuple(x.strides[d] for d in after)
    along = []
    for d in present:
        index = indices[d]
        assert index is not None
        own = _broadcast(index, tuple(shape)).strides
        view = _view(index, loop, (0,) * len(before) + own + (0,) * len(after))
        along.append(Along(view, x.shape[d], x.strides[d]))
    return _Advanced(_view(x, loop, strides), along, set(range(at, at + len(shape))))


def _indices(lowering: Lowering, arguments: Sequence[Any]) -> list[View | None]:
    views = [None if a is None else _read(lowering, a) for a in arguments]
    if any(view is not None and view.dtype in (torch.bool, torch.uint8) for view in views):
        raise Unsupported(_DEPENDS_ON_DATA, remedy="use torch.where")
    return views


def _read(lowering: Lowering, argument: Any) -> View:
    return lowering.read(as_node(argument))


def _view(view: View, shape: Sequence[int], strides: Sequence[int]) -> View:
    """A view from the same first element."""
    return View(view.root, view.offset, tuple(shape), tuple(strides), view.dtype)


def _with_dimension(view: View) -> View:
    """A scalar as a vector of one element."""
    return view if view.shape else _view(view, (1,), (0,))


def _moving(view: View, shape: tuple[int, ...], led: set[int]) -> View:
    """A tensor as it moves with a loop: not in the dimensions where an index tensor leads."""
    return _view(view, shape, tuple(0 if d in led else s for d, s in enumerate(view.strides)))


def _broadcast(view: View, shape: tuple[int, ...]) -> View:
    pad = len(shape) - len(view.shape)
    strides = tuple(0 if n == 1 else s for n, s in zip(view.shape, view.strides, strict=True))
    return _view(view, shape, (0,) * pad + strides)
