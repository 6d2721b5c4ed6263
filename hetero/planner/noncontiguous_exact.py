"""The partition problem as a model of CP-SAT: complete where time allows, and the judge of whether memory suffices.

Integers: times are rounded down to multiples of `value / 2^40`, so no partition is dearer in the model than in truth:
what the model excludes is excluded, and its bound is a true bound. Solutions are priced again by the caller.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from ortools.sat.python import cp_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.planner.noncontiguous_hypergraph import Hypergraph
    from hetero.planner.workload import Floats, Ints

_STEPS = 2.0**40
# A valid inequality: worth of each item, and what no set of load <= value is worth more than, for each class.
Cut = tuple["Floats", dict[int, float]]


def improve(
    graph: Hypergraph,
    devices: Ints,
    value: float,
    lower_bound: float,
    *,
    cuts: Sequence[Cut],
    seconds: float,
    workers: int,
) -> tuple[Ints | None, float]:
    """A partition at most as dear as `devices`, and a lower bound on all of them.

    Args:
        graph: the hypergraph.
        devices: (n,) a partition.
        value: its largest load; positive.
        lower_bound: on the largest load of every partition.
        cuts: inequalities that all partitions of loads <= value obey.
        seconds: at most.
        workers: threads.

    Returns:
        (n,) a partition, None where none was found; and the bound.
    """
    model = cp_model.CpModel()
    possible = graph.allowed & (graph.times <= value)
    runs = _assignment(model, graph, possible)
    scale = _STEPS / value
    largest = model.new_int_var(math.floor(min(lower_bound, value) * scale), math.ceil(value * scale), "largest")
    for d, kind in enumerate(graph.class_of.tolist()):
        terms = [
            math.floor(graph.times[i, kind] * scale) * runs[i, d] for i in np.flatnonzero(possible[:, kind]).tolist()
        ]
        for pins, cost in graph.nets:
            if cost[kind] > 0:
                paid = model.new_bool_var("")
                for a, b in zip(pins, (*pins[1:], pins[0]), strict=True):
                    model.add_bool_or([~runs[a, d], runs[b, d], paid])
                terms.append(math.floor(min(cost[kind], 2 * value) * scale) * paid)
        model.add(sum(terms) <= largest)
    for worth, most in cuts:
        _add_cut(model, graph, runs, worth, most)
    _break_symmetry(model, graph, runs, devices)
    model.minimize(largest)
    solver = _solver(seconds, workers)
    status = solver.solve(model)
    bound = max(lower_bound, min(value, solver.best_objective_bound / scale))
    return _read(solver, graph, runs) if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) else None, bound


def pack(graph: Hypergraph, *, seconds: float) -> tuple[Ints | None, bool]:
    """Any partition that the devices have memory for.

    Returns:
        (n,) the devices, None where none was found; and whether it is certain then that there is none.
    """
    model = cp_model.CpModel()
    runs = _assignment(model, graph, graph.allowed)
    solver = _solver(seconds, 1)
    status = solver.solve(model)
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return _read(solver, graph, runs), False
    return None, status == cp_model.INFEASIBLE


Runs = dict[tuple[int, int], cp_model.IntVar]


def _assignment(model: cp_model.CpModel, graph: Hypergraph, allowed: np.ndarray) -> Runs:
    """Each item on one device that can run it, the bytes on each device within its memory."""
    runs: Runs = {}
    for i in range(len(graph)):
        for d, kind in enumerate(graph.class_of.tolist()):
            runs[i, d] = model.new_bool_var("") if allowed[i, kind] else model.new_constant(0)
        model.add_exactly_one(runs[i, d] for d in range(len(graph.class_of)))
    # Bytes are whole numbers, or else rounded down as times are: the model may then allow what the price refuses.
    for d, kind in enumerate(graph.class_of.tolist()):
        room = graph.memory_bytes[kind] * (1 + 1e-12)
        if graph.nbytes.sum() > room:
            scale = 1.0 if room >= 2.0**20 else 2.0**20
            needs = [math.floor(b * scale) for b in graph.nbytes.tolist()]
            model.add(sum(b * runs[i, d] for i, b in enumerate(needs)) <= math.floor(room * scale))
    return runs


def _add_cut(model: cp_model.CpModel, graph: Hypergraph, runs: Runs, worth: Floats, most: dict[int, float]) -> None:
    scale = 2.0**30 / float(np.abs(worth).max())
    whole = [math.floor(w * scale) for w in worth.tolist()]
    for d, kind in enumerate(graph.class_of.tolist()):
        model.add(sum(w * runs[i, d] for i, w in enumerate(whole)) <= math.floor(most[kind] * scale) + 1)


def _break_symmetry(model: cp_model.CpModel, graph: Hypergraph, runs: Runs, devices: Ints) -> None:
    """Of partitions that differ by the names of devices that are alike, one; `devices`, so renamed, as a hint.

    Name the devices of a class in the order in which they get their first item, the slowest item first. Then the
    item of rank k is on one of the first k + 1 devices of a class.
    """
    fastest = graph.times.min(axis=1)
    order = np.argsort(-fastest, kind="stable").tolist()
    first_of = (np.cumsum(graph.counts) - graph.counts).tolist()
    for rank, i in enumerate(order[: int(graph.counts.max())]):
        for d, kind in enumerate(graph.class_of.tolist()):
            if d - first_of[kind] > rank:
                model.add(runs[i, d] == 0)
    names: dict[int, int] = {}
    used = [0] * len(first_of)
    for i in order:
        device = int(devices[i])
        if device not in names:
            kind = int(graph.class_of[device])
            names[device] = first_of[kind] + used[kind]
            used[kind] += 1
        model.add_hint(runs[i, names[device]], True)


def _solver(seconds: float, workers: int) -> cp_model.CpSolver:
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = workers
    solver.parameters.random_seed = 0
    return solver


def _read(solver: cp_model.CpSolver, graph: Hypergraph, runs: Runs) -> Ints:
    n_devices = len(graph.class_of)
    return np.array(
        [next(d for d in range(n_devices) if solver.boolean_value(runs[i, d])) for i in range(len(graph))], np.int64
    )
