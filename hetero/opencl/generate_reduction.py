"""From a traced reduction to the source and the arguments of its kernel."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from hetero.opencl.c_source import cast
from hetero.opencl.generate import ELEMENTS_PER_GROUP, GROUPS_PER_UNIT, Writer, function, indices, loop, register
from hetero.opencl.ir import Launch
from hetero.opencl.kernels_common import ceil_div

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hetero.opencl.pointwise import Trace
    from hetero.opencl.reducers import Reducer

_LANES = 32  # states side by side of one result: four float vectors of 8, so that additions overlap
_COLUMNS = 64  # results side by side
_MAX_PARTS = 16  # of a reduction with fewer results than that
_GPU_GROUP = 64


@dataclass(frozen=True)
class Division:
    """How the work of a reduction is divided.

    Attributes:
        lanes: states side by side.
        parts: groups that share the elements of a result.
        part_size: turns of the reduced loops, or iterations of the innermost one, in a part.
        is_inner_parted: which of these.
        per_item: rows, or blocks of a row, of a work-item.
        global_size: see `Launch`.
        local_size: see `Launch`.
        count: elements of a result, where they aren't those of the loops.
    """

    lanes: int
    parts: int
    part_size: int
    is_inner_parted: bool
    per_item: int
    global_size: tuple[int, int]
    local_size: tuple[int, int]
    count: int | None = None

    @property
    def is_gpu(self) -> bool:
        """Whether a group has several work-items."""
        return self.local_size[0] > 1


def divide(trace: Trace, reducer: Reducer, *, is_gpu: bool, compute_units: int, count: int | None = None) -> Division:
    """Lanes and parts depend on the shapes alone; how many work-items there are changes no result."""
    last, is_inner = trace.dims[-1], trace.reduced[-1]
    rows = prod(n for n, reduced in zip(trace.dims[:-1], trace.reduced[:-1], strict=True) if not reduced)
    turns = prod(trace.dims[:-1]) // rows
    widest = 1 if is_gpu or (is_inner and reducer.is_scan) else _LANES if is_inner else _COLUMNS
    lanes = min(widest, 1 << (last - 1).bit_length())
    units = rows if is_inner else rows * ceil_div(last, lanes)
    numel = prod(trace.dims)
    parts = min(_MAX_PARTS // units, numel // ELEMENTS_PER_GROUP)
    is_inner_parted = is_inner and turns < parts
    extent = last if is_inner_parted else turns
    parts = 1 if reducer.is_scan else max(1, min(parts, extent))
    part_size = ceil_div(extent, parts)
    parts = ceil_div(extent, part_size)
    most = 1 if compute_units == 1 else compute_units * GROUPS_PER_UNIT
    items = units if is_gpu else max(1, min(most, units, numel // ELEMENTS_PER_GROUP))
    per_item = ceil_div(units, items)
    local = _GPU_GROUP if is_gpu else 1
    global_size = (ceil_div(ceil_div(units, per_item), local) * local, parts)
    return Division(lanes, parts, part_size, is_inner_parted, per_item, global_size, (local, 1), count)


def generate_reduction(
    op: str,
    trace: Trace,
    reducer: Reducer,
    update: str,
    fields: Mapping[str, str],
    results: tuple[Sequence[str], Sequence[torch.dtype]],
    division: Division,
    *,
    part: int = 0,
) -> Launch:
    """The launch of a reduction; see `fuse_reduction.build_reduction`.

    Args:
        op: what it is counted as.
        trace: its loops: kept ones, reduced ones, and perhaps one kept; values; stores on the way; where results go.
        reducer: gives the state.
        update: statements that take something into the state.
        fields: names of the variables that they take.
        results: expressions of the results and their types.
        division: of the work.
        part: distance of the results of neighbouring parts.
    """
    kept = [d for d, is_reduced in enumerate(trace.reduced[:-1]) if not is_reduced]
    reduced = [d for d, is_reduced in enumerate(trace.reduced[:-1]) if is_reduced]
    writer = Writer(trace.dims, (*(int(is_reduced) for is_reduced in trace.reduced[:-1]), 2))
    writer.values(trace)
    for j, (view, strides, i) in enumerate(trace.stores):
        writer.levels[2].append(f"{writer.place(f'y{j}', view, strides, is_output=True)} = v{i};")
    writer.levels[2].append(update.format(**_state(reducer, "s", "l"), **fields))
    count = _count(writer, trace, reducer, division)
    final = []
    for j, ((view, strides), text, dtype) in enumerate(zip(trace.results, *results, strict=True)):
        place = writer.place(f"z{j}", view, strides, is_output=True)
        if part:
            place = place.replace("[", f"[get_global_id(1) * (size_t){writer.number(f'z{j}_part', part)} + ", 1)
        value = cast(f"({text.format(**_state(reducer, 's', 'l'), n=count)})", dtype, view.dtype)
        final.append(f"{place} = {value};")
    for name, number in (("per_item", division.per_item), ("part_size", division.part_size)):
        writer.number(name, number)
    if reducer.is_scan:
        writer.levels[2] += final
        final = []
    body = (_rows if trace.reduced[-1] else _columns)(writer, reducer, division, kept, reduced, final)
    return Launch(
        op=op,
        kernel="reduction",
        source=function("reduction", writer.parameters, body, is_gpu=division.is_gpu),
        arguments=tuple(writer.arguments),
        global_size=division.global_size,
        local_size=division.local_size,
        writes=(*(view for view, _, _ in trace.stores), *(view for view, _ in trace.results)),
        is_generated=True,
    )


def _state(reducer: Reducer, letter: str, lane: str) -> dict[str, str]:
    return {f"{letter}{j}": f"s{j}[{lane}]" for j in range(len(reducer.states))}


def _count(writer: Writer, trace: Trace, reducer: Reducer, division: Division) -> str:
    """The number of elements of a result, as floating-point number."""
    real = "double" if reducer.element == torch.float64 else "float"
    if division.count is not None:
        return f"({real}){writer.number('count', division.count)}"
    sizes = [f"n{d}" for d, is_reduced in enumerate(trace.reduced) if is_reduced]
    return f"(({real})" + " * ".join(sizes or ["1"]) + ")"


def _rows(
    writer: Writer,
    reducer: Reducer,
    division: Division,
    kept: Sequence[int],
    reduced: Sequence[int],
    final: Sequence[str],
) -> list[str]:
    """The innermost loop is reduced: lanes of a row."""
    stop = writer.sizes[-1]
    span, sizes = _span(division.is_inner_parted, writer, reduced, stop)
    step = ["const int c = block + l;", *writer.levels[2]]
    innermost = [
        "int block = start_c;",
        f"for (; block + {division.lanes} <= stop_c; block += {division.lanes})",
        *(f"    {line}" for line in loop("l", "0", str(division.lanes), step)),
        *loop("l", "0", "stop_c - block", step),
    ]
    body = [*indices("row", kept), *writer.levels[0], *_declared(reducer, division.lanes)]
    body += _turns(reduced, [*writer.levels[1], *innermost])
    width = division.lanes
    while width > 1 and final:
        width //= 2
        merge = reducer.merge.format(**_state(reducer, "s", "l"), **_state(reducer, "t", f"l + {width}"))
        body += loop("l", "0", str(width), [merge])
    if final:
        body += ["const int l = 0;", *final]
    return [
        *_range(" * ".join(writer.sizes[d] for d in kept) or "1"),
        *span,
        *sizes,
        *loop("row", "first", "last", body),
    ]


def _columns(
    writer: Writer,
    reducer: Reducer,
    division: Division,
    kept: Sequence[int],
    reduced: Sequence[int],
    final: Sequence[str],
) -> list[str]:
    """The innermost loop is kept: a state for each of its iterations, a block of them at a time."""
    n, lanes = writer.sizes[-1], division.lanes
    span, sizes = _span(False, writer, reduced, n)
    blocks = f"(({n} + {lanes - 1}) / {lanes})"
    column = "const int c = block + l;"
    body = [
        f"const int row = unit / {blocks}, block = unit % {blocks} * {lanes};",
        f"const int width = {n} - block < {lanes} ? {n} - block : {lanes};",
        *indices("row", kept),
        *writer.levels[0],
        *_declared(reducer, lanes),
    ]
    step = [column, *writer.levels[2]]
    body += [f"if (width == {lanes})", *_turns(reduced, [*writer.levels[1], *loop("l", "0", str(lanes), step)])]
    body += ["else", *_turns(reduced, [*writer.levels[1], *loop("l", "0", "width", step)])]
    if final:
        body += loop("l", "0", "width", [column, *final])
    rows = " * ".join([*(writer.sizes[d] for d in kept), blocks])
    return [*_range(rows), *span, *sizes, *loop("unit", "first", "last", body)]


def _range(units: str) -> list[str]:
    return [
        f"const int units = {units};",
        "const int first = get_global_id(0) * per_item;",
        "const int last = first + per_item < units ? first + per_item : units;",
    ]


def _span(is_inner: bool, writer: Writer, reduced: Sequence[int], stop: str) -> tuple[list[str], list[str]]:
    """Which turns, and which iterations of the innermost loop, are this part's."""
    turns = " * ".join(writer.sizes[d] for d in reduced) or "1"
    whole, parted = ("turn", "c") if is_inner else ("c", "turn")
    size = {"turn": turns, "c": stop}
    return (
        [
            f"const int start_{parted} = get_global_id(1) * part_size, left = {size[parted]} - start_{parted};",
            f"const int stop_{parted} = start_{parted} + (left < part_size ? left : part_size);",
        ],
        [f"const int start_{whole} = 0, stop_{whole} = {size[whole]};"],
    )


def _turns(reduced: Sequence[int], body: Sequence[str]) -> list[str]:
    return loop("turn", "start_turn", "stop_turn", [*indices("turn", reduced), *body])


def _declared(reducer: Reducer, lanes: int) -> list[str]:
    """The states and their first values."""
    names = [f"s{j}" for j in range(len(reducer.states))]
    lines = [f"{register(dtype)} {name}[{lanes}];" for name, dtype in zip(names, reducer.states, strict=True)]
    starts = [f"{name}[l] = {start};" for name, start in zip(names, reducer.start, strict=True)]
    return [*lines, *loop("l", "0", str(lanes), starts)]
