"""The chain solver against exhaustive search, priced by formulas written here a third time."""

import contextlib
import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero.cost import Costs, LayerCost, LayerTime, StageOverhead
from hetero.device import Device
from hetero.errors import HeteroError, PlacementError
from hetero.planner.chain import solve
from hetero.planner.evaluate import evaluate
from hetero.planner.problem import OBJECTIVES, build
from hetero.topology import Topology

TOLERANCE = 1e-12  # a few dozen additions of numbers of one size in float64


@dataclasses.dataclass
class Instance:
    costs: Costs
    topology: Topology
    objective: str
    max_memory: dict[str, int]
    pins: dict[str, str]


def random_instance(seed: int, *, least_layers: int = 1, least_devices: int = 1) -> Instance:
    """Shared cores and pools, sub-devices, twins, missing links, pins, tight memory: each in some instances."""
    r = np.random.default_rng(seed)
    n_layers, n_devices = int(r.integers(least_layers, 6)), int(r.integers(least_devices, 5))
    devices = [_random_device(r, f"d{k}") for k in range(n_devices)]
    if n_devices > 2 and r.random() < 0.4:
        devices[2] = dataclasses.replace(devices[2], name="d1.0")
    twins = n_devices > 1 and r.random() < 0.3
    if twins:
        devices[-1] = dataclasses.replace(devices[0], name=devices[-1].name)
    names = [device.name for device in devices]
    layers = tuple(_random_layer(r, f"layer{i}", names, twins) for i in range(n_layers))
    transfers = {
        f"{a}->{b}": (0.1, 200.0) if twins else (float(r.random() * 0.2), float(r.uniform(50, 1000)))
        for a, b in itertools.permutations(names, 2)
        if twins or r.random() < 0.9
    }
    overheads = {} if twins else {n: _random_overhead(r) for n in names if r.random() < 0.7}
    return Instance(
        Costs(layers, int(r.integers(1, 6)), overheads, transfers, float(r.uniform(0, 3))),
        Topology(tuple(devices)),
        str(r.choice(OBJECTIVES)),
        {names[0]: int(devices[0].memory_bytes * 0.7)} if r.random() < 0.3 else {},
        {f"layer{r.integers(n_layers)}": str(r.choice(names))} if r.random() < 0.3 else {},
    )


def _random_overhead(r: np.random.Generator) -> StageOverhead:
    fixed = map(float, r.random(2) * 0.2)
    if r.random() < 0.4:
        return StageOverhead(*fixed)
    return StageOverhead(*fixed, *map(float, 1 + r.random(2)), crew="x" if r.random() < 0.3 else None)


def _random_device(r: np.random.Generator, name: str) -> Device:
    cores = tuple(sorted(r.choice(3, size=r.integers(1, 3), replace=False).tolist())) if r.random() < 0.6 else ()
    memory = int(r.integers(20, 120)) if r.random() < 0.8 else 10**9
    pool = "host" if r.random() < 0.5 else ""
    return Device(name, "cpu", str(r.choice(["x", "y"])), memory, cores=cores, memory_pool=pool)


def _random_layer(r: np.random.Generator, name: str, devices: list[str], twins: bool) -> LayerCost:
    coarse = r.random() < 0.3  # equal times make ties
    times = {}
    for device in devices:
        forward = float(r.integers(0, 4)) if coarse else float(r.random())
        if r.random() < 0.85:
            own = int(r.integers(0, 8)), int(r.integers(0, 20))
            times[device] = LayerTime(forward, float(r.random()), float(r.random() * 0.3), "given", *own)
    if twins and devices[0] in times:
        times[devices[-1]] = times[devices[0]]
    nbytes = [int(r.integers(1, 20)), int(r.integers(0, 5)), int(r.integers(0, 100)), int(r.integers(0, 4))]
    return LayerCost(name, None if r.random() < 0.8 else ("x",), *nbytes, 1.0, times)


