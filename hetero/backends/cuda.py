"""NVIDIA (and, through ROCm builds of torch, AMD) processors: torch runs each unit there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hetero.backends.timing import median_s

if TYPE_CHECKING:
    from hetero.backends import CompiledStage, Context
    from hetero.device import Device

_GEMM_SIZE = 4096
_COPY_BYTES = 1 << 28


def devices(subdevices: bool) -> list[dict[str, Any]]:
    """One device a visible processor."""
    if absence() is not None:
        return []
    return [_describe(index) for index in range(torch.cuda.device_count())]


def _describe(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    runtime = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return {
        "name": f"cuda:{index}",
        "kind": "gpu",
        "api": "cuda",
        "memory_bytes": properties.total_memory,
        "memory_pool": f"cuda:{index}",
        "description": properties.name,
        "driver": f"{runtime}, torch {torch.__version__}",
        "provenance": {"memory_bytes": "driver"},
    }


def absence() -> dict[str, str] | None:
    """Why there is no such device, as torch sees it."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return {
            "api": "cuda",
            "reason": f"torch {torch.__version__} is built without CUDA",
            "remedy": "where there is an NVIDIA GPU: install torch's CUDA build, as its own page 'Get started' says",
        }
    return {
        "api": "cuda",
        "reason": "torch finds no usable GPU",
        "remedy": "check that nvidia-smi lists one and that its driver is recent enough for "
        f"CUDA {torch.version.cuda or torch.version.hip}",
    }


def measure(device: Device) -> dict[str, float]:
    """Peak of the float32 matrix product, bandwidth of a copy (bytes read plus bytes written), time of one op."""
    where = torch.device(device.name)
    a, b = (torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=where) for _ in range(2))
    source, target = (torch.zeros(_COPY_BYTES // 4, device=where) for _ in range(2))
    out, one = torch.empty_like(a), torch.zeros(1, device=where)

    def finished(work: Any) -> Any:
        def call() -> None:
            work()
            torch.cuda.synchronize(where)

        return call

    return {
        "flops": 2.0 * _GEMM_SIZE**3 / median_s(finished(lambda: torch.mm(a, b, out=out))),
        "bandwidth": 2.0 * _COPY_BYTES / median_s(finished(lambda: target.copy_(source))),
        "launch_s": median_s(finished(lambda: one.add_(1.0))),
    }


def torch_device(name: str) -> str:
    """The device itself: torch names it alike."""
    return name


def compile(module: nn.Module, example: tuple[Tensor, Context], device_name: str) -> CompiledStage:
    """The module itself; its parameters have to be there already."""
    return module


def launches(device_name: str) -> dict[str, int]:
    """Empty: torch does not count."""
    return {}
