"""Opened devices: buffers, programs, and launches that are prepared once and replayed."""

from __future__ import annotations

import ctypes
import dataclasses
import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from hetero.opencl.build import assemble, build
from hetero.opencl.errors import DeviceLost, OpenCLError, OutOfDeviceMemory
from hetero.opencl.ir import Argument, Launch, LocalMemory, Root, Scalar, View
from hetero.opencl.memory import SMALLER, largest_buffers
from hetero.opencl.platforms import Capabilities, DeviceDescription, find_device, list_devices, opencl

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    import torch

__all__ = [
    "Capabilities",
    "Device",
    "DeviceDescription",
    "PreparedLaunches",
    "list_devices",
    "open_device",
    "open_variant",
]

_MAX_CACHED_BUFFERS = 4096  # a host pointer costs a few hundred bytes; training alternates between some hundred of them
_MEMORY_STATUS = {"MEM_OBJECT_ALLOCATION_FAILURE", "OUT_OF_RESOURCES", "OUT_OF_HOST_MEMORY", "INVALID_BUFFER_SIZE"}
_LOST_STATUS = {"DEVICE_NOT_AVAILABLE", "INVALID_DEVICE", "INVALID_CONTEXT", "INVALID_COMMAND_QUEUE"}
# What a wait ends with after a kernel has crashed or run into the driver's time limit; the context is of no more use.
_LOST_WHILE_WAITING = {"OUT_OF_RESOURCES", "EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST", "INVALID_OPERATION"}

_open: dict[str, Device] = {}
_open_lock = threading.Lock()


def open_device(name: str) -> Device:
    """The device of a name: one object per device and process, whatever alias it is asked by.

    Args:
        name: `opencl`, `opencl:0`, `opencl:0.1`, `opencl:<platform>:<device>`; see `platforms.find_device`. Or what
            `open_variant` was given.

    Raises:
        DeviceError: no such device.
        NoOpenCLError: no OpenCL device at all.
    """
    with _open_lock:
        if name in _open:
            return _open[name]
    description, handle = find_device(name)
    with _open_lock:
        if description.name not in _open:
            _open[description.name] = Device(description, handle)
        return _open[description.name]


def open_variant(name: str, variant: str, **capabilities: Any) -> Device:
    """A device once more, taken for one of other capabilities, with a queue and counts of its own.

    Kernels for GPUs are right on any device: with `kind="gpu"` whole models are tested where there is none, with
    `shares_host_memory=False` as on a device with memory of its own.

    Args:
        name: of the device.
        variant: name by which `open_device` and the backend's option `device` find it from now on.
        capabilities: fields of `Capabilities` to replace.

    Raises:
        DeviceError: no such device.
        NoOpenCLError: no OpenCL device at all.
    """
    description, handle = find_device(name)
    changed = dataclasses.replace(description.capabilities, **capabilities)
    with _open_lock:
        if variant not in _open or _open[variant].capabilities != changed:
            _open[variant] = Device(dataclasses.replace(description, name=variant, capabilities=changed), handle)
        return _open[variant]


