"""The least possible load of the busiest device, where loads don't add up over devices.

Without transfers, shared cores and shared memory, whoever reaches further along the chain within a limit T is always at
least as well off. So the furthest layer that a set of devices can reach is found set by set, and T by bisection. For
the real problem the result is a lower bound; where the placement found breaks none of its rules, it is the optimum.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero.planner.bounds import States
    from hetero.planner.problem import Floats, Problem
    from hetero.planner.symmetry import Classes

_RELATIVE_PRECISION = 1e-13


@dataclass(frozen=True)
class Bottleneck:
    """The least largest load [s] (a bound from below) and a placement with it; no placement where none was found."""

    floor: float
    path: tuple[int, ...]


def bottleneck(
    problem: Problem, classes: Classes, states: States, *, deadline: float, backward: bool = False
) -> Bottleneck:
    """The least largest forward (or backward) load of any device, as closely as the deadline allows."""
    if len(states.after) == 1:
        return Bottleneck(0.0, ())
    reach = _Reach(problem, classes, states, backward)
    low, high = 0.0, reach.upper
    path = reach.path(high)
    if not path:
        return Bottleneck(0.0, ())
    while high - low > _RELATIVE_PRECISION * high and time.monotonic() < deadline:
        middle = (low + high) / 2 if low else high / 2
        if found := reach.path(middle):
            path, high = found, min(middle, reach.load(found))
        else:
            low = middle
        if high < 1e-300:
            break
    return Bottleneck(low, path)


class _Reach:
    def __init__(self, problem: Problem, classes: Classes, states: States, backward: bool) -> None:
        self.classes, self.states, self.n_layers = classes, states, len(problem.layers)
        times = problem.backward if backward else problem.forward
        runs = np.isfinite(problem.forward)
        self.times = np.where(runs, times, 0.0)
        self.overhead: Floats = problem.overhead[:, int(backward)]
        self.reps = classes.representatives
        self.prefix = np.vstack([np.zeros(len(runs[0])), np.cumsum(self.times, axis=0)])
        self.stop = np.empty((len(self.reps), self.n_layers + 1), np.int64)
        for c, d in enumerate(self.reps):
            nbytes = np.concatenate([[0], np.cumsum(problem.least_bytes[:, d])])
            fits = np.searchsorted(nbytes.astype(float), nbytes + float(problem.limits[d]), side="right") - 1
            gaps = np.append(np.flatnonzero(~runs[:, d]), self.n_layers)
            self.stop[c] = np.minimum(fits, gaps[np.searchsorted(gaps, np.arange(self.n_layers + 1))])
        self.upper = float(self.prefix[-1].max() + self.overhead.max())

    def path(self, limit: float) -> tuple[int, ...]:
        """A placement within the limit; empty: there is none."""
        far = self._far(limit)
        after = self.states.after.tolist()
        reached, origin = [-1] * len(after), [(-1, -1)] * len(after)
        reached[0] = 0
        for state, following in enumerate(after):
            if reached[state] < 0:
                continue
            for c, then in enumerate(following):
                if then >= 0 and far[c][reached[state]] > reached[then]:
                    reached[then], origin[then] = far[c][reached[state]], (state, c)
                    if reached[then] == self.n_layers:
                        return self._trace(then, reached, origin)
        return ()

    def _far(self, limit: float) -> list[list[int]]:
        """For each class, the furthest layer boundary reachable from each boundary by one stage."""
        far = []
        for c, d in enumerate(self.reps):
            ends: NDArray[np.int64] = (
                np.searchsorted(self.prefix[:, d], self.prefix[:, d] + (limit - self.overhead[d]), side="right") - 1
            )
            far.append(np.minimum(ends, self.stop[c]).tolist())
        return far

    def _trace(self, state: int, reached: list[int], origin: list[tuple[int, int]]) -> tuple[int, ...]:
        runs: list[tuple[int, int]] = []
        while state:
            before, c = origin[state]
            runs.append((c, reached[state] - reached[before]))
            state = before
        used = [0] * len(self.reps)
        path: list[int] = []
        for c, length in reversed(runs):
            path += [self.classes.members[c][used[c]]] * length
            used[c] += 1
        return tuple(path)

    def load(self, path: tuple[int, ...]) -> float:
        """The largest load of a device."""
        loads = self.overhead.copy()
        np.add.at(loads, list(path), self.times[np.arange(len(path)), list(path)])
        return float(loads[list(path)].max())
