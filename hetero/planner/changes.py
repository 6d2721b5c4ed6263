"""The planner's inputs with one thing changed: more memory, a faster link, one more device, a layer held in place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hetero.errors import DeviceError
from hetero.planner.chain import solve
from hetero.planner.problem import Problem, build

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hetero.cost import Costs
    from hetero.planner.solution import Solution
    from hetero.topology import Link, Topology


@dataclass(frozen=True)
class Inputs:
    """What a plan was made from; the fields are those of `hetero.plan`."""

    costs: Costs
    topology: Topology
    objective: str
    schedule: str
    max_memory: Mapping[str, int]
    pins: Mapping[str, str]
    colocate: Sequence[Sequence[str]]
    recompute: str
    contiguous: bool

    def problem(self) -> Problem:
        """The placement problem.

        Raises:
            PlacementError: as `hetero.planner.problem.build`.
        """
        return build(
            self.costs,
            self.topology,
            objective=self.objective,
            schedule=self.schedule,
            max_memory=self.max_memory,
            pins=self.pins,
            colocate=self.colocate,
            recompute=self.recompute,
            contiguous=self.contiguous,
        )

    def solve(self, time_limit_s: float) -> Solution:
        """The best placement.

        Raises:
            PlacementError: there is none, or none was found in the time given.
        """
        return solve(self.problem(), time_limit_s=time_limit_s)


def memories(topology: Topology, max_memory: Mapping[str, int]) -> list[str]:
    """The memories that limit a plan: pools, devices with a memory of their own, and what `max_memory` names."""
    places = [device.memory_pool or device.name for device in topology.devices]
    return list(dict.fromkeys([*places, *max_memory]))


def with_memory(inputs: Inputs, place: str, nbytes: int) -> Inputs:
    """So many bytes more in a pool or on a device.

    A pool's members all see the larger memory. Where `max_memory` limits a device of a pool, that limit alone is
    raised, at most to what the device has.
    """
    devices, max_memory = [], dict(inputs.max_memory)
    is_pool = any(device.memory_pool == place for device in inputs.topology.devices)
    for device in inputs.topology.devices:
        grows = device.memory_pool == place if is_pool else device.name == place and not device.memory_pool
        devices.append(dataclasses.replace(device, memory_bytes=device.memory_bytes + nbytes * grows))
    topology = dataclasses.replace(inputs.topology, devices=tuple(devices))
    if place in max_memory:
        most = max_memory[place] + nbytes
        max_memory[place] = most if is_pool else min(most, topology.device(place).memory_bytes)
    return dataclasses.replace(inputs, topology=topology, max_memory=max_memory)


def link_between(inputs: Inputs, source: str, target: str) -> str | None:
    """Name of what joins two devices, `a - b`; None where its bandwidth has no limit."""
    if pairs := _measured(inputs.costs, source, target):
        is_free = all(bandwidth == float("inf") for _, bandwidth in pairs.values())
        return None if is_free else " - ".join(sorted((source, target)))
    link = inputs.topology.link(source, target)
    return None if link.bandwidth == float("inf") else f"{link.source} - {link.target}"


def with_bandwidth(inputs: Inputs, source: str, target: str, bandwidth: float) -> Inputs:
    """So many B/s more, in both directions, on the link that joins two devices.

    A link whose ends are patterns gets faster for all the pairs that it joins. A pair whose times were measured is
    changed alone.
    """
    if pairs := _measured(inputs.costs, source, target):
        faster = {pair: (latency, old + bandwidth) for pair, (latency, old) in pairs.items()}
        costs = dataclasses.replace(inputs.costs, transfers=inputs.costs.transfers | faster)
        return dataclasses.replace(inputs, costs=costs)
    used = inputs.topology.link(source, target)
    # A medium that each host has for itself is told by `link` with the host's name in `shared`.
    at = next(
        k for k, link in enumerate(inputs.topology.links) if dataclasses.replace(link, shared=used.shared) == used
    )
    links = list(inputs.topology.links)
    links[at] = dataclasses.replace(links[at], bandwidth=links[at].bandwidth + bandwidth)
    return dataclasses.replace(inputs, topology=dataclasses.replace(inputs.topology, links=tuple(links)))


def _measured(costs: Costs, source: str, target: str) -> dict[str, tuple[float, float]]:
    """Measured times between two devices, which precede the topology's links, by direction."""
    pairs = (f"{source}->{target}", f"{target}->{source}")
    return {pair: costs.transfers[pair] for pair in pairs if pair in costs.transfers}


