"""Elementwise operations as data: what is remembered of each, and a kernel made of several before it is text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hetero.opencl.ir import Root, View

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Index:
    """An operand: `start + step * i` for the i-th element of the result."""

    start: float | int
    step: float | int


Operand = View | Index | int | float | bool


@dataclass(eq=False)
class Pointwise:
    """One elementwise operation.

    Attributes:
        op: ATen's name.
        out: the result, a dense view of its own root from offset 0.
        template: C expression with a field {i} for operand i.
        operands: views (broadcast to the shape of `out`), an index, or numbers.
        types: what each operand is converted to before the operation.
        result_type: what the expression has; it is converted to the type of `out`.
        stored: where the result goes when it is stored; `out` unless it is a slice of something larger.
        readers: what reads the result, as opaque keys.
        key: its own key among the readers of others.
        reads: roots of all expressions and products, not stored when this one was made, that it reads directly or
            through others.
    """

    op: str
    out: View
    template: str
    operands: tuple[Operand, ...]
    types: tuple[torch.dtype, ...]
    result_type: torch.dtype
    stored: View
    readers: frozenset[Any] = frozenset()
    key: Any = None
    reads: frozenset[Root] = frozenset()


@dataclass
class Value:
    """One variable of the kernel: a load, an index or an operation."""

    dtype: torch.dtype
    strides: tuple[int, ...] | None = None  # of a load or an index
    view: View | None = None
    index: Index | None = None
    node: Pointwise | None = None
    arguments: tuple[int | str, ...] = ()  # of an operation: other values, or literals


@dataclass
class Trace:
    """A kernel before code generation.

    Attributes:
        dims: sizes of the loops, outermost first.
        values: variables in the order of their computation.
        stores: (where, strides, position among the values).
        nodes: the operations.
        reduced: of each loop whether it is reduced over; empty: none is.
        results: (where, strides) of what a reduction yields; strides of reduced loops are 0.
    """

    dims: tuple[int, ...]
    values: list[Value] = field(default_factory=list)
    stores: list[tuple[View, tuple[int, ...], int]] = field(default_factory=list)
    nodes: list[Pointwise] = field(default_factory=list)
    reduced: tuple[bool, ...] = ()
    results: list[tuple[View, tuple[int, ...]]] = field(default_factory=list)
