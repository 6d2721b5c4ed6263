"""Generated elementwise kernels: a DAG of scalar expressions over strided views becomes one launch.

The source is a plain loop over the innermost dimension. Written without library builtins it is vectorised by every
compiler seen (with PoCL 3.0 a hand-written float8 version was within 7 % of it), for every mix of types. What doesn't
depend on the innermost dimension is computed outside its loop. Sizes and strides are arguments, so that equal
expressions of other shapes share one program.

An expression is evaluated over kernel dimensions. A `Pointwise` knows its result as a dense view of a root of its own,
whether or not that root is ever stored; where element i of the kernel lies in that layout is its position: one stride a
kernel dimension. From it follow the strides of all its operands, and thereby the positions of operands that are
expressions themselves: transposed, broadcast and reshaped reads fuse alike.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from hetero.opencl.c_source import literal
from hetero.opencl.errors import Unsupported
from hetero.opencl.generate import generate
from hetero.opencl.ir import Launch, Root, View
from hetero.opencl.pointwise import Index, Pointwise, Trace, Value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


MAX_OPERATIONS = 64  # of one expression; a longer one is stored on the way


class Split(Exception):  # noqa: N818 - control flow
    """A kernel dimension has to be split before the expression fits: (dimension, size of the inner part)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__(dim, inner)
        self.dim, self.inner = dim, inner


class Misfit(Unsupported):
    """The operand's layout can't be expressed over the kernel's dimensions: it has to be stored first."""

    def __init__(self, root: Root) -> None:
        super().__init__("layouts don't fit")
        self.root = root


def build(
    primary: Pointwise,
    pending: Mapping[Root, Pointwise],
    *,
    is_gpu: bool,
    compute_units: int,
) -> tuple[list[Launch], list[Root]]:
    """The launch that computes an expression, with everything pending that it reads.

    Args:
        primary: what has to be stored.
        pending: expressions that aren't stored yet, by root.
        is_gpu: one work-item an element instead of a loop a work-group.
        compute_units: of the device.

    Returns:
        The launch, and the roots that it stores: of `primary`, and of what is computed on the way and others read too.

    Raises:
        Misfit: store `.root` first.
        Unsupported: no C type for a dtype.
    """
    dims, position = loops_of(primary.out)
    while True:
        tracer = Tracer(dims, pending)
        try:
            tracer.operation(primary, position)
            stored = tracer.store(primary)
            break
        except Split as split:
            dims, position = split_loop(dims, position, split)
    return [generate(merged(tracer.trace), is_gpu=is_gpu, compute_units=compute_units)], stored


