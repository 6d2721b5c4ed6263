"""From a traced expression to the source and the arguments of its kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hetero.opencl.c_source import C_TYPES, STORED_TYPES, cast, functions_of, literal
from hetero.opencl.ir import Argument, Epilogue, Launch, View
from hetero.opencl.pointwise import Trace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.opencl.pointwise import Operand, Value

ELEMENTS_PER_GROUP = 4096  # below it a second work-group costs more than it gains
LINE = 16  # floats of a cache line
GROUPS_PER_UNIT = 4  # work-groups per compute unit: enough to balance, few enough to stay cheap


class Writer:
    """Kernel parameters, arguments, and the statements of each level of loops.

    Attributes:
        levels: statements; those of level 0 stand outside of all inner loops, those of the last in the innermost one.
    """

    def __init__(self, dims: tuple[int, ...], levels: tuple[int, ...], *, qualifier: str = "restrict") -> None:
        """Of each loop its size, and the level of what depends on it; the innermost loop alone has the last level."""
        self.names: list[str] = []
        self.parameters: list[str] = []
        self.arguments: list[Argument] = []
        self.levels: list[list[str]] = [[] for _ in range(levels[-1] + 1)]
        self._level_of, self._qualifier = levels, qualifier
        self.sizes = [self.number(f"n{d}", n) for d, n in enumerate(dims)]

    def number(self, name: str, value: int) -> str:
        """A parameter for a number; returns its name."""
        self.names.append(name)
        self.parameters.append(f"const int {name}")
        self.arguments.append(value)
        return name

    def tensor(self, name: str, view: View, *, is_output: bool) -> None:
        """Parameters for a buffer and an offset."""
        c_type = STORED_TYPES[view.dtype] if is_output else f"const {STORED_TYPES[view.dtype]}"
        self.names += [name, f"{name}_offset"]
        self.parameters.append(f"__global {c_type} *{self._qualifier} {name}, const int {name}_offset")
        self.arguments.append(view)

    def place(self, name: str, view: View, strides: tuple[int, ...], *, is_output: bool) -> str:
        """Declare a tensor and a pointer to its row; returns the C expression of its element."""
        self.tensor(name, view, is_output=is_output)
        row, column = self.position(name, strides)
        qualifier = "" if is_output else "const "
        pointer = f"__global {qualifier}{STORED_TYPES[view.dtype]} *{name}_row = {name} + {name}_offset + {row};"
        self.levels[self.level(strides[:-1])].append(pointer)
        return f"{name}_row[{column}]"

    def position(self, name: str, strides: tuple[int, ...]) -> tuple[str, str]:
        """C expressions of the offset of a row, and of an element in it."""
        terms = [f"(size_t)i{d} * {self._stride(name, d, s)}" for d, s in enumerate(strides[:-1]) if s]
        last = strides[-1]
        column = "0" if last == 0 else "c" if last == 1 else f"c * {self._stride(name, len(strides) - 1, last)}"
        return " + ".join(terms) or "0", column

    def level(self, strides: tuple[int, ...]) -> int:
        """The level of what moves with these strides."""
        return max((self._level_of[d] for d, stride in enumerate(strides) if stride), default=0)

    def values(self, trace: Trace) -> None:
        """Declare all values, each at the outermost level that it can be computed at."""
        levels: list[int] = []
        for i, value in enumerate(trace.values):
            levels.append(self._value(i, value, levels))

    def _value(self, i: int, value: Value, levels: Sequence[int]) -> int:
        if value.node is not None:
            node = value.node
            fields = [
                a if isinstance(a, str) else cast(f"v{a}", _dtype_of(node.operands[k], node.types[k]), node.types[k])
                for k, a in enumerate(value.arguments)
            ]
            text = cast(f"({node.template.format(*fields)})", node.result_type, value.dtype)
            level = max((levels[a] for a in value.arguments if isinstance(a, int)), default=0)
        else:
            assert value.strides is not None
            level = self.level(value.strides)
            text = self._load(i, value, value.strides)
        self.levels[level].append(f"const {register(value.dtype)} v{i} = {text};")
        return level

    def _load(self, i: int, value: Value, strides: tuple[int, ...]) -> str:
        if value.view is not None:
            return self.place(f"x{i}", value.view, strides, is_output=False)
        assert value.index is not None
        row, column = self.position(f"x{i}", strides)
        start, step = literal(value.index.start, value.dtype), literal(value.index.step, value.dtype)
        return f"{start} + {step} * (({register(value.dtype)})({row}) + ({register(value.dtype)})({column}))"

    def _stride(self, name: str, d: int, value: int) -> str:
        return "1" if value == 1 else self.number(f"{name}_s{d}", value)


def generate(trace: Trace, *, is_gpu: bool, compute_units: int) -> Launch:
    """The launch of a kernel whose dimensions, values and stores are known; see `fuse.build`."""
    if is_gpu:  # every dimension is an outer one: a work-item an element
        trace = Trace((*trace.dims, 1), trace.values, [(v, (*s, 0), i) for v, s, i in trace.stores], trace.nodes)
        for value in trace.values:
            value.strides = None if value.strides is None else (*value.strides, 0)
    writer = Writer(trace.dims, (*(0 for _ in trace.dims[:-1]), 1))
    writer.values(trace)
    for j, (view, strides, i) in enumerate(trace.stores):
        writer.levels[1].append(f"{writer.place(f'y{j}', view, strides, is_output=True)} = v{i};")
    items, per_item, local = _work(trace.dims, is_gpu=is_gpu, compute_units=compute_units)
    writer.number("per_item", per_item)
    return Launch(
        op=_ops(trace),
        kernel="pointwise",
        source=_source(writer, is_gpu=is_gpu),
        arguments=tuple(writer.arguments),
        global_size=(-(-items // local) * local,),
        local_size=(local,),
        writes=tuple(view for view, _, _ in trace.stores),
        is_generated=True,
    )


def generate_epilogue(trace: Trace, product: View) -> Epilogue:
    """What a kernel does on a block of its result; the last of the dimensions are its columns, the others its rows.

    The result may lie where something is stored: pointers are not `restrict`, instead the loop over columns is said to
    have independent iterations. An element is read before it is written. The function is not inlined: among the
    kernel's own variables constants would be loaded anew in each iteration, which a GELU took half as long again for.

    Args:
        trace: the operations.
        product: the kernel's result; it is in the cache. Of what else is read the next row is fetched ahead, because
            rows of a block lie too far apart for the hardware to see that they follow each other.
    """
    writer = Writer(trace.dims, (*(0 for _ in trace.dims[:-1]), 1), qualifier="")
    writer.values(trace)
    for j, (view, strides, i) in enumerate(trace.stores):
        writer.levels[1].append(f"{writer.place(f'y{j}', view, strides, is_output=True)} = v{i};")
    outer, inner = writer.levels
    for i, value in enumerate(trace.values):
        if value.view is not None and value.view is not product and value.strides is not None:
            outer += _ahead(f"x{i}", value.strides)
    columns = ['_Pragma("clang loop vectorize(assume_safety) interleave_count(2)")', *loop("c", "start", "stop", inner)]
    lines = loop("row", "first", "last", [*indices("row", range(len(trace.dims) - 1)), *outer, *columns])
    head = ["const int first", "const int last", "const int start", "const int stop", *writer.parameters]
    text = [
        f"#define EPILOGUE_PARAMETERS , {', '.join(writer.parameters)}",
        f"#define EPILOGUE_ARGUMENTS , {', '.join(writer.names)}",
        procedure("__attribute__((noinline)) static void epilogue", head, lines),
    ]
    return Epilogue(_ops(trace), "\n".join(text), tuple(writer.arguments), tuple(view for view, _, _ in trace.stores))


def _ahead(name: str, strides: Sequence[int]) -> list[str]:
    """Lines that fetch the next row of a tensor, where one loop goes over rows, another over what is side by side."""
    if len(strides) != 2 or strides[0] <= 1 or strides[1] != 1:
        return []
    return loop("c", "start", "stop", [f"PREFETCH({name}_row + {name}_s0 + c);"], step=LINE)


def _ops(trace: Trace) -> str:
    return "+".join(dict.fromkeys(node.op for node in trace.nodes))


def _dtype_of(operand: Operand, default: torch.dtype) -> torch.dtype:
    return operand.dtype if isinstance(operand, View) else default


def register(dtype: torch.dtype) -> str:
    """The C type of a variable."""
    return {torch.bool: "int", torch.float16: "float"}.get(dtype) or C_TYPES[dtype]


def _work(dims: tuple[int, ...], *, is_gpu: bool, compute_units: int) -> tuple[int, int, int]:
    """Number of work-items, rows (or elements of the only row) of each, and work-items in a group."""
    rows, numel = 1, 1
    for n in dims:
        numel *= n
    rows = dims[0] if len(dims) == 1 else numel // dims[-1]
    if is_gpu:
        return rows, 1, 64
    most = 1 if compute_units == 1 else compute_units * GROUPS_PER_UNIT
    groups = max(1, min(most, rows, numel // ELEMENTS_PER_GROUP))
    per_item = -(-rows // groups)
    return -(-rows // per_item), per_item, 1


def _source(writer: Writer, *, is_gpu: bool) -> str:
    last = len(writer.sizes) - 1
    rows = " * ".join(writer.sizes[:-1]) or writer.sizes[0]
    is_flat = last == 0
    outer, inner = writer.levels
    body = [*outer, *loop("c", "first" if is_flat else "0", "last" if is_flat else f"n{last}", inner)]
    if not is_flat:
        body = loop("row", "first", "last", [*indices("row", range(last)), *body])
    lines = [
        f"const int rows = {rows};",
        "const int first = get_global_id(0) * per_item;",
        "const int last = first + per_item < rows ? first + per_item : rows;",
        *body,
    ]
    return function("pointwise", writer.parameters, lines, is_gpu=is_gpu)


def loop(name: str, start: str, stop: str, body: Sequence[str], *, step: int = 1) -> list[str]:
    """Lines of a loop that counts from start to stop."""
    count = f"{name}++" if step == 1 else f"{name} += {step}"
    return [f"for (int {name} = {start}; {name} < {stop}; {count}) {{", *(f"    {line}" for line in body), "}"]


def indices(flat: str, dims: Sequence[int]) -> list[str]:
    """Lines that take an index over several loops, the last one innermost, apart into i0, i1..."""
    if not dims:
        return []
    lines = [f"int rest_{flat} = {flat};"]
    for d in reversed(dims[1:]):
        lines += [f"const int i{d} = rest_{flat} % n{d};", f"rest_{flat} /= n{d};"]
    return [*lines, f"const int i{dims[0]} = rest_{flat};"]


def function(name: str, parameters: Sequence[str], body: Sequence[str], *, is_gpu: bool) -> str:
    """The source of a kernel, with the functions that it uses."""
    attribute = "" if is_gpu else "__attribute__((reqd_work_group_size(1, 1, 1))) "
    return procedure(f"__kernel {attribute}void {name}", parameters, body)


def procedure(name: str, parameters: Sequence[str], body: Sequence[str]) -> str:
    """The source of a function that returns nothing, with the functions that it uses."""
    text, head = "\n".join(f"    {line}" for line in body), ",\n    ".join(parameters)
    return f"{functions_of(text)}{name}(\n    {head})\n{{\n{text}\n}}\n"
