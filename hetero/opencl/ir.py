"""What lowering produces and the memory plan and the kernels share: storage, views of it, and launches.

A lowered graph is a list of `Launch`es over `View`s of `Root`s. Nothing here knows OpenCL: `program.py` builds and
runs launches, `memory.py` gives roots their place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(eq=False)
class Root:
    """One piece of storage.

    Attributes:
        kind: `input` (a tensor of the caller's, bound at each call), `constant` (a tensor of the plan's), `scratch`
            (lives within one call, in the shared arena), `saved` (kept for the backward pass, in the call's slab),
            `output` (handed to the caller, allocated at each call) or `seed` (of random numbers, drawn by each call:
            seeds.py).
        nbytes: size [B].
        name: what it holds, for error messages.
        index: position among the graph's inputs, for `input`.
        tensor: the data, for `constant`.
        offset: place in the arena or slab [B], set by the memory plan.
    """

    kind: str
    nbytes: int
    name: str = ""
    index: int = -1
    tensor: torch.Tensor | None = None
    offset: int = 0


@dataclass(frozen=True)
class View:
    """A strided tensor inside a root; offset and strides in elements, as in torch."""

    root: Root
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def is_contiguous(self) -> bool:
        """Whether elements lie in row-major order without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


def vector(root: Root) -> View:
    """The whole of a root as a float32 vector."""
    return View(root, 0, (root.nbytes // 4,), (1,), torch.float32)


@dataclass(frozen=True)
class LocalMemory:
    """A kernel argument in local memory [B]."""

    nbytes: int


@dataclass(frozen=True)
class Scalar:
    """A float argument that is set by name before launches are enqueued, and may change between calls."""

    name: str


Argument = View | int | float | LocalMemory | Scalar


@dataclass(frozen=True)
class Epilogue:
    """Elementwise operations that a kernel does on each finished block of its result: generated code.

    Attributes:
        op: the operations.
        source: text that stands in front of the kernel's source: `EPILOGUE_PARAMETERS` and `EPILOGUE_ARGUMENTS`, which
            the kernel and its call of `epilogue` append to their own, and that function, of rows and columns.
        arguments: of the parameters; they follow the kernel's own.
        writes: the views among the arguments that are written.
    """

    op: str
    source: str
    arguments: tuple[Argument, ...]
    writes: tuple[View, ...]


@dataclass(frozen=True)
class Launch:
    """One kernel launch with all its arguments.

    A `View` argument becomes two kernel arguments: the buffer of its root and the offset in elements (int).
    An `int` becomes a 32-bit int, a `float` or a `Scalar` a 32-bit float.

    Attributes:
        op: what it is counted as: the ATen op or operations it serves, e.g. `addmm`.
        kernel: name of the kernel function.
        source: a file of `kernels/`, e.g. `gemm.cl`, or generated code (then `is_generated`).
        arguments: in the order of the kernel's parameters.
        global_size: work-items in each dimension.
        local_size: work-items of a group in each dimension.
        writes: the views among the arguments that the kernel writes; all others are read.
        defines: build-time constants, `-D NAME=value`.
        is_generated: whether `source` is the text itself instead of a file name.
        epilogue: generated code in front of the source, `Epilogue.source`.
    """

    op: str
    kernel: str
    source: str
    arguments: tuple[Argument, ...]
    global_size: tuple[int, ...]
    local_size: tuple[int, ...]
    writes: tuple[View, ...]
    defines: Mapping[str, int | float | str] = field(default_factory=dict)
    is_generated: bool = False
    epilogue: str = ""
