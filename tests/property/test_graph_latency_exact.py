"""Single-sample latency on random graphs against an exhaustive search with a price of its own."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from hetero.errors import PlacementError
from hetero.planner import graph_latency
from hetero.planner.graph_latency import solve
from hetero.planner.workload import DeviceClass, Workload
from hetero.planner.workload_latency import latency

RELATIVE = 1e-8  # ten times what the solver leaves for rounding


def random_workload(seed: int) -> Workload:
    """At most 6 operators: free and dear ones, riders, colours (also in circles), ties, tight memory, unsupported."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 7))
    order = rng.permutation(n)
    density = rng.choice([0.15, 0.4, 0.8])
    edges = [(order[i], order[j]) for i in range(n) for j in range(i + 1, n) if rng.random() < density]
    whole = rng.random() < 0.5

    def figures(high: float, zeros: float) -> np.ndarray:
        values = rng.integers(0, int(high) + 1, n).astype(float) if whole else rng.random(n) * high
        return np.where(rng.random(n) < zeros, 0.0, values)

    cpu, acc = figures(9, rng.choice([0.0, 0.4])), figures(4, rng.choice([0.0, 0.4]))
    acc[rng.random(n) < 0.15] = math.inf
    transfers = np.stack([figures(3, 0.3), np.zeros(n)], axis=1)
    sizes = figures(5, rng.choice([0.1, 0.6]))
    n_acc = int(rng.integers(0, 4))
    processors = int(rng.random() < 0.85) if n_acc and np.isfinite(acc).all() else 1
    colours = rng.integers(0, n, n) if rng.random() < 0.5 else np.arange(n)
    memory = float(rng.choice([3.0, 6.0, sizes.sum() / 2, 100.0]))
    return Workload(
        ids=tuple(f"op{k}" for k in range(n)),
        times=np.stack([acc, cpu], axis=1),
        transfers=transfers,
        nbytes=sizes,
        edges=np.array(edges, np.int64).reshape(-1, 2),
        is_backward=np.zeros(n, bool),
        colours=np.asarray(colours, np.int64),
        classes=(DeviceClass("acc", n_acc, memory), DeviceClass("cpu", processors)),
    )


def price(workload: Workload, homes: tuple[int, ...]) -> float:
    """Latency by relaxation to a fixed point, infinite if the placement breaks a rule; home -1: the processors."""
    n, (acc, cpu) = len(homes), workload.classes
    edges = [(int(u), int(v)) for u, v in workload.edges]
    if any(homes[a] != homes[b] for a in range(n) for b in range(a) if workload.colours[a] == workload.colours[b]):
        return math.inf
    block = {k: ("call", homes[k]) if homes[k] >= 0 else ("cpu", k) for k in range(n)}
    length = {}
    for name in set(block.values()):
        own = [k for k in range(n) if block[k] == name]
        if name[0] == "cpu":
            length[name] = float(workload.times[own[0], 1]) if cpu.count else math.inf
            continue
        if sum(workload.nbytes[own]) > acc.memory_bytes * (1 + 1e-12):
            return math.inf
        crossing = {u for u, v in edges if (block[u] == name) != (block[v] == name)}
        length[name] = float(sum(workload.times[own, 0])) + float(sum(workload.transfers[u, 0] for u in crossing))
    reads = {(block[v], block[u]) for u, v in edges if block[u] != block[v]}
    end = dict.fromkeys(length, (1, 0.0))  # calls and units on the longest way: a circle grows even if it takes no time
    for _ in range(n + 1):
        before = {b: [end[a] for c, a in reads if c == b] for b in end}
        new = {
            b: (
                max((count for count, _ in found), default=0) + 1,
                max((time for _, time in found), default=0.0) + length[b],
            )
            for b, found in before.items()
        }
        if new == end:
            return max(time for _, time in end.values())
        end = new
    return math.inf


def exhaustive(workload: Workload) -> float:
    """The least latency over all placements, accelerators numbered in order of appearance."""
    n, best = len(workload.ids), math.inf
    for homes in itertools.product(range(-1, min(n, workload.classes[0].count)), repeat=n):
        seen = list(dict.fromkeys(h for h in homes if h >= 0))
        if seen == sorted(seen) and seen == list(range(len(seen))):
            best = min(best, price(workload, homes))
    return best


def check_seed(seed: int) -> None:
    workload = random_workload(seed)
    best = exhaustive(workload)
    if math.isinf(best):
        with pytest.raises(PlacementError, match="no placement fits"):
            solve(workload, contiguous=True, time_limit_s=60)
        return
    found = solve(workload, contiguous=True, time_limit_s=60)
    homes = tuple(d if d < workload.classes[0].count else -1 for d in found.devices)
    assert found.value == pytest.approx(latency(workload, found.devices, contiguous=True), rel=1e-12)
    assert found.value == pytest.approx(price(workload, homes), rel=1e-12)
    assert found.lower_bound <= best * (1 + 1e-12)
    assert found.proof == "optimal"
    assert found.value == pytest.approx(best, rel=RELATIVE, abs=1e-12)


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_latency_equals_the_exhaustive_search(first: int) -> None:
    for seed in range(first, first + 100):
        check_seed(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1_000, 11_000, 500))
