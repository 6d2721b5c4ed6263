"""The price of any placement, by formulas of its own: nothing here is shared with the solvers.

A placement may give a device several stages, which the solvers never do. Loads of a device's stages add up, and loads
of devices that share a core add up on that core.

The interval of a value takes all layer times at the low end of their errors, and then all at the high end. The
objectives never fall when a time grows, so it contains the value of every combination in between: it is as wide as if
all errors had one cause, which is the cautious assumption (a machine that is slow today is slow for every layer).
Overheads and transfers enter both ends as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hetero.cost import StageOverhead
from hetero.errors import PlacementError
from hetero.planner.plan import PlanStage, PlanTransfer

if TYPE_CHECKING:
    from hetero.cost import Costs, LayerTime
    from hetero.topology import Topology

Placement = Sequence[tuple[str, int, int]]


@dataclass(frozen=True)
class Evaluation:
    """What a placement costs.

    Attributes:
        value: the objective [s].
        interval_s: (low, high) of it [s].
        stages: with their predicted times and memory.
        transfers: between consecutive stages.
        busiest: the devices whose shared core is the busiest, forwards; empty where a hand-over is slower.
    """

    value: float
    interval_s: tuple[float, float]
    stages: tuple[PlanStage, ...]
    transfers: tuple[PlanTransfer, ...]
    busiest: tuple[str, ...]


def evaluate(
    stages: Placement,
    costs: Costs,
    topology: Topology,
    objective: str = "train_step",
    *,
    max_memory: Mapping[str, int] | None = None,
) -> Evaluation:
    """Price a placement.

    Args:
        stages: (device, first layer, last layer) in execution order; together they hold each layer once, in order.
        costs: of the layers.
        topology: devices and links.
        objective: `latency`, `throughput` or `train_step`.
        max_memory: name of a device or memory pool -> bytes that may be filled there.

    Raises:
        PlacementError: it is no placement of these layers, a device can't run its layers or doesn't exist, two devices
            are the same hardware, or a memory limit is broken; the message says which.
    """
    _check_cover(stages, len(costs.layers))
    _check_devices(stages, costs, topology)
    filled = [_stage_bytes(costs, device, first, last) for device, first, last in stages]
    _check_memory(stages, filled, topology, max_memory or {})
    transfers = _transfers(stages, costs, topology)
    hops = [transfer.seconds for transfer in transfers]
    devices = [device for device, _, _ in stages]
    factors = _factors(devices, costs, objective)
    planned, ends = [], []
    for (device, first, last), nbytes in zip(stages, filled, strict=True):
        planned.append(_planned(device, first, last, nbytes, costs, factors[device], topology))
    for sign in (0, -1, 1):
        times = [_stage_times(device, first, last, costs, factors[device], sign) for device, first, last in stages]
        ends.append(_objective(objective, devices, times, hops, costs.n_microbatches, topology))
    value, low, high = (end[0] for end in ends)
    return Evaluation(value, (low, high), tuple(planned), transfers, ends[0][1])


def _check_cover(stages: Placement, n_layers: int) -> None:
    expected = 0
    for _, first, last in stages:
        if first != expected or last < first:
            raise PlacementError("the stages are no placement", found=f"layers {first} to {last}, expected {expected}")
        expected = last + 1
    if expected != n_layers:
        raise PlacementError("the stages are no placement", found=f"{expected} of {n_layers} layers placed")


def _check_devices(stages: Placement, costs: Costs, topology: Topology) -> None:
    used = {device: topology.device(device) for device, _, _ in stages}
    for a in used.values():
        for b in used.values():
            if a.overlaps(b):
                raise PlacementError(f"{a.name!r} and {b.name!r} are the same hardware and can't be in one plan")
    for device, first, last in stages:
        for layer in costs.layers[first : last + 1]:
            api = used[device].api
            if device not in layer.times or (layer.apis is not None and api not in layer.apis):
                raise PlacementError(f"layer {layer.name!r} can't run on {device!r}", found=", ".join(layer.times))


def _stage_bytes(costs: Costs, device: str, first: int, last: int) -> int:
    total = 0
    for layer in costs.layers[first : last + 1]:
        state = -int(-costs.optimizer_factor * layer.trainable_bytes // 1)
        there = layer.times[device]
        kept = there.call_bytes if there.call_bytes > layer.saved_bytes else layer.saved_bytes
        total += layer.parameter_bytes + state + kept * costs.n_microbatches + there.scratch_bytes
    return total


def _check_memory(stages: Placement, filled: Sequence[int], topology: Topology, max_memory: Mapping[str, int]) -> None:
    used = dict.fromkeys(topology.names, 0)
    for (device, _, _), nbytes in zip(stages, filled, strict=True):
        used[device] += nbytes
    places = [(device.name, [device]) for device in topology.devices]
    for pool in dict.fromkeys(device.memory_pool for device in topology.devices if device.memory_pool):
        places.append((pool, [device for device in topology.devices if device.memory_pool == pool]))
    for name, members in places:
        largest = max(device.memory_bytes for device in members)
        limit, needed = min(largest, max_memory.get(name, largest)), sum(used[device.name] for device in members)
        if needed > limit:
            raise PlacementError(f"{name!r} has too little memory", found=f"{limit} B free", expected=f"{needed} B")


def _transfers(stages: Placement, costs: Costs, topology: Topology) -> tuple[PlanTransfer, ...]:
    transfers = []
    for (source, _, last), (target, _, _) in itertools.pairwise(stages):
        nbytes = costs.layers[last].output_bytes
        if source == target:
            seconds = 0.0
        elif f"{source}->{target}" in costs.transfers:
            latency, bandwidth = costs.transfers[f"{source}->{target}"]
            seconds = latency + nbytes / bandwidth
        else:
            seconds = topology.transfer_s(source, target, nbytes)
        transfers.append(PlanTransfer(source, target, nbytes, seconds))
    return tuple(transfers)


def _factors(devices: Sequence[str], costs: Costs, objective: str) -> dict[str, tuple[float, float]]:
    """How many times as long forward and backward passes take on each device: above 1 where two crews are at work.

    For the latency of a single micro-batch only one device computes at a time.
    """
    fixed = {device: costs.overheads.get(device, StageOverhead()) for device in devices}
    crews = {one.crew or device for device, one in fixed.items() if one.contended_forward is not None}
    if len(crews) < 2 or objective == "latency":
        return dict.fromkeys(fixed, (1.0, 1.0))
    return {device: (one.contended_forward or 1.0, one.contended_backward or 1.0) for device, one in fixed.items()}


def _stage_times(
    device: str, first: int, last: int, costs: Costs, factors: tuple[float, float], sign: int
) -> tuple[float, float]:
    """Forward and backward time of a stage, with that of its call; the layers at the low (-1) or high (1) end."""
    overhead = costs.overheads.get(device)
    forward, backward = (overhead.forward_s, overhead.backward_s) if overhead else (0.0, 0.0)
    for layer in costs.layers[first : last + 1]:
        time: LayerTime = layer.times[device]
        scale = max(0.0, 1.0 + sign * time.error)
        forward += scale * time.forward_s
        backward += scale * time.backward_s
    return factors[0] * forward, factors[1] * backward


def _planned(
    device: str, first: int, last: int, nbytes: int, costs: Costs, factors: tuple[float, float], topology: Topology
) -> PlanStage:
    forward, backward = _stage_times(device, first, last, costs, factors, 0)
    high = sum(_stage_times(device, first, last, costs, factors, 1))
    error = (high - forward - backward) / (forward + backward) if forward + backward else 0.0
    names = tuple(layer.name for layer in costs.layers[first : last + 1])
    cores = topology.device(device).cores
    return PlanStage(device, first, last, names, forward, backward, error, nbytes, cores)


def _objective(
    objective: str,
    devices: Sequence[str],
    times: Sequence[tuple[float, float]],
    hops: Sequence[float],
    m: int,
    topology: Topology,
) -> tuple[float, tuple[str, ...]]:
    """The value, and the devices on the busiest core (by what the objective multiplies)."""
    crews: dict[object, list[str]] = {}
    for name in dict.fromkeys(devices):
        for core in topology.device(name).cores or (name,):
            crews.setdefault(core, []).append(name)
    loads = {}
    for crew in map(tuple, crews.values()):
        inside = [time for device, time in zip(devices, times, strict=True) if device in crew]
        loads[crew] = sum(f for f, _ in inside), sum(b for _, b in inside)
    forward, backward = sum(f for f, _ in times), sum(b for _, b in times)
    max_forward, max_backward = max(f for f, _ in loads.values()), max(b for _, b in loads.values())
    if objective == "latency":
        return forward + sum(hops), max(loads, key=lambda crew: loads[crew][0])
    if objective == "throughput":
        slowest_hop = max(hops, default=0.0)
        busiest = max(loads, key=lambda crew: loads[crew][0]) if max_forward >= slowest_hop else ()
        return max(max_forward, slowest_hop), busiest
    if objective == "train_step":
        value = forward + backward + (m - 1) * (max_forward + max_backward) + 2 * sum(hops)
        return value, max(loads, key=lambda crew: sum(loads[crew]))
    raise PlacementError(f"unknown objective {objective!r}", expected="latency, throughput or train_step")
