"""Reductions and scans: which reducer each is, over which dimensions, and what it yields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from hetero.opencl import kernels, reducers
from hetero.opencl.c_source import require_c_types
from hetero.opencl.errors import Unsupported
from hetero.opencl.fuse_reduction import Reduction
from hetero.opencl.handlers.registry import as_node, handles
from hetero.opencl.ir import Root, View
from hetero.opencl.pointwise import Pointwise
from hetero.opencl.steps import bound_arguments, operation_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.fx import Node

    from hetero.opencl.lower import Lowering
    from hetero.opencl.reducers import Reducer

aten = torch.ops.aten

# Of the result's type: sums of integers are computed, and are, int64.
_FOLDS: dict[Any, Callable[[torch.dtype], Reducer]] = {
    aten.sum.default: reducers.total,
    aten.sum.dim_IntList: reducers.total,
    aten.mean.default: reducers.mean,
    aten.mean.dim: reducers.mean,
    aten.prod.default: reducers.product,
    aten.prod.dim_int: reducers.product,
    aten.amax.default: reducers.largest,
    aten.amin.default: reducers.smallest,
    aten.max.default: reducers.largest,
    aten.min.default: reducers.smallest,
    aten.any.default: reducers.any_of,
    aten.any.dim: reducers.any_of,
    aten.any.dims: reducers.any_of,
    aten.all.default: reducers.all_of,
    aten.all.dim: reducers.all_of,
    aten.all.dims: reducers.all_of,
}


_HAND_WRITTEN: dict[Any, Literal["sum", "mean", "amax", "amin"]] = {
    reducers.total: "sum",
    reducers.mean: "mean",
    reducers.largest: "amax",
    reducers.smallest: "amin",
}


@handles(*_FOLDS)
def _fold(lowering: Lowering, node: Node) -> None:
    out, reducer = _new(lowering, node), _FOLDS[node.target]
    lowering.define(node, out)
    dim = bound_arguments(node).get("dim")
    if reducer in _HAND_WRITTEN and _by_hand(lowering, node, _HAND_WRITTEN[reducer], dim, out):
        return
    _reduce(lowering, node, reducer(out.dtype), dim, (out,))


def _by_hand(lowering: Lowering, node: Node, kind: Literal["sum", "mean", "amax", "amin"], dim: Any, out: View) -> bool:
    """Whether a hand-written kernel was taken: for what is stored already there is a faster one."""
    x = lowering.peek(as_node(bound_arguments(node)["self"]))
    dims = _dimensions(dim, len(x.shape))
    if not x.numel or lowering.is_expression(x.root) or all(x.shape[d] == 1 for d in dims):
        return False
    try:
        build = kernels.of(lowering.target).reduction
        launches = build(kind, x, out, dims=dims, scratch=lowering.scratch, op=operation_name(node))
    except Unsupported:
        return False
    lowering.store(x.root)
    lowering.emit(launches)
    return True


@handles(aten.argmax.default, aten.argmin.default)
def _arg(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    make = reducers.largest_with_index if node.target is aten.argmax.default else reducers.smallest_with_index
    out = _new(lowering, node)
    lowering.define(node, out)
    _reduce(lowering, node, make(_dtype(lowering, node)), bound["dim"], (None, out))


@handles(aten.max.dim, aten.min.dim)
def _with_index(lowering: Lowering, node: Node) -> None:
    make = reducers.largest_with_index if node.target is aten.max.dim else reducers.smallest_with_index
    values, indices = _new_all(lowering, node)
    lowering.define(node, (values, indices))
    _reduce(lowering, node, make(values.dtype), bound_arguments(node)["dim"], (values, indices))


@handles(aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.std_mean.correction)
def _spread(lowering: Lowering, node: Node) -> None:
    bound, name = bound_arguments(node), operation_name(node)
    correction = 1.0 if bound["correction"] is None else float(bound["correction"])
    reducer = reducers.spread(_dtype(lowering, node), correction=correction, is_root=name.startswith("std"))
    if name.endswith("mean"):
        spread, mean = _new_all(lowering, node)
        lowering.define(node, (spread, mean))
        _reduce(lowering, node, reducer, bound["dim"], (spread, mean))
    else:
        out = _new(lowering, node)
        lowering.define(node, out)
        _reduce(lowering, node, reducer, bound["dim"], (out, None))


_SCANS: dict[Any, Callable[..., Reducer]] = {
    aten.cumsum.default: reducers.total,
    aten.cumprod.default: reducers.product,
}
_INDEXED_SCANS: dict[Any, Callable[..., Reducer]] = {
    aten.cummax.default: reducers.largest_with_index,
    aten.cummin.default: reducers.smallest_with_index,
}


@handles(*_SCANS)
def _scan(lowering: Lowering, node: Node) -> None:
    out = _new(lowering, node)
    lowering.define(node, out)
    reducer = _SCANS[node.target](out.dtype, is_scan=True)
    _reduce(lowering, node, reducer, bound_arguments(node)["dim"], (out,))


@handles(*_INDEXED_SCANS)
def _indexed_scan(lowering: Lowering, node: Node) -> None:
    values, indices = _new_all(lowering, node)
    lowering.define(node, (values, indices))
    reducer = _INDEXED_SCANS[node.target](values.dtype, is_scan=True)
    _reduce(lowering, node, reducer, bound_arguments(node)["dim"], (values, indices))


def _reduce(lowering: Lowering, node: Node, reducer: Reducer, dim: Any, results: Sequence[View | None]) -> None:
    """Emit the reduction of a node's first argument into views shaped as its results."""
    x = lowering.peek(as_node(bound_arguments(node)["self"]))
    wanted = [view for view in results if view is not None]
    require_c_types(x.dtype, *(view.dtype for view in wanted))
    dims = _dimensions(dim, len(x.shape))
    if not x.numel:
        for view in wanted:
            lowering.fill(view, _of_nothing(reducer, node), op=operation_name(node))
        return
    source = _source(node, x, reducer.element)
    places = tuple(None if view is None else _as_source(view, x.shape, dims, reducer) for view in results)
    lowering.reduce(Reduction(operation_name(node), source, frozenset(dims), reducer, places))


