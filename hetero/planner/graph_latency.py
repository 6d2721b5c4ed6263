"""The placement of least single-sample latency on a graph of operators, one call to each accelerator, with a bound.

Any placement runs as a sequence of calls and of units on processors in which nothing precedes what it reads: a path
through the lattice of ideals (`graph_latency_lattice`). What the rest of the path depends on is when each open output
is ready and how many accelerators are left; the price of a call depends on the two ideals alone. So:

1. Backward, a bound of the time that each open output of each ideal still needs, for each number of accelerators left:
   the least over all ways to go on, output by output (`tails`). At the empty ideal it bounds the latency.
2. Forward, labels: one vector of ready times for each way to come to an ideal. A label is dropped when another one is
   as good in every figure, or when a ready time plus its tail reaches the target (`labels`). A complete search that
   finds nothing below the target proves it a bound. Targets start at the bound of step 1, and so few labels survive
   that most ideals are never looked at; they grow until a placement is found, which is then the target to undercut.

Lattices of more than `_MANY_IDEALS` are preceded by smaller ones, of fused units (`graph_latency_fuse`): one that gives
placements and one that bounds them, so that there are both should time end before step 1 does.
Before all that, the same search on one topological order, a lattice that is a chain, gives a placement in no time.
Where even the fused lattices are too large, it is all there is, beside the bound of the longest path.
Cost model: `workload_latency`, which also prices the answer.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hetero.errors import PlacementError
from hetero.planner.graph_latency_fuse import fused
from hetero.planner.graph_latency_kernels import WIDE
from hetero.planner.graph_latency_read import nothing_fits, placement_of
from hetero.planner.graph_latency_run import Run
from hetero.planner.graph_latency_units import Units, longest_path, units_of
from hetero.planner.workload_latency import check_inference, latency
from hetero.planner.workload_plan import BOUNDED, OPTIMAL, Placement

if TYPE_CHECKING:
    from hetero.planner.graph_latency_read import Step
    from hetero.planner.workload import Workload

_MAX_IDEALS = 60_000
_MAX_EXACT_IDEALS = 5_000  # below, operators with bytes are units of their own rather than riders
_FEW, _ALL = 8, 1 << 60  # labels kept of an ideal and a number of accelerators: for a quick search, and a complete one
_TARGETS = (1e-7, 1e-3, 1e-2, 0.1, math.inf)  # above the bound of the tails
# What rounding may add up to: sums of some thousand terms, each off by 2^-53 of a partial sum.
_RELATIVE = 1e-9
_LONGEST = (4, 3, 2)  # chains of units that are fused
_LIGHT = 1 / 16  # share of an accelerator's memory that a fused unit may fill: heavier ones fit nowhere well
_MANY_IDEALS = 20_000  # above, units are fused first


def solve(workload: Workload, *, contiguous: bool, time_limit_s: float) -> Placement:
    """The best placement found within a time, with a bound for all placements.

    Args:
        workload: an inference graph. The number of its processors says only whether there are any: an operator on one
            never waits for another (`workload_latency`).
        contiguous: must be true: each accelerator is called once. Several calls are not searched.
        time_limit_s: a placement is returned even if the search is not over by then.

    Raises:
        PlacementError: no placement fits, or the workload is none for this objective.
    """
    begin = time.monotonic()
    check_inference(workload)
    if not contiguous:
        raise PlacementError(
            "latency is planned with one call to each accelerator",
            found="placements that are not contiguous are asked for",
            expected="contiguous placements",
            remedy="leave --no-contiguous away; `latency(..., contiguous=False)` still prices such a placement",
        )
    search = _Search(workload, begin + time_limit_s, longest_path(workload) * (1 - _RELATIVE))
    riding = units_of(workload, max_rider_bytes=math.inf)
    if all(math.isfinite(t) for t in riding.cpu):
        search.offer(riding, [])
    if riding.members and not search.is_over:
        search.chain(riding)
        search.lattice(riding)
    if search.devices is None:
        raise PlacementError("no placement was found in time", found=f"{time_limit_s} s", remedy="raise the time limit")
    bound = min(search.bound, search.value)
    proof = OPTIMAL if search.is_proven else BOUNDED
    seconds = time.monotonic() - begin
    return Placement(search.devices, search.value, bound, proof, "labels over ideals", seconds)


@dataclass
class _Search:
    """The best placement and bound so far."""

    workload: Workload
    deadline: float
    bound: float
    value: float = math.inf
    devices: tuple[int, ...] | None = None

    @property
    def is_proven(self) -> bool:
        return self.value * (1 - 2 * _RELATIVE) <= self.bound

    @property
    def is_over(self) -> bool:
        return self.is_proven or time.monotonic() > self.deadline

    def offer(self, units: Units, steps: list[Step]) -> None:
        """Keep a placement if it is the best so far."""
        devices = placement_of(self.workload, units, steps)
        value = latency(self.workload, devices, contiguous=True)
        if value < self.value:
            self.value, self.devices = value, devices

    def chain(self, units: Units) -> None:
        """Search one topological order."""
        order = tuple(frozenset({k - 1}) if k else frozenset() for k in range(len(units.members)))
        run = Run.of(self.workload, replace(units, preds=order), max_ideals=_MAX_IDEALS)
        if run is not None and run.fill_tails(self.deadline) and run.root < WIDE:
            self._descend(run, is_complete=False)

    def lattice(self, riding: Units) -> None:
        """Search all ideals."""
        exact = units_of(self.workload, max_rider_bytes=0.0)
        run = Run.of(self.workload, exact, max_ideals=_MAX_EXACT_IDEALS)
        if run is None:
            run = Run.of(self.workload, riding, max_ideals=_MAX_IDEALS)
        if run is None or len(run.lattice.ideals) > _MANY_IDEALS:
            self._coarse(riding)
        if run is None or self.is_over or not run.fill_tails(self.deadline):
            return
        if run.root >= WIDE:
            raise nothing_fits(self.workload)
        self.bound = max(self.bound, run.root * (1 - _RELATIVE))
        self._descend(run, is_complete=True)

    def _coarse(self, riding: Units) -> None:
        """Search lattices of fused units, which are much smaller: a placement and a bound that are nearly as good."""
        times = self.workload.times[:, 0].tolist()
        limit = self.workload.classes[0].memory_bytes * _LIGHT
        for longest, relaxed in itertools.product(_LONGEST, (True, False)):
            units = fused(riding, times, longest=longest, max_bytes=limit, relaxed=relaxed)
            run = Run.of(self.workload, units, max_ideals=_MANY_IDEALS)
            if run is not None and not self.is_over and run.fill_tails(self.deadline) and run.root < WIDE:
                self._descend(run, is_complete=relaxed, is_offered=not relaxed)

    def _descend(self, run: Run, *, is_complete: bool, is_offered: bool = True) -> None:
        """Raise the target until the best placement of a run is found.

        `is_complete`: the run leaves no placement out, so that what it doesn't find doesn't exist. `is_offered`: what
        it finds is a placement, not that of a relaxation.
        """
        for excess in _TARGETS:
            target = run.root * (1 + excess) if run.root > 0 else math.inf
            for limit in (_FEW, _ALL):
                ceiling = min(target, self.value * (1 - _RELATIVE))
                found = run.search(ceiling, limit, self.deadline)
                if found.steps is not None and is_offered:
                    self.offer(run.units, found.steps)
                if found.is_exhaustive:
                    break
            if not found.is_exhaustive:
                return
            if is_complete:
                self.bound = max(self.bound, found.value * (1 - _RELATIVE))
            if found.steps is not None or ceiling < target or self.is_over:
                return
