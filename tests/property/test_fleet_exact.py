"""Fleet plans against exhaustive search: whole replicas within the counts, true bounds, prices by other formulas."""

import itertools
import math

import numpy as np
import pytest

from hetero.cost import Costs, LayerCost, LayerTime, StageOverhead
from hetero.device import Device
from hetero.errors import PlacementError
from hetero.planner.fleet import FleetPlan, plan_fleet
from hetero.topology import Link, Topology

TOLERANCE = 1e-9  # of a plan's value, which has been through a linear program


def random_fleet(seed: int) -> tuple[Costs, Topology]:
    """Two or three classes of a few devices; missing links and layers, tight memory, zero times and ties."""
    r = np.random.default_rng(seed)
    counts = {f"k{c}": int(r.integers(1, 5)) for c in range(int(r.integers(1, 4)))}
    devices = []
    for name, n in counts.items():
        memory = int(r.integers(20, 90)) if r.random() < 0.7 else 10**6
        devices += [Device(f"{name}:{k}", "gpu", "x", memory) for k in range(n)]
    links = [
        Link(f"{a}:*", f"{b}:*", float(r.random() * 0.3), float(r.uniform(20, 200)))
        for a, b in itertools.combinations_with_replacement(counts, 2)
        if r.random() < 0.85
    ]
    is_coarse = r.random() < 0.5
    layers = []
    for i in range(int(r.integers(1, 5))):
        times = {
            f"{name}:0": LayerTime(
                float(r.integers(0, 4)) if is_coarse else float(r.uniform(0.1, 1)), 0.0, 0.0, "given"
            )
            for name in counts
            if r.random() < 0.9
        }
        layers.append(LayerCost(f"l{i}", None, int(r.integers(1, 30)), 0, int(r.integers(0, 40)), 0, 1.0, times))
    overheads = {"k0:0": StageOverhead(float(r.random() * 0.2))} if r.random() < 0.5 else {}
    return Costs(tuple(layers), 1, overheads), Topology(tuple(devices), tuple(links))


def pipelines(costs: Costs, topology: Topology, most: int) -> list[tuple[tuple[int, ...], float]]:
    """(devices of each class, bottleneck) of every pipeline."""
    kinds = list(dict.fromkeys(name.split(":")[0] for name in topology.names))
    n, found = len(costs.layers), []
    for k in range(1, min(n, most) + 1):
        for inner in itertools.combinations(range(1, n), k - 1):
            for path in itertools.product(kinds, repeat=k):
                slowest = bottleneck(costs, topology, (0, *inner, n), path)
                if slowest < math.inf:
                    found.append((tuple(path.count(kind) for kind in kinds), slowest))
    return found


def bottleneck(costs: Costs, topology: Topology, cuts: tuple[int, ...], path: tuple[str, ...]) -> float:
    """The slowest stage or hand-over; infinite where a pipeline is impossible."""
    slowest = 0.0
    for kind, first, stop in zip(path, cuts, cuts[1:], strict=False):
        inside = costs.layers[first:stop]
        if any(f"{kind}:0" not in layer.times for layer in inside):
            return math.inf
        if sum(layer.parameter_bytes for layer in inside) > topology.device(f"{kind}:0").memory_bytes:
            return math.inf
        load = sum(layer.times[f"{kind}:0"].forward_s for layer in inside)
        slowest = max(slowest, load + costs.overheads.get(f"{kind}:0", StageOverhead()).forward_s)
    for a, b, cut in zip(path, path[1:], cuts[1:], strict=False):
        link = next((x for x in topology.links if {x.source, x.target} == {f"{a}:*", f"{b}:*"}), None)
        if link is None:
            return math.inf
        slowest = max(slowest, link.latency_s + costs.layers[cut - 1].output_bytes / link.bandwidth)
    return slowest


def best_throughput(columns: list[tuple[tuple[int, ...], float]], counts: tuple[int, ...]) -> float:
    """The most that whole numbers of pipelines give, by trying each number of each in turn."""
    best: dict[tuple[int, ...], float] = {}
    for used, slowest in columns:
        best[used] = min(best.get(used, math.inf), slowest)
    known: dict[tuple[int, ...], float] = {}

    def most(left: tuple[int, ...]) -> float:
        if left not in known:
            options = [
                1 / slowest + most(tuple(n - u for n, u in zip(left, used, strict=True)))
                for used, slowest in best.items()
                if all(u <= n for u, n in zip(used, left, strict=True))
            ]
            known[left] = max(options, default=0.0)
        return known[left]

    return most(counts)


