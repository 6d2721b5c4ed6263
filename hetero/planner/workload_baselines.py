"""Simple placements of a workload, for comparison: what a plan is worth is what it saves over these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hetero.errors import PlacementError
from hetero.planner.contiguous import homes, largest_load
from hetero.planner.contract import contract
from hetero.planner.ideals import Search
from hetero.planner.lattice import lattice
from hetero.planner.workload_plan import max_load

if TYPE_CHECKING:
    from collections.abc import Callable

    from hetero.planner.contract import Contraction
    from hetero.planner.workload import Workload


@dataclass(frozen=True)
class WorkloadBaseline:
    """A simple placement.

    Attributes:
        name: what it does.
        devices: index of each operator's device; empty: it can't be made.
        value: largest load; None: it breaks a rule.
        reason: why.
    """

    name: str
    devices: tuple[int, ...]
    value: float | None
    reason: str = ""


def baselines(workload: Workload, *, contiguous: bool) -> list[WorkloadBaseline]:
    """Everything on one device of each class, greedy by bytes, and the best split of one topological order."""
    graph = contract(workload)
    ways: list[tuple[str, Callable[[], list[int]]]] = []
    for c, kind in enumerate(workload.classes):
        if kind.count:
            alone = [workload.class_of.index(c)] * len(graph.times)
            ways.append((f"all on one {kind.name}", lambda alone=alone: alone))  # type: ignore[misc]
    ways.append(("greedy by bytes", lambda: _by_bytes(workload, graph)))
    ways.append(("best split of one topological order", lambda: _split(workload, graph)))
    return [_priced(workload, graph, name, way, contiguous=contiguous) for name, way in ways]


def _priced(
    workload: Workload, graph: Contraction, name: str, way: Callable[[], list[int]], *, contiguous: bool
) -> WorkloadBaseline:
    try:
        devices = tuple(np.array(way())[graph.node_of].tolist())
        return WorkloadBaseline(name, devices, max_load(workload, devices, contiguous=contiguous))
    except PlacementError as error:
        return WorkloadBaseline(name, (), None, error.message)


def _by_bytes(workload: Workload, graph: Contraction) -> list[int]:
    """Fill the devices in turn, in topological order, as who knows bytes alone does."""
    kinds = {kind: c for c, kind in enumerate(graph.kinds)}
    device, used, homes = 0, 0.0, []
    for node, size in enumerate(graph.nbytes.tolist()):
        while True:
            if device == len(workload.devices):
                raise PlacementError("the devices are full before all operators are placed")
            c = kinds[workload.class_of[device]]
            if math.isfinite(graph.times[node, c]) and used + size <= graph.memory[c]:
                break
            device, used = device + 1, 0.0
        used += size
        homes.append(device)
    return homes


def _split(workload: Workload, graph: Contraction) -> list[int]:
    """The order is fixed; the cuts and the classes of the pieces are the best there are (to a thousandth)."""
    chain = lattice(graph, [[node - 1] if node else [] for node in range(len(graph.times))], limit=len(graph.times) + 1)
    assert chain is not None
    search, shares = Search(graph, chain), None
    low, high = 0.0, math.inf
    while low < high * 0.999:
        found = search.shares((low + high) / 2)
        if found is None and not math.isfinite(high):
            break
        if found is None:
            low = (low + high) / 2
        else:
            shares, high = found, largest_load(graph, found)
    if shares is None:
        raise PlacementError("no split of the order fits into memory")
    return homes(workload, graph, shares)
