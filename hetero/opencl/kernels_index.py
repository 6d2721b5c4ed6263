"""Gather and scatter: kernels generated for the dimensions, index tensors and types of a call.

A call is a loop over i = (i0, i1, ...). One side moves by strides alone, the other is also led by index tensors:

    gather:   y[s(i)] = x[t(i) + sum over k of stride_k index_k(i)]
    scatter:  y[t(i) + sum over k of stride_k index_k(i)] = x[s(i)] combined with what is there

All indexing of ATen is of this form: `gather` and `scatter` with one index tensor as large as the loop, `index` and
`index_put` with several that broadcast over it, `index_select` and `embedding` with one of a single dimension.

Several elements of a scatter may go to one place. Which ones can is known: those that differ in `ordered` dimensions
of the loop. One work-item does all of these, in row-major order, so there are no atomics: sums are the same bits at
every run, and without a combination the last one wins.

An index outside its dimension is never followed. What would have been read is NaN; of integers the smallest number of
the type (an invalid index itself, should it be used as one) and of bool false. What would have been written is left
out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

import torch

from hetero.opencl.c_source import C_TYPES, literal, require_c_types
from hetero.opencl.errors import Unsupported
from hetero.opencl.ir import Argument, Launch, View
from hetero.opencl.kernels_common import ceil_div

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

Combine = Literal["assign", "sum", "prod", "amax", "amin"]

_MAX_GROUPS = 64  # of a launch: several a core on anything this project meets
_GROUP_ELEMENTS = 4096  # a work-group's least share
_COLUMN_UNIT = 16  # columns are divided in multiples of the widest vector
_GPU_GROUP = 64
_INDEX_TYPES = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Along:
    """A dimension of a tensor in which an index tensor leads.

    Attributes:
        index: int64 or int32, of the shape of the loop; stride 0 where it doesn't depend on a dimension.
        size: of the tensor's dimension; what is not in [0, size) is out of range.
        stride: of the tensor's dimension.
    """

    index: View
    size: int
    stride: int


def gather(
    x: View, along: Sequence[Along], out: View, *, wraps: bool = False, is_gpu: bool = False, op: str = "gather"
) -> list[Launch]:
    """Elements of x from where index tensors say.

    Args:
        x: of the shape of the loop, with the strides with which it moves apart from the index tensors: 0 in dimensions
            that only they know.
        along: the index tensors.
        out: of the shape of the loop, any strides without overlap; x's dtype.
        wraps: negative indices count from the end.
        is_gpu: a work-item an element.
        op: what the launch is counted as.

    Raises:
        Unsupported: no C type for the dtype, or another index dtype.
    """
    _require_types(out, along)
    order = sorted(range(len(out.shape)), key=lambda d: -abs(out.strides[d]))
    n_inner = 0 if is_gpu else 1
    text = _Text(
        (order[: len(order) - n_inner], [], order[len(order) - n_inner :]), [x, out, *(a.index for a in along)]
    )
    source, target = text.tensor("x", x), text.tensor("y", out, is_output=True)
    text.address(along, x, wraps=wraps)
    text.inner.append(f"{target}[{text.place(out, 'y')}] = valid ? {source}[at] : {_missing(out.dtype)};")
    return [text.launch("gather", out, is_gpu=is_gpu, op=op)]


def scatter(
    x: View | float,
    along: Sequence[Along],
    out: View,
    *,
    ordered: Collection[int],
    combine: Combine = "assign",
    wraps: bool = False,
    is_gpu: bool = False,
    op: str = "scatter",
) -> list[Launch]:
    """Write elements to where index tensors say; what isn't written stays.

    Args:
        x: of the shape of the loop, or one number for all; out's dtype.
        along: the index tensors.
        out: of the shape of the loop, with the strides with which it moves apart from the index tensors.
        ordered: dimensions of the loop in which different elements may go to one place; in every other one, out's
            stride alone keeps them apart.
        combine: what becomes of an element and what is there already.
        wraps: negative indices count from the end.
        is_gpu: a work-item for all elements that may meet.
        op: what the launch is counted as.

    Raises:
        Unsupported: no C type for the dtype, or another index dtype.
    """
    _require_types(out, along)
    free = [d for d in range(len(out.shape)) if d not in ordered and out.shape[d] != 1]
    free.sort(key=lambda d: -abs(out.strides[d]))
    # The inner loop goes over a row of neighbours, if there is one nearer than what the index tensors choose from.
    is_near = bool(free) and abs(out.strides[free[-1]]) <= min(abs(a.stride) for a in along)
    n_inner = 1 if is_near and not is_gpu else 0
    views = [out, *(a.index for a in along), *([x] if isinstance(x, View) else [])]
    text = _Text((free[: len(free) - n_inner], sorted(ordered), free[len(free) - n_inner :]), views)
    target = text.tensor("y", out, is_output=True)
    value = f"{text.tensor('x', x)}[{text.place(x, 'x')}]" if isinstance(x, View) else literal(x, out.dtype)
    text.address(along, out, wraps=wraps)
    text.inner.append(f"if (valid) {target}[at] = {_combined(combine, f'{target}[at]', value, out.dtype)};")
    return [text.launch("scatter", out, is_gpu=is_gpu, op=op)]


class GpuIndexing:
    """The same for a GPU: a work-item an element, of a scatter for all elements that may meet."""

    gather = staticmethod(functools.partial(gather, is_gpu=True))
    scatter = staticmethod(functools.partial(scatter, is_gpu=True))


def _require_types(data: View, along: Sequence[Along]) -> None:
    require_c_types(data.dtype)
    for a in along:
        if a.index.dtype not in _INDEX_TYPES:
            raise Unsupported(f"indices of {a.index.dtype}")


@dataclass(frozen=True)
class _Loop:
    """One loop of the kernel: neighbouring dimensions of a call that every view walks as one.

    Attributes:
        name: of its variable; `n_` in front of it is the number of turns.
        size: number of turns.
        dim: the innermost of its dimensions, whose strides it has.
    """

    name: str
    size: int
    dim: int


class _Text:
    """The kernel as it is written: parameters, arguments, what is computed outside and inside of the inner loop.

    Rows (the outer dimensions) are divided among work-items, then columns (the inner one); `turns`, the ordered
    dimensions, are gone through by each.
    """

    def __init__(self, dims: tuple[list[int], list[int], list[int]], views: Sequence[View]) -> None:
        self.parameters: list[str] = []
        self.arguments: list[Argument] = []
        self.outer: list[str] = []
        self.inner: list[str] = []
        self.rows, self.turns, self.columns = (
            _merged(name, group, views) for name, group in zip(("row", "turn", "column"), dims, strict=True)
        )
        for loop in (*self.rows, *self.turns, *self.columns):
            self.number(f"n_{loop.name}", loop.size)

    def number(self, name: str, value: int) -> str:
        self.parameters.append(f"const int {name}")
        self.arguments.append(value)
        return name

    def tensor(self, name: str, view: View, *, is_output: bool = False) -> str:
        """Declare a tensor; a C expression of the pointer to its first element."""
        qualifier = "" if is_output else "const "
        self.parameters.append(f"__global {qualifier}{C_TYPES[view.dtype]} *restrict {name}, const int {name}_offset")
        self.arguments.append(view)
        return f"({name} + {name}_offset)"

    def place(self, view: View, name: str, loops: Sequence[_Loop] | None = None) -> str:
        """A C expression of where in a view the loops are, in elements; of all loops or some."""
        terms = []
        for loop in (*self.rows, *self.turns, *self.columns) if loops is None else loops:
            stride = view.strides[loop.dim]
            if stride:
                factor = "" if stride == 1 else " * " + self.number(f"{name}_{loop.name}", stride)
                terms.append(f"(size_t){loop.name}{factor}")
        return " + ".join(terms) or "0"

    def address(self, along: Sequence[Along], view: View, *, wraps: bool) -> None:
        """Declare `at`, where in a view loops and index tensors lead, and whether that is `valid`."""
        checks: tuple[list[str], list[str]] = ([], [])
        terms: tuple[list[str], list[str]] = (
            [self.place(view, "at", (*self.rows, *self.turns))],
            [self.place(view, "at", self.columns)],
        )
        for j, a in enumerate(along):
            is_inner = any(a.index.strides[loop.dim] for loop in self.columns)
            index = f"{self.tensor(f'index{j}', a.index)}[{self.place(a.index, f'index{j}')}]"
            size, lines = self.number(f"size{j}", a.size), self.inner if is_inner else self.outer
            lines.append(f"const long i{j} = {index};")
            lines.append(f"const long k{j} = {f'i{j} < 0 ? i{j} + {size} : i{j}' if wraps else f'i{j}'};")
            checks[is_inner].append(f"k{j} >= 0 && k{j} < {size}")
            terms[is_inner].append(f"(size_t)k{j} * {self.number(f'step{j}', a.stride)}")
        self.outer.append(f"const int row_valid = {' && '.join(checks[0]) or '1'};")
        self.outer.append(f"const size_t row_at = {' + '.join(terms[0])};")
        self.inner.append(f"const int valid = {' && '.join(['row_valid', *checks[1]])};")
        self.inner.append(f"const size_t at = row_at + {' + '.join(terms[1])};")

    def launch(self, kernel: str, out: View, *, is_gpu: bool, op: str) -> Launch:
        """The launch of what has been written."""
        rows, columns = (prod(loop.size for loop in loops) for loops in (self.rows, self.columns))
        work = rows * columns * prod(loop.size for loop in self.turns)
        if is_gpu:
            row_share, column_share, local = 1, 1, _GPU_GROUP
        else:
            groups = max(1, min(_MAX_GROUPS, work // _GROUP_ELEMENTS))
            row_share, local = ceil_div(rows, groups), 1
            column_share = ceil_div(ceil_div(columns, max(1, groups // rows)), _COLUMN_UNIT) * _COLUMN_UNIT
        self.number("rows_each", row_share)
        self.number("columns_each", column_share)
        items = ceil_div(rows, row_share)
        return Launch(
            op=op,
            kernel=kernel,
            source=self._source(kernel, is_gpu=is_gpu),
            arguments=tuple(self.arguments),
            global_size=(ceil_div(items, local) * local, ceil_div(columns, column_share)),
            local_size=(local, 1),
            writes=(out,),
            is_generated=True,
        )

    def _source(self, kernel: str, *, is_gpu: bool) -> str:
        column = self.columns[0].name if self.columns else "column"
        lines = [*_decomposed("row", self.rows), "for (int turn = 0; turn < n_turns; turn++) {"]
        lines += [f"    {line}" for line in (*_decomposed("turn", self.turns), *self.outer)]
        lines += [f"    for (int {column} = first_column; {column} < last_column; {column}++) {{"]
        lines += [*(f"        {line}" for line in self.inner), "    }", "}"]
        body = "\n".join(f"        {line}" for line in lines)
        attribute = "" if is_gpu else "__attribute__((reqd_work_group_size(1, 1, 1))) "
        pragma = "#pragma OPENCL EXTENSION cl_khr_fp64 : enable\n" if "double" in "".join(self.parameters) else ""
        parameters = ",\n    ".join(self.parameters)
        return (
            f"{pragma}__kernel {attribute}void {kernel}(\n    {parameters})\n{{\n"
            f"    const int n_rows = {_count(self.rows)}, n_turns = {_count(self.turns)}, "
            f"n_columns = {_count(self.columns)};\n"
            "    const int first_row = get_global_id(0) * rows_each, first_column = get_global_id(1) * columns_each;\n"
            "    const int last_row = n_rows - first_row < rows_each ? n_rows : first_row + rows_each;\n"
            "    const int last_column = n_columns - first_column < columns_each ? n_columns "
            ": first_column + columns_each;\n"
            f"    for (int row = first_row; row < last_row; row++) {{\n{body}\n    }}\n}}\n"
        )


def _merged(name: str, dims: Sequence[int], views: Sequence[View]) -> list[_Loop]:
    """Loops over dimensions, outermost first; neighbours that every view walks as one become one."""
    groups: list[tuple[int, int]] = []  # number of turns, innermost dimension
    for d in dims:
        size = views[0].shape[d]
        if size == 1:
            continue
        if groups and all(v.strides[groups[-1][1]] == v.strides[d] * size for v in views):
            groups[-1] = (groups[-1][0] * size, d)
        else:
            groups.append((size, d))
    return [_Loop(f"{name}{i}", size, d) for i, (size, d) in enumerate(groups)]


def _decomposed(name: str, loops: Sequence[_Loop]) -> list[str]:
    """Statements that declare the loops' variables from the number of a turn of all of them."""
    if not loops:
        return []
    lines = [f"int {name}_rest = {name};"]
    for loop in reversed(loops[1:]):
        lines += [f"const int {loop.name} = {name}_rest % n_{loop.name};", f"{name}_rest /= n_{loop.name};"]
    return [*lines, f"const int {loops[0].name} = {name}_rest;"]


