"""The solver for chains over device classes against exhaustive search, and against the solver for single devices."""

import dataclasses
import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero.cost import Costs, LayerCost, LayerTime, StageOverhead
from hetero.device import Device
from hetero.errors import PlacementError
from hetero.planner import chain, class_boxes, class_chain
from hetero.planner.bounds import Weights
from hetero.planner.class_problem import reduced
from hetero.planner.pricing import evaluate
from hetero.planner.problem import build
from hetero.planner.symmetry import classes
from hetero.topology import Topology

TOLERANCE = 1e-12  # a few dozen additions of numbers of one size in float64
OBJECTIVES = ("latency", "throughput", "train_step")


@dataclasses.dataclass
class Instance:
    costs: Costs
    topology: Topology
    objective: str
    counts: dict[str, int]


def random_instance(seed: int, *, least_layers: int = 1, most_layers: int = 6) -> Instance:
    """Classes of one to three devices; zero times, ties, tight memory, missing links and layers that few can run."""
    r = np.random.default_rng(seed)
    n_layers, n_classes = int(r.integers(least_layers, most_layers + 1)), int(r.integers(1, 4))
    counts = {f"c{k}": int(r.integers(1, 4 if n_classes < 3 else 3)) for k in range(n_classes)}
    kind = str(r.choice(["coarse", "fine", "zero"], p=[0.4, 0.5, 0.1]))
    memory = {name: int(r.integers(20, 120)) if r.random() < 0.6 else 10**9 for name in counts}
    api = {name: str(r.choice(["x", "y"])) for name in counts}
    devices = [Device(f"{c}:{k}", "gpu", api[c], memory[c]) for c, n in counts.items() for k in range(n)]
    layers = tuple(_layer(r, f"layer{i}", counts, kind) for i in range(n_layers))
    transfers = {}
    for a, b in itertools.product(counts, repeat=2):
        latency, bandwidth = float(r.random() * 0.2), float(r.uniform(50, 1000))
        if r.random() < 0.85:
            pairs = itertools.product(range(counts[a]), range(counts[b]))
            transfers |= {f"{a}:{i}->{b}:{j}": (latency, bandwidth) for i, j in pairs if (a, i) != (b, j)}
    overheads = {}
    for c in counts:
        if r.random() < 0.4:
            fixed = StageOverhead(*map(float, r.random(2) * 0.3))
            overheads |= {f"{c}:{k}": fixed for k in range(counts[c])}
    costs = Costs(layers, int(r.integers(1, 6)), overheads, transfers, float(r.uniform(0, 3)))
    return Instance(costs, Topology(tuple(devices)), str(r.choice(OBJECTIVES)), counts)


def _layer(r: np.random.Generator, name: str, counts: dict[str, int], kind: str) -> LayerCost:
    times = {}
    for c, n in counts.items():
        draw = {"coarse": lambda: float(r.integers(0, 4)), "fine": r.random, "zero": lambda: 0.0}[kind]
        time_ = LayerTime(float(draw()), float(draw()), 0.1, "given", int(r.integers(0, 8)), int(r.integers(0, 9)))
        if r.random() < 0.88:
            times |= {f"{c}:{k}": time_ for k in range(n)}
    nbytes = [int(r.integers(1, 20)), int(r.integers(0, 5)), int(r.integers(0, 100)), int(r.integers(0, 4))]
    return LayerCost(name, None if r.random() < 0.9 else ("x",), *nbytes, 1.0, times)


def every_price(x: Instance, weights: Weights) -> list[float]:
    """The prices of all placements (by class; devices of a class taken in order), best first."""
    n = len(x.costs.layers)
    prices = []
    for k in range(1, min(n, sum(x.counts.values())) + 1):
        for kinds in itertools.product(x.counts, repeat=k):
            if all(kinds.count(c) <= x.counts[c] for c in kinds):
                for inner in itertools.combinations(range(1, n), k - 1):
                    prices.append(price(x, (0, *inner, n), kinds, weights))
    return sorted(prices)


