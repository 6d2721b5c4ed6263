"""Calls of a lowered graph: frames, each with preset kernels and memory for one call in flight.

Scratch lies in the device's arena, which every call on its queue uses in turn. What is saved for the backward pass lies
in the frame's slab. The tensors that a call returns for saving share the slab's storage, so the frame is free again
exactly when its storage has no other users: dropped forwards, backwards out of order and retain_graph need no care.
What the caller keeps, outputs and gradients, has storage of its own, each piece; it is used again by a later call when
the caller has let it go, by the same count.

Inputs are used where they lie. Only their addresses are looked at, at every call: nothing rests on tensor versions,
which fused optimizers and `.data` don't move.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hetero.opencl.ir import Launch, Root, View
from hetero.opencl.memory import MemoryPlan, assign, lifetimes
from hetero.opencl.program import Device, PreparedLaunches
from hetero.opencl.steps import HostStep, Lowered

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MAX_SPARE_FRAMES = 16  # frames without a slab that may wait, one for each set of weights that shares the graph


class Plan:
    """A lowered graph with its memory laid out; makes frames.

    Attributes:
        lowered: steps and interface.
        memory: sizes, known before the first launch.
    """

    def __init__(self, lowered: Lowered, device: Device) -> None:
        self.lowered = lowered
        self.device = device
        uses = [_roots_of(step) for step in lowered.steps]
        kept = [view.root for view in lowered.outputs if isinstance(view, View)]
        spans = lifetimes([*uses, kept])
        self.memory: MemoryPlan = assign(spans, alignment=max(64, device.capabilities.alignment_bytes))
        self.roots = tuple(spans)
        sizes = [(view.root.nbytes, i) for i, view in enumerate(lowered.inputs) if view is not None]
        self._key = max(sizes)[1] if sizes else -1
        self._frames: list[Frame] = []

    def run(self, arguments: list[Any]) -> list[Any]:
        """One call. The caller holds the device's lock."""
        return self._frame(arguments).run(arguments)

    def _frame(self, arguments: Sequence[Any]) -> Frame:
        """A free frame, if possible one whose kernels already point at these inputs."""
        key = arguments[self._key].data_ptr() if self._key >= 0 else 0
        spare = None
        for frame in self._frames:
            if frame.is_free():
                if frame.key == key:
                    return frame
                spare = frame
        if spare is None or (not self.memory.slab_bytes and len(self._frames) < _MAX_SPARE_FRAMES):
            spare = Frame(self, arena_of(self.device, self.memory.arena_bytes))
            self._frames.append(spare)
        spare.key = key
        return spare


