"""How many replicas of which pipelines: column generation with a certified bound.

With x_p replicas of pipeline p, bottleneck T_p and u_pc devices of class c, the fleet hands out

    max  sum of x_p / T_p   with   sum of u_pc x_p <= n_c,   x_p whole.

There are far too many pipelines to list. The linear relaxation over some of them gives each device a worth w_c, and
pricing (`fleet_core.sweep`) the pipelines that earn more than their devices are worth, until none is left. For any
worths, if no pipeline's return 1 / (T_p u_p w) exceeds R, then R w is a feasible solution of the dual, so that
R times the worth of the whole fleet bounds every plan. Nothing in that depends on the grid of T or on a solver.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from hetero.planner import fleet_core

if TYPE_CHECKING:
    from hetero.planner.class_problem import ClassChain
    from hetero.planner.problem import Floats
    from hetero.planner.symmetry import Ints

_STEPS = (3e-2, 3e-3, 3e-4, 3e-5)
_ROUNDS = 40
_MOST = 400
_MARGINS = (1, 3, 10, 40)
_ENOUGH = 3e-4

Path = tuple[tuple[int, int], ...]
"""Class and end of each stage."""


@dataclass(frozen=True)
class Column:
    """A pipeline, the time between two micro-batches that it hands out [s], and its devices by class."""

    path: Path
    bottleneck_s: float
    used: tuple[int, ...]


@dataclass(frozen=True)
class FleetSolution:
    """Replicas of pipelines.

    Attributes:
        replicas: each pipeline and its number.
        throughput: of all together [1/s].
        upper_bound: no plan's throughput is larger [1/s].
        worth: (C,) what one more device of a class adds to the relaxation's throughput [1/s].
    """

    replicas: tuple[tuple[Column, int], ...]
    throughput: float
    upper_bound: float
    worth: Floats


def solve_fleet(chain: ClassChain, counts: Ints, *, most_stages: int, deadline: float) -> FleetSolution:
    """The best replicas found by the deadline (`time.monotonic()`), with a bound.

    Args:
        chain: layers and classes; its own counts are not used.
        counts: (C,) devices of each class.
        most_stages: of a pipeline.
        deadline: the bound's search ends there, and so does that of whole numbers.
    """
    pricing = _Pricing(chain, most_stages)
    columns = pricing.first()
    worth, bound = np.ones(len(counts)), np.inf
    scale = min((column.bottleneck_s for column in columns), default=1.0)
    half = time.monotonic() + (deadline - time.monotonic()) / 2
    for step in _STEPS:
        for _ in range(_ROUNDS):
            if not columns or (time.monotonic() > half and bound < np.inf):
                break
            worth = _worths(columns, counts, scale)
            gain, new = pricing.better(worth / scale, step)
            bound = min(bound, gain * float(worth @ counts) / scale)
            before = len(columns)
            columns = list(dict.fromkeys([*columns, *new]))
            if gain <= 1 + 3 * step or len(columns) == before:
                break
    replicas = _whole(columns, counts, bound, deadline)
    total = sum(n / column.bottleneck_s for column, n in replicas)
    return FleetSolution(replicas, total, max(bound, total) if columns else 0.0, worth / scale)


class _Pricing:
    """The search of pipelines worth having."""

    def __init__(self, chain: ClassChain, most_stages: int) -> None:
        runs = np.isfinite(chain.forward)
        times = np.where(runs, chain.forward, 0.0)
        self.loads = np.ascontiguousarray(np.vstack([np.zeros(times.shape[1]), np.cumsum(times, axis=0)]).T)
        self.fixed = np.ascontiguousarray(chain.overhead[:, 0])
        self.stop = chain.stops()
        self.hops = chain.hops() if most_stages > 1 else np.full_like(chain.hops(), np.inf)
        self.most_stages = most_stages
        possible = self.hops[np.isfinite(self.hops)].max(initial=0.0)
        self.largest = max(float((self.loads[:, -1] + self.fixed).max()), float(possible))

    def first(self) -> list[Column]:
        """Pipelines of all speeds where each device is worth as much as any other."""
        return self._sweep(np.full(len(self.fixed), 1e-300), 3e-2)[1]

    def better(self, worth: Floats, step: float) -> tuple[float, list[Column]]:
        """A bound on the return of all pipelines, and some with one above 1."""
        return self._sweep(worth, step)

    def _sweep(self, worth: Floats, step: float) -> tuple[float, list[Column]]:
        gain, n, slowest, lengths, paths = fleet_core.sweep(
            self.loads, self.fixed, self.stop, self.hops, worth, self.largest, step, self.most_stages, _MOST
        )
        found = []
        for k in range(n):
            path = tuple((int(c), int(j)) for c, j in paths[k, : lengths[k]])
            used = np.bincount([c for c, _ in path], minlength=len(self.fixed))
            found.append(Column(path, float(slowest[k]), tuple(used.tolist())))
        return float(gain), found


def _matrix(columns: list[Column]) -> sparse.csc_array:
    """(C, P) devices of each class that a pipeline takes."""
    return sparse.csc_array(np.array([column.used for column in columns], float).T)


def _worths(columns: list[Column], counts: Ints, scale: float) -> Floats:
    """(C,) dual prices of the relaxation over these pipelines, in units of 1 / scale."""
    gains = np.array([scale / column.bottleneck_s for column in columns])
    found = linprog(-gains, A_ub=_matrix(columns), b_ub=counts.astype(float), method="highs")
    worth: Floats = np.maximum(0.0, -found.ineqlin.marginals)
    return worth


def _whole(columns: list[Column], counts: Ints, bound: float, deadline: float) -> tuple[tuple[Column, int], ...]:
    """Whole numbers of replicas: most of the relaxation's rounded down, and the rest by branch and bound.

    The more of the relaxation is left open, the better and the slower: margin after margin, until the gap is small.
    """
    columns = [column for column in columns if all(u <= n for u, n in zip(column.used, counts, strict=True))]
    if not columns:
        return ()
    gains = np.array([1.0 / column.bottleneck_s for column in columns])
    gains /= gains.max()
    matrix = _matrix(columns)
    relaxed = linprog(-gains, A_ub=matrix, b_ub=counts.astype(float), method="highs")
    best, value = np.floor(relaxed.x + 1e-9), -1.0
    top = float(np.max([1.0 / column.bottleneck_s for column in columns]))
    for margin in _MARGINS:
        fixed = np.maximum(0.0, np.floor(relaxed.x + 1e-9) - margin)
        left = counts - matrix @ fixed
        limit = max(0.1, (deadline - time.monotonic()) / 2)
        found = milp(
            -gains,
            constraints=LinearConstraint(matrix, -np.inf, left),
            integrality=np.ones(len(gains)),
            bounds=Bounds(0, np.inf),
            options={"time_limit": limit, "mip_rel_gap": _ENOUGH / 10},
        )
        if found.x is not None and float(gains @ (fixed + np.round(found.x))) > value:
            best = fixed + np.round(found.x)
            value = float(gains @ best)
        if value * top >= bound * (1 - _ENOUGH) or time.monotonic() > deadline:
            break
    assert ((matrix @ best) <= counts).all()
    return tuple((columns[k], int(best[k])) for k in np.flatnonzero(best))