def check(seed: int, max_pipeline: int | None) -> float:
    """The plan keeps to the counts and its price, and the best plan lies between it and its bound; the gap."""
    costs, topology = random_fleet(seed)
    kinds = list(dict.fromkeys(name.split(":")[0] for name in topology.names))
    counts = tuple(sum(name.startswith(f"{kind}:") for name in topology.names) for kind in kinds)
    columns = pipelines(costs, topology, max_pipeline or len(costs.layers))
    possible = [c for c in columns if all(u <= n for u, n in zip(c[0], counts, strict=True))]
    if any(not slowest for _, slowest in possible):
        return math.nan
    try:
        plan = plan_fleet(costs, topology, max_pipeline=max_pipeline, time_limit_s=2.0)
    except PlacementError:
        assert not possible
        return math.nan
    best = best_throughput(possible, counts)
    assert plan.throughput <= best * (1 + TOLERANCE)
    assert plan.upper_bound >= best * (1 - TOLERANCE)
    used, total = dict.fromkeys(kinds, 0), 0.0
    names = {group.name: group.members[0].split(":")[0] for group in topology.classes()}
    for replica in plan.replicas:
        path = tuple(names[stage.device_class] for stage in replica.stages)
        cuts = (0, *(stage.last + 1 for stage in replica.stages))
        assert len(path) <= (max_pipeline or len(path))
        total += replica.count / bottleneck(costs, topology, cuts, path)
        for kind in path:
            used[kind] += replica.count
    assert total == pytest.approx(plan.throughput, rel=TOLERANCE)
    assert all(used[kind] <= n for kind, n in zip(kinds, counts, strict=True))
    assert {names[name]: n for name, n in plan.used.items()} == used
    assert FleetPlan.from_json(plan.to_json()) == plan
    return best / plan.throughput - 1


@pytest.mark.parametrize("max_pipeline", [None, 1, 2])
def test_the_best_plan_lies_between_value_and_bound(max_pipeline):
    gaps = [gap for seed in range(60) if not math.isnan(gap := check(seed, max_pipeline))]
    assert len(gaps) > 20
    assert np.median(gaps) <= TOLERANCE


@pytest.mark.slow
def test_the_best_plan_lies_between_value_and_bound_a_thousand_times():
    for seed in range(1000, 2000):
        check(seed, (None, 1, 2, 3)[seed % 4])


def alike(n: int) -> tuple[Costs, Topology]:
    """Two layers of 1 s, n devices that hold one each."""
    layers = tuple(LayerCost(f"l{i}", None, 1, 0, 1, 0, 1.0, {"a": LayerTime(1.0, 0.0, 0.0, "given")}) for i in (0, 1))
    devices = tuple(Device(f"a:{k}", "gpu", "x", 1) for k in range(n))
    return Costs(layers, 1), Topology(devices, (Link("a:*", "a:*", 0.0, 1e9),))


def test_a_fleet_of_ten_thousand_equal_devices_is_planned_optimally():
    plan = plan_fleet(*alike(10_000))
    assert [(replica.count, replica.bottleneck_s) for replica in plan.replicas] == [(5000, 1.0)]
    assert plan.upper_bound == pytest.approx(5000.0, rel=1e-3)
    assert plan.used == {"a": 10_000}
    assert plan.worth["a"] == pytest.approx(0.5)
    assert "10000 of 10000 used, 0 idle" in plan.explain()


def test_what_makes_a_fleet_impossible_is_named():
    costs, topology = alike(4)
    with pytest.raises(PlacementError, match="has no devices"):
        plan_fleet(costs, Topology(()))
    with pytest.raises(PlacementError, match="would need a link between classes that is missing"):
        plan_fleet(costs, Topology(topology.devices))
    with pytest.raises(PlacementError, match="no pipeline of at most 1 stages"):
        plan_fleet(costs, topology, max_pipeline=1)
    with pytest.raises(PlacementError, match="max_pipeline is 0"):
        plan_fleet(costs, topology, max_pipeline=0)
    with pytest.raises(PlacementError, match="'l0' fits on no device"):
        plan_fleet(costs, Topology((Device("a", "gpu", "x", 0),)))
    with pytest.raises(PlacementError, match="no device of the topology has costs"):
        plan_fleet(costs, Topology((Device("b:0", "gpu", "x", 9),)))
