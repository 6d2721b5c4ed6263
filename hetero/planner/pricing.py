"""The price of any placement, by formulas of its own: nothing here is shared with the solvers.

A placement may give a device several stages, which the solvers never do. Loads of a device's stages add up, and loads
of devices that share a core add up on that core.

The interval of a value takes all layer times t at the low end of their errors, t / (1 + e), and then all at the high
end, t (1 + e): an error is a factor, so that a time known within a factor of three has a low end above zero. The
objectives never fall when a time grows, so it contains the value of every combination in between: it is as wide as if
all errors had one cause, which is the cautious assumption (a machine that is slow today is slow for every layer).
Overheads and transfers enter both ends as they are.

Links. In `throughput`, hand-overs that one medium carries add up: those in one direction of a full-duplex link, those
in both of a half-duplex one, those of all links that share a medium. A single micro-batch (`latency`) has one hand-over
under way at a time. In a step, transfers overlap with work and don't wait for each other, by the formula as well as in
the 1F1B simulation; what taking turns costs is for `hetero.schedule.simulate` to say.

`energy` and `dollars` are those of a GPipe step: every used device costs its idle power or its rent for the whole step;
work adds the power above idle (all of it where no idle power is known) for the time it takes, and calls their price.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hetero.cost import StageOverhead
from hetero.device import RECOMPUTING_APIS
from hetero.errors import DeviceError, PlacementError
from hetero.planner.plans import PlanStage, PlanTransfer
from hetero.schedule import GPIPE, ONE_F_ONE_B, step_time

if TYPE_CHECKING:
    from collections.abc import Collection

    from hetero.cost import Costs, LayerTime
    from hetero.device import Device
    from hetero.topology import Topology

Placement = Sequence[tuple[str, int, int]]


@dataclass(frozen=True)
class Evaluation:
    """What a placement costs.

    Attributes:
        value: the objective, in the unit that `hetero.planner.plans.unit` says.
        interval_s: (low, high) of it.
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
    recomputed: Collection[str] = (),
    schedule: str = GPIPE,
) -> Evaluation:
    """Price a placement.

    Args:
        stages: (device, first layer, last layer) in execution order; together they hold each layer once, in order.
        costs: of the layers.
        topology: devices and links.
        objective: `latency`, `throughput`, `train_step`, `energy` or `dollars`.
        max_memory: name of a device or memory pool -> bytes that may be filled there.
        recomputed: names of layers that are run again in their backward pass.
        schedule: `gpipe`, priced by formulas, or `1f1b` (`train_step` only), priced by simulation.

    Raises:
        PlacementError: it is no placement of these layers, a device can't run its layers or doesn't exist, two devices
            are the same hardware, or a memory limit is broken; the message says which.
    """
    _check_cover(stages, len(costs.layers))
    _check_devices(stages, costs, topology)
    _check_recomputed(stages, costs, topology, recomputed)
    devices = [device for device, _, _ in stages]
    _check_schedule(schedule, objective, devices, costs.n_microbatches)
    filled = []
    for s, (device, first, last) in enumerate(stages):
        in_flight = costs.n_microbatches if schedule == GPIPE else min(costs.n_microbatches, len(stages) - s)
        filled.append(_stage_bytes(costs, device, first, last, recomputed, in_flight))
    _check_memory(stages, filled, topology, max_memory or {})
    transfers = _transfers(stages, costs, topology)
    factors = _factors(devices, costs, objective)
    planned, ends = [], []
    for (device, first, last), nbytes in zip(stages, filled, strict=True):
        planned.append(_planned(device, first, last, sum(nbytes), costs, factors[device], topology, recomputed))
    for sign in (0, -1, 1):
        times = [
            _stage_times(device, first, last, costs, factors[device], sign, recomputed)
            for device, first, last in stages
        ]
        priced = _Priced(devices, times, transfers, costs.n_microbatches, topology)
        value, busiest = _objective(priced, objective, schedule)
        ends.append((value + (_calls_usd(stages, costs) if objective == "dollars" else 0.0), busiest))
    value, low, high = (end[0] for end in ends)
    return Evaluation(value, (min(value, low), max(value, high)), tuple(planned), transfers, ends[0][1])


