"""Throughput of a graph of operators without contiguity: any operator on any device, with a bound.

Two sides that meet. From above, simulated annealing (noncontiguous_search.py) runs beside everything else. From below,
column generation refutes limits on the largest load (noncontiguous_bound.py), the ones that matter first: 2 % below
the best value known, then the value itself; where one can't be refuted, bisection finds the largest that can. What
remains of the time goes to a complete search (noncontiguous_exact.py).
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from hetero.errors import PlacementError
from hetero.planner import noncontiguous_diagram as diagrams
from hetero.planner import noncontiguous_exact as exact
from hetero.planner.noncontiguous_bound import Refuter, rate_bound
from hetero.planner.noncontiguous_hypergraph import EXACT, from_workload, reduced
from hetero.planner.noncontiguous_search import Annealer, Schedule
from hetero.planner.workload_plan import BOUNDED, OPTIMAL, Placement, check, max_load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.planner.noncontiguous_hypergraph import Hypergraph
    from hetero.planner.workload import Ints, Workload

SOLVER = "column generation, annealing, CP-SAT"
GOAL = 0.02
_FINEST = 1e-4
_MOVES_PER_ITEM, _MOST_MOVES = 500, 3_000_000
_RUN_SHARE = 0.1
_USED_SHARE = 0.95  # the rest is for what can't be interrupted: a linear program, a pass through a diagram
_ATTEMPT_SHARE = 0.4
_POWERS, _HOTTEST = (8.0, 16.0, 4.0), (0.3, 1.0)


def solve(
    workload: Workload, *, time_limit_s: float, start: Placement | None = None, workers: int | None = None
) -> Placement:
    """The operators' devices for which the busiest is least busy.

    Args:
        workload: the graph; operators of one colour stay together, memory and unsupported operators are respected.
        time_limit_s: wall time; earlier if the optimum is proved.
        start: a placement to improve on, as the best contiguous one; the answer is never worse.
        workers: threads; None: one for each processor, two at most.

    Raises:
        PlacementError: an operator fits no device, or all of them together don't.
    """
    begun = time.perf_counter()
    deadline = begun + _USED_SHARE * time_limit_s
    graph = from_workload(workload)
    devices = start.devices if start is not None else _first_placement(workload, graph, time_limit_s)
    best = _Best(workload, devices)
    bound = _close_in(graph, best, deadline, workers or min(2, os.cpu_count() or 1)) if best.value > 0.0 else 0.0
    value = best.value
    bound = min(bound, value)
    return Placement(
        devices=best.devices,
        value=value,
        lower_bound=bound,
        proof=OPTIMAL if _is_closed(bound, value) else BOUNDED,
        solver=SOLVER,
        seconds=time.perf_counter() - begun,
    )


class _Best:
    """The best placement so far, priced by `max_load`; shared by threads."""

    def __init__(self, workload: Workload, devices: Sequence[int]) -> None:
        self._workload = workload
        self._lock = threading.Lock()
        self.devices = tuple(int(d) for d in devices)
        self.value = max_load(workload, self.devices, contiguous=False)

    def offer(self, graph: Hypergraph, items: Ints) -> None:
        """Take a partition of the graph's items if it is better."""
        devices = tuple(items[graph.item_of].tolist())
        try:
            value = max_load(self._workload, devices, contiguous=False)
        except PlacementError:  # bytes that the solver's arithmetic had rounded
            return
        with self._lock:
            if value < self.value:
                self.devices, self.value = devices, value

    def items(self, graph: Hypergraph) -> Ints | None:
        """(n,) the placement as one of the graph's items; None where it parts operators of one item."""
        devices = np.array(self.devices, np.int64)
        items = np.zeros(len(graph), np.int64)
        items[graph.item_of] = devices
        return items if (items[graph.item_of] == devices).all() else None