def price(x: Instance, cuts: tuple[int, ...], devices: tuple[str, ...]) -> float:
    """The objective of a placement; infinite where a rule forbids it."""
    m, device = x.costs.n_microbatches, {name: x.topology.device(name) for name in devices}
    if any(a.overlaps(b) for a, b in itertools.combinations(device.values(), 2)):
        return math.inf
    forward, backward, used = dict.fromkeys(devices, 0.0), dict.fromkeys(devices, 0.0), dict.fromkeys(devices, 0)
    figures = {n: x.costs.overheads.get(n, StageOverhead()) for n in devices}
    slowed = {n for n, one in figures.items() if one.contended_forward is not None and x.objective != "latency"}
    n_crews = len({figures[n].crew or n for n in slowed})
    for name, first, stop in zip(devices, cuts, cuts[1:], strict=False):
        overhead = figures[name]
        forward[name], backward[name] = overhead.forward_s, overhead.backward_s
        for layer in x.costs.layers[first:stop]:
            is_allowed = layer.apis is None or device[name].api in layer.apis
            if name not in layer.times or not is_allowed or x.pins.get(layer.name, name) != name:
                return math.inf
            forward[name] += layer.times[name].forward_s
            backward[name] += layer.times[name].backward_s
            used[name] += layer.parameter_bytes + math.ceil(x.costs.optimizer_factor * layer.trainable_bytes)
            there = layer.times[name]
            used[name] += m * max(layer.saved_bytes, there.call_bytes) + there.scratch_bytes
        if name in slowed and n_crews >= 2:
            forward[name] *= overhead.contended_forward
            backward[name] *= overhead.contended_backward
    pool = [d for d in x.topology.devices if d.memory_pool]
    fits = all(used[n] <= x.max_memory.get(n, device[n].memory_bytes) for n in devices)
    in_pool = sum(used[n] for n in devices if device[n].memory_pool)
    if not fits or (pool and in_pool > max(d.memory_bytes for d in pool)):
        return math.inf
    hops = [_hop(x, a, b, cut) for a, b, cut in zip(devices, devices[1:], cuts[1:], strict=False)]
    shared = [[n for n in devices if core in device[n].cores] for core in range(3)] + [[n] for n in devices]
    max_f, max_b = (max(sum(load[n] for n in crew) for crew in shared) for load in (forward, backward))
    if x.objective == "latency":
        return sum(forward.values()) + sum(hops)
    if x.objective == "throughput":
        return max(max_f, *hops) if hops else max_f
    return sum(forward.values()) + sum(backward.values()) + (m - 1) * (max_f + max_b) + 2 * sum(hops)


def _hop(x: Instance, a: str, b: str, cut: int) -> float:
    if (given_link := x.costs.transfers.get(f"{a}->{b}")) is not None:
        return given_link[0] + x.costs.layers[cut - 1].output_bytes / given_link[1]
    return 0.0 if x.topology.device(a).memory_pool == x.topology.device(b).memory_pool != "" else math.inf


def every_price(x: Instance) -> list[float]:
    """The prices of all placements, best first."""
    n = len(x.costs.layers)
    prices = []
    for k in range(1, min(n, len(x.topology.devices)) + 1):
        for inner in itertools.combinations(range(1, n), k - 1):
            for devices in itertools.permutations(x.topology.names, k):
                prices.append(price(x, (0, *inner, n), devices))
    return sorted(prices)


def check(x: Instance) -> None:
    """The solver finds the best price, proves it, and `evaluate` agrees; or it refuses and there is none."""
    best = every_price(x)[0]
    try:
        problem = build(x.costs, x.topology, objective=x.objective, max_memory=x.max_memory, pins=x.pins)
        solution = solve(problem)
    except PlacementError:
        assert best == math.inf
        return
    assert solution.is_optimal
    assert solution.value == pytest.approx(best, rel=TOLERANCE, abs=TOLERANCE)
    assert solution.lower_bound == solution.value
    priced = evaluate(solution.stages, x.costs, x.topology, x.objective, max_memory=x.max_memory)
    assert priced.value == pytest.approx(best, rel=TOLERANCE, abs=TOLERANCE)