def _check_schedule(schedule: str, objective: str, devices: Sequence[str], n_microbatches: int) -> None:
    if schedule not in (GPIPE, ONE_F_ONE_B):
        raise PlacementError(f"unknown schedule {schedule!r}", expected=f"{GPIPE} or {ONE_F_ONE_B}")
    if schedule == GPIPE:
        return
    if objective != "train_step":
        raise PlacementError("1f1b is a schedule of training steps", found=objective, expected="train_step")
    if twice := [device for device in devices if devices.count(device) > 1]:
        raise PlacementError("under 1f1b a device holds one stage", found=f"{twice[0]!r} holds several")
    if len(devices) > n_microbatches:
        raise PlacementError(
            "1f1b needs at least as many micro-batches as stages",
            found=f"{n_microbatches} micro-batches, {len(devices)} stages",
        )


def _check_recomputed(stages: Placement, costs: Costs, topology: Topology, recomputed: Collection[str]) -> None:
    names = {layer.name: k for k, layer in enumerate(costs.layers)}
    for name in recomputed:
        if name not in names:
            raise PlacementError(f"recomputed layer {name!r} does not exist", found=", ".join(names))
        device = next(topology.device(d) for d, first, last in stages if first <= names[name] <= last)
        if device.api not in RECOMPUTING_APIS:
            raise PlacementError(
                f"layer {name!r} can't be recomputed on {device.name!r}",
                found=f"its runtime is {device.api}",
                expected=" or ".join(RECOMPUTING_APIS),
            )


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


def _stage_bytes(
    costs: Costs, device: str, first: int, last: int, recomputed: Collection[str], in_flight: int
) -> tuple[int, int]:
    """What a stage fills all the time, and beside that while the recomputed layer that drops most is run again [B]."""
    total = room = 0
    for i, layer in enumerate(costs.layers[first : last + 1], first):
        state = -int(-costs.optimizer_factor * layer.trainable_bytes // 1)
        there = layer.times[device]
        saved, kept = _activations(costs, i, device, recomputed)
        total += layer.parameter_bytes + state + kept * in_flight + there.scratch_bytes
        room = max(room, saved - kept)
    return total, room


def _activations(costs: Costs, i: int, device: str, recomputed: Collection[str]) -> tuple[int, int]:
    """What a layer saves for its backward pass and what of it stays for each micro-batch in flight [B]."""
    layer = costs.layers[i]
    call = layer.times[device].call_bytes
    saved = call if call > layer.saved_bytes else layer.saved_bytes
    if layer.name not in recomputed:
        return saved, saved
    before = costs.layers[i - 1].output_bytes if i else 0
    return saved, min(saved, before if layer.recompute_bytes is None else layer.recompute_bytes)


def _check_memory(
    stages: Placement, filled: Sequence[tuple[int, int]], topology: Topology, max_memory: Mapping[str, int]
) -> None:
    used = dict.fromkeys(topology.names, 0)
    room = dict.fromkeys(topology.names, 0)
    for (device, _, _), (nbytes, extra) in zip(stages, filled, strict=True):
        used[device] += nbytes
        room[device] = max(room[device], extra)
    used = {device: nbytes + room[device] for device, nbytes in used.items()}
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
    device: str,
    first: int,
    last: int,
    costs: Costs,
    factors: tuple[float, float],
    sign: int,
    recomputed: Collection[str],
) -> tuple[float, float]:
    """Forward and backward time of a stage, with that of its call; the layers at the low (-1) or high (1) end."""
    overhead = costs.overheads.get(device)
    forward, backward = (overhead.forward_s, overhead.backward_s) if overhead else (0.0, 0.0)
    again = 0.0
    for layer in costs.layers[first : last + 1]:
        time: LayerTime = layer.times[device]
        scale = (1.0 + time.error) ** sign
        forward += scale * time.forward_s
        backward += scale * time.backward_s
        again += scale * time.forward_s if layer.name in recomputed else 0.0
    return factors[0] * forward, factors[1] * backward + factors[0] * again


def _planned(
    device: str,
    first: int,
    last: int,
    nbytes: int,
    costs: Costs,
    factors: tuple[float, float],
    topology: Topology,
    recomputed: Collection[str],
) -> PlanStage:
    forward, backward = _stage_times(device, first, last, costs, factors, 0, recomputed)
    high = sum(_stage_times(device, first, last, costs, factors, 1, recomputed))
    error = (high - forward - backward) / (forward + backward) if forward + backward else 0.0
    names = tuple(layer.name for layer in costs.layers[first : last + 1])
    cores = topology.device(device).cores
    saved = sum(_activations(costs, i, device, recomputed)[1] for i in range(first, last + 1))
    again = tuple(name for name in names if name in recomputed)
    return PlanStage(device, first, last, names, forward, backward, error, nbytes, cores, saved, again)