class Device:
    """A device with its context and its one in-order queue.

    Attributes:
        name: canonical name.
        description: what it is.
        capabilities: what it can do.
        context: pyopencl context of this device alone.
        queue: in-order queue. It is made for the device by name: on a context of a sub-device the default queue of PoCL
            runs on all cores.
        lock: whoever binds, enqueues and waits holds it meanwhile.
        counts: launches enqueued so far, by op.
        bytes_moved: bytes copied so far, by direction: h2d, d2h.
        programs_built: programs made so far, by where they came from: `source`, or `cache` (a binary on disk); PoCL,
            which has a cache of its own, always gets the source.
        lost: how the device was lost: the status; empty while it works.
    """

    def __init__(self, description: DeviceDescription, handle: Any) -> None:
        cl = opencl()
        self.name = description.name
        self.description = description
        self.capabilities = description.capabilities
        self.context: Any = cl.Context([handle])
        self.queue: Any = cl.CommandQueue(self.context, device=handle)
        self.lock = threading.RLock()
        self.counts: Counter[str] = Counter()
        self.bytes_moved: Counter[str] = Counter()
        self.programs_built: Counter[str] = Counter()
        self.lost = ""
        self._handle = handle
        self._programs: dict[tuple[object, ...], Any] = {}
        self._buffers: dict[tuple[int, int], Any] = {}

    def buffer(self, pointer: int, nbytes: int) -> Any:
        """A buffer that is host memory itself; cached by address and size.

        Args:
            pointer: address, a multiple of 4; the memory must live as long as launches use it.
            nbytes: size [B], not 0.

        Raises:
            OpenCLError: the device doesn't share the host's memory, or the driver refuses.
        """
        buffer = self._buffers.get((pointer, nbytes))
        if buffer is not None:
            return buffer
        if not self.capabilities.shares_host_memory:
            raise OpenCLError(f"{self.name} does not share the host's memory", remedy="use allocate, upload, download")
        if len(self._buffers) >= _MAX_CACHED_BUFFERS:
            self._buffers.clear()
        flags = opencl().mem_flags
        memory = _host_memory(pointer, nbytes)
        with self._errors(f"a buffer over {nbytes} bytes of the host"):
            buffer = opencl().Buffer(self.context, flags.READ_WRITE | flags.USE_HOST_PTR, hostbuf=memory)
        self._buffers[pointer, nbytes] = buffer
        return buffer

    def allocate(self, nbytes: int, *, holds: Collection[Root] = ()) -> Any:
        """A buffer in the device's own memory.

        Args:
            nbytes: size [B].
            holds: what will lie there, for the message of an error.

        Raises:
            OutOfDeviceMemory: more than one allocation may have, or than there is.
        """
        limit = min(self.capabilities.max_allocation_bytes, self.capabilities.memory_bytes)
        if nbytes > limit:
            raise self._out_of_memory(nbytes, holds)
        with self._errors("an allocation", nbytes=nbytes, holds=holds):
            return opencl().Buffer(self.context, opencl().mem_flags.READ_WRITE, max(nbytes, 4))

    def sub_buffer(self, buffer: Any, offset: int, nbytes: int) -> Any:
        """A region of a buffer; both in bytes, the offset a multiple of `capabilities.alignment_bytes`."""
        with self._errors(f"a sub-buffer of {nbytes} bytes at {offset}"):
            return buffer.get_sub_region(offset, nbytes)

    def upload(self, buffer: Any, tensor: torch.Tensor) -> None:
        """Copy a contiguous host tensor to the device (h2d); done when it returns."""
        with self._errors("a copy to the device"):
            opencl().enqueue_copy(self.queue, buffer, _host_memory(tensor.data_ptr(), tensor.nbytes), is_blocking=True)
        self.bytes_moved["h2d"] += tensor.nbytes

    def download(self, tensor: torch.Tensor, buffer: Any) -> None:
        """Copy a buffer into a contiguous host tensor (d2h); done when it returns."""
        with self._errors("a copy from the device"):
            opencl().enqueue_copy(self.queue, _host_memory(tensor.data_ptr(), tensor.nbytes), buffer, is_blocking=True)
        self.bytes_moved["d2h"] += tensor.nbytes

    def copy(self, target: Any, source: Any) -> None:
        """Enqueue a copy of a buffer into another of the same size, both on the device."""
        with self._errors("a copy on the device"):
            opencl().enqueue_copy(self.queue, target, source, byte_count=source.size)

    def program(
        self,
        source: str,
        defines: Mapping[str, int | float | str],
        *,
        is_generated: bool = False,
        epilogue: str = "",
    ) -> Any:
        """The built program of a source; built at most once a process and device.

        Raises:
            KernelBuildError: it doesn't compile; see `build.build`.
        """
        key = (source, is_generated, epilogue, *sorted(defines.items()))
        with self.lock:
            if key not in self._programs:
                text, name = assemble(source, is_generated=is_generated, epilogue=epilogue)
                constants = {"LANES": self.capabilities.lanes, **defines}
                program, origin = build(self.context, self._handle, text, name, constants)
                self._programs[key] = program
                self.programs_built[origin] += 1
            return self._programs[key]

    def prepare(self, launches: Sequence[Launch]) -> PreparedLaunches:
        """Kernel objects of their own with all arguments set but the buffers of roots that are bound later.

        Raises:
            KernelBuildError: a kernel doesn't compile.
        """
        with self.lock:
            return PreparedLaunches(self, launches)

    def finish(self) -> None:
        """Wait until everything enqueued is done; other Python threads run meanwhile.

        Raises:
            DeviceLost: it doesn't answer any more, or something enqueued has crashed.
            OpenCLError: something enqueued has failed.
        """
        with self._errors("a launch", is_waiting=True):
            self.queue.finish()

    @contextmanager
    def _errors(
        self, action: str, *, nbytes: int = 0, holds: Collection[Root] = (), is_waiting: bool = False
    ) -> Iterator[None]:
        """OpenCL's errors as ours, the status by its name. Nothing is tried on a device that is lost."""
        cl = opencl()
        if self.lost:
            raise self._lost_error()
        try:
            yield
        except cl.Error as error:
            status = cl.status_code.to_string(error.code, "UNKNOWN_STATUS_%d")
            if status in _LOST_STATUS or (is_waiting and (status in _LOST_WHILE_WAITING or "UNKNOWN" in status)):
                self.lost = f"{status} ({error.routine})"
                raise self._lost_error() from error
            if status in _MEMORY_STATUS and nbytes:
                raise self._out_of_memory(nbytes, holds) from error
            raise OpenCLError(f"{action} failed on {self.name}", found=f"{status} ({error.routine})") from error

    def _lost_error(self) -> DeviceLost:
        return DeviceLost(
            f"{self.name} ({self.description.description}) is lost: its results are gone, and it takes no more calls",
            found=self.lost,
            remedy="start the process again, from the last checkpoint; if it comes back, look into the driver's log "
            "(dmesg) or place the work on another device: heteroq devices",
        )

    def _out_of_memory(self, nbytes: int, holds: Collection[Root]) -> OutOfDeviceMemory:
        c = self.capabilities
        found = f"{c.memory_bytes} bytes of memory, at most {c.max_allocation_bytes} in one piece"
        found += f"; {largest_buffers(holds)}" if holds else ""
        return OutOfDeviceMemory(f"{self.name} can't allocate {nbytes} bytes", found=found, remedy=SMALLER)