def price(x: Instance, cuts: tuple[int, ...], kinds: tuple[str, ...], w: Weights) -> float:
    """The objective of a placement; infinite where a rule forbids it."""
    costs, m = x.costs, x.costs.n_microbatches
    names = [f"{c}:{kinds[:k].count(c)}" for k, c in enumerate(kinds)]
    total, most_f, most_b = 0.0, 0.0, 0.0
    for name, first, stop in zip(names, cuts, cuts[1:], strict=False):
        device, fixed, used = x.topology.device(name), costs.overheads.get(name, StageOverhead()), 0
        forward, backward = fixed.forward_s, fixed.backward_s
        for layer in costs.layers[first:stop]:
            if name not in layer.times or (layer.apis is not None and device.api not in layer.apis):
                return math.inf
            there = layer.times[name]
            forward, backward = forward + there.forward_s, backward + there.backward_s
            used += layer.parameter_bytes + math.ceil(costs.optimizer_factor * layer.trainable_bytes)
            used += m * max(layer.saved_bytes, there.call_bytes) + there.scratch_bytes
        if used > device.memory_bytes:
            return math.inf
        total += w.forward * forward + w.backward * backward
        most_f, most_b = max(most_f, forward), max(most_b, backward)
    for a, b, cut in zip(names, names[1:], cuts[1:], strict=False):
        if f"{a}->{b}" not in costs.transfers:
            return math.inf
        latency, bandwidth = costs.transfers[f"{a}->{b}"]
        hop = latency + costs.layers[cut - 1].output_bytes / bandwidth
        total += w.transfer * hop
        most_f = max(most_f, hop) if w.links else most_f
    return total + w.max_forward * most_f + w.max_backward * most_b


