"""OpenCL devices and their sub-devices: units are compiled for them by `hetero.opencl`.

pyopencl is imported at the first question, not with this file.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hetero.backends.timing import median_s
from hetero.opencl.errors import NoOpenCLError

if TYPE_CHECKING:
    from hetero.backends import CompiledStage, Context
    from hetero.device import Device

_GEMM_SIZE = 1024
_COPY_BYTES = 1 << 26


def devices(subdevices: bool) -> list[dict[str, Any]]:
    """Each device of each platform, followed by its sub-devices if they are asked for."""
    from hetero.opencl.program import list_devices

    try:
        found = list_devices(subdevices=subdevices)
    except NoOpenCLError:
        return []
    return [
        {
            "name": device.name,
            "kind": device.capabilities.kind,
            "api": "opencl",
            "memory_bytes": device.capabilities.memory_bytes,
            "cores": device.cores,
            "memory_pool": "host" if device.capabilities.kind == "cpu" else device.name.split(".")[0],
            "description": device.description,
            "driver": device.driver,
            "provenance": {"memory_bytes": "driver"},
        }
        for device in found
    ]


def absence() -> dict[str, str] | None:
    """Why there is no OpenCL device: no loader, platform or device; or why an installed driver has none."""
    from hetero.opencl.program import list_devices
    from hetero.opencl.vendors import intel_absence

    try:
        list_devices(subdevices=False)
    except NoOpenCLError as error:
        reason = f"{error.message}: {error.found}" if error.found else error.message
        return {"api": "opencl", "reason": reason, "remedy": error.remedy or "pip install 'pyopencl[pocl]'"}
    missing = intel_absence()
    return None if missing is None else dataclasses.asdict(missing)


def measure(device: Device) -> dict[str, float]:
    """Peak of our float32 matrix product, bandwidth of a copy (read plus written), time of an empty command."""
    from hetero.opencl.program import open_device

    opened = open_device(device.name)
    source, target = opened.allocate(_COPY_BYTES), opened.allocate(_COPY_BYTES)
    opened.upload(source, torch.zeros(_COPY_BYTES // 4))

    def copy() -> None:
        _cl().enqueue_copy(opened.queue, target, source)
        opened.finish()

    def empty() -> None:
        _cl().enqueue_marker(opened.queue)
        opened.finish()

    with opened.lock:
        bandwidth = 2.0 * _COPY_BYTES / median_s(copy)
        launch_s = median_s(empty)
    return {"flops": 2.0 * _GEMM_SIZE**3 / median_s(_matmul(device.name)), "bandwidth": bandwidth, "launch_s": launch_s}


def _matmul(device_name: str) -> Any:
    linear = nn.Linear(_GEMM_SIZE, _GEMM_SIZE, bias=False).requires_grad_(False)
    x = torch.randn(_GEMM_SIZE, _GEMM_SIZE)
    compiled = compile(_Alone(linear), (x, {}), device_name)
    return lambda: compiled(x, {})


class _Alone(nn.Module):
    """A module with one argument, called like a stage."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, context: Context) -> Any:
        return self.module(x)


def torch_device(name: str) -> str:
    """Host memory: a device that shares it works there; to any other, tensors are copied and back at each call."""
    return "cpu"


def compile(module: nn.Module, example: tuple[Tensor, Context], device_name: str) -> CompiledStage:
    """The module compiled for the device.

    Raises:
        HeteroError: an operation can't be lowered, or a kernel doesn't build.
    """
    from hetero.opencl.backend import compile_module

    return compile_module(module, device_name)


def launches(device_name: str) -> dict[str, int]:
    """Kernels enqueued so far, by op."""
    from hetero.opencl.program import open_device

    return dict(open_device(device_name).counts)


def _cl() -> Any:
    from hetero.opencl.platforms import opencl

    return opencl()
