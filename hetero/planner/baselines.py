"""Placements that need no planner: what a plan has to beat.

Each starts from a wish for every layer. A layer that can't run on the device wished for goes to the device that runs it
fastest among those that can. So a device may hold several stages, which the solvers never allow.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from hetero.errors import HeteroError
from hetero.planner.evaluate import evaluate
from hetero.planner.plan import Alternative
from hetero.planner.problem import layer_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hetero.cost import Costs, LayerCost
    from hetero.topology import Topology

Stages = tuple[tuple[str, int, int], ...]


def baselines(
    costs: Costs,
    topology: Topology,
    objective: str,
    *,
    max_memory: Mapping[str, int] | None = None,
    pins: Mapping[str, str] | None = None,
) -> tuple[Alternative, ...]:
    """Each general device alone, the even split, and greedy by bytes, priced or with the reason why not."""
    general = general_devices(costs, topology)
    wishes = {f"{device} alone": [device] * len(costs.layers) for device in general}
    apart = _apart(general, topology)
    if len(apart) > 1:
        wishes["even split"] = even_split(costs, apart)
        wishes["greedy by bytes"] = greedy_by_bytes(costs, topology, apart, max_memory or {})
    found = []
    for name, wish in wishes.items():
        stages = grant(wish, costs, topology)
        if broken := _broken_pin(stages, costs, pins or {}):
            found.append(Alternative(name, (), None, f"breaks the pin of {broken!r}"))
        else:
            found.append(priced(name, stages, costs, topology, objective, max_memory=max_memory))
    return tuple(found)


def _broken_pin(stages: Stages, costs: Costs, pins: Mapping[str, str]) -> str | None:
    """The first layer that is not on the device to which it is pinned."""
    placed = [(layer.name, device) for device, i, j in stages for layer in costs.layers[i : j + 1]]
    return next((layer for layer, device in placed if pins.get(layer, device) != device), None)


def general_devices(costs: Costs, topology: Topology) -> list[str]:
    """The devices that can run as many layers as any other can."""
    count = {name: sum(name in able(layer, topology) for layer in costs.layers) for name in topology.names}
    return [name for name, n in count.items() if n == max(count.values())]


def able(layer: LayerCost, topology: Topology) -> list[str]:
    """Names of the devices that can run a layer."""
    return [d.name for d in topology.devices if d.name in layer.times and (layer.apis is None or d.api in layer.apis)]


def _apart(names: Sequence[str], topology: Topology) -> list[str]:
    """The devices without those that are part of an earlier one."""
    chosen: list[str] = []
    for name in names:
        if not any(topology.device(name).overlaps(topology.device(other)) for other in chosen):
            chosen.append(name)
    return chosen


def even_split(costs: Costs, devices: Sequence[str]) -> list[str]:
    """As many layers for each device, in the order in which they are listed."""
    n = len(costs.layers)
    return [devices[i * len(devices) // n] for i in range(n)]


def greedy_by_bytes(
    costs: Costs, topology: Topology, devices: Sequence[str], max_memory: Mapping[str, int]
) -> list[str]:
    """Fill one device after the other, knowing bytes and no time, as `accelerate`'s automatic device map does."""
    wish: list[str] = []
    current, used = 0, 0
    for layer in costs.layers:
        while current < len(devices) - 1:
            device = topology.device(devices[current])
            if used + layer_bytes(layer, costs, device.name) <= max_memory.get(device.name, device.memory_bytes):
                break
            current, used = current + 1, 0
        wish.append(devices[current])
        used += layer_bytes(layer, costs, devices[current])
    return wish


def grant(wish: Sequence[str], costs: Costs, topology: Topology) -> Stages:
    """A wish (device of each layer) as stages that can run."""
    wished = [topology.device(name) for name in dict.fromkeys(wish)]
    devices = []
    for name, layer in zip(wish, costs.layers, strict=True):
        candidates = able(layer, topology)
        if name not in candidates:
            apart = [c for c in candidates if not any(topology.device(c).overlaps(other) for other in wished)]
            name = min(apart or candidates, key=lambda c: layer.times[c].forward_s + layer.times[c].backward_s)
        devices.append(name)
    cuts = [0, *(i for i in range(1, len(devices)) if devices[i] != devices[i - 1]), len(devices)]
    return tuple((devices[a], a, b - 1) for a, b in itertools.pairwise(cuts))


def priced(
    name: str,
    stages: Stages,
    costs: Costs,
    topology: Topology,
    objective: str,
    *,
    max_memory: Mapping[str, int] | None = None,
) -> Alternative:
    """A placement with its price, or with the reason why it is impossible."""
    try:
        value = evaluate(stages, costs, topology, objective, max_memory=max_memory).value
    except HeteroError as error:
        return Alternative(name, stages, None, " ".join(str(error).split()))
    return Alternative(name, stages, value)