def _host_memory(pointer: int, nbytes: int) -> Any:
    """Memory of the host as pyopencl takes it. Unlike `Tensor.numpy` it leaves a tensor's storage resizable."""
    return (ctypes.c_char * nbytes).from_address(pointer)


class PreparedLaunches:
    """Launches with their kernel objects; a replay only enqueues.

    Not shared between calls in flight: the buffers that are bound are the state of one.

    Attributes:
        kernels: names of the kernel functions, in order.
    """

    def __init__(self, device: Device, launches: Sequence[Launch]) -> None:
        cl = opencl()
        self._device = device
        self._calls: list[tuple[Any, tuple[int, ...], tuple[int, ...]]] = []
        self._sites: dict[Root, list[tuple[Any, int]]] = {}
        self._scalars: dict[str, list[tuple[Any, int]]] = {}
        self._bound: dict[Root, Any] = {}  # keeps the buffers alive: a kernel holds no reference to its arguments
        self._ops = Counter(launch.op for launch in launches)
        self.kernels = tuple(launch.kernel for launch in launches)
        self._complete = False
        for launch in launches:
            program = device.program(
                launch.source, launch.defines, is_generated=launch.is_generated, epilogue=launch.epilogue
            )
            kernel = cl.Kernel(program, launch.kernel)
            self._set_arguments(kernel, launch.arguments)
            self._calls.append((kernel, launch.global_size, launch.local_size))
        for root in self.roots:
            if root.kind == "constant" and root.tensor is not None:
                self.bind(root, self._constant(root.tensor, root.nbytes))

    @property
    def roots(self) -> tuple[Root, ...]:
        """Roots that the launches use, in order of first use."""
        return tuple(self._sites)

    def bind(self, root: Root, buffer: Any) -> None:
        """Set the buffer of a root wherever it is an argument.

        Args:
            root: a root; one that no launch uses is ignored.
            buffer: pyopencl buffer of at least the root's size.
        """
        if self._bound.get(root) is buffer:
            return
        sites = self._sites.get(root)
        if sites is None:
            return
        for kernel, index in sites:
            kernel.set_arg(index, buffer)
        self._bound[root] = buffer

    def set(self, values: Mapping[str, float]) -> None:
        """Set scalars by name, wherever they are arguments."""
        for name, value in values.items():
            for kernel, index in self._scalars.get(name, ()):
                kernel.set_arg(index, np.float32(value))

    def unbind(self, roots: Iterable[Root]) -> None:
        """Forget the buffers of roots, so that their memory can be given back; they have to be bound anew."""
        for root in roots:
            if self._bound.pop(root, None) is not None:
                self._complete = False

    def enqueue(self) -> None:
        """Enqueue all launches in order and count them; returns before they are done.

        Raises:
            OpenCLError: a root has no buffer yet, or the driver refuses a launch.
        """
        if not self._complete:
            missing = [root.name or root.kind for root in self._sites if root not in self._bound]
            if missing:
                raise OpenCLError("launches have arguments without a buffer", found=", ".join(missing))
            self._complete = True
        enqueue, queue = opencl().enqueue_nd_range_kernel, self._device.queue
        with self._device._errors("a launch"):
            for kernel, global_size, local_size in self._calls:
                enqueue(queue, kernel, global_size, local_size)
        self._device.counts.update(self._ops)

    def _set_arguments(self, kernel: Any, arguments: Sequence[Argument]) -> None:
        index = 0
        for argument in arguments:
            if isinstance(argument, View):
                self._sites.setdefault(argument.root, []).append((kernel, index))
                kernel.set_arg(index + 1, np.int32(argument.offset))
                index += 2
                continue
            if isinstance(argument, Scalar):
                self._scalars.setdefault(argument.name, []).append((kernel, index))
            elif isinstance(argument, LocalMemory):
                kernel.set_arg(index, opencl().LocalMemory(argument.nbytes))
            else:
                kernel.set_arg(index, np.float32(argument) if isinstance(argument, float) else np.int32(argument))
            index += 1
        assert index == kernel.num_args, f"{kernel.function_name} takes {kernel.num_args} arguments, not {index}"

    def _constant(self, tensor: torch.Tensor, nbytes: int) -> Any:
        """A buffer of a constant's data; the root keeps the tensor alive."""
        if self._device.capabilities.shares_host_memory:
            return self._device.buffer(tensor.data_ptr(), nbytes)
        buffer = self._device.allocate(nbytes)
        self._device.upload(buffer, tensor)
        return buffer
