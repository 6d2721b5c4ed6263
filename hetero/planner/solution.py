"""What the chain's solvers give."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hetero.errors import PlacementError
from hetero.schedule import GPIPE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.planner.problem import Problem


class NotFoundInTimeError(PlacementError):
    """No placement was found, but there may be one."""


class NoneBetterError(PlacementError):
    """No placement below a known value was found; `lower_bound`: there is none below this."""

    def __init__(self, message: str, *, lower_bound: float) -> None:
        super().__init__(message)
        self.lower_bound = lower_bound


@dataclass(frozen=True)
class Solution:
    """A placement and the proof of its quality.

    Attributes:
        stages: (device, first layer, last layer) in execution order.
        value: the objective [s, J or USD].
        lower_bound: no placement of the kind searched has a smaller value.
        is_optimal: whether the search was complete.
        seconds: that it took.
        recomputed: layers that are run again in their backward pass.
    """

    stages: tuple[tuple[str, int, int], ...]
    value: float
    lower_bound: float
    is_optimal: bool
    seconds: float
    recomputed: tuple[int, ...] = ()

    def path(self, problem: Problem) -> list[int]:
        """Device of each layer, as an index."""
        return [problem.devices.index(name) for name, first, last in self.stages for _ in range(first, last + 1)]


def stages(problem: Problem, path: Sequence[int]) -> tuple[tuple[str, int, int], ...]:
    """(device, first, last) of each run of equal devices in a path."""
    cuts = [0, *(i for i in range(1, len(path)) if path[i] != path[i - 1]), len(path)]
    return tuple((problem.devices[path[a]], a, b - 1) for a, b in itertools.pairwise(cuts))


def store_what_fits(problem: Problem, path: Sequence[int], recomputed: Sequence[bool]) -> tuple[bool, ...]:
    """Recompute no layer for which there is room; for objectives in which a second forward pass costs nothing."""
    again = list(recomputed)
    for i in np.flatnonzero(recomputed).tolist():
        again[i] = False
        again[i] = not fits(problem, path, again)
    return tuple(again)


def fits(problem: Problem, path: Sequence[int], recomputed: Sequence[bool]) -> bool:
    """Whether a placement keeps to the limits of devices and pools."""
    filled, room = np.zeros(len(problem.devices), np.int64), np.zeros(len(problem.devices), np.int64)
    stage = np.cumsum([i > 0 and path[i] != path[i - 1] for i in range(len(path))])
    for i, (d, again) in enumerate(zip(path, recomputed, strict=True)):
        saved, kept = problem.saved[i, d], problem.kept[i, d]
        behind = problem.n_microbatches if problem.schedule == GPIPE else int(stage[-1] - stage[i]) + 1
        filled[d] += problem.fixed[i, d] + min(problem.n_microbatches, behind) * (kept if again else saved)
        room[d] = max(room[d], saved - kept if again else 0)
    filled += room
    pools = all(filled[list(pool.members)].sum() <= pool.limit for pool in problem.pools)
    return bool(pools and (filled <= problem.limits).all())
