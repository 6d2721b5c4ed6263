"""Compile the planner's kernels once, so that the first plan needn't wait: `python -m hetero.planner.compiled`.

numba keeps machine code beside the sources, or in the user's cache where it can't write there.
"""

from __future__ import annotations

import importlib

import numpy as np

from hetero.planner.graph import plan_workload
from hetero.planner.workload import ACCELERATOR, CPU, DeviceClass, Workload


def example(n: int = 12) -> Workload:
    """A ladder of n operators for two accelerators and a processor: it needs every stage of every solver.

    Args:
        n: even.
    """
    rungs = [(i, i + 2) for i in range(n - 2)] + [(i, i + 1) for i in range(0, n, 2)]
    times = np.array([[1.0 + i % 3, 10.0 + i % 5] for i in range(n)])
    return Workload(
        ids=tuple(range(n)),
        times=times,
        transfers=np.array([[0.1 + i % 2 / 10, 0.0] for i in range(n)]),
        nbytes=np.ones(n),
        edges=np.array(rungs, np.int64),
        is_backward=np.zeros(n, bool),
        colours=np.arange(n),
        classes=(DeviceClass(ACCELERATOR, 2, 0.8 * n), DeviceClass(CPU, 1)),
    )


def compile_all() -> None:
    """Load the kernels with fixed signatures, and solve a small graph by every solver for the others."""
    for name in ("dominance", "class_core", "fleet_core"):
        importlib.import_module(f"hetero.planner.{name}")
    importlib.import_module("hetero.schedule_clock")
    for objective, contiguous in (("throughput", True), ("throughput", False), ("latency", True)):
        plan_workload(example(), objective=objective, contiguous=contiguous)


if __name__ == "__main__":
    compile_all()
