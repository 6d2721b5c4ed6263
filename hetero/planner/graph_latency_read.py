"""From the steps of a search to a placement: riders are put where they go, as far as their bytes fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hetero.errors import PlacementError
from hetero.planner.graph_latency_units import neighbours
from hetero.planner.workload import CPU

if TYPE_CHECKING:
    from hetero.planner.graph_latency_units import Units
    from hetero.planner.workload import Workload


class Step(NamedTuple):
    """Units that run in one call of an accelerator, or on processors."""

    units: tuple[int, ...]
    is_call: bool


def placement_of(workload: Workload, units: Units, steps: list[Step]) -> tuple[int, ...]:
    """(N,) devices; calls go to accelerators in turn, all else to the first processor."""
    processor = workload.classes[0].count
    devices = [processor] * len(workload.ids)
    home = {}
    calls = [step for step in steps if step.is_call]
    for device, call in enumerate(calls):
        for unit in call.units:
            home[unit] = device
            for node in units.members[unit]:
                devices[node] = device
    _lead(workload, units, home, devices)
    for device in range(len(calls)):
        _shed(workload, units, device, devices)
    return tuple(devices)


def _lead(workload: Workload, units: Units, home: dict[int, int], devices: list[int]) -> None:
    """Put sources beside their readers where that is cheaper than moving their outputs."""
    for rider in units.sources:
        homes = {home.get(unit, -1) for unit in rider.units}
        is_cheaper = workload.times[rider.node, 0] <= workload.transfers[rider.node, 0]
        if is_cheaper and len(homes) == 1 and (device := homes.pop()) >= 0:
            devices[rider.node] = device


def _shed(workload: Workload, units: Units, device: int, devices: list[int]) -> None:
    """Send riders of a call that is over the memory limit to the processor, those that cost least first."""
    limit = workload.classes[0].memory_bytes
    used = sum(float(workload.nbytes[node]) for node, home in enumerate(devices) if home == device)
    if used <= limit:
        return
    reads, read_by = neighbours(workload)

    def cost(node: int) -> tuple[float, float]:
        """Transfers that are due once a rider is elsewhere; more bytes first among equals."""
        outside = [u for u in reads[node] if all(devices[v] == device for v in read_by[u])]
        own = workload.transfers[node, 0] if read_by[node] else 0.0
        return float(own + sum(workload.transfers[u, 0] for u in outside)), -float(workload.nbytes[node])

    riders = [rider.node for rider in (*units.sources, *units.sinks) if devices[rider.node] == device]
    for node in sorted(riders, key=cost):
        if used <= limit:
            break
        devices[node] = workload.classes[0].count
        used -= float(workload.nbytes[node])


def nothing_fits(workload: Workload) -> PlacementError:
    """Some operators run on accelerators alone, and don't fit there."""
    count, memory = workload.classes[0].count, workload.classes[0].memory_bytes
    bound_to = ~np.isfinite(workload.times[:, 1]) if workload.classes[1].count else np.ones(len(workload.ids), bool)
    return PlacementError(
        "no placement fits into the accelerators' memory, one contiguous call each",
        found=f"{workload.nbytes[bound_to].sum():.0f} B of operators that can't run on {CPU}, {count} accelerators",
        expected=f"at most {memory:.0f} B on each",
        remedy="add accelerators or memory, or let operators run on processors",
    )
