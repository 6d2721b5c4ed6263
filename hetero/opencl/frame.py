"""Calls of a lowered graph: frames, each with preset kernels and memory for one call in flight.

Scratch lies in the device's arena, which every call on its queue uses in turn. What is saved for the backward pass lies
in the frame's slab. The tensors that a call returns for saving share the slab's storage, so the frame is free again
exactly when its storage has no other users: dropped forwards, backwards out of order and retain_graph need no care.
What the caller keeps, outputs and gradients, has storage of its own, each piece; outputs.py finds a free one by the
same count. A device with memory of its own has no frames: copied.py.

Inputs are used where they lie. Only their addresses are looked at, at every call: nothing rests on tensor versions,
which fused optimizers and `.data` don't move.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hetero.opencl.copied import COPIED_KINDS, CopiedCalls
from hetero.opencl.ir import Root, View
from hetero.opencl.memory import MemoryPlan, assign, lifetimes, piece_bytes_of, pieces, require_fit
from hetero.opencl.outputs import OutputPool, in_layout, show, storage_users, whole_views
from hetero.opencl.program import Device, PreparedLaunches
from hetero.opencl.seeds import Seed
from hetero.opencl.steps import HostStep, Lowered, roots_of, segments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MAX_SPARE_FRAMES = 16  # frames without a slab that may wait, one for each set of weights that shares the graph


class Plan:
    """A lowered graph with its memory laid out; makes frames.

    Attributes:
        lowered: steps and interface.
        memory: sizes, known before the first launch.
        roots: all that the steps use or the caller gets.
        pools: memory of each output.

    Raises:
        OutOfDeviceMemory: the device has no room for it.
    """

    def __init__(self, lowered: Lowered, device: Device, *, copies: bool) -> None:
        self.lowered = lowered
        self.device = device
        uses = [roots_of(step) for step in lowered.steps]
        kept = [view.root for view in lowered.outputs if isinstance(view, View)]
        is_shared = device.capabilities.shares_host_memory and not copies
        if not is_shared:  # inputs are all there before the first step
            uses.insert(0, [root for roots in uses for root in roots if root.kind in ("input", "seed")])
        spans = lifetimes([*uses, kept])
        alignment = max(64, device.capabilities.alignment_bytes)
        in_arena = ("scratch",) if is_shared else COPIED_KINDS
        piece_bytes = piece_bytes_of(device.capabilities, alignment)
        memory = assign(spans, alignment=alignment, in_arena=in_arena, piece_bytes=piece_bytes)
        on_device = memory.memory_bytes if is_shared else memory.arena_bytes + memory.constant_bytes
        require_fit(memory, spans, on_device, device.name, device.capabilities)
        self.memory: MemoryPlan = memory
        self._copied = None if is_shared else CopiedCalls(lowered, device, tuple(spans), memory)
        self.roots = tuple(spans)
        self.pools = {root: OutputPool(view) for root, view in whole_views(lowered.outputs, ("output",)).items()}
        sizes = [(view.root.nbytes, i) for i, view in enumerate(lowered.inputs) if view is not None]
        self._key = max(sizes)[1] if sizes else -1
        self._frames: list[Frame] = []

    def run(self, arguments: list[Any]) -> list[Any]:
        """One call. The caller holds the device's lock."""
        if self._copied is not None:
            return self._copied.run(arguments)
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
            self._frames = [*(frame for frame in self._frames if frame.is_in_place()), spare]
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
        self._segments = segments(device, plan.lowered)
        self._prepared = [s for s in self._segments if isinstance(s, PreparedLaunches)]
        self._bind_own(plan)
        self._seed = self._bind_seed(plan.lowered.seed)
        self._inputs = self._input_slots()
        self._outputs = [_OutputSlot(root, self._users(root), pool) for root, pool in plan.pools.items()]
        self._wholes = set(whole_views(plan.lowered.outputs, ("output",)).values())
        self._fresh: dict[Root, torch.Tensor] = {}
        self._storage = self._slab.untyped_storage()
        self._place = self._storage.data_ptr(), self._storage.nbytes()
        self._returns = [self._return(i) for i in range(len(plan.lowered.outputs))]
        for step in plan.lowered.steps:  # so that all lasting users of the slab are counted now
            for view in (*step.inputs, *step.outputs) if isinstance(step, HostStep) else ():
                if view.root.kind == "saved":
                    self._tensor(view, ())
        self._own_users = storage_users(self._storage)

    def is_free(self) -> bool:
        """Whether nobody holds a tensor in the slab any more, and it is where it was."""
        return storage_users(self._storage) == self._own_users and self.is_in_place()

    def is_in_place(self) -> bool:
        """Whether nobody has moved the slab, as a hook that calls `share_memory_` on a saved tensor does."""
        return (self._storage.data_ptr(), self._storage.nbytes()) == self._place

    def run(self, arguments: list[Any]) -> list[Any]:
        """Bind what moved, enqueue, wait, return the outputs."""
        device = self._device
        for slot in self._inputs:
            tensor = arguments[slot.index]
            if tensor.stride() != slot.strides:
                tensor = arguments[slot.index] = in_layout(tensor, slot.view)
            pointer = tensor.data_ptr()
            if pointer != slot.pointer:
                slot.bind(device, pointer)
        fresh = self._fresh
        for output in self._outputs:
            piece = output.pool.take(output.pointer)
            if piece.pointer != output.pointer:
                output.bind(device, piece.pointer)
            fresh[output.root] = piece.tensor.detach()
        if self._seed is not None:
            self._seed.draw()
        try:
            for segment in self._segments:
                if isinstance(segment, HostStep):
                    self._run_on_host(segment, arguments)
                else:
                    segment.enqueue()
        finally:
            device.finish()  # before the inputs may go, whatever happened
        results = self._results(arguments)
        fresh.clear()
        return results

    def _results(self, arguments: Sequence[Any]) -> list[Any]:
        results: list[Any] = []
        for i, (first, give) in enumerate(self._returns):
            results.append(give(arguments) if first == i else results[first])
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
        if view in self._wholes:
            return first, lambda arguments: self._fresh[view.root]
        return first, lambda arguments: self._tensor(view, arguments)

    def _tensor(self, view: View, arguments: Sequence[Any]) -> torch.Tensor:
        """A view as a tensor over the memory that the kernels use."""
        root = view.root
        if root.kind == "input":
            tensor = arguments[root.index].detach()
            return show(tensor, view, tensor.storage_offset())
        if root.kind == "constant":
            assert root.tensor is not None
            return show(root.tensor, view, 0)
        if root.kind == "output":
            return show(self._fresh[root], view, 0)
        memory = self._slab if root.kind == "saved" else self._arena
        key = (root.kind, view.dtype)
        if key not in self._typed:
            whole = memory.numel() // view.dtype.itemsize * view.dtype.itemsize
            self._typed[key] = memory[:whole].view(view.dtype)
        return show(self._typed[key], view, root.offset // view.dtype.itemsize)

    def _run_on_host(self, step: HostStep, arguments: Sequence[Any]) -> None:
        self._device.finish()
        with torch.no_grad():
            results = step.call([self._tensor(view, arguments) for view in step.inputs])
            for view, result in zip(step.outputs, results, strict=True):
                self._tensor(view, arguments).copy_(result)

    def _bind_own(self, plan: Plan) -> None:
        """Scratch and saved roots: parts of the arena and of the slab."""
        device, piece_bytes = self._device, plan.memory.piece_bytes
        buffers = {
            kind: [device.buffer(memory.data_ptr() + start, n) for start, n in pieces(memory.numel(), piece_bytes)]
            for kind, memory in (("scratch", self._arena), ("saved", self._slab))
        }
        for root in plan.roots:
            users = self._users(root)
            if root.kind in buffers and users:
                piece, offset = divmod(root.offset, piece_bytes)
                part = device.sub_buffer(buffers[root.kind][piece], offset, max(root.nbytes, 4))
                for prepared in users:
                    prepared.bind(root, part)

    def _bind_seed(self, root: Root | None) -> Seed | None:
        """Memory of the seed, if anything is random."""
        if root is None:
            return None
        seed = Seed()
        for prepared in self._users(root):
            prepared.bind(root, self._device.buffer(seed.tensor.data_ptr(), root.nbytes))
        return seed

    def _users(self, root: Root) -> list[PreparedLaunches]:
        return [prepared for prepared in self._prepared if root in prepared.roots]

    def _input_slots(self) -> list[_InputSlot]:
        slots = []
        for index, view in enumerate(self._lowered.inputs):
            if view is not None and view.numel:
                slots.append(_InputSlot(view.root, self._users(view.root), index, view))
        return slots


@dataclass
class _Slot:
    """An input or output: who uses it, and where it was at the last call."""

    root: Root
    users: list[PreparedLaunches]
    pointer: int = field(default=0, init=False)

    def bind(self, device: Device, pointer: int) -> None:
        """Let the kernels use it where it is now."""
        if self.root.nbytes:
            buffer = device.buffer(pointer, self.root.nbytes)
            for prepared in self.users:
                prepared.bind(self.root, buffer)
        self.pointer = pointer


@dataclass
class _InputSlot(_Slot):
    index: int
    view: View

    def __post_init__(self) -> None:
        self.strides = self.view.strides


@dataclass
class _OutputSlot(_Slot):
    pool: OutputPool


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
