"""Many replicas of a pipeline on many devices: the most micro-batches a second, with a certified gap.

A chain of layers is placed on a few devices many times over. Which pipelines are worth having, and how many of each,
is found by column generation (`fleet_columns`); the devices are counted by class, never one by one.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hetero.errors import PlacementError
from hetero.planner.chain import weights
from hetero.planner.class_sums import Sums
from hetero.planner.fleet_classes import Fleet, fleet
from hetero.planner.fleet_columns import Column, solve_fleet
from hetero.planner.pricing import evaluate
from hetero.planner.words import seconds
from hetero.topology import Topology

if TYPE_CHECKING:
    from hetero.cost import Costs
    from hetero.device import Device

_SAME = 1e-9


@dataclass(frozen=True)
class FleetStage:
    """Consecutive layers on one device of a class.

    Attributes:
        device_class: name of the class.
        first: index of the first layer.
        last: index of the last layer, inclusive.
    """

    device_class: str
    first: int
    last: int


@dataclass(frozen=True)
class FleetReplica:
    """A pipeline and how often the fleet holds it.

    Attributes:
        stages: in execution order, each on a device of its own.
        count: number of replicas.
        bottleneck_s: time from one micro-batch to the next in one replica, priced by `evaluate` [s].
    """

    stages: tuple[FleetStage, ...]
    count: int
    bottleneck_s: float


@dataclass(frozen=True)
class FleetPlan:
    """Replicas of pipelines on a fleet, with the proof of their quality.

    Attributes:
        replicas: the pipelines.
        throughput: forward passes of micro-batches, all replicas together, in the steady state [1/s].
        upper_bound: no plan has a larger throughput [1/s].
        gap: (upper_bound - throughput) / upper_bound.
        proof: `optimal` where there is no gap, else `bounded`.
        devices: class -> devices there are.
        used: class -> devices in replicas; the others are idle.
        worth: class -> throughput that one more device of the class is worth, by the linear relaxation [1/s].
        seconds: time of the search [s].
        provenance: class -> name of the device under which the costs know it.
    """

    replicas: tuple[FleetReplica, ...]
    throughput: float
    upper_bound: float
    gap: float
    proof: str
    devices: dict[str, int]
    used: dict[str, int]
    worth: dict[str, float]
    seconds: float
    provenance: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FleetPlan:
        """The inverse of `to_json`."""
        replicas = tuple(
            FleetReplica(tuple(FleetStage(**stage) for stage in one["stages"]), one["count"], one["bottleneck_s"])
            for one in data["replicas"]
        )
        return cls(**{**data, "replicas": replicas})

    def explain(self) -> str:
        """The plan in words: throughput, bound, replicas, and what the classes are used for and worth."""
        lines = [
            f"fleet of {sum(self.devices.values())} devices in {len(self.devices)} classes",
            f"  throughput   {self.throughput:.6g} micro-batches/s in {sum(r.count for r in self.replicas)} replicas",
            f"  upper bound  {self.upper_bound:.6g}, gap {100 * self.gap:.3f} %: {self.proof}",
            f"  solver       column generation, {seconds(self.seconds)}",
            "",
        ]
        for replica in self.replicas:
            stages = ", ".join(f"{s.device_class} {s.first}-{s.last}" for s in replica.stages)
            lines.append(f"{replica.count} x {seconds(replica.bottleneck_s)}: {stages}")
        lines.append("")
        for name, count in self.devices.items():
            idle, worth = count - self.used[name], self.worth[name]
            lines.append(f"{name}: {self.used[name]} of {count} used, {idle} idle; one more adds {worth:.4g}/s")
        return "\n".join(lines)


def plan_fleet(
    costs: Costs, topology: Topology, *, max_pipeline: int | None = None, time_limit_s: float = 30.0
) -> FleetPlan:
    """The most throughput that a fleet gives with replicas of pipelines, forwards, in the steady state.

    Args:
        costs: of the layers for one micro-batch, with times for one device of each class (its name, or the class's).
        topology: any number of devices in a few classes (`Topology.classes`).
        max_pipeline: stages of a pipeline at most; None: any number.
        time_limit_s: for the search. What it ends with is a plan and a bound that holds.

    Raises:
        PlacementError: the request makes no sense, a layer can run or fits nowhere, or no pipeline is possible; the
            message says which and why.
    """
    start = time.monotonic()
    if max_pipeline is not None and max_pipeline < 1:
        raise PlacementError(f"max_pipeline is {max_pipeline}", expected="at least one stage, or None")
    whole = fleet(costs, topology)
    counts = np.array([len(group.members) for group in whole.groups], np.int64)
    n_layers = len(costs.layers)
    solution = solve_fleet(
        whole.chain, counts, most_stages=min(max_pipeline or n_layers, n_layers), deadline=start + time_limit_s
    )
    if not solution.replicas:
        _refuse(whole, costs, max_pipeline)
    replicas = tuple(_priced(column, n, whole, costs) for column, n in solution.replicas)
    throughput = sum(replica.count / replica.bottleneck_s for replica in replicas)
    assert abs(throughput - solution.throughput) <= _SAME * throughput, "solver and evaluator disagree"
    upper = max(solution.upper_bound, throughput)
    used = np.zeros(len(counts), int)
    for column, n in solution.replicas:
        used += n * np.array(column.used)
    names = [group.name for group in whole.groups]
    devices = {group.name: len(group.members) for group in topology.classes()}
    gap = (upper - throughput) / upper
    return FleetPlan(
        replicas=replicas,
        throughput=throughput,
        upper_bound=upper,
        gap=gap,
        proof="optimal" if gap <= _SAME else "bounded",
        devices=devices,
        used=dict.fromkeys(devices, 0) | dict(zip(names, used.tolist(), strict=True)),
        worth=dict.fromkeys(devices, 0.0) | dict(zip(names, solution.worth.tolist(), strict=True)),
        seconds=time.monotonic() - start,
        provenance=dict(zip(names, whole.keys, strict=True)),
    )


def _priced(column: Column, count: int, whole: Fleet, costs: Costs) -> FleetReplica:
    """A pipeline on devices of its own, with the price that `evaluate` gives it."""
    seen = [0] * len(whole.groups)
    stages, first = [], 0
    for c, end in column.path:
        stages.append((f"{c}:{seen[c]}", c, first, end - 1))
        seen[c], first = seen[c] + 1, end
    devices = tuple(
        dataclasses.replace(whole.groups[c].device, name=name, memory_pool="", cores=(), host="", rack="")
        for name, c, _, _ in stages
    )
    priced = evaluate(
        [(name, first, last) for name, _, first, last in stages],
        _costs_of(stages, devices, whole, costs),
        Topology(devices),
        "throughput",
    )
    named = tuple(FleetStage(whole.groups[c].name, first, last) for _, c, first, last in stages)
    return FleetReplica(named, count, priced.value)


def _costs_of(
    stages: list[tuple[str, int, int, int]], devices: tuple[Device, ...], whole: Fleet, costs: Costs
) -> Costs:
    """The costs with the times of one replica's devices."""
    kind = {name: c for name, c, _, _ in stages}
    layers = []
    for layer in costs.layers:
        times = {n: layer.times[whole.keys[c]] for n, c in kind.items() if whole.keys[c] in layer.times}
        layers.append(dataclasses.replace(layer, times=times))
    overheads = {n: costs.overheads[whole.keys[c]] for n, c in kind.items() if whole.keys[c] in costs.overheads}
    overheads = {
        n: dataclasses.replace(one, contended_forward=None, contended_backward=None) for n, one in overheads.items()
    }
    transfers = {}
    for a, b in itertools.pairwise(devices):
        latency, inverse = (t[kind[a.name], kind[b.name]] for t in (whole.chain.latency, whole.chain.inverse_bandwidth))
        transfers[f"{a.name}->{b.name}"] = (float(latency), float(1 / inverse) if inverse else float("inf"))
    return dataclasses.replace(costs, layers=tuple(layers), overheads=overheads, transfers=transfers)


def _refuse(whole: Fleet, costs: Costs, max_pipeline: int | None) -> None:
    """Say why there is not one pipeline."""
    names = [f"{len(group.members)} x {group.name}" for group in whole.groups]
    boundless = dataclasses.replace(whole.chain, latency=np.zeros_like(whole.chain.latency))
    objective = weights("latency", 1)
    linked = [Sums(chain, objective).relaxed((np.inf, np.inf)).bound for chain in (whole.chain, boundless)]
    if not np.isfinite(linked[0]) and np.isfinite(linked[1]):
        missing = [
            f"{a.name} and {b.name}"
            for (i, a), (j, b) in itertools.product(enumerate(whole.groups), repeat=2)
            if not np.isfinite(whole.chain.latency[i, j]) and (i != j or len(a.members) > 1)
        ]
        raise PlacementError(
            "every pipeline would need a link between classes that is missing",
            found=f"no link between {'; '.join(missing[:6])}",
            remedy="add it to the topology's links, with latency_s and bandwidth",
        )
    limit = "" if max_pipeline is None else f" of at most {max_pipeline} stages"
    raise PlacementError(
        f"no pipeline{limit} holds the {len(costs.layers)} layers",
        found=", ".join(names),
        expected="devices with room for all layers of one pipeline, and links between them",
        remedy="more devices or memory, a smaller batch or model" + (", a larger max_pipeline" if limit else ""),
    )
