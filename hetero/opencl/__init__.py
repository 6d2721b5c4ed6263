"""OpenCL devices: kernels, and a torch.compile backend that uses them.

`compile_module` and `fallbacks` are what other packages need; the backend itself is found by its name, "opencl".
"""

from __future__ import annotations

from typing import Any

__all__ = ["TrainStep", "compile_module", "fallbacks", "memory_plans"]


def __getattr__(name: str) -> Any:
    """The public names, imported at first use: listing devices needs no compiler."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hetero.opencl import backend, graph, train_step

    owners = {"TrainStep": train_step, "compile_module": backend}
    return getattr(owners.get(name, graph), name)
