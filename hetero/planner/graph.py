"""A graph of operators placed on classes of devices: one way in to all graph solvers, each answer priced again."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING

from hetero.errors import PlacementError
from hetero.planner.workload_plan import OPTIMAL, Placement, max_load

if TYPE_CHECKING:
    from hetero.planner.workload import Workload

THROUGHPUT, LATENCY = "throughput", "latency"
OBJECTIVES = (THROUGHPUT, LATENCY)

# Solvers that hold integers round costs; a price this close to theirs (relative) is the same.
_ROUNDING = 1e-6


def plan_workload(
    workload: Workload, *, objective: str = THROUGHPUT, contiguous: bool = True, time_limit_s: float = 60.0
) -> Placement:
    """The best placement of a graph's operators, with its proof.

    Args:
        workload: operators, edges and classes of devices.
        objective: `throughput`: the load of the busiest device, hence the time from one sample to the next in the
            steady state; `latency`: the time of a single sample, of an inference graph.
        contiguous: the forward operators of each device are an interval of the graph. For throughput the devices can
            be ordered so that no forward edge leads back: their forward operators are the differences of a chain of
            ideals, in which edges between backward operators whose colour has no forward one count in reverse. It is of
            such placements that the bound speaks; intervals that lead to one another in a circle can cost less.
        time_limit_s: after it the best placement known is returned, with a lower bound that holds all the same.

    Raises:
        PlacementError: no placement keeps to memory and support; or the request makes no sense.
    """
    if objective not in OBJECTIVES:
        raise PlacementError(f"unknown objective {objective!r}", expected=" or ".join(OBJECTIVES))
    if not (math.isfinite(time_limit_s) and time_limit_s > 0):
        raise PlacementError(f"the time limit is {time_limit_s}", expected="seconds, more than 0")
    if objective == LATENCY:
        placement = _latency(workload, contiguous=contiguous, time_limit_s=time_limit_s)
    elif contiguous:
        from hetero.planner import contiguous as intervals

        placement = intervals.solve(workload, time_limit_s=time_limit_s)
    else:
        placement = _noncontiguous(workload, time_limit_s=time_limit_s)
    price = evaluate_placement(workload, placement, objective=objective, contiguous=contiguous)
    assert math.isclose(price, placement.value, rel_tol=_ROUNDING), (price, placement.value)
    bound = price if placement.proof == OPTIMAL else min(placement.lower_bound, price)
    return dataclasses.replace(placement, value=price, lower_bound=bound)


def evaluate_placement(
    workload: Workload, placement: Placement, *, objective: str = THROUGHPUT, contiguous: bool = True
) -> float:
    """Price of a placement, by code that no solver shares.

    Raises:
        PlacementError: it breaks a rule.
    """
    if objective == THROUGHPUT:
        return max_load(workload, placement.devices, contiguous=contiguous)
    from hetero.planner.workload_latency import latency

    return latency(workload, placement.devices, contiguous=contiguous)


def _latency(workload: Workload, *, contiguous: bool, time_limit_s: float) -> Placement:
    from hetero.planner import graph_latency

    return graph_latency.solve(workload, contiguous=contiguous, time_limit_s=time_limit_s)


def _noncontiguous(workload: Workload, *, time_limit_s: float) -> Placement:
    """From the best contiguous placement, if there is one: the answer is never worse."""
    from hetero.planner import contiguous, noncontiguous

    began = time.perf_counter()
    try:
        start = contiguous.solve(workload, time_limit_s=time_limit_s / 4)
    except PlacementError:
        start = None  # what no interval allows may still be possible
    left = max(time_limit_s - (time.perf_counter() - began), 0.1 * time_limit_s)
    placement = noncontiguous.solve(workload, time_limit_s=left, start=start)
    return dataclasses.replace(placement, seconds=time.perf_counter() - began)
