"""Which function lowers which ATen operation, and what these functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from hetero.opencl.errors import Unsupported
from hetero.opencl.lower import Lowering
from hetero.opencl.steps import Deferred

if TYPE_CHECKING:
    from hetero.opencl.ir import Epilogue, Launch, View

Handler = Callable[[Lowering, Node], None]
HANDLERS: dict[Any, Handler] = {}


def handles(*operations: Any) -> Callable[[Handler], Handler]:
    """Register the handler of ATen operations."""

    def register(handler: Handler) -> Handler:
        for operation in operations:
            HANDLERS[operation] = handler
        return handler

    return register


def with_plain_inputs(
    lowering: Lowering, build: Callable[..., list[Launch]], views: Sequence[View | None]
) -> list[Launch]:
    """A kernel's launches; where it can't take the layout of its inputs, those of contiguous copies."""
    try:
        return build(*views)
    except Unsupported:
        if all(view is None or view.is_contiguous for view in views):
            raise
        return build(*contiguous(lowering, views))


def defer(
    lowering: Lowering,
    node: Node,
    build: Callable[..., list[Launch]],
    views: Sequence[View | None],
    outputs: list[View],
    *,
    residual: int,
    takes_epilogue: bool = False,
) -> None:
    """Remember a kernel; copies of its inputs are made now if it needs them."""
    try:
        build(*views)
    except Unsupported:
        if all(view is None or view.is_contiguous for view in views):
            raise
        views = contiguous(lowering, views)

    def emit(stored: Sequence[View], residual: View | None, epilogue: Epilogue | None) -> list[Launch]:
        options = {} if epilogue is None else {"epilogue": epilogue}
        return build(*views, stored=stored, residual=residual, **options)

    lowering.defer(Deferred(outputs, emit, residual, takes_epilogue, frozenset(lowering.readers(node))))
    if all(reader.op == "output" for reader in lowering.readers(node)):
        lowering.store(outputs[0].root)  # nothing can be gained by waiting, and what it reads can be given up


def contiguous(lowering: Lowering, views: Sequence[View | None]) -> list[View | None]:
    """The views, those with gaps or another order of elements replaced by contiguous copies."""
    return [view if view is None or view.is_contiguous else lowering.contiguous(view) for view in views]


def as_float(argument: Any) -> float:
    """A number of a call, as the type checker wants it."""
    return float(argument)


def as_node(argument: Any) -> Node:
    """A tensor argument of a call, as the type checker wants it."""
    assert isinstance(argument, Node)
    return argument


def read_optional(lowering: Lowering, argument: Any) -> View | None:
    """The stored view of a tensor argument that may be None."""
    return lowering.read(argument) if isinstance(argument, Node) else None


def new_outputs(lowering: Lowering, node: Node) -> tuple[View, ...]:
    """New views for all results of a call."""
    return tuple(lowering.new(value, str(node)) for value in lowering.value(node))


def product(sizes: Any) -> int:
    """Number of elements of some dimensions."""
    result = 1
    for n in sizes:
        result *= int(n)
    return result


def require_float32(lowering: Lowering, node: Node) -> None:
    """Raise Unsupported unless the (first) result is float32."""
    value = lowering.value(node)
    dtype = (value if isinstance(value, torch.Tensor) else value[0]).dtype
    if dtype != torch.float32:
        raise Unsupported(f"its kernel is for torch.float32 only, not {dtype}")
