"""A search over one lattice: its arrays, its tails, and targets to get below."""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hetero.planner.graph_latency_kernels import WIDE, Labels, labels, pool, scratch, tails
from hetero.planner.graph_latency_lattice import MAX_OPEN, Lattice, ideals_of, lattice_of
from hetero.planner.graph_latency_read import Step

if TYPE_CHECKING:
    from hetero.planner.graph_latency_units import Units
    from hetero.planner.workload import Floats, Workload

_MAX_LABELS = 3_000_000  # pages of the pool that no label reaches cost nothing
_CHUNK = 64  # ideals between two looks at the clock
_ROUNDING = 1 + 1e-12  # of memory limits, as in `workload_plan.check`
WORKERS = min(2, os.cpu_count() or 1)


@dataclass(frozen=True)
class Found:
    """What a search gave.

    Attributes:
        steps: of the best placement below the ceiling; None: there is none, or none was seen.
        value: of that placement in the search's arithmetic, otherwise the ceiling.
        is_exhaustive: nothing below `value` was left out.
    """

    steps: list[Step] | None
    value: float
    is_exhaustive: bool


@dataclass
class Run:
    """One lattice.

    Attributes:
        units: what it is made of.
        lattice: its arrays.
        n_devices, capacity: accelerators and bytes of each.
        q, z: tails (`graph_latency_kernels.tails`).
    """

    units: Units
    lattice: Lattice
    n_devices: int
    capacity: float
    q: Floats
    z: Floats

    @classmethod
    def of(cls, workload: Workload, units: Units, *, max_ideals: int) -> Run | None:
        """None: the lattice is larger than `max_ideals`, or has too many open outputs."""
        layers = ideals_of(units.preds, limit=max_ideals)
        if layers is None:
            return None
        lattice = lattice_of(workload, units, layers)
        if int(np.diff(lattice.graph.open_ptr).max()) > MAX_OPEN:
            return None
        kind = workload.classes[0]
        n_devices = min(kind.count, len(units.members))
        q = np.full((len(lattice.graph.open_output) + 1, n_devices + 1), WIDE)
        z = np.full((len(lattice.ideals), n_devices + 1), WIDE)
        return cls(units, lattice, n_devices, kind.memory_bytes * _ROUNDING, q, z)

    @property
    def root(self) -> float:
        """The tails' bound of the latency."""
        return float(self.z[0, -1])

    def fill_tails(self, deadline: float) -> bool:
        """Compute all tails, layer by layer, an ideal's after those of larger ones; false: time is up."""
        graph = self.lattice.graph
        spaces = [scratch(graph) for _ in range(WORKERS)]
        with ThreadPoolExecutor(WORKERS) as threads:
            for first, last in reversed(self.lattice.layers()):
                if time.monotonic() > deadline:
                    return False
                cuts = np.linspace(first, last, WORKERS + 1).astype(int).tolist()
                jobs = [
                    threads.submit(tails, graph, space, self.n_devices, self.capacity, low, high, self.q, self.z)
                    for space, low, high in zip(spaces, cuts[:-1], cuts[1:], strict=True)
                ]
                for job in jobs:
                    job.result()
        return True

    def search(self, ceiling: float, limit: int, deadline: float) -> Found:
        """The best placement of a latency below `ceiling`, with at most `limit` labels of an ideal and device count."""
        graph, space, n_ideals = self.lattice.graph, scratch(self.lattice.graph), len(self.lattice.ideals)
        found = pool(graph, self.n_devices, _MAX_LABELS)
        size, best, reached, is_complete = 1, min(ceiling, WIDE), 0, True
        while reached < n_ideals:
            until = min(n_ideals, reached + _CHUNK)
            stop, size, best, dropped = labels(
                graph, space, self.n_devices, self.capacity, reached, until, self.q, self.z, found, size, limit, best
            )
            is_complete = is_complete and not dropped
            if stop < until or time.monotonic() > deadline:
                is_complete = False
                break
            reached = until
        label = _best_of(found, n_ideals - 1)
        if label < 0:
            return Found(None, ceiling, is_complete)
        return Found(self._steps(found, label), float(found.done[label]), is_complete)

    def _steps(self, found: Labels, label: int) -> list[Step]:
        """The way to a label of the full ideal."""
        steps = []
        while (parent := int(found.parent[label])) >= 0:
            units = self.lattice.added(int(found.ideal[parent]), int(found.ideal[label]))
            steps.append(Step(tuple(units), bool(found.is_call[label])))
            label = parent
        return steps[::-1]


def _best_of(found: Labels, ideal: int) -> int:
    """The label of an ideal with the least value; -1: there is none."""
    best, least = -1, math.inf
    for label in found.head[ideal].tolist():
        while label >= 0:
            if found.done[label] < least:
                best, least = label, float(found.done[label])
            label = int(found.following[label])
    return best
