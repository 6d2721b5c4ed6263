"""Figures of costs and topology as the arrays of a `Problem`: one function for each kind."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hetero.device import RECOMPUTING_APIS
from hetero.errors import DeviceError, PlacementError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hetero.cost import Costs, LayerCost
    from hetero.device import Device
    from hetero.topology import Topology

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """Devices that share memory.

    Attributes:
        name: of the pool.
        members: indices of its devices.
        limit: what they may fill together [B].
    """

    name: str
    members: tuple[int, ...]
    limit: int


def layer_bytes(layer: LayerCost, costs: Costs, device: str) -> int:
    """Memory that a layer fills on a device in a training step with all micro-batches in flight [B]."""
    return _fixed_bytes(layer, costs, device) + _saved_bytes(layer, device) * costs.n_microbatches


def _fixed_bytes(layer: LayerCost, costs: Costs, device: str) -> int:
    training = math.ceil(costs.optimizer_factor * layer.trainable_bytes)
    own = layer.times.get(device)
    return layer.parameter_bytes + training + (own.scratch_bytes if own else 0)


def _saved_bytes(layer: LayerCost, device: str) -> int:
    own = layer.times.get(device)
    return max(layer.saved_bytes, own.call_bytes if own else 0)


def memory(costs: Costs, devices: Sequence[Device], *, recompute: bool) -> tuple[Ints, Ints, Ints]:
    """(L, D) each: `Problem.fixed`, `saved` and `kept`."""
    layers = costs.layers
    fixed = np.array([[_fixed_bytes(layer, costs, d.name) for d in devices] for layer in layers], np.int64)
    saved = np.array([[_saved_bytes(layer, d.name) for d in devices] for layer in layers], np.int64)
    can = np.array([recompute and d.api in RECOMPUTING_APIS for d in devices])
    least = np.array([costs.kept_bytes(i) for i in range(len(layers))], np.int64)
    return fixed, saved, np.where(can, np.minimum(saved, least[:, None]), saved)


def rates(devices: Sequence[Device], objective: str, n_microbatches: int) -> tuple[Floats, Floats]:
    """`Problem.rate` and `busy_rate`: idle power and what work adds to it, or a rent."""
    none = np.zeros(len(devices))
    if objective == "dollars":
        return np.array([(d.price_usd_h or 0.0) / 3600 for d in devices]), none
    if objective != "energy":
        return none, none
    idle = np.array([min(d.idle_power_w or 0.0, d.power_w or 0.0) for d in devices])
    return idle, n_microbatches * (np.array([d.power_w or 0.0 for d in devices]) - idle)


def times(costs: Costs, devices: Sequence[Device], able: Sequence[Sequence[str]]) -> tuple[Floats, Floats, Floats]:
    """(L, D) each: forward and backward times, and what a micro-batch's calls cost."""
    forward = np.full((len(costs.layers), len(devices)), np.inf)
    backward, calls = np.full_like(forward, np.inf), np.zeros_like(forward)
    for i, layer in enumerate(costs.layers):
        for d, device in enumerate(devices):
            if device.name in able[i]:
                there = layer.times[device.name]
                forward[i, d], backward[i, d], calls[i, d] = there.forward_s, there.backward_s, there.usd
    return forward, backward, calls


def links(costs: Costs, topology: Topology, devices: Sequence[Device]) -> tuple[Floats, Floats]:
    """Latency and inverse bandwidth between all pairs; an infinite latency where there is no link."""
    latency, inverse = np.zeros((len(devices), len(devices))), np.zeros((len(devices), len(devices)))
    for i, a in enumerate(devices):
        for j, b in enumerate(devices):
            if i == j:
                continue
            if (given := costs.transfers.get(f"{a.name}->{b.name}")) is not None:
                latency[i, j], inverse[i, j] = given[0], 1 / given[1]
                continue
            try:
                link = topology.link(a.name, b.name)
            except DeviceError:
                latency[i, j] = np.inf
            else:
                latency[i, j], inverse[i, j] = link.latency_s, 1 / link.bandwidth
    return latency, inverse


def media(devices: Sequence[Device], topology: Topology, *, contiguous: bool) -> tuple[NDArray[np.bool_], ...]:
    """The media that may carry several hand-overs of one plan, as masks of (source, target).

    Where a device holds one interval, a plan goes from one device to another once, and never back; so a wire of their
    own never carries two.
    """
    carried: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for i, j in itertools.permutations(range(len(devices)), 2):
        carried.setdefault(_medium(topology, devices[i].name, devices[j].name), []).append((i, j))
    media = []
    for pairs in carried.values():
        if not contiguous or len({frozenset(pair) for pair in pairs}) > 1:
            mask = np.zeros((len(devices), len(devices)), bool)
            mask[tuple(zip(*pairs, strict=True))] = True
            media.append(mask)
    return tuple(media)


def _medium(topology: Topology, source: str, target: str) -> tuple[str, ...]:
    """What carries a hand-over; the directions of a shared medium are those in which its link is written."""
    try:
        link = topology.link(source, target)
    except DeviceError:
        return source, target
    if link.shared:
        return (link.shared,) if link.duplex == "half" else (link.shared, str(link.joins(source, target)))
    return tuple(sorted((source, target))) if link.duplex == "half" else (source, target)


def core_groups(devices: Sequence[Device]) -> tuple[tuple[int, ...], ...]:
    """For each core the devices on it, without groups that lie within another one."""
    cores = {core for device in devices for core in device.cores}
    groups = {tuple(k for k, device in enumerate(devices) if core in device.cores) for core in cores}
    groups |= {(k,) for k, device in enumerate(devices) if not device.cores}
    return tuple(sorted(g for g in groups if not any(set(g) < set(other) for other in groups)))


def limits(devices: Sequence[Device], topology: Topology, max_memory: Mapping[str, int]) -> list[int]:
    """(D,) what a plan may fill on each device [B]; each limit that is asked for makes sense."""
    known = {device.name: device.memory_bytes for device in topology.devices}
    for device in topology.devices:
        if device.memory_pool:
            known.setdefault(device.memory_pool, 0)
            known[device.memory_pool] = max(known[device.memory_pool], device.memory_bytes)
    for name, limit in max_memory.items():
        if name not in known:
            raise PlacementError(f"max_memory names {name!r}, which does not exist", found=", ".join(known))
        if not 0 <= limit <= known[name]:
            raise PlacementError(
                f"max_memory of {name!r} is {limit} B", expected=f"0 to the {known[name]} B that it has"
            )
    most = np.iinfo(np.int64).max
    return [min(int(max_memory.get(device.name, device.memory_bytes)), most) for device in devices]


def pools(devices: Sequence[Device], topology: Topology, max_memory: Mapping[str, int]) -> tuple[Pool, ...]:
    """The shared memories; the limit of one is what its largest device may fill."""
    pools = []
    for name in dict.fromkeys(device.memory_pool for device in devices if device.memory_pool):
        members = tuple(k for k, device in enumerate(devices) if device.memory_pool == name)
        largest = max(device.memory_bytes for device in topology.devices if device.memory_pool == name)
        pools.append(Pool(name, members, int(max_memory.get(name, largest))))
    return tuple(pools)


def crews(devices: Sequence[Device], costs: Costs) -> tuple[tuple[int, ...], ...]:
    """The devices that slow those of the others where two of these groups are at work."""
    crews: dict[str, list[int]] = {}
    for d, device in enumerate(devices):
        overhead = costs.overheads.get(device.name)
        if overhead is not None and overhead.contended_forward is not None:
            crews.setdefault(overhead.crew or device.name, []).append(d)
    return tuple(map(tuple, crews.values()))
