"""A fleet as a class chain: one column for each kind of device, however many there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hetero.errors import DeviceError, PlacementError
from hetero.planner import checks
from hetero.planner.arrays import layer_bytes
from hetero.planner.class_problem import ClassChain

if TYPE_CHECKING:
    from hetero.cost import Costs
    from hetero.device import Device
    from hetero.planner.problem import Floats
    from hetero.planner.symmetry import Ints
    from hetero.topology import DeviceGroup, Topology


@dataclass(frozen=True)
class Fleet:
    """The classes of a fleet that can run something.

    Attributes:
        groups: their devices.
        keys: the name under which the costs know each class.
        chain: the layers on them.
    """

    groups: tuple[DeviceGroup, ...]
    keys: tuple[str, ...]
    chain: ClassChain


def fleet(costs: Costs, topology: Topology) -> Fleet:
    """The classes of a topology with the costs of the layers on one device of each.

    A class's costs are those of its first member that has any, or of the class's own name. A hand-over between two
    classes takes as long as over the slowest of the links that join their devices: those of one host, of one rack, or
    apart. Memory is counted as in every plan: parameters, gradients, optimizer state and all micro-batches in flight.

    Raises:
        PlacementError: there are no devices or no layers, a figure makes no sense, or a layer can run nowhere, or fits
            nowhere.
    """
    checks.check_microbatches(costs, None)
    checks.check_costs(costs)
    if not topology.devices:
        raise PlacementError("the topology has no devices", expected="at least one")
    timed = {name for layer in costs.layers for name in layer.times}
    known = [(group, key) for group in topology.classes() if (key := _key(group, timed)) is not None]
    if not known:
        raise PlacementError(
            "no device of the topology has costs",
            found=f"costs of {', '.join(sorted(timed)) or 'no device'}",
            expected=f"of one device of each class: {', '.join(group.name for group in topology.classes())}",
        )
    groups, keys = tuple(group for group, _ in known), tuple(key for _, key in known)
    forward = np.full((len(costs.layers), len(groups)), np.inf)
    for i, layer in enumerate(costs.layers):
        for c, (group, key) in enumerate(known):
            if key in layer.times and (layer.apis is None or group.device.api in layer.apis):
                forward[i, c] = layer.times[key].forward_s
    nbytes = np.array([[layer_bytes(layer, costs, key) for key in keys] for layer in costs.layers], np.int64)
    limits = np.array([group.device.memory_bytes for group in groups], np.int64)
    _check_layers(costs, groups, forward, nbytes, limits)
    latency, inverse = _links(costs, topology, groups, keys)
    overheads = [costs.overheads.get(key) for key in keys]
    chain = ClassChain(
        counts=np.array([min(len(group.members), len(costs.layers)) for group in groups], np.int64),
        forward=forward,
        backward=np.zeros_like(forward),
        overhead=np.array([(one.forward_s if one else 0.0, 0.0) for one in overheads]),
        nbytes=nbytes,
        limits=limits,
        latency=latency,
        inverse_bandwidth=inverse,
        output_bytes=np.array([layer.output_bytes for layer in costs.layers], float),
        joined=np.zeros(len(costs.layers), bool),
    )
    return Fleet(groups, keys, chain)


def _key(group: DeviceGroup, timed: set[str]) -> str | None:
    return next((name for name in (*group.members, group.name) if name in timed), None)


def _check_layers(costs: Costs, groups: tuple[DeviceGroup, ...], forward: Floats, nbytes: Ints, limits: Ints) -> None:
    """Refuse a layer that no class can run or hold."""
    for layer, times, needed in zip(costs.layers, forward, nbytes, strict=True):
        runs = np.isfinite(times)
        names = [group.name for group in groups]
        if not runs.any():
            raise PlacementError(f"layer {layer.name!r} can run on no device", found=", ".join(names))
        if (needed[runs] > limits[runs]).all():
            free = {name: int(limit) for name, limit, able in zip(names, limits, runs, strict=True) if able}
            checks.refuse_memory(layer.name, int(needed[runs].min()), free)


def _links(
    costs: Costs, topology: Topology, groups: tuple[DeviceGroup, ...], keys: tuple[str, ...]
) -> tuple[Floats, Floats]:
    """(C, C) latency and inverse bandwidth between devices of two classes; an infinite latency: no link."""
    latency, inverse = np.full((len(groups), len(groups)), np.inf), np.zeros((len(groups), len(groups)))
    size = float(np.mean([layer.output_bytes for layer in costs.layers]))
    for a, source in enumerate(groups):
        for b, target in enumerate(groups):
            if (given := costs.transfers.get(f"{keys[a]}->{keys[b]}")) is not None and a != b:
                latency[a, b], inverse[a, b] = given[0], 1 / given[1]
                continue
            ways = []
            for device in _kinds(source.device, target, topology):
                if (given := costs.transfers.get(f"{source.device.name}->{device}")) is not None:
                    ways.append((given[0], 1 / given[1]))
                    continue
                try:
                    link = topology.link(source.device.name, device)
                except DeviceError:
                    continue
                ways.append((link.latency_s, 1 / link.bandwidth))
            if ways:
                latency[a, b], inverse[a, b] = max(ways, key=lambda way: way[0] + size * way[1])
    return latency, inverse


def _kinds(source: Device, target: DeviceGroup, topology: Topology) -> list[str]:
    """One device of a class for each way in which it can lie to another device: same host, same rack, apart."""
    found: dict[tuple[bool, bool], str] = {}
    for name in target.members:
        if name != source.name:
            other = topology.device(name)
            found.setdefault((source.host == other.host, source.rack == other.rack), name)
    return list(found.values())
