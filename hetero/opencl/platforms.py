"""Which OpenCL devices exist, their names, and their sub-devices of one compute unit each."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

from hetero.errors import DeviceError
from hetero.opencl.errors import NoOpenCLError
from hetero.opencl.vendors import shown_to_the_loader

_CHECKER, _INTEL = "Oclgrind", "Intel(R) OpenCL"
_NAME = re.compile(r"opencl(?::(?P<first>\d+)(?::(?P<second>\d+))?(?:\.(?P<sub>\d+))?)?")
_lock = threading.RLock()


@dataclass(frozen=True)
class Capabilities:
    """What a device can do.

    Attributes:
        kind: `cpu` or `gpu` (anything that isn't a CPU).
        compute_units: work-groups that run at the same time.
        memory_bytes: its global memory [B].
        max_allocation_bytes: the largest single buffer [B].
        local_memory_bytes: local memory of a work-group [B].
        shares_host_memory: buffers over torch's memory are the memory itself; no copies.
        alignment_bytes: offsets of sub-buffers are multiples of it [B].
        lanes: floats of a vector register: 8 or 16.
        max_work_group_size: work-items of a work-group at most.
        subgroups: has functions of sub-groups (cl_khr_subgroups or cl_intel_subgroups).
        fp16: computes with `half` (cl_khr_fp16).
    """

    kind: str
    compute_units: int
    memory_bytes: int
    max_allocation_bytes: int
    local_memory_bytes: int
    shares_host_memory: bool
    alignment_bytes: int
    lanes: int
    max_work_group_size: int
    subgroups: bool
    fp16: bool


@dataclass(frozen=True)
class DeviceDescription:
    """One device or sub-device.

    Attributes:
        name: `opencl:0`: devices of all platforms counted through; `opencl:0.1`: its second sub-device.
        platform: index of the platform, as in `opencl:<platform>:<device>`.
        index: index of the device in its platform.
        subindex: which sub-device, None for a whole device.
        description: the driver's name of it.
        driver: platform, version and driver version.
        capabilities: what it can do.
        cores: host cores that it computes on; empty unless it is a CPU.
    """

    name: str
    platform: int
    index: int
    subindex: int | None
    description: str
    driver: str
    capabilities: Capabilities
    cores: tuple[int, ...]


def opencl() -> Any:
    """The module pyopencl.

    PoCL reads POCL_AFFINITY when it starts: with it, sub-device k computes on core k and nowhere else. So the variable
    is set before the first import (unless the user has set it).

    Raises:
        NoOpenCLError: pyopencl can't be imported.
    """
    os.environ.setdefault("POCL_AFFINITY", "1")
    try:
        import pyopencl
    except ImportError as error:
        raise NoOpenCLError(
            "pyopencl can't be imported", found=str(error), remedy="pip install 'pyopencl[pocl]'"
        ) from error
    return pyopencl


def _platforms(cl: Any) -> list[Any]:
    """The loader's platforms in its order, then what we added; so adding a driver renumbers nothing.

    Oclgrind interprets kernels to check them. It is here only where it is alone, so that its wheel can be installed
    beside real drivers.
    """
    with shown_to_the_loader() as has_added_intel:
        found = cl.get_platforms()
    if has_added_intel:
        found.sort(key=lambda platform: bool(platform.name == _INTEL))
    return [platform for platform in found if platform.name != _CHECKER] or found


@cache
def _devices() -> list[tuple[int, int, Any]]:
    """(platform, index, device) of every device there is."""
    cl = opencl()
    remedy = (
        "pip install 'pyopencl[pocl]' (runs on any CPU), or install your device's driver; then look at OCL_ICD_VENDORS"
    )
    try:
        platforms = _platforms(cl)
    except (cl.Error, OSError) as error:
        raise NoOpenCLError("there is no OpenCL platform", found=str(error), remedy=remedy) from error
    found = []
    for i, platform in enumerate(platforms):
        try:
            found += [(i, j, device) for j, device in enumerate(platform.get_devices())]
        except cl.Error:  # a platform without a device says so by an error
            continue
    if not found:
        raise NoOpenCLError(
            "no OpenCL platform has a device", found=", ".join(p.name for p in platforms), remedy=remedy
        )
    return found


@cache
def _subdevices(flat: int) -> list[Any]:
    """Sub-devices of one compute unit each; none if the device has a single one or can't be divided."""
    cl, device = opencl(), _devices()[flat][2]
    if device.max_compute_units < 2:
        return []
    try:
        return list(device.create_sub_devices([cl.device_partition_property.EQUALLY, 1]))
    except cl.Error:
        return []


def _capabilities(device: Any) -> Capabilities:
    cl = opencl()
    extensions = set(device.extensions.split())
    return Capabilities(
        kind="cpu" if device.type & cl.device_type.CPU else "gpu",
        compute_units=device.max_compute_units,
        memory_bytes=device.global_mem_size,
        max_allocation_bytes=device.max_mem_alloc_size,
        local_memory_bytes=device.local_mem_size,
        shares_host_memory=bool(device.type & cl.device_type.CPU and device.host_unified_memory),
        alignment_bytes=max(device.mem_base_addr_align // 8, 1),
        lanes=16 if device.native_vector_width_float >= 16 else 8,
        max_work_group_size=device.max_work_group_size,
        subgroups=not extensions.isdisjoint({"cl_khr_subgroups", "cl_intel_subgroups"}),
        fp16="cl_khr_fp16" in extensions,
    )


def _describe(flat: int, subindex: int | None) -> DeviceDescription:
    platform, index, device = _devices()[flat]
    name = f"opencl:{flat}"
    if subindex is not None:
        device, name = _subdevices(flat)[subindex], f"{name}.{subindex}"
    capabilities = _capabilities(device)
    cores: tuple[int, ...] = ()
    if capabilities.kind == "cpu":
        cores = tuple(range(capabilities.compute_units)) if subindex is None else (subindex,)
    driver = f"{device.platform.name} {device.platform.version}, driver {device.driver_version}"
    return DeviceDescription(name, platform, index, subindex, device.name, driver, capabilities, cores)


def list_devices(*, subdevices: bool = True) -> list[DeviceDescription]:
    """All devices, each followed by its sub-devices.

    Args:
        subdevices: list the sub-devices too.

    Raises:
        NoOpenCLError: no platform, or none with a device.
    """
    with _lock:
        found = []
        for flat in range(len(_devices())):
            found.append(_describe(flat, None))
            if subdevices:
                found += [_describe(flat, k) for k in range(len(_subdevices(flat)))]
        return found


def find_device(name: str) -> tuple[DeviceDescription, Any]:
    """The device of a name and its pyopencl object.

    Args:
        name: `opencl` (the first), `opencl:<n>`, `opencl:<platform>:<device>`, each with `.<k>` for a sub-device.

    Raises:
        DeviceError: no such device; the message lists what exists.
        NoOpenCLError: no device at all.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise DeviceError(
            f"{name!r} is not the name of an OpenCL device",
            expected="opencl, opencl:<n>, opencl:<platform>:<device>, or one of these with .<sub-device>",
            remedy="list them with: heteroq devices",
        )
    with _lock:
        first, second, sub = (int(g) if g is not None else None for g in match.groups())
        for flat, (platform, index, device) in enumerate(_devices()):
            if (flat == (first or 0)) if second is None else ((platform, index) == (first, second)):
                if sub is None:
                    return _describe(flat, None), device
                if sub < len(_subdevices(flat)):
                    return _describe(flat, sub), _subdevices(flat)[sub]
        existing = ", ".join(f"{d.name} ({d.description})" for d in list_devices())
        raise DeviceError(f"device {name!r} does not exist", found=existing, remedy="list them with: heteroq devices")
