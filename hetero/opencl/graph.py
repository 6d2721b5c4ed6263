"""Compiled graphs: from what AOTAutograd gives to something that runs, and what is known about all of them."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from hetero.opencl.buffer_names import name_roots
from hetero.opencl.frame import Plan
from hetero.opencl.handlers import HANDLERS
from hetero.opencl.handlers.random import with_saved_states
from hetero.opencl.lower import Lowering
from hetero.opencl.program import Device, open_device
from hetero.opencl.steps import HostStep

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hetero.opencl.memory import MemoryPlan

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fallback:
    """An operation that runs on the host: ATen name, and path of the module it belongs to."""

    op: str
    module: str


_fallbacks: dict[str, dict[Fallback, set[str]]] = {}
_plans: dict[str, list[MemoryPlan]] = {}
_owned: dict[tuple[str, str], list[MemoryPlan]] = {}
_state_lock = threading.Lock()


def fallbacks(device: str | Any) -> list[Fallback]:
    """What runs on the host because it has no kernel.

    Args:
        device: name of a device, for everything in the process; or a callable made by `compile_module`, for its own.
    """
    name, owner = (device, None) if isinstance(device, str) else (device.device, device.structure)
    with _state_lock:
        found = _fallbacks.get(open_device(name).name, {})
        return [fallback for fallback, owners in found.items() if owner is None or owner in owners]


def memory_plans(device: str | Any) -> list[MemoryPlan]:
    """Memory of every graph planned for a device in the process, in the order of compilation.

    Args:
        device: name of a device; or a callable made by `compile_module`, for its own graphs.
    """
    name, owner = (device, None) if isinstance(device, str) else (device.device, device.structure)
    name = open_device(name).name
    with _state_lock:
        return list(_plans.get(name, []) if owner is None else _owned.get((name, owner), []))


class CompiledGraph:
    """A compiled graph: one plan for each geometry of its inputs, of which a static graph has only one."""

    def __init__(
        self,
        gm: GraphModule,
        device: Device,
        *,
        n_user_outputs: int,
        is_backward: bool,
        fallback: str | None,
        copies: bool,
        owner: str,
    ) -> None:
        # AOTAutograd then passes one list that we empty, so that inputs die early. It copies the instance's attributes.
        self._boxed_call = True
        self._gm, self._device, self._fallback, self._copies = gm, device, fallback, copies
        self._n_user_outputs, self._is_backward, self._owner = n_user_outputs, is_backward, owner
        self._plans: dict[Any, Plan] = {}
        gm.graph.eliminate_dead_code()
        with_saved_states(gm.graph)
        values = {node: node.meta.get("val") for node in gm.graph.nodes}
        self._is_dynamic = not all(_is_concrete(v) for v in values.values())
        self._static: Plan | None = None
        if not self._is_dynamic and all("val" in n.meta for n in gm.graph.nodes if n.op == "call_function"):
            with unset_fake_temporarily():
                self._static = self._plan(values)

    def __call__(self, arguments: list[Any]) -> list[Any]:
        """One call; empties the list."""
        taken = list(arguments)
        arguments.clear()
        with self._device.lock:
            plan = self._static
            if plan is None:
                key = tuple((a.shape, a.stride(), a.dtype) if isinstance(a, torch.Tensor) else a for a in taken)
                plan = self._plans.get(key)
                if plan is None:
                    plan = self._plans[key] = self._plan(_concrete_values(self._gm, taken))
            return plan.run(taken)

    def _plan(self, values: Mapping[Node, Any]) -> Plan:
        lowering = Lowering(
            self._gm.graph,
            values,
            n_user_outputs=self._n_user_outputs,
            is_backward=self._is_backward,
            target=self._device.capabilities,
            fallback=self._fallback,
        )
        with self._device.lock:
            lowered = lowering.run(HANDLERS)
            name_roots(lowered.steps, self._gm.graph)
            plan = Plan(lowered, self._device, copies=self._copies)
        name = self._device.name
        with _state_lock:
            _plans.setdefault(name, []).append(plan.memory)
            _owned.setdefault((name, self._owner), []).append(plan.memory)
            for step in plan.lowered.steps:
                if isinstance(step, HostStep):
                    owners = _fallbacks.setdefault(name, {}).setdefault(Fallback(step.op, step.module), set())
                    owners.add(self._owner)
                    _log.warning("aten.%s (%s) has no kernel for %s and runs on the host", step.op, step.module, name)
        _log.debug("planned for %s: %d steps, %s", name, len(plan.lowered.steps), plan.memory)
        return plan


class _Recorder(Interpreter):
    """Runs a graph on fake tensors and keeps what every node yields."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node and keep its result."""
        result = super().run_node(n)
        self.values[n] = result
        return result


def _concrete_values(gm: GraphModule, arguments: Sequence[Any]) -> dict[Node, Any]:
    """What each node yields for inputs of these shapes."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a.detach()) if isinstance(a, torch.Tensor) else a for a in arguments]
        recorder = _Recorder(gm)
        recorder.run(*fakes)
    return recorder.values


def _is_concrete(value: Any) -> bool:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return False
        if isinstance(leaf, torch.Tensor):
            sizes = (*leaf.shape, *leaf.stride(), leaf.storage_offset())
            if any(isinstance(n, torch.SymInt) for n in sizes):
                return False
    return True
