"""Contiguous throughput of graphs against exhaustive search over chains of ideals, and against known optima."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hetero
from hetero.planner import contiguous
from hetero.planner.contract import contract
from hetero.planner.graph import evaluate_placement
from hetero.planner.ideals import Tail
from hetero.planner.lattice import lattice
from hetero.planner.workload_baselines import baselines
from hetero.planner.workload_plan import loads

# Sums of a dozen terms in another order.
ROUNDING = 1e-12
# The known optima are printed and were found with sums in another order; this is the accuracy that they are given for.
REFERENCE = 1e-6

OPEN = Path(os.environ.get("HETEROQ_SHARED", Path(__file__).parents[3] / "shared")) / "workloads" / "open"


def exhaustive(workload: hetero.Workload) -> float | None:
    """The least largest load over all chains of ideals and all classes of their differences; None: there is none.

    By definition: sets of colours as bits, every pair of closed sets a share, loads summed over operators and edges.
    """
    names = sorted(set(workload.colours.tolist()))
    bit = [1 << names.index(colour) for colour in workload.colours.tolist()]
    forward = {b for b, back in zip(bit, workload.is_backward.tolist(), strict=True) if not back}
    arcs = set()
    for a, b in workload.edges.tolist():
        back = (bool(workload.is_backward[a]), bool(workload.is_backward[b]))
        if back == (False, False):
            arcs.add((bit[a], bit[b]))
        elif back == (True, True) and not {bit[a], bit[b]} <= forward:
            arcs.add((bit[b], bit[a]))
    ideals = [m for m in range(1 << len(names)) if all(m & a or not m & b for a, b in arcs)]

    def load(share: int, c: int) -> float:
        members = [k for k, b in enumerate(bit) if b & share]
        if workload.nbytes[members].sum() > workload.classes[c].memory_bytes:
            return math.inf
        total = float(workload.times[members, c].sum())
        for u, home in enumerate(bit):
            readers = [bool(bit[v] & share) for w, v in workload.edges.tolist() if w == u]
            crosses = not all(readers) if home & share else any(readers)
            total += float(workload.transfers[u, c]) if crosses else 0.0
        return total

    shares = {(i, j) for i in ideals for j in ideals if i & j == i and i != j}
    price = {(s, c): load(s, c) for s in {j ^ i for i, j in shares} for c in range(len(workload.classes))}
    best: dict[tuple[tuple[int, ...], int], float] = {}
    for counts in product(*(range(kind.count + 1) for kind in workload.classes)):
        best[counts, 0] = 0.0
        for j in ideals[1:]:
            ways = [
                max(best[(*counts[:c], counts[c] - 1, *counts[c + 1 :]), i], price[j ^ i, c])
                for c in range(len(counts))
                if counts[c]
                for i in ideals
                if (i, j) in shares
            ]
            best[counts, j] = min(ways, default=math.inf)
    value = best[tuple(kind.count for kind in workload.classes), ideals[-1]]
    return value if math.isfinite(value) else None


def instance(draw: np.random.Generator) -> hetero.Workload | None:
    """A small workload with something odd about it; None: an operator that no device runs."""
    n, n_classes = int(draw.integers(1, 8)), int(draw.integers(1, 4))
    style = draw.integers(4)

    def costs(*size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        if style == 0:
            return draw.integers(0, 4, size).astype(float)  # ties and zeros
        if style == 1:
            return draw.random(size)
        if style == 2:
            return draw.integers(0, 2, size) * draw.random(size) * 1e12
        return np.exp(draw.normal(0, 2, size)) * 1e-12

    times = costs(n, n_classes)
    if draw.random() < 0.4:
        times[draw.random((n, n_classes)) < 0.2] = np.inf
    transfers = costs(n, n_classes) * draw.choice([0, 0.3, 1, 3])
    if n_classes > 1 and draw.random() < 0.6:
        transfers[:, -1] = 0
    order, density = draw.permutation(n), draw.random()
    edges = [(order[i], order[j]) for i in range(n) for j in range(i + 1, n) if draw.random() < density]
    backward = np.zeros(n, bool)
    if draw.random() < 0.5:
        backward[order[draw.integers(n + 1) :]] = True  # a training graph: the end is the backward pass
    if draw.random() < 0.2:
        backward = draw.random(n) < 0.4
    classes = tuple(
        hetero.DeviceClass(f"c{c}", int(draw.integers(0, 3)), float(draw.choice([2, 4, 6, np.inf])))
        for c in range(n_classes)
    )
    try:
        return hetero.Workload(
            ids=tuple(f"n{k}" for k in range(n)),
            times=times,
            transfers=transfers,
            nbytes=np.float64(draw.random() < 0.6) * draw.integers(0, 4, n).astype(np.float64),
            edges=np.array(edges, np.int64).reshape(-1, 2),
            is_backward=backward,
            colours=np.arange(n) if draw.random() < 0.4 else draw.integers(0, max(1, n - 1), n),
            classes=classes,
        )
    except hetero.PlacementError:
        return None


def check(workload: hetero.Workload) -> None:
    """The solver's answer is the exhaustive one, and everything below it holds."""
    optimum = exhaustive(workload)
    if optimum is None:
        with pytest.raises(hetero.PlacementError):
            hetero.plan_workload(workload)
        return
    placement = hetero.plan_workload(workload)
    assert placement.value == pytest.approx(optimum, rel=ROUNDING * 100, abs=0)
    assert placement.proof == "optimal"
    assert placement.lower_bound == placement.value == evaluate_placement(workload, placement)
    graph = contract(workload)
    assert contiguous.lower_bound(graph) <= optimum * (1 + ROUNDING)
    whole = lattice(graph, graph.parents, limit=10_000)
    assert whole is not None
    assert Tail(graph, whole, optimum * (1 + ROUNDING)).open
    for one in baselines(workload, contiguous=True):
        assert one.value is None or one.value >= optimum * (1 - ROUNDING)