@dataclass(frozen=True)
class _Priced:
    """A placement's figures: device, forward and backward time of each stage, hand-overs, micro-batches."""

    devices: Sequence[str]
    times: Sequence[tuple[float, float]]
    transfers: Sequence[PlanTransfer]
    m: int
    topology: Topology

    def core_loads(self) -> dict[tuple[str, ...], tuple[float, float]]:
        """Forward and backward time of the devices on each core."""
        crews: dict[object, list[str]] = {}
        for name in dict.fromkeys(self.devices):
            for core in self.topology.device(name).cores or (name,):
                crews.setdefault(core, []).append(name)
        loads = {}
        for crew in map(tuple, crews.values()):
            inside = [time for device, time in zip(self.devices, self.times, strict=True) if device in crew]
            loads[crew] = sum(f for f, _ in inside), sum(b for _, b in inside)
        return loads

    def step_s(self) -> float:
        """GPipe's Σf + (m-1) max f + Σb + (m-1) max b + 2 Σc."""
        loads = self.core_loads().values()
        largest = max(f for f, _ in loads) + max(b for _, b in loads)
        hops = sum(transfer.seconds for transfer in self.transfers)
        return sum(f + b for f, b in self.times) + (self.m - 1) * largest + 2 * hops

    def one_f_one_b_s(self) -> float:
        """The simulated 1F1B step."""
        forward, backward = zip(*self.times, strict=True)
        hops = [transfer.seconds for transfer in self.transfers]
        cores = [self.topology.device(name).cores for name in self.devices]
        return step_time(forward, backward, hops, self.m, schedule=ONE_F_ONE_B, cores=cores)

    def medium_loads(self) -> list[float]:
        """Seconds that each medium is busy for one micro-batch, forwards."""
        loads: dict[object, float] = {}
        for one in self.transfers:
            medium: object = (one.source, one.target)
            try:
                link = self.topology.link(one.source, one.target)
            except DeviceError:  # timed, but no link of the topology
                pass
            else:
                one_way = link.joins(one.source, one.target)
                if link.shared:
                    medium = (link.shared, "both" if link.duplex == "half" else one_way)
                elif link.duplex == "half":
                    medium = frozenset((one.source, one.target))
            loads[medium] = loads.get(medium, 0.0) + one.seconds
        return list(loads.values())

    def rated(self, objective: str) -> float:
        """What the used devices cost for the step, and what their work costs beside that [J or USD]."""
        total = 0.0
        used = [_known(self.topology.device(name), objective) for name in dict.fromkeys(self.devices)]
        for device in used:
            if objective == "dollars":
                total += (device.price_usd_h or 0.0) / 3600 * self.step_s()
            else:
                power = device.power_w or 0.0
                idle = min(device.idle_power_w or 0.0, power)
                own = [time for name, time in zip(self.devices, self.times, strict=True) if name == device.name]
                total += idle * self.step_s() + (power - idle) * self.m * sum(f + b for f, b in own)
        return total


def _known(device: Device, objective: str) -> Device:
    field = "price_usd_h" if objective == "dollars" else "power_w"
    if getattr(device, field) is None:
        raise PlacementError(f"objective {objective!r} needs {field} of device {device.name!r}", found="unknown")
    return device


def _calls_usd(stages: Placement, costs: Costs) -> float:
    """What the calls of a step cost [USD]."""
    layers = ((device, layer) for device, first, last in stages for layer in costs.layers[first : last + 1])
    return costs.n_microbatches * sum(layer.times[device].usd for device, layer in layers)


def _objective(priced: _Priced, objective: str, schedule: str) -> tuple[float, tuple[str, ...]]:
    """The value, and the devices on the busiest core (by what the objective multiplies)."""
    loads = priced.core_loads()
    busiest = max(loads, key=lambda crew: sum(loads[crew]))
    busiest_forward = max(loads, key=lambda crew: loads[crew][0])
    if objective == "latency":
        hops = sum(transfer.seconds for transfer in priced.transfers)
        return sum(f for f, _ in priced.times) + hops, busiest_forward
    if objective == "throughput":
        slowest, fullest = loads[busiest_forward][0], max(priced.medium_loads(), default=0.0)
        return max(slowest, fullest), busiest_forward if slowest >= fullest else ()
    if objective == "train_step":
        return (priced.step_s() if schedule == GPIPE else priced.one_f_one_b_s()), busiest
    if objective in ("energy", "dollars"):
        return priced.rated(objective), busiest
    raise PlacementError(
        f"unknown objective {objective!r}", expected="latency, throughput, train_step, energy, dollars"
    )