def twin_name(device: str) -> str:
    """Name of one more device like this one; not a name of a part of it."""
    return f"another {device}"


def with_twin(inputs: Inputs, name: str, alike: tuple[str, ...] = ()) -> Inputs:
    """One more device like this one, with cores of its own, in the same memory pool if it is in one.

    It is joined to every other device as this one is; to this one as two of a kind are joined to each other, or where
    there is no second one, by the slowest link that this one has. It takes turns with nobody.

    Args:
        inputs: to be changed.
        name: of the device.
        alike: devices of its kind, which may include itself.
    """
    topology, costs = inputs.topology, inputs.costs
    original, twin = topology.device(name), twin_name(name)
    core = 1 + max((core for device in topology.devices for core in device.cores), default=-1)
    cores = tuple(range(core, core + len(original.cores)))
    devices = (*topology.devices, dataclasses.replace(original, name=twin, cores=cores))
    links, transfers = _twin_links(topology, name, alike), _twin_transfers(costs, name, alike)
    layers = tuple(
        dataclasses.replace(layer, times=layer.times | {twin: layer.times[name]}) if name in layer.times else layer
        for layer in costs.layers
    )
    overheads, max_memory = dict(costs.overheads), dict(inputs.max_memory)
    if name in overheads:
        overheads[twin] = dataclasses.replace(overheads[name], crew=None)
    if name in max_memory:
        max_memory[twin] = max_memory[name]
    return dataclasses.replace(
        inputs,
        topology=dataclasses.replace(topology, devices=devices, links=(*links, *topology.links)),
        costs=dataclasses.replace(costs, layers=layers, overheads=overheads, transfers=costs.transfers | transfers),
        max_memory=max_memory,
    )


def _twin_links(topology: Topology, name: str, alike: tuple[str, ...]) -> list[Link]:
    """The twin's links, each in the direction in which the device's own one is written."""
    twin, links, own = twin_name(name), [], []
    for other in topology.names:
        if other == name or not _is_linked(topology, name, other):
            continue
        there, back = topology.link(name, other), topology.link(other, name)
        own.append((there, other in alike))
        if there.joins(name, other):
            links.append(_exactly(there, twin, other))
        if back.joins(other, name):
            links.append(_exactly(back, other, twin))
    siblings = [link for link, is_alike in own if is_alike]
    if siblings:
        links.append(_exactly(siblings[0], name, twin))
    elif _is_linked(topology, name, name):  # by a pattern that joins all of its kind
        link = topology.link(name, name)
        links += [_exactly(link, name, twin), _exactly(link, twin, name)]
    elif own and not topology.device(name).memory_pool:
        links.append(_exactly(min((link for link, _ in own), key=lambda link: link.bandwidth), name, twin))
    return links


def _is_linked(topology: Topology, a: str, b: str) -> bool:
    return any(link.joins(a, b) or link.joins(b, a) for link in topology.links) and _reaches(topology, a, b)


def _reaches(topology: Topology, a: str, b: str) -> bool:
    try:
        topology.link(a, b)
    except DeviceError:
        return False
    return True


def _exactly(link: Link, source: str, target: str) -> Link:
    """The same link between these two devices, whose names are no patterns."""
    source, target = ("".join(f"[{c}]" if c in "*?[" else c for c in end) for end in (source, target))
    return dataclasses.replace(link, source=source, target=target, within="")


def _twin_transfers(costs: Costs, name: str, alike: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """Measured times of the twin's hand-overs, as far as there are any of the device's."""
    twin = twin_name(name)
    fresh: dict[str, tuple[float, float]] = {}
    own: dict[tuple[str, str], tuple[float, float]] = {}
    for pair, figures in costs.transfers.items():
        source, target = pair.split("->")
        if name in (source, target):
            own[source, target] = figures
            fresh["->".join(twin if end == name else end for end in (source, target))] = figures
    if own:
        siblings = [own[name, other] for other in alike if (name, other) in own]
        between = siblings[0] if siblings else min(own.values(), key=lambda figures: figures[1])
        fresh |= {f"{name}->{twin}": between, f"{twin}->{name}": between}
    return fresh


def with_pin(inputs: Inputs, layer: str, device: str) -> Inputs:
    """A layer held on a device."""
    return dataclasses.replace(inputs, pins={**inputs.pins, layer: device})
