"""Placement without contiguity against all assignments of random small workloads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hetero.errors import PlacementError
from hetero.planner import noncontiguous, noncontiguous_diagram, noncontiguous_exact
from hetero.planner.noncontiguous_bound import Refuter, rate_bound
from hetero.planner.noncontiguous_hypergraph import from_workload, reduced
from hetero.planner.workload import DeviceClass, Workload
from hetero.planner.workload_plan import OPTIMAL, Placement, max_load

# Sums of a few dozen float64 terms in two orders.
SUMS = 1e-12
# What `optimal` may be off by: the solvers refute values 1e-9 below the best, and count 2e-9 as closed.
CLOSED = 2e-9
QUICK, SWEEP = 25, 1500


def brute_force(workload: Workload) -> float:
    """The smallest largest load of all assignments that keep the rules; infinite where none does."""
    best = np.inf
    colours = sorted(set(workload.colours.tolist()))
    place = {colour: k for k, colour in enumerate(colours)}
    class_of = workload.class_of
    readers: dict[int, set[int]] = {}
    for source, target in workload.edges.tolist():
        readers.setdefault(source, set()).add(target)
    for choice in itertools.product(range(len(class_of)), repeat=len(colours)):
        devices = [choice[place[c]] for c in workload.colours.tolist()]
        worst = 0.0
        for d, kind in enumerate(class_of):
            own = {v for v, device in enumerate(devices) if device == d}
            if sum(workload.nbytes[v] for v in own) > workload.classes[kind].memory_bytes:
                worst = np.inf
            load = sum(workload.times[v, kind] for v in own)
            for source, targets in readers.items():
                if any((source in own) != (target in own) for target in targets):
                    load += workload.transfers[source, kind]
            worst = max(worst, load)
        best = min(best, worst)
    return float(best)


def random_workload(seed: int) -> Workload | None:
    """One to eight operators on none to three devices of each of up to three classes; None where an operator can't run.

    Integers, so that ties are common; zero costs, colours, unsupported operators, tight memory, devices that pay no
    transfers.
    """
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    n_classes = int(rng.integers(1, 4))
    counts = rng.integers(0, 4, n_classes)
    counts[0] += counts.sum() == 0
    while counts.sum() > 4:
        counts[np.argmax(counts)] -= 1
    times = rng.integers(0, 10, (n, n_classes)).astype(float) * float(rng.choice([1.0, 0.1, 1e-6, 3e8]))
    times[rng.random(n) < 0.2] = 0.0
    times[rng.random((n, n_classes)) < 0.1] = np.inf
    transfers = rng.integers(0, 6, (n, n_classes)).astype(float) * float(rng.choice([0.0, 1.0, 0.1]))
    transfers[:, rng.random(n_classes) < 0.3] = 0.0
    density = rng.choice([0.2, 0.5, 0.9])
    order = rng.permutation(n)
    edges = [(order[a], order[b]) for a in range(n) for b in range(a + 1, n) if rng.random() < density]
    nbytes = rng.integers(0, 5, n).astype(float)
    memory = [float(rng.integers(3, 12)) if rng.random() < 0.4 else np.inf for _ in range(n_classes)]
    try:
        return Workload(
            ids=tuple(f"op{k}" for k in range(n)),
            times=times,
            transfers=transfers,
            nbytes=nbytes,
            edges=np.array(edges, np.int64).reshape(-1, 2),
            is_backward=rng.random(n) < 0.3,
            colours=rng.integers(0, n, n) if rng.random() < 0.4 else np.arange(n),
            classes=tuple(DeviceClass(f"c{k}", int(counts[k]), memory[k]) for k in range(n_classes)),
        )
    except PlacementError:
        return None


def small_workloads(seeds: range) -> list[tuple[int, Workload]]:
    found = [(seed, random_workload(seed)) for seed in seeds]
    return [
        (seed, workload)
        for seed, workload in found
        if workload is not None and len(workload.class_of) ** len(set(workload.colours.tolist())) <= 5000
    ]


def check_solver(workload: Workload, seed: int) -> None:
    optimum = brute_force(workload)
    if np.isinf(optimum):
        with pytest.raises(PlacementError):
            noncontiguous.solve(workload, time_limit_s=20.0, workers=1)
        return
    placement = noncontiguous.solve(workload, time_limit_s=20.0, workers=1)
    assert placement.value == max_load(workload, placement.devices, contiguous=False), seed
    assert placement.lower_bound <= optimum * (1 + SUMS), seed
    assert placement.proof == OPTIMAL, seed
    assert placement.value <= optimum * (1 + CLOSED), seed


def check_bounds(workload: Workload, seed: int) -> None:
    """Every bound holds, at limits around the optimum."""
    optimum = brute_force(workload)
    graph = from_workload(workload)
    if np.isinf(optimum) or optimum == 0.0:
        return
    assert rate_bound(graph) <= optimum * (1 + SUMS), seed
    for above in (1.0 + 1e-8, 1.5):
        smaller = reduced(graph, optimum * above)
        diagrams = noncontiguous_diagram.build(smaller)
        assert diagrams is not None
        refuter = Refuter(smaller, diagrams)
        for share in (0.5, 0.9, 0.999, 1.0, 1.0 + 1e-12, 1.2):
            if share <= above:
                assert not refuter.refutes(optimum * share, is_over=lambda: False) or share < 1.0, (seed, share)
    items = noncontiguous._greedy(graph)
    if items is not None:
        value = float(graph.loads(items).max())
        _, bound = noncontiguous_exact.improve(graph, items, value, 0.0, cuts=[], seconds=20.0, workers=1)
        assert bound <= optimum * (1 + SUMS), seed


def check_most_valuable_set(workload: Workload, seed: int) -> None:
    graph = from_workload(workload)
    diagrams = noncontiguous_diagram.build(graph)
    assert diagrams is not None
    rng = np.random.default_rng(seed)
    worth = rng.normal(size=len(graph))
    for kind in np.flatnonzero(graph.counts).tolist():
        loads = {}
        for choice in itertools.product((False, True), repeat=len(graph)):
            members = np.array(choice)
            load = float(graph.times[members, kind].sum())
            for pins, cost in graph.nets:
                load += float(cost[kind]) if 0 < members[list(pins)].sum() < len(pins) else 0.0
            loads[choice] = load
        finite = [load for load in loads.values() if np.isfinite(load) and load > 0]
        for limit in rng.choice(finite, 3) if finite else []:
            best = max(float(worth[list(c)].sum()) for c, load in loads.items() if load <= limit)
            value, members = diagrams[kind].best(worth, limit, 64)
            assert loads[tuple(members.tolist())] <= limit * (1 + SUMS) + SUMS, seed
            assert value <= best + SUMS, seed
            assert diagrams[kind].upper_bound(worth, limit) >= best - SUMS, seed


def test_small_workloads_are_solved_as_by_exhaustive_search() -> None:
    for seed, workload in small_workloads(range(QUICK)):
        check_solver(workload, seed)


def test_no_bound_exceeds_the_optimum() -> None:
    for seed, workload in small_workloads(range(QUICK)):
        check_bounds(workload, seed)


def test_the_diagram_encloses_the_most_valuable_set() -> None:
    for seed, workload in small_workloads(range(QUICK)):
        check_most_valuable_set(workload, seed)


def test_graphs_too_wide_for_a_diagram_are_solved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noncontiguous_diagram, "MAX_STATES", 0)
    for seed, workload in small_workloads(range(100, 120)):
        assert noncontiguous_diagram.build(from_workload(workload)) is None
        check_solver(workload, seed)


@pytest.mark.slow
def test_many_small_workloads_are_solved_as_by_exhaustive_search() -> None:
    for seed, workload in small_workloads(range(1000, 1000 + SWEEP)):
        check_solver(workload, seed)


@pytest.mark.slow
def test_no_bound_of_many_exceeds_the_optimum() -> None:
    for seed, workload in small_workloads(range(5000, 5000 + SWEEP)):
        check_bounds(workload, seed)
        check_most_valuable_set(workload, seed)


def chain(times: list[float], *, nbytes: list[float], counts: tuple[int, int], memory: float) -> Workload:
    """Operators in a row, on `acc` devices ten times as fast as `cpu`, outputs of cost 1 on `acc`."""
    n = len(times)
    return Workload(
        ids=tuple(f"op{k}" for k in range(n)),
        times=np.array([[t, 10 * t] for t in times]),
        transfers=np.tile([1.0, 0.0], (n, 1)),
        nbytes=np.array(nbytes),
        edges=np.array([(k, k + 1) for k in range(n - 1)], np.int64).reshape(-1, 2),
        is_backward=np.zeros(n, bool),
        colours=np.arange(n),
        classes=(DeviceClass("acc", counts[0], memory), DeviceClass("cpu", counts[1], memory)),
    )


def test_the_answer_is_never_worse_than_the_start() -> None:
    for seed, workload in small_workloads(range(200, 230)):
        if np.isinf(brute_force(workload)):
            continue
        first = noncontiguous._first_placement(workload, from_workload(workload), 5.0)
        value = max_load(workload, first, contiguous=False)
        start = Placement(tuple(first), value, 0.0, "heuristic", "greedy", 0.0)
        for limit_s in (0.0, 5.0):
            placement = noncontiguous.solve(workload, time_limit_s=limit_s, start=start, workers=1)
            assert placement.lower_bound <= placement.value <= value, seed


def test_a_placement_that_costs_nothing_is_found_from_one_that_does() -> None:
    workload = chain([1.0, 1.0], nbytes=[1.0, 1.0], counts=(1, 1), memory=50.0)
    free = {"times": np.array([[0.0, 5.0], [5.0, 0.0]]), "transfers": np.zeros((2, 2))}
    workload = Workload(**{**vars(workload), **free})
    start = Placement((1, 0), max_load(workload, (1, 0), contiguous=False), 0.0, "heuristic", "by hand", 0.0)
    placement = noncontiguous.solve(workload, time_limit_s=5.0, start=start, workers=1)
    assert (placement.value, placement.lower_bound, placement.proof) == (0.0, 0.0, OPTIMAL)


def test_an_operator_too_large_for_every_device_is_named_with_its_bytes() -> None:
    workload = chain([1.0, 2.0, 3.0], nbytes=[1.0, 90.0, 1.0], counts=(2, 1), memory=50.0)
    with pytest.raises(PlacementError, match="'op1' fits no device") as error:
        noncontiguous.solve(workload, time_limit_s=5.0)
    assert "90 B needed, 50 B on" in str(error.value)


def test_operators_too_large_together_are_refused_with_bytes_and_devices() -> None:
    workload = chain([1.0] * 4, nbytes=[30.0] * 4, counts=(2, 1), memory=50.0)
    with pytest.raises(PlacementError, match="don't fit the devices' memory") as error:
        noncontiguous.solve(workload, time_limit_s=5.0)
    assert "120 B" in str(error.value)
    assert "2 acc of 50 B, 1 cpu of 50 B" in str(error.value)


def test_colours_that_no_device_supports_together_are_refused() -> None:
    workload = chain([1.0, 2.0], nbytes=[1.0, 1.0], counts=(1, 1), memory=50.0)
    apart = workload.times.copy()
    apart[0, 0] = apart[1, 1] = np.inf
    workload = Workload(**{**vars(workload), "times": apart, "colours": np.zeros(2, np.int64)})
    with pytest.raises(PlacementError, match="'op0' with 1 of its colour can run on no device"):
        noncontiguous.solve(workload, time_limit_s=5.0)


def test_memory_that_only_one_packing_fits_is_found() -> None:
    # By falling bytes on the emptiest device, 6 5 4 3 3 3 ends with 6 + 3 + 3 and 5 + 4 + 3 only by chance.
    workload = chain([9.0, 1.0, 1.0, 1.0, 1.0, 1.0], nbytes=[6.0, 5.0, 4.0, 3.0, 3.0, 3.0], counts=(2, 0), memory=12.0)
    placement = noncontiguous.solve(workload, time_limit_s=20.0, workers=1)
    assert placement.proof == OPTIMAL
    assert placement.value == pytest.approx(brute_force(workload), rel=CLOSED)


def test_the_first_run_of_annealing_ends_with_the_time_limit() -> None:
    n = 3000
    workload = chain([1.0 + k % 7 for k in range(n)], nbytes=[1.0] * n, counts=(8, 1), memory=1000.0)
    devices = tuple(k * 8 // n for k in range(n))
    start = Placement(devices, max_load(workload, devices, contiguous=False), 0.0, "heuristic", "by hand", 0.0)
    placement = noncontiguous.solve(workload, time_limit_s=1.0, start=start, workers=1)
    assert placement.seconds < 15.0  # of many times as much without the limit
    assert placement.lower_bound <= placement.value <= start.value


def test_times_far_above_the_best_value_are_no_coefficients_of_the_model() -> None:
    workload = chain([1.0, 1.0, 1.0], nbytes=[1.0] * 3, counts=(2, 1), memory=50.0)
    times = np.array([[2e-12, 9e12], [3e-12, 8.0], [3e-12, 2e-12]])
    workload = Workload(**{**vars(workload), "times": times, "transfers": workload.transfers * 1e-12})
    value = max_load(workload, (0, 1, 1), contiguous=False)
    graph = from_workload(workload)
    _, bound = noncontiguous_exact.improve(graph, np.array([0, 1, 1]), value, 0.0, cuts=[], seconds=20.0, workers=1)
    assert bound <= brute_force(workload) * (1 + SUMS)


def test_scaling_all_costs_scales_value_and_bound() -> None:
    _, workload = small_workloads(range(3, 40))[3]
    for factor in (1e-9, 1e12):
        scaled = Workload(
            **{**vars(workload), "times": workload.times * factor, "transfers": workload.transfers * factor}
        )
        placement = noncontiguous.solve(scaled, time_limit_s=20.0, workers=1)
        assert placement.proof == OPTIMAL
        assert placement.value == pytest.approx(brute_force(workload) * factor, rel=CLOSED)