class Frame:
    """Kernels with preset arguments, and the slab of one call in flight."""

    def __init__(self, plan: Plan, arena: torch.Tensor) -> None:
        self.key = 0
        device, memory = plan.device, plan.memory
        self._device, self._lowered, self._arena = device, plan.lowered, arena
        with torch.inference_mode(mode=False):
            self._slab = torch.empty(max(memory.slab_bytes, 4), dtype=torch.uint8)
        self._typed: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._segments = _segments(device, plan.lowered)
        self._prepared = [s for s in self._segments if isinstance(s, PreparedLaunches)]
        self._bind_own(plan)
        self._inputs = self._input_slots()
        self._outputs = self._output_slots()
        self._fresh: dict[Root, torch.Tensor] = {}
        self._storage = self._slab.untyped_storage()
        self._returns = [self._return(i) for i in range(len(plan.lowered.outputs))]
        for step in plan.lowered.steps:  # so that all lasting users of the slab are counted now
            for view in (*step.inputs, *step.outputs) if isinstance(step, HostStep) else ():
                if view.root.kind == "saved":
                    self._tensor(view, ())
        self._base_uses = torch._C._storage_Use_Count(self._storage._cdata)

    def is_free(self) -> bool:
        """Whether nobody holds a tensor in the slab any more."""
        uses: int = torch._C._storage_Use_Count(self._storage._cdata)
        return uses == self._base_uses

    def run(self, arguments: list[Any]) -> list[Any]:
        """Bind what moved, enqueue, wait, return the outputs."""
        device = self._device
        for slot in self._inputs:
            tensor = arguments[slot.index]
            if tensor.stride() != slot.strides:
                # Nothing guards the layout of saved tensors: hooks that pack and unpack them may change it.
                tensor = torch.empty_strided(slot.shape, slot.strides, dtype=tensor.dtype).copy_(tensor)
                arguments[slot.index] = tensor
            pointer = tensor.data_ptr()
            if pointer != slot.pointer:
                buffer = device.buffer(pointer, slot.nbytes)
                for prepared in slot.users:
                    prepared.bind(slot.root, buffer)
                slot.pointer = pointer
        fresh = self._fresh
        for output in self._outputs:
            if output.is_held():
                output.allocate(device)
            assert output.tensor is not None
            fresh[output.root] = output.tensor.detach()
        for segment in self._segments:
            if isinstance(segment, HostStep):
                self._run_on_host(segment, arguments)
            else:
                segment.enqueue()
        device.finish()
        results = self._results(arguments)
        fresh.clear()
        return results

    def _results(self, arguments: Sequence[Any]) -> list[Any]:
        seen: dict[int, Any] = {}
        results = []
        for same, give in self._returns:
            if same not in seen:
                seen[same] = give(arguments)
            results.append(seen[same])
        return results

    def _return(self, i: int) -> tuple[int, Callable[[Sequence[Any]], Any]]:
        """(position of the first equal output, function of the arguments that gives it)."""
        lowered = self._lowered
        view, index = lowered.outputs[i], lowered.is_input[i]
        if index >= 0:
            return i, lambda arguments: arguments[index]
        if not isinstance(view, View):
            return i, lambda arguments: view
        first = lowered.outputs.index(view)
        if view.root.kind == "saved":
            lasting = self._tensor(view, ())
            return first, lambda arguments: lasting.detach()  # shares the storage, and counts as its user
        if view.root.kind == "constant":
            return first, lambda arguments: self._tensor(view, arguments).clone()
        if any(view == output.whole for output in self._outputs):
            return first, lambda arguments: self._fresh[view.root]
        return first, lambda arguments: self._tensor(view, arguments)

    def _tensor(self, view: View, arguments: Sequence[Any]) -> torch.Tensor:
        """A view as a tensor over the memory that the kernels use."""
        root = view.root
        if root.kind == "input":
            tensor = arguments[root.index].detach()
            return _show(tensor, view, tensor.storage_offset())
        if root.kind == "constant":
            assert root.tensor is not None
            return _show(root.tensor, view, 0)
        if root.kind == "output":
            return _show(self._fresh[root], view, 0)
        memory = self._slab if root.kind == "saved" else self._arena
        key = (root.kind, view.dtype)
        if key not in self._typed:
            whole = memory.numel() // view.dtype.itemsize * view.dtype.itemsize
            self._typed[key] = memory[:whole].view(view.dtype)
        return _show(self._typed[key], view, root.offset // view.dtype.itemsize)

    def _run_on_host(self, step: HostStep, arguments: Sequence[Any]) -> None:
        self._device.finish()
        with torch.no_grad():
            results = step.call([self._tensor(view, arguments) for view in step.inputs])
            for view, result in zip(step.outputs, results, strict=True):
                self._tensor(view, arguments).copy_(result)

    def _bind_own(self, plan: Plan) -> None:
        """Scratch and saved roots: parts of the arena and of the slab."""
        device = self._device
        buffers = {
            "scratch": device.buffer(self._arena.data_ptr(), self._arena.numel()),
            "saved": device.buffer(self._slab.data_ptr(), self._slab.numel()),
        }
        for root in plan.roots:
            users = self._users(root)
            if root.kind in buffers and users:
                part = device.sub_buffer(buffers[root.kind], root.offset, max(root.nbytes, 4))
                for prepared in users:
                    prepared.bind(root, part)

    def _users(self, root: Root) -> list[PreparedLaunches]:
        return [prepared for prepared in self._prepared if root in prepared.roots]

    def _output_slots(self) -> list[_OutputSlot]:
        """Roots that the caller gets, each with the view that it is allocated as, and who writes it."""
        slots: dict[Root, View] = {}
        for view in self._lowered.outputs:
            if isinstance(view, View) and view.root.kind == "output":
                is_whole = view.offset == 0 and view.numel * view.dtype.itemsize == view.root.nbytes
                if is_whole or view.root not in slots:
                    length = view.root.nbytes // view.dtype.itemsize
                    slots[view.root] = view if is_whole else View(view.root, 0, (length,), (1,), view.dtype)
        return [_OutputSlot(root, view, self._users(root)) for root, view in slots.items()]

    def _input_slots(self) -> list[_InputSlot]:
        slots = []
        for index, view in enumerate(self._lowered.inputs):
            if view is not None and view.numel:
                slots.append(_InputSlot(index, view.root, view.shape, view.strides, self._users(view.root)))
        return slots


@dataclass
class _InputSlot:
    """An input: what it looks like, who uses it, where it was at the last call."""

    index: int
    root: Root
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    users: list[PreparedLaunches]
    pointer: int = 0

    @property
    def nbytes(self) -> int:
        return self.root.nbytes


@dataclass
class _OutputSlot:
    """An output: how it is allocated, who writes it, and the memory of the last call, used again once nobody has it."""

    root: Root
    whole: View
    users: list[PreparedLaunches]
    tensor: torch.Tensor | None = None
    storage: torch.UntypedStorage | None = None
    base_uses: int = 0

    def is_held(self) -> bool:
        """Whether there is no memory, or somebody outside has it."""
        if self.storage is None:
            return True
        uses: int = torch._C._storage_Use_Count(self.storage._cdata)
        return uses != self.base_uses

    def allocate(self, device: Device) -> None:
        """Take new memory."""
        whole = self.whole
        with torch.inference_mode(mode=False):
            self.tensor = torch.empty_strided(whole.shape, whole.strides, dtype=whole.dtype)
        self.storage = self.tensor.untyped_storage()
        self.base_uses = torch._C._storage_Use_Count(self.storage._cdata)
        if self.root.nbytes:
            buffer = device.buffer(self.tensor.data_ptr(), self.root.nbytes)
            for prepared in self.users:
                prepared.bind(self.root, buffer)


_arenas: weakref.WeakKeyDictionary[Device, torch.Tensor] = weakref.WeakKeyDictionary()
_arenas_lock = threading.Lock()


def arena_of(device: Device, nbytes: int) -> torch.Tensor:
    """The device's arena, at least of a size [B]. A larger one replaces it; frames made before keep theirs."""
    with _arenas_lock:
        arena = _arenas.get(device)
        if arena is None or arena.numel() < nbytes:
            with torch.inference_mode(mode=False):
                arena = _arenas[device] = torch.empty(max(nbytes, 4096), dtype=torch.uint8)
        return arena


def _segments(device: Device, lowered: Lowered) -> list[PreparedLaunches | HostStep]:
    """Runs of launches, prepared, with the host's steps between them."""
    segments: list[PreparedLaunches | HostStep] = []
    for is_launch, steps in itertools.groupby(lowered.steps, key=lambda step: isinstance(step, Launch)):
        if is_launch:
            segments.append(device.prepare([step for step in steps if isinstance(step, Launch)]))
        else:
            segments.extend(step for step in steps if isinstance(step, HostStep))
    return segments


def _roots_of(step: Launch | HostStep) -> list[Root]:
    views = (*step.inputs, *step.outputs) if isinstance(step, HostStep) else step.arguments
    return [view.root for view in views if isinstance(view, View)]


def _show(base: torch.Tensor, view: View, offset: int) -> torch.Tensor:
    """A view as a tensor, `offset` elements into its memory."""
    return base.as_strided(view.shape, view.strides, offset + view.offset)
