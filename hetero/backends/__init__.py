"""Runtimes that execute layers: entry points of the group `hetero.backends`, each a module of plain functions.

Nothing is imported before the first use. A runtime that fails to import is an absence with a reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, Protocol

from torch import Tensor, nn

from hetero.device import Absence, Device
from hetero.errors import DeviceError

Context = Mapping[str, Tensor]
"""Tensors beside the activations: not differentiable, the batch as first dimension."""

CompiledStage = Callable[[Tensor, Context], Any]
"""What a backend makes of a module: gives what the module gives, differentiable by autograd, safe for several calls in
flight. One that plans its memory also has `memory_bytes() -> (of a call in flight, shared by all calls)` [B]."""


class Backend(Protocol):
    """The functions of a backend's module."""

    def devices(self, subdevices: bool) -> list[dict[str, Any]]:
        """Fields of `Device`, one dict a device; empty where there is none."""

    def absence(self) -> dict[str, str] | None:
        """`api`, `reason` and `remedy` where the runtime or a part of it is unusable; None where all of it works."""

    def measure(self, device: Device) -> dict[str, float]:
        """`flops` [FLOP/s], `bandwidth` [B/s] and `launch_s` [s], measured now, in the calling thread."""

    def torch_device(self, name: str) -> str:
        """Where the tensors of that device live, as torch names it."""

    def compile(self, module: nn.Module, example: tuple[Tensor, Context], device_name: str) -> CompiledStage:
        """The module on that device, for inputs like the example."""

    def launches(self, device_name: str) -> dict[str, int]:
        """Launches there so far, by op; empty where nothing is counted."""


@functools.cache
def _loaded() -> tuple[dict[str, Backend], dict[str, Absence]]:
    backends: dict[str, Backend] = {}
    broken: dict[str, Absence] = {}
    for entry in entry_points(group="hetero.backends"):
        try:
            backends[entry.name] = entry.load()
        except (ImportError, OSError, AttributeError) as error:
            broken[entry.name] = Absence(
                entry.name,
                f"{entry.value} does not import: {type(error).__name__}: {error}",
                f"install what it needs, or reinstall the package that provides {entry.value}",
            )
    return backends, broken


def all_backends() -> dict[str, Backend]:
    """The runtimes that import, by api."""
    return _loaded()[0]


def broken_backends() -> dict[str, Absence]:
    """The runtimes that do not, by api."""
    return _loaded()[1]


def backend(api: str) -> Backend:
    """The runtime of that name.

    Raises:
        DeviceError: it is not installed or does not import.
    """
    backends, broken = _loaded()
    if api in backends:
        return backends[api]
    absence = broken.get(api)
    raise DeviceError(
        f"runtime {api!r} is not usable",
        found=absence.reason if absence else ", ".join(sorted(backends)),
        remedy=absence.remedy if absence else "install a package that registers it under hetero.backends",
    )
