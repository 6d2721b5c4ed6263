"""Devices that a plan can swap without changing its cost: eight of a kind are one class with a count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from hetero.planner.problem import Problem

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Classes:
    """Devices grouped by interchangeability.

    Attributes:
        members: indices of the devices of each class.
        of: (D,) class of each device.
        previous: (D,) the member before it in its class, -1 for the first. A search that opens a device only after
            the previous one meets each plan in one of its symmetric forms alone.
    """

    members: tuple[tuple[int, ...], ...]
    of: Ints
    previous: Ints

    @property
    def representatives(self) -> list[int]:
        """The first member of each class."""
        return [group[0] for group in self.members]


def classes(problem: Problem) -> Classes:
    """The classes of interchangeable devices of a problem."""
    groups: list[list[int]] = []
    for device in range(len(problem.devices)):
        alike = (group for group in groups if problem.contiguous and _interchangeable(problem, group[0], device))
        group = next(alike, None)
        if group is None:
            groups.append([device])
        else:
            group.append(device)
    of, previous = np.zeros(len(problem.devices), np.int64), np.full(len(problem.devices), -1)
    for k, group in enumerate(groups):
        of[group] = k
        previous[group[1:]] = group[:-1]
    return Classes(tuple(tuple(group) for group in groups), of, previous)


def _interchangeable(problem: Problem, u: int, v: int) -> bool:
    """Whether swapping two devices maps the problem onto itself."""
    others = [k for k in range(len(problem.devices)) if k not in (u, v)]
    if problem.conflicts[u] != problem.conflicts[v] or v in problem.conflicts[u]:
        return False
    if problem.limits[u] != problem.limits[v]:
        return False
    of_layers = (problem.forward, problem.backward, problem.calls, problem.fixed, problem.saved, problem.kept)
    if not all(np.array_equal(table[:, u], table[:, v]) for table in of_layers):
        return False
    of_devices = (problem.overhead, problem.contention, problem.rate, problem.busy_rate)
    if not all(np.array_equal(table[u], table[v]) for table in of_devices):
        return False
    if any((u in crew) != (v in crew) for crew in problem.crews):
        return False
    for table in (problem.latency, problem.inverse_bandwidth):
        outward = np.array_equal(table[u, others], table[v, others])
        inward = np.array_equal(table[others, u], table[others, v])
        if not (outward and inward and table[u, v] == table[v, u]):
            return False
    swapped = np.arange(len(problem.devices))
    swapped[[u, v]] = v, u
    if {medium[np.ix_(swapped, swapped)].tobytes() for medium in problem.media} != {m.tobytes() for m in problem.media}:
        return False
    sharing = [group for group in problem.core_groups if len(group) > 1 and (u in group) != (v in group)]
    pools = [{pool.limit for pool in problem.pools if k in pool.members and len(pool.members) == 1} for k in (u, v)]
    shared_pools = [
        pool for pool in problem.pools if len(pool.members) > 1 and (u in pool.members) != (v in pool.members)
    ]
    return not sharing and not shared_pools and pools[0] == pools[1]
