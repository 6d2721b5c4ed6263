"""From a traced expression to the source and the arguments of its kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hetero.opencl.c_source import C_TYPES, cast, functions_of, literal
from hetero.opencl.ir import Argument, Launch, View
from hetero.opencl.pointwise import Trace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.opencl.pointwise import Operand, Value

_ELEMENTS_PER_GROUP = 4096  # below it a second work-group costs more than it gains
_GROUPS_PER_UNIT = 4  # work-groups per compute unit: enough to balance, few enough to stay cheap


class _Writer:
    """Kernel parameters, arguments and the two levels of the body."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        self.dims = dims
        self.parameters: list[str] = []
        self.arguments: list[Argument] = []
        self.outer: list[str] = []
        self.inner: list[str] = []
        self.sizes = [self.number(f"n{d}", n) for d, n in enumerate(dims)]

    def number(self, name: str, value: int) -> str:
        self.parameters.append(f"const int {name}")
        self.arguments.append(value)
        return name

    def tensor(self, name: str, view: View, *, is_output: bool) -> None:
        qualifier = "" if is_output else "const "
        self.parameters.append(f"__global {qualifier}{C_TYPES[view.dtype]} *restrict {name}, const int {name}_offset")
        self.arguments.append(view)

    def position(self, name: str, strides: tuple[int, ...]) -> tuple[str, str]:
        """C expressions of the offset of a row, and of an element in it."""
        terms = [f"(size_t)i{d} * {self._stride(name, d, s)}" for d, s in enumerate(strides[:-1]) if s]
        last = strides[-1]
        column = "0" if last == 0 else "c" if last == 1 else f"c * {self._stride(name, len(strides) - 1, last)}"
        return " + ".join(terms) or "0", column

    def _stride(self, name: str, d: int, value: int) -> str:
        return "1" if value == 1 else self.number(f"{name}_s{d}", value)


def generate(trace: Trace, *, is_gpu: bool, compute_units: int) -> Launch:
    """The launch of a kernel whose dimensions, values and stores are known; see `fuse.build`."""
    if is_gpu:  # every dimension is an outer one: a work-item an element
        trace = Trace((*trace.dims, 1), trace.values, [(v, (*s, 0), i) for v, s, i in trace.stores], trace.nodes)
        for value in trace.values:
            value.strides = None if value.strides is None else (*value.strides, 0)
    writer = _Writer(trace.dims)
    is_inner: list[bool] = []
    for i, value in enumerate(trace.values):
        is_inner.append(_write_value(writer, i, value, is_inner))
    for j, (view, strides, i) in enumerate(trace.stores):
        writer.tensor(f"y{j}", view, is_output=True)
        row, column = writer.position(f"y{j}", strides)
        writer.outer.append(f"__global {C_TYPES[view.dtype]} *y{j}_row = y{j} + y{j}_offset + {row};")
        writer.inner.append(f"y{j}_row[{column}] = v{i};")
    items, per_item, local = _work(trace.dims, is_gpu=is_gpu, compute_units=compute_units)
    writer.number("per_item", per_item)
    return Launch(
        op="+".join(dict.fromkeys(node.op for node in trace.nodes)),
        kernel="pointwise",
        source=_source(writer, is_gpu=is_gpu),
        arguments=tuple(writer.arguments),
        global_size=(-(-items // local) * local,),
        local_size=(local,),
        writes=tuple(view for view, _, _ in trace.stores),
        is_generated=True,
    )


def _write_value(writer: _Writer, i: int, value: Value, is_inner: Sequence[bool]) -> bool:
    """One variable declaration; returns whether it depends on the innermost dimension."""
    if value.node is not None:
        node = value.node
        fields = [
            a if isinstance(a, str) else cast(f"v{a}", _dtype_of(node.operands[k], node.types[k]), node.types[k])
            for k, a in enumerate(value.arguments)
        ]
        text = cast(f"({node.template.format(*fields)})", node.result_type, value.dtype)
        inner = any(isinstance(a, int) and is_inner[a] for a in value.arguments)
    else:
        assert value.strides is not None
        inner = value.strides[-1] != 0
        if value.view is not None:
            writer.tensor(f"x{i}", value.view, is_output=False)
            row, column = writer.position(f"x{i}", value.strides)
            c_type = C_TYPES[value.view.dtype]
            writer.outer.append(f"__global const {c_type} *x{i}_row = x{i} + x{i}_offset + {row};")
            text = f"x{i}_row[{column}]"
        else:
            assert value.index is not None
            row, column = writer.position(f"x{i}", value.strides)
            start, step = literal(value.index.start, value.dtype), literal(value.index.step, value.dtype)
            text = f"{start} + {step} * (({C_TYPES[value.dtype]})({row}) + ({C_TYPES[value.dtype]})({column}))"
    (writer.inner if inner else writer.outer).append(f"const {_register(value.dtype)} v{i} = {text};")
    return inner


def _dtype_of(operand: Operand, default: torch.dtype) -> torch.dtype:
    return operand.dtype if isinstance(operand, View) else default


def _register(dtype: torch.dtype) -> str:
    return "int" if dtype == torch.bool else C_TYPES[dtype]


def _work(dims: tuple[int, ...], *, is_gpu: bool, compute_units: int) -> tuple[int, int, int]:
    """Number of work-items, rows (or elements of the only row) of each, and work-items in a group."""
    rows, numel = 1, 1
    for n in dims:
        numel *= n
    rows = dims[0] if len(dims) == 1 else numel // dims[-1]
    if is_gpu:
        return rows, 1, 64
    most = 1 if compute_units == 1 else compute_units * _GROUPS_PER_UNIT
    groups = max(1, min(most, rows, numel // _ELEMENTS_PER_GROUP))
    per_item = -(-rows // groups)
    return -(-rows // per_item), per_item, 1


def _source(writer: _Writer, *, is_gpu: bool) -> str:
    last = len(writer.dims) - 1
    rows = " * ".join(writer.sizes[:-1]) or writer.sizes[0]
    is_flat = last == 0
    body = [
        *writer.outer,
        "for (int c = first; c < last; c++) {" if is_flat else f"for (int c = 0; c < n{last}; c++) {{",
        *(f"    {line}" for line in writer.inner),
        "}",
    ]
    if not is_flat:
        index = []
        for d in range(last - 1, 0, -1):
            index += [f"const int i{d} = rest % n{d};", f"rest /= n{d};"]
        index = ["int rest = row;", *index, "const int i0 = rest;"]
        body = ["for (int row = first; row < last; row++) {", *(f"    {line}" for line in index + body), "}"]
    text = "\n".join(f"    {line}" for line in body)
    attribute = "" if is_gpu else "__attribute__((reqd_work_group_size(1, 1, 1))) "
    parameters = ",\n    ".join(writer.parameters)
    return (
        f"{functions_of(text)}__kernel {attribute}void pointwise(\n    {parameters})\n{{\n"
        f"    const int rows = {rows};\n"
        "    const int first = get_global_id(0) * per_item;\n"
        "    const int last = first + per_item < rows ? first + per_item : rows;\n"
        f"{text}\n}}\n"
    )