def _count(loops: Sequence[_Loop]) -> str:
    return " * ".join(f"n_{loop.name}" for loop in loops) or "1"


def _missing(dtype: torch.dtype) -> str:
    """What stands for an element out of range."""
    if dtype.is_floating_point:
        return literal(float("nan"), dtype)
    return literal(False if dtype == torch.bool else torch.iinfo(dtype).min, dtype)


def _combined(combine: Combine, there: str, value: str, dtype: torch.dtype) -> str:
    """A C expression of an element and what is added to it, multiplied with it..."""
    if combine == "assign":
        return value
    if combine in ("amax", "amin"):  # NaN if either is
        sign = ">" if combine == "amax" else "<"
        return f"{there} {sign} {value} || {there} != {there} ? {there} : {value}"
    if dtype == torch.bool:
        return f"{there} != 0 {'||' if combine == 'sum' else '&&'} {value} != 0"
    operator = "+" if combine == "sum" else "*"
    if dtype.is_floating_point:
        return f"{there} {operator} {value}"
    c_type = C_TYPES[dtype]  # modulo 2^n, which C leaves undefined for signed numbers
    unsigned = "uint" if dtype.itemsize < 4 else c_type if c_type[0] == "u" else f"u{c_type}"
    return f"({c_type})(({unsigned}){there} {operator} ({unsigned}){value})"