def sweep(seed: int, number: int) -> None:
    draw, done = np.random.default_rng(seed), 0
    while done < number:
        workload = instance(draw)
        if workload is not None:
            check(workload)
            done += 1


@pytest.mark.parametrize("seed", range(6))
def test_small_workloads_equal_exhaustive_search(seed: int) -> None:
    sweep(seed, 40)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_ten_thousand_workloads_equal_exhaustive_search(seed: int) -> None:
    sweep(seed, 200)


def _chains(n_chains: int, length: int, *, seed: int = 0) -> hetero.Workload:
    """Parallel chains: (length + 1) ** n_chains ideals."""
    draw, n = np.random.default_rng(seed), n_chains * length
    times = draw.random((n, 2)) * [1, 10]
    edges = [(length * a + b, length * a + b + 1) for a in range(n_chains) for b in range(length - 1)]
    return hetero.Workload(
        ids=tuple(range(n)),
        times=times,
        transfers=draw.random((n, 2)) * [0.3, 0],
        nbytes=np.zeros(n),
        edges=np.array(edges, np.int64).reshape(-1, 2),
        is_backward=np.zeros(n, bool),
        colours=np.arange(n),
        classes=(hetero.DeviceClass("acc", 2), hetero.DeviceClass("cpu", 1)),
    )


def test_devices_beyond_the_number_of_operators_cost_no_time() -> None:
    many = tuple(hetero.DeviceClass(name, 50_000) for name in ("acc", "cpu"))
    workload = dataclasses.replace(_chains(2, 2), classes=many)
    few = dataclasses.replace(workload, classes=tuple(hetero.DeviceClass(kind.name, 4) for kind in many))
    assert contract(workload).counts == (4, 4)
    assert hetero.plan_workload(workload).value == hetero.plan_workload(few).value


