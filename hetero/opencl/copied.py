"""Calls of a lowered graph on a device with memory of its own: what it needs goes there and back at each call.

Everything lies in the device's arena, one buffer, and only for the time of the call: inputs, parameters among them,
from the start until their last use; outputs until they are copied to new memory of the host. What is saved for the
backward pass travels through the host as well, so that hooks may pack, move or change it like any other tensor.
Nothing is left on the device after a call, so any number may be in flight, and memory is that of the largest graph.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch

from hetero.opencl.ir import Root, View
from hetero.opencl.outputs import empty, in_layout, show, whole_views
from hetero.opencl.program import Device, PreparedLaunches
from hetero.opencl.steps import HostStep, Lowered, roots_of, segments

if TYPE_CHECKING:
    from collections.abc import Sequence

COPIED_KINDS = ("input", "scratch", "saved", "output")  # all but constants, which stay


class CopiedCalls:
    """Kernels with preset arguments, and the copies of a call."""

    def __init__(self, lowered: Lowered, device: Device, roots: Sequence[Root], arena_bytes: int) -> None:
        self._lowered, self._device, self._arena_bytes = lowered, device, arena_bytes
        self._roots = [root for root in roots if root.kind in COPIED_KINDS]
        used = {root for step in lowered.steps for root in roots_of(step)}
        self._inputs = [(i, v) for i, v in enumerate(lowered.inputs) if v is not None and v.numel and v.root in used]
        self._outputs = whole_views(lowered.outputs, ("output", "saved"))
        self._segments: list[PreparedLaunches | HostStep] | None = None
        self._arena: Any = None
        self._parts: dict[Root, Any] = {}

    def run(self, arguments: Sequence[Any]) -> list[Any]:
        """Copy the inputs, enqueue, wait, copy and return the outputs."""
        device = self._device
        if self._segments is None:
            self._segments = segments(device, self._lowered)
        arena = _arena_of(device, self._arena_bytes)
        if arena is not self._arena:
            self._bind(self._segments, arena)
        for index, view in self._inputs:
            device.upload(self._parts[view.root], _as_bytes(in_layout(arguments[index].detach(), view)))
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

    def _bind(self, steps: Sequence[PreparedLaunches | HostStep], arena: Any) -> None:
        for root in self._roots:
            part = self._parts[root] = self._device.sub_buffer(arena, root.offset, max(root.nbytes, 4))
            for step in steps:
                if isinstance(step, PreparedLaunches):
                    step.bind(root, part)
        self._arena = arena

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


_arenas: weakref.WeakKeyDictionary[Device, Any] = weakref.WeakKeyDictionary()
_arenas_lock = threading.Lock()


def _arena_of(device: Device, nbytes: int) -> Any:
    """The device's arena, at least of a size [B]; a larger one replaces it for all."""
    with _arenas_lock:
        arena = _arenas.get(device)
        if arena is None or arena.size < nbytes:
            arena = _arenas[device] = device.allocate(max(nbytes, 4096))
        return arena
