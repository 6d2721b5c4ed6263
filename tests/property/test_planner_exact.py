"""The chain solver against exhaustive search, priced by formulas written here a third time."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero.cost import Costs, LayerCost, LayerTime, StageOverhead
from hetero.device import Device
from hetero.errors import PlacementError
from hetero.planner import one_f_one_b
from hetero.planner.chain import solve
from hetero.planner.pricing import evaluate
from hetero.planner.problem import OBJECTIVES, build
from hetero.schedule import step_time
from hetero.topology import Link, Topology

TOLERANCE = 1e-12  # a few dozen additions of numbers of one size in float64


@dataclasses.dataclass
class Instance:
    costs: Costs
    topology: Topology
    objective: str
    max_memory: dict[str, int]
    pins: dict[str, str]
    schedule: str = "gpipe"
    colocate: tuple[tuple[str, ...], ...] = ()
    recompute: str = "never"
    contiguous: bool = True

    def problem(self):
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return build(fields.pop("costs"), fields.pop("topology"), **fields)

    def evaluate(self, solution):
        again = [self.costs.layers[i].name for i in solution.recomputed]
        options = {"max_memory": self.max_memory, "recomputed": again, "schedule": self.schedule}
        return evaluate(solution.stages, self.costs, self.topology, self.objective, **options)


def random_instance(seed: int, *, least_layers: int = 1, least_devices: int = 1, plain: bool = False) -> Instance:
    """Shared cores and pools, sub-devices, twins, missing links, pins, tight memory: each in some instances.

    Unless `plain`, also what `with_features` adds.
    """
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
    x = Instance(
        Costs(layers, int(r.integers(1, 6)), overheads, transfers, float(r.uniform(0, 3))),
        Topology(tuple(devices)),
        str(r.choice(OBJECTIVES[:3] if plain else OBJECTIVES)),
        {names[0]: int(devices[0].memory_bytes * 0.7)} if r.random() < 0.3 else {},
        {f"layer{r.integers(n_layers)}": str(r.choice(names))} if r.random() < 0.3 else {},
    )
    return x if plain else with_features(x, r)


def with_features(x: Instance, r: np.random.Generator) -> Instance:
    """The instance with a schedule, colocation, recomputation, several runs a device and shared media in some cases."""
    layers = [layer.name for layer in x.costs.layers]
    if x.objective == "train_step" and r.random() < 0.5:
        x = dataclasses.replace(x, schedule="1f1b")
    if len(layers) > 1 and r.random() < 0.3:
        groups = [tuple(r.choice(layers, size=2, replace=False).tolist()) for _ in range(r.integers(1, 3))]
        x = dataclasses.replace(x, colocate=tuple(groups))
    if r.random() < 0.4:
        x = dataclasses.replace(x, topology=dataclasses.replace(x.topology, links=_random_links(r, x.topology.names)))
        given_times = {pair: t for pair, t in x.costs.transfers.items() if r.random() < 0.5}
        x = dataclasses.replace(x, costs=dataclasses.replace(x.costs, transfers=given_times))
    # Fewer layers and devices where the exhaustive search has more to try.
    if len(layers) < 5 and r.random() < 0.5:
        x = dataclasses.replace(x, recompute="allowed")
    if x.schedule == "gpipe" and len(layers) < 5 and len(x.topology.names) < 4 and r.random() < 0.5:
        x = dataclasses.replace(x, contiguous=False)
    return x


def _random_links(r: np.random.Generator, names: tuple[str, ...]) -> tuple[Link, ...]:
    links = []
    for a, b in itertools.combinations(names, 2):
        figures = float(r.random() * 0.3), float(r.uniform(20, 500))
        how = {"duplex": str(r.choice(["full", "half"])), "shared": str(r.choice(["", "", "bus", "hub"]))}
        ends = (a, b) if r.random() < 0.5 else (b, a)
        links += [Link(*ends, *figures, **how)] if r.random() < 0.9 else []
    return tuple(links)


def _random_overhead(r: np.random.Generator) -> StageOverhead:
    fixed = map(float, r.random(2) * 0.2)
    if r.random() < 0.4:
        return StageOverhead(*fixed)
    return StageOverhead(*fixed, *map(float, 1 + r.random(2)), crew="x" if r.random() < 0.3 else None)


def _random_device(r: np.random.Generator, name: str) -> Device:
    cores = tuple(sorted(r.choice(3, size=r.integers(1, 3), replace=False).tolist())) if r.random() < 0.6 else ()
    memory = int(r.integers(20, 120)) if r.random() < 0.8 else 10**9
    pool = "host" if r.random() < 0.5 else ""
    figures = {
        "price_usd_h": 3600.0 * float(r.integers(0, 4) if r.random() < 0.5 else r.random()),
        "power_w": float(r.integers(0, 4)) + 0.5,
        "idle_power_w": float(r.random() * 2) if r.random() < 0.5 else None,
    }
    api = str(r.choice(["cpu", "opencl"]))
    return Device(name, "cpu", api, memory, cores=cores, memory_pool=pool, **figures)


def _random_layer(r: np.random.Generator, name: str, devices: list[str], twins: bool) -> LayerCost:
    coarse = r.random() < 0.3  # equal times make ties
    times = {}
    for device in devices:
        forward = float(r.integers(0, 4)) if coarse else float(r.random())
        if r.random() < 0.85:
            own = int(r.integers(0, 8)), int(r.integers(0, 20))
            usd = float(r.random()) if r.random() < 0.3 else 0.0
            times[device] = LayerTime(forward, float(r.random()), float(r.random() * 0.3), "given", *own, usd)
    if twins and devices[0] in times:
        times[devices[-1]] = times[devices[0]]
    nbytes = [int(r.integers(1, 20)), int(r.integers(0, 5)), int(r.integers(0, 100)), int(r.integers(0, 9))]
    again = int(r.integers(0, 4)) if r.random() < 0.8 else None
    return LayerCost(name, None if r.random() < 0.8 else ("cpu",), *nbytes, 1.0, times, again)


def price(x: Instance, path: tuple[str, ...], again: tuple[bool, ...]) -> float:
    """The objective of a placement (device of each layer, whether it is recomputed); infinite: a rule forbids it."""
    m, used = x.costs.n_microbatches, list(dict.fromkeys(path))
    device = {name: x.topology.device(name) for name in used}
    runs = [list(run) for _, run in itertools.groupby(range(len(path)), key=lambda i: path[i])]
    place = {layer.name: name for layer, name in zip(x.costs.layers, path, strict=True)}
    if (
        any(a.overlaps(b) for a, b in itertools.combinations(device.values(), 2))
        or any(place[layer] != name for layer, name in x.pins.items())
        or any(len({place[layer] for layer in group}) > 1 for group in x.colocate)
        or (x.contiguous and len(runs) > len(used))
        or (x.schedule == "1f1b" and len(runs) > m)
        or not _fits(x, path, again, runs)
    ):
        return math.inf
    stages = _stage_times(x, path, again, runs)
    if not stages:
        return math.inf
    hops = [_hop(x, path[run[-1]], path[run[-1] + 1], run[-1]) for run in runs[:-1]]
    if math.inf in hops:
        return math.inf
    devices = [path[run[0]] for run in runs]
    load = [{n: sum(t[k] for t, d in zip(stages, devices, strict=True) if d == n) for n in used} for k in (0, 1)]
    shared = [[n for n in used if core in device[n].cores] for core in range(3)] + [[n] for n in used]
    max_f, max_b = (max(sum(one[n] for n in crew) for crew in shared) for one in load)
    both = sum(f + b for f, b in stages)
    step = both + (m - 1) * (max_f + max_b) + 2 * sum(hops)
    if x.objective == "latency":
        return sum(f for f, _ in stages) + sum(hops)
    if x.objective == "throughput":
        media: dict[str, float] = {}
        for a, b, hop in zip(devices, devices[1:], hops, strict=False):
            media[_medium(x, a, b)] = media.get(_medium(x, a, b), 0.0) + hop
        return max(max_f, *media.values(), 0.0)
    if x.objective == "dollars":
        calls = sum(layer.times[d].usd for layer, d in zip(x.costs.layers, path, strict=True))
        return sum(device[n].price_usd_h for n in used) / 3600 * step + m * calls
    if x.objective == "energy":
        idle = {n: min(device[n].idle_power_w or 0.0, device[n].power_w) for n in used}
        work = sum((device[n].power_w - idle[n]) * (load[0][n] + load[1][n]) for n in used)
        return sum(idle.values()) * step + m * work
    return step if x.schedule == "gpipe" else _one_f_one_b(x, stages, hops, devices)


def _fits(x: Instance, path: tuple[str, ...], again: tuple[bool, ...], runs: list[list[int]]) -> bool:
    m, filled, room = x.costs.n_microbatches, dict.fromkeys(path, 0), dict.fromkeys(path, 0)
    for s, run in enumerate(runs):
        in_flight = m if x.schedule == "gpipe" else min(m, len(runs) - s)
        for i in run:
            layer, name = x.costs.layers[i], path[i]
            there = layer.times.get(name)
            if there is None or (layer.apis is not None and x.topology.device(name).api not in layer.apis):
                return False
            saved = kept = max(layer.saved_bytes, there.call_bytes)
            if again[i]:
                given_bytes = x.costs.layers[i - 1].output_bytes if i else 0
                kept = min(saved, given_bytes if layer.recompute_bytes is None else layer.recompute_bytes)
                room[name] = max(room[name], saved - kept)
                if x.topology.device(name).api != "cpu" or x.recompute == "never":
                    return False
            filled[name] += layer.parameter_bytes + math.ceil(x.costs.optimizer_factor * layer.trainable_bytes)
            filled[name] += in_flight * kept + there.scratch_bytes
    pool = [d for d in x.topology.devices if d.memory_pool]
    if any(filled[n] + room[n] > x.max_memory.get(n, x.topology.device(n).memory_bytes) for n in filled):
        return False
    in_pool = sum(filled[n] + room[n] for n in filled if x.topology.device(n).memory_pool)
    return not pool or in_pool <= max(d.memory_bytes for d in pool)


def _stage_times(
    x: Instance, path: tuple[str, ...], again: tuple[bool, ...], runs: list[list[int]]
) -> list[tuple[float, float]]:
    figures = {n: x.costs.overheads.get(n, StageOverhead()) for n in path}
    slowed = {n for n, one in figures.items() if one.contended_forward is not None and x.objective != "latency"}
    is_slow = len({figures[n].crew or n for n in slowed}) >= 2
    stages = []
    for run in runs:
        name = path[run[0]]
        times = [x.costs.layers[i].times[name] for i in run]
        slow_f, slow_b = 1.0, 1.0
        if is_slow and name in slowed:
            slow_f, slow_b = figures[name].contended_forward, figures[name].contended_backward
        second = sum(time.forward_s for i, time in zip(run, times, strict=True) if again[i])
        forward = figures[name].forward_s + sum(time.forward_s for time in times)
        backward = figures[name].backward_s + sum(time.backward_s for time in times)
        stages.append((slow_f * forward, slow_b * backward + slow_f * second))
    return stages


def _hop(x: Instance, a: str, b: str, layer: int) -> float:
    nbytes = x.costs.layers[layer].output_bytes
    if (given_link := x.costs.transfers.get(f"{a}->{b}")) is not None:
        return given_link[0] + nbytes / given_link[1]
    if (link := _link(x, a, b)) is not None:
        return link.latency_s + nbytes / link.bandwidth
    return 0.0 if x.topology.device(a).memory_pool == x.topology.device(b).memory_pool != "" else math.inf


def _link(x: Instance, a: str, b: str) -> Link | None:
    return next((one for one in x.topology.links if {one.source, one.target} == {a, b}), None)


def _medium(x: Instance, a: str, b: str) -> str:
    """In this file each link is written once, for one pair: full-duplex media have the direction it is written in."""
    link = _link(x, a, b)
    name = (link.shared if link else "") or " ".join(sorted((a, b)))
    if link is None or (link.duplex == "full" and not link.shared):
        return f"{name} to {b}"
    return name if link.duplex == "half" else f"{name} {link.source == a}"


def _one_f_one_b(x: Instance, stages: list[tuple[float, float]], hops: list[float], devices: list[str]) -> float:
    """The step in which each device does its work in the order of 1F1B; waits are resolved by going over it again."""
    m, n = x.costs.n_microbatches, len(stages)
    cores = [set(x.topology.device(d).cores) for d in devices]
    if any(a & b for a, b in itertools.combinations(cores, 2)):
        forward, backward = zip(*stages, strict=True)
        return step_time(forward, backward, hops, m, cores=[tuple(own) for own in cores])
    end: dict[tuple[str, int, int], float] = {}
    orders = []
    for s in range(n):
        warm = min(m, n - 1 - s)
        order = [("f", k) for k in range(warm)]
        for k in range(m - warm):
            order += [("f", warm + k), ("b", k)]
        orders.append(order + [("b", k) for k in range(m - warm, m)])
    while len(end) < 2 * m * n:
        for s, order in enumerate(orders):
            free = 0.0
            for phase, k in order:
                before = ("f", s - 1, k) if phase == "f" else ("b", s + 1, k)
                if phase == "f" and s == 0:
                    ready = 0.0
                elif phase == "b" and s == n - 1:
                    ready = end.get(("f", s, k), math.inf)
                else:
                    ready = end.get(before, math.inf) + hops[s - 1 if phase == "f" else s]
                if ready == math.inf:
                    break
                free = max(free, ready) + stages[s][phase == "b"]
                end[phase, s, k] = free
    return max(end.values())


def every_price(x: Instance) -> list[float]:
    """The prices of all placements, best first; of those that recompute layers the best one of each."""
    n, names = len(x.costs.layers), x.topology.names
    choices = [(False,) * n] if x.recompute == "never" else list(itertools.product((False, True), repeat=n))
    prices = []
    for path in _paths(n, names, contiguous=x.contiguous):
        prices.append(min(price(x, path, again) for again in choices))
    return sorted(prices)


def _paths(n: int, names: tuple[str, ...], *, contiguous: bool) -> list[tuple[str, ...]]:
    if not contiguous:
        return list(itertools.product(names, repeat=n))
    paths = []
    for k in range(1, min(n, len(names)) + 1):
        for inner in itertools.combinations(range(1, n), k - 1):
            cuts = (0, *inner, n)
            for devices in itertools.permutations(names, k):
                lengths = (b - a for a, b in itertools.pairwise(cuts))
                paths.append(tuple(d for d, length in zip(devices, lengths, strict=True) for _ in range(length)))
    return paths


def check(x: Instance) -> None:
    """The solver finds the best price, proves it, and `evaluate` agrees; or it refuses and there is none."""
    best = every_price(x)[0]
    try:
        solution = solve(x.problem())
    except PlacementError:
        assert best == math.inf
        return
    assert solution.is_optimal
    assert solution.value == pytest.approx(best, rel=TOLERANCE, abs=TOLERANCE)
    assert solution.lower_bound == solution.value
    assert x.evaluate(solution).value == pytest.approx(best, rel=TOLERANCE, abs=TOLERANCE)


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


def test_the_instances_cover_every_objective_and_constraint_with_and_without_a_plan():
    seen = {True: set(), False: set()}
    for seed in range(160):
        x = random_instance(seed)
        try:
            solution = solve(x.problem())
        except PlacementError:
            solution = None
        seen[solution is not None] |= {x.objective, x.schedule, f"contiguous {x.contiguous}"}
        seen[solution is not None] |= {"colocate"} if x.colocate else set()
        seen[solution is not None] |= {"recompute"} if x.recompute == "allowed" else set()
        seen[solution is not None] |= {"recomputed"} if solution and solution.recomputed else set()
        seen[solution is not None] |= {"media"} if solution and x.problem().media else set()
    assert seen[True] >= {*OBJECTIVES, "1f1b", "contiguous False", "colocate", "recomputed", "media"}
    assert seen[False] >= {*OBJECTIVES, "1f1b", "contiguous False", "colocate", "recompute"}


def test_a_beam_of_one_label_still_gives_a_true_bound(monkeypatch):
    monkeypatch.setattr("hetero.planner.chain._BEAMS", (1, 1))
    monkeypatch.setattr("hetero.planner.one_f_one_b._BEAMS", (1, 1))
    n_bounds = 0
    for seed in range(110):
        x = random_instance(seed, least_layers=4, least_devices=3)
        best = every_price(x)[0]
        try:
            solution = solve(x.problem(), time_limit_s=0.0)
        except PlacementError:
            continue
        n_bounds += not solution.is_optimal
        assert solution.lower_bound <= best * (1 + TOLERANCE) + TOLERANCE
        assert solution.value >= best * (1 - TOLERANCE) - TOLERANCE
        assert not solution.is_optimal or solution.value == pytest.approx(best, rel=TOLERANCE, abs=TOLERANCE)
        assert x.evaluate(solution).value == pytest.approx(solution.value, rel=TOLERANCE, abs=TOLERANCE)
    assert n_bounds >= 20


def test_the_bound_of_1f1b_is_below_the_simulated_step_of_every_placement():
    r, n_tight = np.random.default_rng(0), 0
    for _ in range(2000):
        n, m = int(r.integers(1, 7)), int(r.integers(1, 9))
        if n > m:
            continue
        spread = float(r.choice([0.0, 0.3, 3.0]))
        f, b = (np.exp(spread * r.standard_normal(n)) * scale for scale in (1.0, float(r.choice([1.0, 2.0]))))
        hops = r.random(n - 1) * float(r.choice([0.0, 0.1, 1.0]))
        bound, step = one_f_one_b.lower_bound(f, b, hops, m), step_time(f, b, hops, m)
        assert bound <= step * (1 + TOLERANCE)
        n_tight += bound >= step * (1 - 1e-9)
    assert n_tight > 500


def test_the_runner_up_is_the_second_best_placement():
    n_checked = 0
    for seed in range(150):
        x = dataclasses.replace(random_instance(seed, plain=True), objective="train_step", pins={})
        first, last = x.topology.devices[0], x.topology.devices[-1]
        prices = [p for p in every_price(x) if p < math.inf]
        if len(prices) < 2 or last == dataclasses.replace(first, name=last.name):
            continue  # of two equal devices the runner-up is the first that is no mirror image
        problem = x.problem()
        best = solve(problem)
        second = solve(problem, reference=best.path(problem))
        assert second.stages != best.stages
        assert second.value == pytest.approx(prices[1], rel=TOLERANCE, abs=TOLERANCE)
        n_checked += 1
    assert n_checked > 30