class _Search:
    """Runs of annealing, longer and longer, until stopped."""

    def __init__(self, best: _Best, deadline: float) -> None:
        self._best, self._deadline = best, deadline
        self._stop = np.zeros(1, np.bool_)
        self._n_runs = 0

    def stop(self) -> None:
        self._stop[0] = True

    def run_once(self, graph: Hypergraph) -> None:
        self._run(graph, Annealer(graph), _first_moves(graph))

    def run_until_stopped(self, graph: Hypergraph) -> None:
        annealer = Annealer(graph)
        moves = _first_moves(graph)
        while not self._stop[0] and time.perf_counter() < self._deadline and self._best.value > 0.0:
            begun = time.perf_counter()
            self._run(graph, annealer, moves)
            if time.perf_counter() - begun < _RUN_SHARE * (self._deadline - begun):
                moves = min(_MOST_MOVES, moves * 3 // 2)

    def _run(self, graph: Hypergraph, annealer: Annealer, moves: int) -> None:
        start = self._best.items(graph)
        if start is None:
            start = _greedy(graph)
        goal = self._best.value
        if start is None or goal == 0.0:
            return
        k = self._n_runs
        self._n_runs += 1
        schedule = Schedule(
            moves=moves,
            power=_POWERS[k % len(_POWERS)],
            hottest=_HOTTEST[k % len(_HOTTEST)],
            largest=max(1, len(graph) // (3, 6, 12, 24)[k % 4]),
            seed=k,
        )
        items = annealer.run(start, goal, schedule, self._stop)
        self._best.offer(graph, items)


def _close_in(graph: Hypergraph, best: _Best, deadline: float, workers: int) -> float:
    """Improve the best placement from above while the bound, which is returned, rises from below."""
    bound = rate_bound(graph)
    search = _Search(best, deadline)
    timer = threading.Timer(max(0.0, deadline - time.perf_counter()), search.stop)
    timer.daemon = True
    timer.start()
    try:
        search.run_once(reduced(graph, best.value))  # mostly gains much
        if best.value == 0.0:
            return 0.0
        smaller = reduced(graph, best.value)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(search.run_until_stopped, smaller)
            try:
                bound = _raise_bound(smaller, best, bound, deadline, workers)
            finally:
                search.stop()
            running.result()
    finally:
        timer.cancel()
    return bound


def _first_moves(graph: Hypergraph) -> int:
    return min(_MOST_MOVES, _MOVES_PER_ITEM * len(graph))


def _raise_bound(graph: Hypergraph, best: _Best, bound: float, deadline: float, workers: int) -> float:
    """A lower bound as close to the best value as the time allows."""
    found_diagrams = diagrams.build(graph)
    refuter = None if found_diagrams is None else Refuter(graph, found_diagrams)
    if refuter is not None:
        bound = _refute(refuter, best, bound, deadline)
    value, items, left = best.value, best.items(graph), deadline - time.perf_counter()
    if _is_closed(bound, value) or left <= 0 or items is None:
        return bound
    cuts: list[exact.Cut] = []
    if refuter is not None and found_diagrams is not None:
        kinds = np.flatnonzero(graph.counts).tolist()
        cuts.append((refuter.worth, {c: found_diagrams[c].upper_bound(refuter.worth, value) for c in kinds}))
    threads = max(1, workers - 1)
    found, bound = exact.improve(graph, items, value, bound, cuts=cuts, seconds=left, workers=threads)
    if found is not None:
        best.offer(graph, found)
    return bound


def _refute(refuter: Refuter, best: _Best, bound: float, deadline: float) -> float:
    """The largest limit refuted; see the module's text for the order."""
    irrefutable, given_up, value = np.inf, np.inf, best.value
    while (now := time.perf_counter()) < deadline:
        if best.value < value:  # what took too long for a worse value says nothing about the goals of a better one
            given_up, value = np.inf, best.value
        if _is_closed(bound, value):
            break
        goal, top = value * (1 - GOAL), value * (1 - EXACT)
        limit = goal if bound < goal else top
        if limit >= (failed := min(irrefutable, given_up)):
            limit = (bound + failed) / 2
            if failed - bound < _FINEST * value:
                break
        end = now + _ATTEMPT_SHARE * (deadline - now)

        def is_over(value: float = value, end: float = end) -> bool:
            return time.perf_counter() > end or best.value < value * (1 - _FINEST)

        verdict = refuter.refutes(limit, is_over=is_over)
        if verdict:
            bound = limit
        elif verdict is False:
            irrefutable = limit
        elif best.value == value or time.perf_counter() > end:
            given_up = limit
    return bound


def _is_closed(bound: float, value: float) -> bool:
    return bound >= value * (1 - 2 * EXACT)


def _greedy(graph: Hypergraph) -> Ints | None:
    """Items by falling bytes, each on the device of least load that has room; None where one has no room left."""
    load, free = np.zeros(len(graph.class_of)), graph.memory_bytes[graph.class_of] * (1 + 1e-12)
    items = np.zeros(len(graph), np.int64)
    for i in np.argsort(-graph.nbytes, kind="stable").tolist():
        can = graph.allowed[i, graph.class_of] & (free >= graph.nbytes[i])
        if not can.any():
            return None
        device = int(np.argmin(np.where(can, load + np.where(can, graph.times[i, graph.class_of], 0.0), np.inf)))
        load[device] += graph.times[i, graph.class_of[device]]
        free[device] -= graph.nbytes[i]
        items[i] = device
    return items


def _first_placement(workload: Workload, graph: Hypergraph, time_limit_s: float) -> list[int]:
    """Any placement that keeps the rules.

    Raises:
        PlacementError: there is none, or none was found.
    """
    _check_each_fits(workload, graph)
    items = _greedy(graph)
    is_certain = False
    if items is None:
        items, is_certain = exact.pack(graph, seconds=time_limit_s / 2)
    if items is not None:
        devices: list[int] = items[graph.item_of].tolist()
        check(workload, devices, contiguous=False)
        return devices
    room = ", ".join(f"{c.count} {c.name} of {c.memory_bytes:.0f} B" for c in workload.classes)
    raise PlacementError(
        "the operators don't fit the devices' memory"
        if is_certain
        else f"found no placement that fits the devices' memory in {time_limit_s / 2:.0f} s",
        found=f"{graph.nbytes.sum():.0f} B, of which one colour alone {graph.nbytes.max():.0f} B, on {room}",
        remedy="more devices, or devices of more memory",
    )


def _check_each_fits(workload: Workload, graph: Hypergraph) -> None:
    alone = np.flatnonzero(~graph.allowed.any(axis=1))
    if not len(alone):
        return
    item = int(alone[0])
    members = np.flatnonzero(graph.item_of == item)
    first = workload.ids[int(members[0])]
    able = np.isfinite(graph.times[item]) & (graph.counts > 0)
    who = f"operator {first!r}" + (f" with {len(members) - 1} of its colour" if len(members) > 1 else "")
    if not able.any():
        raise PlacementError(
            f"{who} can run on no device",
            found="each class of devices lacks support for one of them",
            remedy="give them different colours, or add a device that supports all",
        )
    kind = max(np.flatnonzero(able).tolist(), key=lambda c: float(graph.memory_bytes[c]))
    raise PlacementError(
        f"{who} fits no device",
        found=f"{graph.nbytes[item]:.0f} B needed, {graph.memory_bytes[kind]:.0f} B on {workload.classes[kind].name}",
        remedy="a device of more memory",
    )
