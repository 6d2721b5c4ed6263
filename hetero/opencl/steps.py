"""What lowering consists of: view operations, steps, deferred kernels, a lowered graph."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hetero.opencl.ir import Epilogue, Launch, Root, View

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.fx import Node

    from hetero.opencl.program import Device, PreparedLaunches

aten = torch.ops.aten
_VARIABLE = re.compile(r"^[LG]\['[^']*'\](\._modules)?\.?")

VIEW_OPS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten._reshape_alias.default,
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.slice.Tensor,
        aten.select.int,
        aten.detach.default,
        aten.alias.default,
        aten.diagonal.default,
        aten.unfold.default,
        aten.lift.default,
        aten.lift_fresh.default,
    }
)


class Target(Protocol):
    """What generated code and the choice of kernels depend on of a device: `program.Capabilities`."""

    @property
    def kind(self) -> str:
        """`cpu` or `gpu`."""

    @property
    def compute_units(self) -> int:
        """How many work-groups run at the same time."""

    @property
    def local_memory_bytes(self) -> int:
        """Local memory of a work-group [B]."""

    @property
    def max_work_group_size(self) -> int:
        """Work-items of a work-group at most."""

    @property
    def subgroups(self) -> bool:
        """Whether kernels may use functions of sub-groups."""

    @property
    def fp16(self) -> bool:
        """Whether kernels may use `half`."""


@dataclass(frozen=True)
class HostStep:
    """An operation that runs on the host because nothing else does it: the whole of `fallback="cpu"`.

    Attributes:
        op: the ATen operation.
        module: path of the module it belongs to.
        call: gets its tensors in the order of `inputs`, returns one tensor an output.
        inputs: views that it reads.
        outputs: views that it writes.
    """

    op: str
    module: str
    call: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
    inputs: tuple[View, ...]
    outputs: tuple[View, ...]


Step = Launch | HostStep


@dataclass(eq=False)
class Deferred:
    """A kernel that is emitted at its first use, perhaps with a residual, an epilogue, or into other memory.

    Attributes:
        outputs: where its results are read from; `stored` at the same place says where they go.
        emit: (stored, residual, epilogue) -> launches.
        residual: position of the output that a residual can be added to, or -1.
        takes_epilogue: whether elementwise operations on the only output can be a part of its launch.
        readers: what reads the outputs, as opaque keys.
    """

    outputs: list[View]
    emit: Callable[[Sequence[View], View | None, Epilogue | None], list[Launch]]
    residual: int = -1
    takes_epilogue: bool = False
    readers: frozenset[Any] = frozenset()
    stored: list[View] = field(default_factory=list)


@dataclass(frozen=True)
class Lowered:
    """A graph's steps and interface.

    Attributes:
        steps: in order.
        inputs: root of each input; None for a number.
        outputs: of each output its view, or a number or None; an `input` root's view may be the input itself.
        is_input: for each output the index of the input that it is, or -1.
        seed: what a call has to draw first; None if nothing is random.
    """

    steps: tuple[Step, ...]
    inputs: tuple[View | None, ...]
    outputs: tuple[View | float | int | None, ...]
    is_input: tuple[int, ...]
    seed: Root | None = None


def roots_of(step: Step) -> list[Root]:
    """What a step reads or writes."""
    views = (*step.inputs, *step.outputs) if isinstance(step, HostStep) else step.arguments
    return [view.root for view in views if isinstance(view, View)]


def segments(device: Device, lowered: Lowered) -> list[PreparedLaunches | HostStep]:
    """Runs of launches, prepared, with the host's steps between them."""
    found: list[PreparedLaunches | HostStep] = []
    for is_launch, steps in itertools.groupby(lowered.steps, key=lambda step: isinstance(step, Launch)):
        if is_launch:
            found.append(device.prepare([step for step in steps if isinstance(step, Launch)]))
        else:
            found.extend(step for step in steps if isinstance(step, HostStep))
    return found


def bound_arguments(node: Node) -> dict[str, Any]:
    """Arguments of a call by schema name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(node.args):
            bound[argument.name] = node.args[i]
        else:
            bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return bound


def module_path(node: Node) -> str:
    """Where in the user's module a node comes from, as `named_modules` says; of the module itself its class.

    TorchDynamo's paths begin with the local variable that holds the module. Backward nodes know theirs from their
    forward node. Nodes of no module have no path.
    """
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    if not stack:
        return ""
    path, kind = list(stack.values())[-1]
    inside = _VARIABLE.sub("", str(path))
    return inside or str(getattr(kind, "__name__", kind)).rsplit(".", 1)[-1]


def operation_name(node: Node) -> str:
    """ATen's name of what a node calls, without overload."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))