def test_latency_equals_the_exhaustive_search_on_many_instances(first: int) -> None:
    for seed in range(first, first + 500):
        check_seed(seed)


def test_riders_and_chains_alone_give_true_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the lattice without riders is too large, their bytes are left out of the bound and put back after."""
    monkeypatch.setattr(graph_latency, "_MAX_EXACT_IDEALS", 0)
    proven = 0
    for seed in range(600, 750):
        workload = random_workload(seed)
        best = exhaustive(workload)
        if math.isinf(best):
            continue
        found = solve(workload, contiguous=True, time_limit_s=60)
        assert found.lower_bound <= best * (1 + 1e-12)
        assert found.value >= best * (1 - 1e-12)
        assert found.value == pytest.approx(latency(workload, found.devices, contiguous=True), rel=1e-12)
        proven += found.proof == "optimal"
    assert proven > 100


def test_large_lattices_leave_one_order_and_the_longest_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_latency, "_MAX_EXACT_IDEALS", 0)
    monkeypatch.setattr(graph_latency, "_MAX_IDEALS", 8)
    for seed in range(900, 950):
        workload = replace(random_workload(seed), classes=(DeviceClass("acc", 2, 6.0), DeviceClass("cpu", 1)))
        best = exhaustive(workload)
        found = solve(workload, contiguous=True, time_limit_s=60)
        assert found.lower_bound <= best * (1 + 1e-12)
        assert found.value >= best * (1 - 1e-12)


def test_call_may_enclose_a_colour_that_runs_on_processors() -> None:
    """a -> d, b; c -> d, b with c and d of one colour: c runs before the call {a, b} and d after it."""
    workload = Workload(
        ids=("a", "b", "c", "d"),
        times=np.array([[2.0, 3.0], [1.0, 2.0], [3.0, 0.0], [1.0, 0.0]]),
        transfers=np.array([[0.6, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
        nbytes=np.array([3.0, 0.0, 0.0, 2.0]),
        edges=np.array([[0, 1], [0, 3], [2, 3], [2, 1]]),
        is_backward=np.zeros(4, bool),
        colours=np.array([0, 1, 2, 2]),
        classes=(DeviceClass("acc", 1, 4.0), DeviceClass("cpu", 1)),
    )
    found = solve(workload, contiguous=True, time_limit_s=60)
    assert exhaustive(workload) == pytest.approx(3.6)
    assert found.value == pytest.approx(3.6)
    assert found.proof == "optimal"


def test_permuted_and_scaled_workloads_have_the_same_answer() -> None:
    for seed in range(200, 220):
        workload = random_workload(seed)
        if math.isinf(best := exhaustive(workload)):
            continue
        for scale in (1e-12, 1e9):
            scaled = replace(workload, times=workload.times * scale, transfers=workload.transfers * scale)
            assert solve(scaled, contiguous=True, time_limit_s=60).value == pytest.approx(best * scale, rel=RELATIVE)
        order = np.random.default_rng(seed).permutation(len(workload.ids))
        place = np.argsort(order)
        permuted = replace(
            workload,
            ids=tuple(workload.ids[k] for k in order),
            times=workload.times[order],
            transfers=workload.transfers[order],
            nbytes=workload.nbytes[order],
            colours=workload.colours[order],
            edges=place[workload.edges],
        )
        assert solve(permuted, contiguous=True, time_limit_s=60).value == pytest.approx(best, rel=RELATIVE, abs=1e-12)


def test_fused_units_bound_and_restrict(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing but fused units, values are those of placements and bounds are true."""
    monkeypatch.setattr(graph_latency, "_MAX_EXACT_IDEALS", 0)
    monkeypatch.setattr(graph_latency, "_MAX_IDEALS", 0)
    monkeypatch.setattr(graph_latency, "_LIGHT", 1.0)
    monkeypatch.setattr(graph_latency, "longest_path", lambda workload: 0.0)
    bounded = 0
    for seed in range(1_000, 1_150):
        workload = random_workload(seed)
        best = exhaustive(workload)
        if math.isinf(best):
            continue
        found = solve(workload, contiguous=True, time_limit_s=60)
        assert found.lower_bound <= best * (1 + 1e-12)
        assert found.value >= best * (1 - 1e-12)
        bounded += found.lower_bound > 0.5 * best
    assert bounded > 80