def check(x: Instance) -> None:
    """The solver finds the best price and proves it, and two others agree; or it refuses and there is none."""
    best = every_price(x, chain.weights(x.objective, x.costs.n_microbatches))[0]
    try:
        problem = build(x.costs, x.topology, objective=x.objective)
        assert class_chain.applies(problem)
        solution = class_chain.solve(problem)
    except PlacementError:
        assert best == math.inf
        return
    assert solution.is_optimal
    assert solution.value == pytest.approx(best, rel=TOLERANCE, abs=TOLERANCE)
    assert solution.lower_bound <= best * (1 + TOLERANCE)
    priced = evaluate(solution.stages, x.costs, x.topology, x.objective)
    assert priced.value == pytest.approx(best, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("block", range(4))
def test_the_plan_is_the_best_of_all_placements_in_fixed_instances(block):
    for seed in range(100 * block, 100 * block + 100):
        check(random_instance(seed))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_the_plan_is_the_best_of_all_placements(seed):
    check(random_instance(seed))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_the_plan_is_the_best_of_all_placements_five_thousand_times(block):
    for seed in range(1000 + 250 * block, 1250 + 250 * block):
        check(random_instance(seed))


@pytest.mark.parametrize("block", range(3))
def test_any_mixture_of_weights_is_solved_exactly(block):
    n_checked = 0
    for seed in range(60 * block, 60 * block + 60):
        x, r = random_instance(seed), np.random.default_rng(seed)
        drawn = [float(r.choice([0.0, 1.0, 2.5])) for _ in range(5)]
        weights = Weights(*drawn, links=bool(r.random() < 0.3))
        best = every_price(x, weights)[0]
        try:
            problem = build(x.costs, x.topology, objective="latency")
        except PlacementError:
            assert best == math.inf
            continue
        found = class_boxes.best(reduced(problem, classes(problem)), weights, deadline=time.monotonic() + 60)
        assert found.is_complete
        assert found.value == pytest.approx(best, rel=TOLERANCE, abs=TOLERANCE)
        n_checked += best < math.inf
    assert n_checked > 20


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_both_solvers_agree_beyond_exhaustive_search(objective):
    n_compared = 0
    for seed in range(50):
        x = random_instance(seed, least_layers=8, most_layers=12)
        try:
            problem = build(x.costs, x.topology, objective=objective)
            expected = chain.solve(problem)
        except PlacementError:
            with pytest.raises(PlacementError):
                class_chain.solve(build(x.costs, x.topology, objective=objective))
            continue
        solution = class_chain.solve(problem)
        assert expected.is_optimal
        assert solution.is_optimal
        assert solution.value == pytest.approx(expected.value, rel=TOLERANCE, abs=TOLERANCE)
        n_compared += 1
    assert n_compared > 10


def test_the_runner_up_is_the_second_best_placement():
    n_checked = 0
    for seed in range(160):
        x = random_instance(seed, least_layers=2)
        prices = every_price(x, chain.weights(x.objective, x.costs.n_microbatches))
        if not prices[0] < math.inf:
            continue
        problem = build(x.costs, x.topology, objective=x.objective)
        best = class_chain.solve(problem)
        path = [problem.devices.index(device) for device, first, last in best.stages for _ in range(first, last + 1)]
        if len(prices) < 2 or prices[1] == math.inf:
            with pytest.raises(PlacementError, match="there is no other placement"):
                class_chain.solve(problem, reference=path)
            continue
        second = class_chain.solve(problem, reference=path)
        assert second.stages != best.stages
        assert second.value == pytest.approx(prices[1], rel=TOLERANCE, abs=TOLERANCE)
        n_checked += 1
    assert n_checked > 60


def test_without_time_value_and_bound_are_still_true():
    n_bounds = 0
    for seed in range(120):
        x = dataclasses.replace(random_instance(seed, least_layers=4), objective=OBJECTIVES[seed % 3])
        best = every_price(x, chain.weights(x.objective, x.costs.n_microbatches))[0]
        try:
            solution = class_chain.solve(build(x.costs, x.topology, objective=x.objective), time_limit_s=-1.0)
        except PlacementError:
            continue
        n_bounds += not solution.is_optimal
        assert solution.lower_bound <= best * (1 + TOLERANCE) + TOLERANCE
        assert solution.value >= best * (1 - TOLERANCE) - TOLERANCE
        priced = evaluate(solution.stages, x.costs, x.topology, x.objective)
        assert priced.value == pytest.approx(solution.value, rel=TOLERANCE, abs=TOLERANCE)
    assert n_bounds >= 5


def test_too_little_memory_names_the_first_layer_that_finds_no_room():
    layers = tuple(LayerCost(f"l{i}", None, 60, 0, 1, 0, 1.0, {}) for i in range(3))
    time_ = LayerTime(1.0, 1.0, 0.0, "given")
    layers = tuple(dataclasses.replace(layer, times={"a:0": time_, "a:1": time_, "b:0": time_}) for layer in layers)
    devices = (Device("a:0", "gpu", "x", 70), Device("a:1", "gpu", "x", 70), Device("b:0", "gpu", "x", 59))
    transfers = {f"{a.name}->{b.name}": (0.0, 1.0) for a, b in itertools.permutations(devices, 2)}
    problem = build(Costs(layers, 1, {}, transfers), Topology(devices))
    with pytest.raises(PlacementError, match="'l2' fits on no device"):
        class_chain.solve(problem)


@pytest.mark.parametrize("cores", [((0,), (1,)), ((0,), (0,))], ids=["own cores", "one core"])
def test_devices_that_share_a_core_are_left_to_the_other_solver(cores):
    time_ = LayerTime(1.0, 1.0, 0.0, "given")
    layers = (LayerCost("l", None, 1, 0, 1, 0, 1.0, {"a:0": time_, "a:1": time_}),)
    devices = tuple(Device(f"a:{k}", "cpu", "x", 10, cores=own) for k, own in enumerate(cores))
    problem = build(Costs(layers, 1, {}, {"a:0->a:1": (0.0, 1.0), "a:1->a:0": (0.0, 1.0)}), Topology(devices))
    assert class_chain.applies(problem) == (cores[0] != cores[1])
