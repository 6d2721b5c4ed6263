"""The answer of a graph solver, and its price by formulas that no solver shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hetero.errors import PlacementError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.planner.workload import Workload

OPTIMAL, BOUNDED, HEURISTIC = "optimal", "bounded", "heuristic"


@dataclass(frozen=True)
class Placement:
    """Where each operator runs, with the proof of its quality.

    Attributes:
        devices: (N,) index into `Workload.devices` for each operator.
        value: of the objective, in the workload's unit.
        lower_bound: no placement of the kind searched has a smaller value.
        proof: `optimal`, `bounded` or `heuristic`.
        solver: what found it.
        seconds: of the search.
    """

    devices: tuple[int, ...]
    value: float
    lower_bound: float
    proof: str
    solver: str
    seconds: float

    @property
    def gap(self) -> float:
        """(value - lower_bound) / value."""
        return (self.value - self.lower_bound) / self.value if self.value else 0.0

    def to_json(self, workload: Workload) -> dict[str, Any]:
        """What `heteroq plan --workload FILE --json` prints."""
        names = workload.devices
        return {
            "value": self.value,
            "lower_bound": self.lower_bound,
            "gap": self.gap,
            "proof": self.proof,
            "solver": self.solver,
            "seconds": self.seconds,
            "assignment": {str(name): names[d] for name, d in zip(workload.ids, self.devices, strict=True)},
        }


def max_load(workload: Workload, devices: Sequence[int], *, contiguous: bool) -> float:
    """Load of the busiest device: the time from one sample to the next in the steady state.

    Args:
        workload: the graph.
        devices: (N,) index of each operator's device.
        contiguous: check that the forward operators of each device are an interval of the graph: none of their
            paths leaves the device and comes back.

    Raises:
        PlacementError: the placement breaks a rule: memory, colours, an operator on a device that can't run it, or
            contiguity.
    """
    check(workload, devices, contiguous=contiguous)
    return max(load.total for load in loads(workload, devices))


@dataclass(frozen=True)
class DeviceLoad:
    """What a device does for one sample: its time in computation and in transfers, and what it holds.

    Attributes:
        compute: sum of its operators' times.
        transfers: sum over the outputs that cross its boundary, each once.
        nbytes: of its operators [B].
        operators: how many.
    """

    compute: float
    transfers: float
    nbytes: float
    operators: int

    @property
    def total(self) -> float:
        """Of computation and transfers."""
        return self.compute + self.transfers


def loads(workload: Workload, devices: Sequence[int]) -> list[DeviceLoad]:
    """Load of each device, in the order of `Workload.devices`."""
    classes = workload.class_of
    compute, transfers, nbytes, count = ([0.0] * len(classes) for _ in range(4))
    for node, device in enumerate(devices):
        compute[device] += float(workload.times[node, classes[device]])
        nbytes[device] += float(workload.nbytes[node])
        count[device] += 1
    touched: dict[int, set[int]] = {}
    for source, target in workload.edges.tolist():
        if devices[source] != devices[target]:
            touched.setdefault(source, set()).update((devices[source], devices[target]))
    for node, ends in touched.items():
        for device in ends:
            transfers[device] += float(workload.transfers[node, classes[device]])
    return [DeviceLoad(*row[:3], int(row[3])) for row in zip(compute, transfers, nbytes, count, strict=True)]


def check(workload: Workload, devices: Sequence[int], *, contiguous: bool) -> None:
    """Refuse a placement that breaks a rule; see `max_load`."""
    classes, names = workload.class_of, workload.devices
    if len(devices) != len(workload.ids):
        raise PlacementError(f"{len(devices)} operators are placed", expected=str(len(workload.ids)))
    memory = np.zeros(len(names))
    homes: dict[int, int] = {}
    for node, device in enumerate(devices):
        if not np.isfinite(workload.times[node, classes[device]]):
            raise PlacementError(f"operator {workload.ids[node]!r} can't run on {names[device]}")
        memory[device] += workload.nbytes[node]
        if homes.setdefault(int(workload.colours[node]), device) != device:
            raise PlacementError(f"operator {workload.ids[node]!r} is apart from others of its colour")
    for device, used in enumerate(memory.tolist()):
        limit = workload.classes[classes[device]].memory_bytes
        if used > limit * (1 + 1e-12):
            raise PlacementError(f"{names[device]} is too small", found=f"{used:.0f} B", expected=f"{limit:.0f} B")
    if contiguous:
        _check_contiguous(workload, devices)


def _check_contiguous(workload: Workload, devices: Sequence[int]) -> None:
    """No path of forward operators leaves a device and comes back to it."""
    forward = ~workload.is_backward
    targets: dict[int, list[int]] = {}
    for source, target in workload.edges.tolist():
        if forward[source] and forward[target]:
            targets.setdefault(source, []).append(target)
    for device in set(devices):
        own = {node for node, d in enumerate(devices) if d == device and forward[node]}
        stack = [t for node in own for t in targets.get(node, ()) if t not in own]
        seen = set(stack)
        while stack:
            for target in targets.get(stack.pop(), ()):
                if target in own:
                    raise PlacementError(
                        f"the operators on {workload.devices[device]} are not contiguous",
                        found=f"a path leaves the device and comes back to {workload.ids[target]!r}",
                    )
                if target not in seen:
                    seen.add(target)
                    stack.append(target)
