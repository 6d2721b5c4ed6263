"""Calls of a lowered graph on a device with memory of its own: what it needs goes there and back at each call.

Everything lies in the device's arena, and only for the time of the call: inputs, parameters among them,
from the start until their last use; outputs until they are copied to new memory of the host. What is saved for the
backward pass travels through the host as well, so that hooks may pack, move or change it like any other tensor.
Nothing is left on the device after a call, so any number may be in flight, and memory is that of the largest graph.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from hetero.opencl.ir import Root, View
from hetero.opencl.memory import MemoryPlan, pieces
from hetero.opencl.outputs import empty, in_layout, show, whole_views
from hetero.opencl.program import Device, PreparedLaunches
from hetero.opencl.seeds import Seed
from hetero.opencl.steps import HostStep, Lowered, roots_of, segments

if TYPE_CHECKING:
    from collections.abc import Sequence

COPIED_KINDS = ("input", "scratch", "saved", "output", "seed")  # all but constants, which stay


class CopiedCalls:
    """Kernels with preset arguments, and the copies of a call.

    Attributes:
        roots: what lies in the arena.
    """

    def __init__(self, lowered: Lowered, device: Device, roots: Sequence[Root], memory: MemoryPlan) -> None:
        self._lowered, self._device, self._memory = lowered, device, memory
        self.roots = [root for root in roots if root.kind in COPIED_KINDS]
        used = {root for step in lowered.steps for root in roots_of(step)}
        self._inputs = [(i, v) for i, v in enumerate(lowered.inputs) if v is not None and v.numel and v.root in used]
        self._outputs = whole_views(lowered.outputs, ("output", "saved"))
        self._segments: list[PreparedLaunches | HostStep] | None = None
        self._parts: dict[Root, Any] = {}
        self._seed = None if lowered.seed is None else Seed()

    def run(self, arguments: Sequence[Any]) -> list[Any]:
        """Copy the inputs, enqueue, wait, copy and return the outputs."""
        device = self._device
        if self._segments is None:
            self._segments = segments(device, self._lowered)
        arena = _arenas.setdefault(device, _Arena())
        if not arena.is_bound(self):
            self._bind(self._segments, arena.bind(self, device, self._memory))
        for index, view in self._inputs:
            device.upload(self._parts[view.root], _as_bytes(in_layout(arguments[index].detach(), view)))
        if self._seed is not None:
            self._seed.draw()
            self._upload_seed(self._seed)
        for segment in self._segments:
            if isinstance(segment, HostStep):
                self._run_on_host(segment)
            else:
                segment.enqueue()
        device.finish()
        fresh = {root: empty(view) for root, view in self._outputs.items()}
        for root, tensor in fresh.items():
            if tensor.numel():
                device.download(_as_bytes(tensor), self._parts[root])
        return self._results(arguments, fresh)

    def _upload_seed(self, seed: Seed) -> None:
        root = self._lowered.seed
        if root in self._parts:
            self._device.upload(self._parts[root], _as_bytes(seed.tensor))

    def _bind(self, steps: Sequence[PreparedLaunches | HostStep], buffers: Sequence[Any]) -> None:
        for root in self.roots:
            piece, offset = divmod(root.offset, self._memory.piece_bytes)
            part = self._parts[root] = self._device.sub_buffer(buffers[piece], offset, max(root.nbytes, 4))
            for step in steps:
                if isinstance(step, PreparedLaunches):
                    step.bind(root, part)

    def release(self) -> None:
        """Let go of the arena, which is going to be replaced."""
        self._parts.clear()
        for step in self._segments or ():
            if isinstance(step, PreparedLaunches):
                step.unbind(self.roots)

    def _run_on_host(self, step: HostStep) -> None:
        """Its inputs copied to the host, its outputs to the device."""
        self._device.finish()
        with torch.no_grad():
            results = step.call([self._from_device(view) for view in step.inputs])
            for view, result in zip(step.outputs, results, strict=True):
                memory = torch.empty(view.root.nbytes, dtype=torch.uint8)
                show(memory.view(view.dtype), view, 0).copy_(result)
                if view.numel:
                    self._device.upload(self._parts[view.root], memory)

    def _from_device(self, view: View) -> torch.Tensor:
        if view.root.tensor is not None:
            return show(view.root.tensor, view, 0)
        memory = torch.empty(view.root.nbytes, dtype=torch.uint8)
        if view.numel:
            self._device.download(memory, self._parts[view.root])
        return show(memory.view(view.dtype), view, 0)

    def _results(self, arguments: Sequence[Any], fresh: dict[Root, torch.Tensor]) -> list[Any]:
        seen: dict[View, torch.Tensor] = {}
        results: list[Any] = []
        for view, index in zip(self._lowered.outputs, self._lowered.is_input, strict=True):
            if index >= 0:
                results.append(arguments[index])
            elif not isinstance(view, View):
                results.append(view)
            else:
                if view not in seen:
                    seen[view] = self._result(view, arguments, fresh)
                results.append(seen[view])
        return results

    def _result(self, view: View, arguments: Sequence[Any], fresh: dict[Root, torch.Tensor]) -> torch.Tensor:
        if view.root.kind == "input":
            tensor = arguments[view.root.index].detach()
            return show(tensor, view, tensor.storage_offset())
        if view.root.tensor is not None:
            return show(view.root.tensor, view, 0).clone()
        whole = fresh[view.root]
        return whole if view == self._outputs[view.root] else show(whole, view, 0)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory from a tensor's first element to its last, whatever its strides."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,)).view(torch.uint8)


class _Arena:
    """A device's memory for one call at a time, as buffers of at most one piece each.

    It grows by replacement. All who are bound to the old one let go of it first: there is no room for both.
    """

    def __init__(self) -> None:
        self._buffers: list[Any] = []
        self._nbytes, self._piece_bytes = 0, 0
        self._users: weakref.WeakSet[CopiedCalls] = weakref.WeakSet()

    def is_bound(self, user: CopiedCalls) -> bool:
        """Whether these calls' kernels point into it."""
        return user in self._users

    def bind(self, user: CopiedCalls, device: Device, memory: MemoryPlan) -> list[Any]:
        """The buffers, enough of them for a plan.

        Raises:
            OutOfDeviceMemory: others use the device's memory.
        """
        if self._nbytes < memory.arena_bytes or self._piece_bytes != memory.piece_bytes:
            for other in self._users:
                other.release()
            self._users.clear()
            self._buffers, self._nbytes, self._piece_bytes = [], 0, memory.piece_bytes
            nbytes = max(memory.arena_bytes, 4096)
            sizes = [size for _, size in pieces(nbytes, memory.piece_bytes)]
            self._buffers = [device.allocate(size, holds=user.roots) for size in sizes]
            self._nbytes = nbytes
        self._users.add(user)
        return self._buffers


_arenas: weakref.WeakKeyDictionary[Device, _Arena] = weakref.WeakKeyDictionary()  # used under the device's lock