@pytest.mark.parametrize("seed", range(5))
def test_lattice_too_large_gives_a_placement_and_a_true_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = _chains(3, 3, seed=seed)
    optimum = hetero.plan_workload(workload).value
    monkeypatch.setattr(contiguous, "_most_ideals", lambda graph: 40)  # of 64
    placement = hetero.plan_workload(workload)
    assert placement.lower_bound <= optimum * (1 + ROUNDING)
    assert placement.value >= optimum * (1 - ROUNDING)
    assert placement.proof == "optimal" or placement.lower_bound < placement.value


def test_time_limit_keeps_the_best_found_and_a_true_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = _chains(3, 4)
    optimum = hetero.plan_workload(workload).value
    ticks = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))  # a second at each look
    placement = hetero.plan_workload(workload, time_limit_s=2.0)
    assert placement.proof == "bounded"
    assert placement.lower_bound <= optimum * (1 + ROUNDING) <= placement.value * (1 + 2 * ROUNDING)


def test_backward_operators_may_return_to_a_device_but_not_forward_ones() -> None:
    # a -> b -> b' -> a', with a and a' of one colour. The forward cut alone decides.
    workload = hetero.Workload(
        ids=("a", "b", "b'", "a'"),
        times=np.ones((4, 1)),
        transfers=np.zeros((4, 1)),
        nbytes=np.zeros(4),
        edges=np.array([[0, 1], [1, 2], [2, 3]]),
        is_backward=np.array([False, False, True, True]),
        colours=np.array([0, 1, 1, 0]),
        classes=(hetero.DeviceClass("acc", 2),),
    )
    placement = hetero.plan_workload(workload)
    assert placement.value == 2
    assert placement.devices[0] == placement.devices[3] != placement.devices[1]
    assert [load.operators for load in loads(workload, placement.devices)] == [2, 2]


def _reference(name: str) -> tuple[hetero.Workload, float, dict[str, Any]]:
    if not OPEN.is_dir():
        pytest.skip(f"no reference workloads in {OPEN}; set HETEROQ_SHARED to the folder that has workloads/open")
    data = json.loads((OPEN / f"{name}.json").read_text())
    known = json.loads((OPEN / "EXPECTED.json").read_text())
    return hetero.Workload.from_json(data), known[name]["optimum"], data


NAMES = [
    "LayerGraphs_bert24_inference",
    "LayerGraphs_gnmt_inference",
    "LayerGraphs_inceptionv3_inference",
    "LayerGraphs_resnet50_training",
    "OperatorGraphs_bert_l-12_inference",
    "OperatorGraphs_bert_l-3_inference",
    "OperatorGraphs_bert_l-6_training",
    "OperatorGraphs_resnet50_inference",
]


@pytest.mark.parametrize("name", NAMES)
def test_known_optimum_is_reached_and_proven(name: str) -> None:
    workload, optimum, _ = _reference(f"throughput__{name}")
    placement = hetero.plan_workload(workload)
    assert placement.value == pytest.approx(optimum, rel=REFERENCE)
    assert placement.proof == "optimal"


@pytest.mark.parametrize("factor", [1e-9, 1e9])
@pytest.mark.parametrize("name", ["LayerGraphs_gnmt_inference", "OperatorGraphs_bert_l-6_training"])
def test_names_and_units_change_nothing(name: str, factor: float) -> None:
    _, optimum, data = _reference(f"throughput__{name}")
    draw = np.random.default_rng(1)
    fresh = dict(
        zip([node["id"] for node in data["nodes"]], draw.permutation(10 * len(data["nodes"])).tolist(), strict=False)
    )
    for node in data["nodes"]:
        node.update(id=f"op{fresh[node['id']]}")
        node.update({key: node[key] * factor for key in ("cpuLatency", "fpgaLatency")})
    for edge in data["edges"]:
        edge.update({key: f"op{fresh[edge[key]]}" for key in ("sourceId", "destId")}, cost=edge["cost"] * factor)
    draw.shuffle(data["nodes"])
    draw.shuffle(data["edges"])
    placement = hetero.plan_workload(hetero.Workload.from_json(data))
    assert placement.value == pytest.approx(optimum * factor, rel=REFERENCE)
    assert placement.proof == "optimal"
