"""The host's processor: torch runs each unit eagerly, with one thread a core of the device."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hetero.backends.timing import median_s

if TYPE_CHECKING:
    from hetero.backends import CompiledStage, Context
    from hetero.device import Device

_GEMM_SIZE = 1024  # three matrices of 4 MiB: beyond the second cache level, as a layer's are
_COPY_BYTES = 1 << 26  # read and written once a copy; larger than the last cache level of most processors


def devices(subdevices: bool) -> list[dict[str, Any]]:
    """One device: all cores that this process may use."""
    name = _processor_name()
    return [
        {
            "name": "cpu",
            "kind": "cpu",
            "api": "cpu",
            "memory_bytes": memory_bytes(),
            "cores": host_cores(),
            "memory_pool": "host",
            "description": name,
            "driver": f"torch {torch.__version__}",
            "provenance": {"memory_bytes": "operating system"},
        }
    ]


def absence() -> None:
    """None: there is always a processor."""
    return


def measure(device: Device) -> dict[str, float]:
    """Peak of torch's float32 matrix product, bandwidth of a copy (bytes read plus bytes written), time of one op."""
    a, b = torch.randn(_GEMM_SIZE, _GEMM_SIZE), torch.randn(_GEMM_SIZE, _GEMM_SIZE)
    out = torch.empty_like(a)
    source, target = torch.zeros(_COPY_BYTES // 4), torch.zeros(_COPY_BYTES // 4)
    one = torch.zeros(1)
    return {
        "flops": 2.0 * _GEMM_SIZE**3 / median_s(lambda: torch.mm(a, b, out=out)),
        "bandwidth": 2.0 * _COPY_BYTES / median_s(lambda: target.copy_(source)),
        "launch_s": median_s(lambda: one.add_(1.0)),
    }


def torch_device(name: str) -> str:
    """Host memory."""
    return "cpu"


def compile(module: nn.Module, example: tuple[Tensor, Context], device_name: str) -> CompiledStage:
    """The module itself: torch's own kernels, op by op."""
    return module


def launches(device_name: str) -> dict[str, int]:
    """Empty: torch does not count."""
    return {}


def host_cores() -> tuple[int, ...]:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def memory_bytes() -> int:
    """Physical memory, or the control group's limit where that is smaller [B]."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
    return total


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