def _source(node: Node, x: View, dtype: torch.dtype) -> Pointwise:
    """The reduced tensor, converted, as an elementwise operation with a contiguous result that is never stored."""
    strides: list[int] = []
    step = 1
    for n in reversed(x.shape):
        strides.insert(0, step)
        step *= n
    out = View(Root("scratch", 0, str(node)), 0, x.shape, tuple(strides), dtype)
    return Pointwise(operation_name(node), out, "{0}", (x,), (dtype,), dtype, out, key=node)


def _as_source(view: View, shape: tuple[int, ...], dims: Sequence[int], reducer: Reducer) -> View:
    """A result with a stride for each dimension of what is reduced."""
    if reducer.is_scan or len(view.shape) == len(shape):
        return View(view.root, view.offset, shape, view.strides, view.dtype)
    left = iter(view.strides)
    strides = tuple(0 if d in dims else next(left) for d in range(len(shape)))
    return View(view.root, view.offset, shape, strides, view.dtype)


def _dimensions(dim: Any, rank: int) -> list[int]:
    """Which dimensions a call means; None and an empty list mean all."""
    if dim is None or dim == []:
        return list(range(rank))
    given = [dim] if isinstance(dim, int) else dim
    return sorted({d % rank for d in given}) if rank else []


def _of_nothing(reducer: Reducer, node: Node) -> float | int:
    """What reducing no elements yields, where torch allows it."""
    name = operation_name(node)
    if name in ("mean", "var", "std", "var_mean", "std_mean"):
        return float("nan")
    if name in ("sum", "prod", "any", "all"):
        return int(reducer.start[0])
    raise Unsupported(f"{name} of nothing")


def _dtype(lowering: Lowering, node: Node) -> torch.dtype:
    """The type of what is reduced."""
    return lowering.peek(as_node(bound_arguments(node)["self"])).dtype


def _new(lowering: Lowering, node: Node) -> View:
    return lowering.new(lowering.value(node), str(node))


def _new_all(lowering: Lowering, node: Node) -> tuple[View, View]:
    first, second = (lowering.new(value, str(node)) for value in lowering.value(node))
    return first, second
