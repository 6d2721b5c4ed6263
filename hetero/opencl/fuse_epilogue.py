"""Elementwise operations on a matrix product in the launch that computes it.

The kernel of the product calls generated code on each part of its result that is finished, while it is in the cache.
That code is what a launch of its own would do, over loops whose last one is the columns of the product and whose others
are its rows: so an expression fits if it takes the product element by element in the order in which it lies in memory.
What else it reads may lie anywhere.

The product itself is stored as well where others read it, a backward pass for example. Else it has no memory: it is
written where the expression's result goes, which then takes its place.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from hetero.opencl.fuse import Misfit, Split, Tracer, loops_of, merged, split_loop
from hetero.opencl.generate import generate_epilogue
from hetero.opencl.ir import Launch, Root, View

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hetero.opencl.pointwise import Pointwise, Trace
    from hetero.opencl.steps import Deferred


def build_epilogue(
    primary: Pointwise,
    deferred: Deferred,
    pending: Mapping[Root, Pointwise],
    *,
    is_gpu: bool,
    compute_units: int,
) -> tuple[list[Launch], list[Root]]:
    """The launches of a product with an expression that reads it, and everything else pending that this one reads.

    Args:
        primary: what has to be stored.
        deferred: the kernel of the product.
        pending: expressions that aren't stored yet, by root.
        is_gpu: see `fuse.build`.
        compute_units: see `fuse.build`.

    Returns:
        The launches, and the roots that nothing else has to store: of expressions, and of the product.

    Raises:
        Misfit: store `.root` first, which may be the product.
        Unsupported: no C type for a dtype.
    """
    (product,) = deferred.outputs
    trace, stored = _trace(primary, product, pending)
    inside = {node.key for node in trace.nodes}
    loads = [value for value in trace.values if value.view is not None and value.view.root is product.root]
    place = (_place(primary, product, trace) if deferred.readers <= inside else None) or product
    for load in loads:
        load.view = place
    return deferred.emit([place], None, generate_epilogue(trace, place)), [*stored, product.root]


def _trace(primary: Pointwise, product: View, pending: Mapping[Root, Pointwise]) -> tuple[Trace, list[Root]]:
    """The expression over rows and columns of the product, and what it stores."""
    dims, position = loops_of(primary.out)
    while True:
        dims, position, first = _with_columns(dims, position, product)
        tracer = Tracer(dims, pending)
        try:
            tracer.operation(primary, position)
            stored = tracer.store(primary)
            break
        except Split as split:
            dims, position = split_loop(dims, position, split)
    trace = tracer.trace
    _require_order(trace, product)
    trace.reduced = tuple(d >= first for d in range(len(dims)))  # rows and columns are not merged
    trace = merged(trace)
    if sum(trace.reduced) != 1:
        raise Misfit(product.root)
    return trace, stored


def _with_columns(
    dims: tuple[int, ...], position: tuple[int, ...], product: View
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """The loops, one of them split if needed so that the last ones are the columns, and the first of these."""
    if not dims or prod(dims) != product.numel:
        raise Misfit(product.root)
    left, d = product.shape[-1], len(dims)
    if left == 1:
        return (*dims, 1), (*position, 1), d
    while left > 1:
        d -= 1
        if left % dims[d] == 0:
            left //= dims[d]
        elif dims[d] % left == 0:
            return (*split_loop(dims, position, Split(d, left)), d + 1)
        else:
            raise Misfit(product.root)
    return dims, position, d


def _require_order(trace: Trace, product: View) -> None:
    """Raise Misfit unless the loops go through the product as it lies in memory, wherever it is read."""
    order = tuple(prod(trace.dims[d + 1 :]) for d in range(len(trace.dims)))
    for value in trace.values:
        if value.view is None or value.view.root is not product.root:
            continue
        assert value.strides is not None
        is_whole = value.view.offset == product.offset
        if not is_whole or any(n != 1 and s != t for n, s, t in zip(trace.dims, value.strides, order, strict=True)):
            raise Misfit(product.root)


def _place(primary: Pointwise, product: View, trace: Trace) -> View | None:
    """The result's memory as the product's, if it is as large and laid out alike."""
    order = tuple(prod(trace.dims[d + 1 :]) for d in range(len(trace.dims)))
    strides = next(strides for view, strides, _ in trace.stores if view is primary.stored)
    is_alike = all(n == 1 or s == t for n, s, t in zip(trace.dims, strides, order, strict=True))
    if primary.stored.dtype != product.dtype or not is_alike:
        return None
    return View(primary.stored.root, primary.stored.offset, product.shape, product.strides, product.dtype)