def loops_of(out: View) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Loops over a dense view in the order in which it lies in memory: sizes, and steps in it."""
    order = sorted((d for d, n in enumerate(out.shape) if n != 1), key=lambda d: -out.strides[d])
    return tuple(out.shape[d] for d in order), tuple(out.strides[d] for d in order)


def split_loop(
    dims: tuple[int, ...], position: tuple[int, ...], split: Split
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The loops with one of them as two."""
    d, inner = split.dim, split.inner
    return (
        (*dims[:d], dims[d] // inner, inner, *dims[d + 1 :]),
        (*position[:d], position[d] * inner, position[d], *position[d + 1 :]),
    )


class Tracer:
    """Walks the expression once over given kernel dimensions."""

    def __init__(self, dims: tuple[int, ...], pending: Mapping[Root, Pointwise]) -> None:
        self.trace = Trace(dims)
        self._pending = pending
        self._memo: dict[tuple[Any, ...], int] = {}
        self._positions: dict[Pointwise, tuple[int, ...]] = {}

    def store(self, primary: Pointwise | None) -> list[Root]:
        """Store `primary` and what was computed on the way and others read too; returns the roots."""
        inside = frozenset(node.key for node in self.trace.nodes)
        stored = [node for node in self.trace.nodes if node is primary or self._is_read_outside(node, inside)]
        for node in stored:
            at = self._positions[node]
            strides = self._strides(node, at, node.stored)
            self.trace.stores.append((node.stored, strides, self._memo[node, at]))
        return [node.out.root for node in stored]

    def _is_read_outside(self, node: Pointwise, inside: frozenset[Any]) -> bool:
        if not any(isinstance(operand, View) for operand in node.operands):
            return False  # a constant is cheaper to compute again
        position = self._positions[node]
        is_whole = all(position) or not self.trace.dims
        return is_whole and not node.readers <= inside

    def operation(self, node: Pointwise, position: tuple[int, ...]) -> int:
        """Trace an operation at a position; returns which value it is."""
        if (node, position) in self._memo:
            return self._memo[node, position]
        arguments = tuple(self._operand(node, position, i) for i in range(len(node.operands)))
        if node not in self._positions:
            self._positions[node] = position
            self.trace.nodes.append(node)
        return self._add((node, position), Value(node.out.dtype, node=node, arguments=arguments))

    def _operand(self, node: Pointwise, position: tuple[int, ...], i: int) -> int | str:
        operand, dtype = node.operands[i], node.types[i]
        if isinstance(operand, Index):
            return self._add((operand, position, dtype), Value(dtype, strides=position, index=operand))
        if not isinstance(operand, View):
            return literal(operand, dtype)
        strides = self._strides(node, position, operand)
        producer = self._pending.get(operand.root)
        if producer is not None:
            if operand.offset != 0 or not is_dense_cover(self.trace.dims, strides, producer.out.numel):
                raise Misfit(operand.root)
            return self.operation(producer, strides)
        key = (operand.root, operand.offset, strides)
        return self._add(key, Value(operand.dtype, strides=strides, view=operand))

    def _strides(self, node: Pointwise, position: tuple[int, ...], view: View) -> tuple[int, ...]:
        """Strides over the kernel's dimensions of a view that broadcasts to the shape of `node.out`."""
        pad = len(node.out.shape) - len(view.shape)
        own = [0] * pad + [0 if n == 1 else s for n, s in zip(view.shape, view.strides, strict=True)]
        layout = sorted(
            ((s, n, own[d]) for d, (n, s) in enumerate(zip(node.out.shape, node.out.strides, strict=True)) if n != 1),
            reverse=True,
        )
        result = []
        for d, (n, step) in enumerate(zip(self.trace.dims, position, strict=True)):
            if step == 0:
                result.append(0)
                continue
            stride, size, wanted = next(entry for entry in layout if entry[0] <= step)
            end = stride * size
            if step % stride or end % step:
                raise Misfit(node.out.root)
            if step * n > end:
                inner = end // step
                if n % inner or inner == 1:
                    raise Misfit(node.out.root)
                raise Split(d, inner)
            result.append(step // stride * wanted)
        return tuple(result)

    def _add(self, key: tuple[Any, ...], value: Value) -> int:
        if key not in self._memo:
            self._memo[key] = len(self.trace.values)
            self.trace.values.append(value)
        return self._memo[key]


def is_dense_cover(dims: Sequence[int], strides: Sequence[int], numel: int) -> bool:
    """Whether the dimensions with a stride enumerate 0 .. numel - 1, each once."""
    expected = 1
    for stride, n in sorted((s, n) for s, n in zip(strides, dims, strict=True) if s != 0 and n != 1):
        if stride != expected:
            return False
        expected *= n
    return expected == numel


def merged(trace: Trace) -> Trace:
    """The trace with neighbouring loops of one sort joined where every stride allows it; at least one loop."""
    vectors = [v.strides for v in trace.values if v.strides is not None]
    vectors += [strides for _, strides, _ in trace.stores] + [strides for _, strides in trace.results]
    sorts = trace.reduced or (False,) * len(trace.dims)
    groups: list[list[int]] = []
    for d in range(len(trace.dims)):
        before = groups[-1][-1] if groups else d
        if groups and sorts[before] == sorts[d] and all(v[before] == v[d] * trace.dims[d] for v in vectors):
            groups[-1].append(d)
        else:
            groups.append([d])

    def pick(strides: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(strides[group[-1]] for group in groups) or (0,)

    sizes = tuple(prod(trace.dims[d] for d in group) for group in groups) or (1,)
    for value in trace.values:
        if value.strides is not None:
            value.strides = pick(value.strides)
    return Trace(
        sizes,
        trace.values,
        [(view, pick(strides), i) for view, strides, i in trace.stores],
        trace.nodes,
        tuple(sorts[group[0]] for group in groups) or (True,),
        [(view, pick(strides)) for view, strides in trace.results],
    )
