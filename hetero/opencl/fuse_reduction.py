"""Generated reductions: elementwise operations and the reduction over them become one launch, or two.

The kernel's loops are the kept dimensions of the reduced tensor, then the reduced ones, each ordered as the tensor lies
in memory. The innermost loop follows memory, whichever sort it is: over reduced elements, taken into a few states side
by side (lanes) which are merged in the end; or over kept ones, each with a state of its own. Where there is too little
to keep but much to reduce, groups reduce parts, and a second launch merges their states.

How elements are divided into lanes and parts depends on the shapes alone, so results are the same bits on any number of
cores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, prod
from typing import TYPE_CHECKING, Any

from hetero.opencl.fuse import Split, Tracer, merged
from hetero.opencl.generate_reduction import divide, generate_reduction
from hetero.opencl.ir import Launch, Root, View
from hetero.opencl.pointwise import Index, Pointwise, Trace, Value
from hetero.opencl.reducers import INDEX_TYPE, Reducer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch


@dataclass(frozen=True)
class Reduction:
    """A reduction of what an elementwise operation yields.

    Attributes:
        op: what the launches are counted as.
        source: the operation; its result is never stored.
        dims: dimensions of its result that are reduced; of a scan the one that it goes along.
        reducer: what is done with the elements.
        results: for each result of the reducer where it goes, or None. Shaped as the source's result; strides of
            reduced dimensions count only for a scan.
    """

    op: str
    source: Pointwise
    dims: frozenset[int]
    reducer: Reducer
    results: tuple[View | None, ...]


@dataclass(frozen=True)
class _Loop:
    """One loop: its size and its step in the source's result, in the elements' index, and in each result."""

    size: int
    position: int
    is_reduced: bool
    index: int
    results: tuple[int, ...]

    def split(self, inner: int) -> tuple[_Loop, _Loop]:
        """Two loops that do the same, the inner one of a given size."""
        outer = replace(
            self,
            size=self.size // inner,
            position=self.position * inner,
            index=self.index * inner,
            results=tuple(stride * inner for stride in self.results),
        )
        return outer, replace(self, size=inner)


def build_reduction(
    reduction: Reduction, pending: Mapping[Root, Pointwise], *, is_gpu: bool, compute_units: int
) -> tuple[list[Launch], list[Root]]:
    """The launches of a reduction, with everything pending that it reads.

    Args:
        reduction: the reduction.
        pending: expressions that aren't stored yet, by root.
        is_gpu: one work-item a result instead of a loop a work-group.
        compute_units: of the device.

    Returns:
        The launches, and the roots of expressions that they store because others read them too.

    Raises:
        Misfit: store `.root` first.
        Unsupported: no C type for a dtype.
    """
    loops = _loops(reduction)
    while True:
        tracer = Tracer(tuple(loop.size for loop in loops), pending)
        try:
            element = tracer.operation(reduction.source, tuple(loop.position for loop in loops))
            stored = tracer.store(None)
            break
        except Split as split:
            loops[split.dim : split.dim + 1] = loops[split.dim].split(split.inner)
    trace = tracer.trace
    index = len(trace.values)
    if reduction.reducer.uses_index:
        strides = tuple(loop.index for loop in loops)
        trace.values.append(Value(INDEX_TYPE, strides=strides, index=Index(0, 1)))
    trace.reduced = tuple(loop.is_reduced for loop in loops)
    wanted = [view for view in reduction.results if view is not None]
    trace.results = [(view, tuple(loop.results[j] for loop in loops)) for j, view in enumerate(wanted)]
    whole = merged(trace)
    kinds = tuple(j for j, view in enumerate(reduction.results) if view is not None)
    fields = {"e": f"v{element}", "i": f"v{index}"}
    return _launches(whole, reduction, kinds, fields, is_gpu=is_gpu, compute_units=compute_units), stored


def _loops(reduction: Reduction) -> list[_Loop]:
    """Kept loops, then reduced ones, each as the source lies in memory; the one with the smallest step innermost."""
    out = reduction.source.out
    (operand,) = reduction.source.operands
    memory = operand.strides if isinstance(operand, View) else out.strides
    wanted = [view for view in reduction.results if view is not None]
    is_scan = reduction.reducer.is_scan
    index, step = {}, 1
    for d in reversed(range(len(out.shape))):
        index[d] = step if d in reduction.dims else 0
        step *= out.shape[d] if d in reduction.dims else 1

    def loop(d: int) -> _Loop:
        is_reduced = d in reduction.dims
        results = tuple(0 if is_reduced and not is_scan else view.strides[d] for view in wanted)
        return _Loop(out.shape[d], out.strides[d], is_reduced, index[d], results)

    order = sorted((d for d, n in enumerate(out.shape) if n != 1), key=lambda d: -(memory[d] or inf))
    loops = [loop(d) for d in order]
    last = loops[-1:] if loops and not loops[-1].is_reduced else []
    rest = loops[:-1] if last else loops
    return [x for x in rest if not x.is_reduced] + [x for x in rest if x.is_reduced] + last


def _launches(
    trace: Trace,
    reduction: Reduction,
    kinds: Sequence[int],
    fields: Mapping[str, str],
    *,
    is_gpu: bool,
    compute_units: int,
) -> list[Launch]:
    """One launch, or one that reduces parts and one that merges their states."""
    reducer = reduction.reducer
    texts = [reducer.results[j] for j in kinds], [reducer.types[j] for j in kinds]
    division = divide(trace, reducer, is_gpu=is_gpu, compute_units=compute_units)
    if division.parts == 1:
        return [generate_reduction(reduction.op, trace, reducer, reducer.update, fields, texts, division)]
    kept = [d for d, is_reduced in enumerate(trace.reduced) if not is_reduced]
    n_kept = prod(trace.dims[d] for d in kept)
    names = [f"{{s{j}}}" for j in range(len(reducer.states))], list(reducer.states)
    states = [_partial(division.parts, [trace.dims[d] for d in kept], dtype) for dtype in reducer.states]
    merging = _merging(trace, states)
    trace.results = [(state, _all_loops(state.strides[1:], trace.reduced)) for state in states]
    first = generate_reduction(reduction.op, trace, reducer, reducer.update, fields, names, division, part=n_kept)
    fields = {f"t{j}": f"v{j}" for j in range(len(states))}
    division = divide(merging, reducer, is_gpu=is_gpu, compute_units=compute_units, count=prod(trace.dims) // n_kept)
    return [first, generate_reduction(reduction.op, merging, reducer, reducer.merge, fields, texts, division)]


def _merging(trace: Trace, states: Sequence[View]) -> Trace:
    """The reduction over parts: the loop over them stands before the innermost kept one."""
    kept = [d for d, is_reduced in enumerate(trace.reduced) if not is_reduced]

    def placed(part: Any, of_kept: Sequence[Any]) -> tuple[Any, ...]:
        return (*of_kept[:-1], part, *of_kept[-1:])

    return Trace(
        placed(states[0].shape[0], states[0].shape[1:]),
        [Value(state.dtype, strides=placed(state.strides[0], state.strides[1:]), view=state) for state in states],
        reduced=placed(True, [False] * len(kept)),
        results=[(view, placed(0, [strides[d] for d in kept])) for view, strides in trace.results],
    )


def _partial(parts: int, kept: Sequence[int], dtype: torch.dtype) -> View:
    """States of all parts: (parts, *kept), contiguous."""
    shape = (parts, *kept)
    strides = tuple(prod(shape[d + 1 :]) for d in range(len(shape)))
    return View(Root("scratch", prod(shape) * dtype.itemsize, "partial reduction"), 0, shape, strides, dtype)


def _all_loops(strides: Sequence[int], reduced: Sequence[bool]) -> tuple[int, ...]:
    """Strides of kept loops as strides of all loops."""
    left = iter(strides)
    return tuple(0 if is_reduced else next(left) for is_reduced in reduced)