def check_several_runs(x: Instance) -> None:
    """The same where a device may hold several runs of layers; priced by `evaluate`, which the tests above check."""
    best = math.inf
    for path in itertools.product(x.topology.names, repeat=len(x.costs.layers)):
        if all(x.pins.get(layer.name, name) == name for layer, name in zip(x.costs.layers, path, strict=True)):
            cuts = [0, *(i for i in range(1, len(path)) if path[i] != path[i - 1]), len(path)]
            stages = [(path[a], a, b - 1) for a, b in itertools.pairwise(cuts)]
            with contextlib.suppress(HeteroError):
                priced = evaluate(stages, x.costs, x.topology, x.objective, max_memory=x.max_memory)
                best = min(best, priced.value)
    options = {"objective": x.objective, "max_memory": x.max_memory, "pins": x.pins, "contiguous": False}
    try:
        solution = solve(build(x.costs, x.topology, **options))
    except PlacementError:
        assert best == math.inf
        return
    assert solution.is_optimal
    assert solution.value == pytest.approx(best, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("block", range(4))
def test_the_plan_of_several_runs_a_device_is_the_best_of_all_assignments(block):
    for seed in range(25 * block, 25 * block + 25):
        check_several_runs(random_instance(seed))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_the_plan_is_the_best_of_all_placements(seed):
    check(random_instance(seed))


@pytest.mark.parametrize("block", range(4))
def test_the_plan_is_the_best_of_all_placements_in_fixed_instances(block):
    for seed in range(60 * block, 60 * block + 60):
        check(random_instance(seed))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_the_plan_is_the_best_of_all_placements_ten_thousand_times(block):
    for seed in range(500 * block, 500 * block + 500):
        check(random_instance(seed))


def test_a_beam_of_one_label_still_gives_a_true_bound(monkeypatch):
    monkeypatch.setattr("hetero.planner.chain._BEAMS", (1, 1))
    n_bounds = 0
    for seed in range(60):
        x = random_instance(seed, least_layers=5, least_devices=4)
        best = every_price(x)[0]
        try:
            problem = build(x.costs, x.topology, objective=x.objective, max_memory=x.max_memory, pins=x.pins)
            solution = solve(problem, time_limit_s=0.0)
        except PlacementError:
            continue
        n_bounds += not solution.is_optimal
        assert solution.lower_bound <= best * (1 + TOLERANCE) + TOLERANCE
        assert solution.value >= best * (1 - TOLERANCE) - TOLERANCE
        assert not solution.is_optimal or solution.value == pytest.approx(best, rel=TOLERANCE, abs=TOLERANCE)
        priced = evaluate(solution.stages, x.costs, x.topology, x.objective, max_memory=x.max_memory)
        assert priced.value == pytest.approx(solution.value, rel=TOLERANCE, abs=TOLERANCE)
    assert n_bounds >= 20


def test_the_runner_up_is_the_second_best_placement():
    n_checked = 0
    for seed in range(150):
        x = dataclasses.replace(random_instance(seed), objective="train_step", pins={})
        first, last = x.topology.devices[0], x.topology.devices[-1]
        prices = [p for p in every_price(x) if p < math.inf]
        if len(prices) < 2 or last == dataclasses.replace(first, name=last.name):
            continue  # of two equal devices the runner-up is the first that is no mirror image
        problem = build(x.costs, x.topology, objective="train_step", max_memory=x.max_memory)
        best = solve(problem)
        path = [problem.devices.index(device) for device, first, last in best.stages for _ in range(first, last + 1)]
        second = solve(problem, reference=path)
        assert second.stages != best.stages
        assert second.value == pytest.approx(prices[1], rel=TOLERANCE, abs=TOLERANCE)
        n_checked += 1
    assert n_checked > 30
