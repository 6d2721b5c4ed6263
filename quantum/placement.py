"""Aer as a runtime for a planner: the functions of the entry-point group `hetero.backends`, and nothing else.

An Aer stage runs its torch modules eagerly on the host; only the circuits inside are Aer's. Results are plain dicts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def devices(subdevices: bool) -> list[dict[str, Any]]:
    """The one Aer device, which shares the host's cores and memory; [] where Aer is not installed."""
    if absence() is not None:
        return []
    import psutil  # type: ignore[import-untyped]

    memory = int(psutil.virtual_memory().total)
    return [
        {
            "name": "aer",
            "kind": "qpu",
            "api": "aer",
            "memory_bytes": memory,
            "cores": _cores(),
            "memory_pool": "host",
            "description": f"Qiskit Aer statevector simulator on {platform.processor() or platform.machine()}",
            "driver": f"qiskit-aer {importlib.metadata.version('qiskit-aer')}",
            "provenance": {"memory_bytes": "physical memory of the host", "cores": "affinity of this process"},
        }
    ]


def absence() -> dict[str, Any] | None:
    """Why Aer can't be used here; None if it can."""
    for package, distribution in (("qiskit_aer", "qiskit-aer"), ("pennylane", "pennylane")):
        if importlib.util.find_spec(package) is None:
            return {
                "api": "aer",
                "reason": f"the package {distribution} is not installed",
                "remedy": f"pip install {distribution}",
            }
    return None


def measure(device: Any) -> dict[str, float]:
    """Rates of Aer's own gates now: flops [FLOP/s] of a two-qubit unitary, bandwidth [B/s], launch_s [s]."""
    import numpy as np

    from quantum.state import AerRows

    n, repetitions = 14, 32
    state = np.zeros((1, 1 << n), dtype=np.complex128)
    state[0, 0] = 1.0
    matrix = np.eye(4, dtype=np.complex128)[::-1].copy()

    def seconds(gates: int) -> float:
        start = time.perf_counter()
        with AerRows(state if gates else state[:, :2]) as aer:
            for gate in range(gates):
                aer.unitary((gate % n, (gate + 1) % n), matrix)
        return time.perf_counter() - start

    seconds(1)
    gate_s = statistics.median(seconds(repetitions) for _ in range(5)) / repetitions
    launch_s = statistics.median(seconds(0) for _ in range(21))
    # a line of the matrix product: four complex multiplications (6 FLOP) and three additions (2 FLOP)
    return {"flops": 30.0 * (1 << n) / gate_s, "bandwidth": 32.0 * (1 << n) / gate_s, "launch_s": launch_s}


def torch_device(name: str) -> str:
    """Where the tensors of an Aer stage live."""
    return "cpu"


def compile(module: torch.nn.Module, example: Any, device_name: str) -> Callable[[Any, Any], Any]:
    """The module itself, run eagerly: `(x, context) -> y`."""

    def run(x: Any, context: Any) -> Any:
        return module(x, context)

    return run


def launches(device_name: str) -> dict[str, int]:
    """Operations that Aer has executed in this process, by name."""
    from quantum.state import operation_counts

    return operation_counts()


def _cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))
