"""The placement problem as arrays, checked: what every solver reads and none has to question.

Memory is counted for training under GPipe, whatever the objective: parameters, gradients and optimizer state of a
layer, and what its backward pass needs for every micro-batch, since all are in flight at once. Costs of a model that
is only run forwards have no trainable and no saved bytes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray

from hetero.errors import DeviceError, PlacementError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hetero.cost import Costs, LayerCost
    from hetero.device import Device
    from hetero.topology import Topology

OBJECTIVES = ("latency", "throughput", "train_step")

Floats = NDArray[np.float64]

_BYTES_OF = "(parameters, gradients, optimizer state, activations of all micro-batches)"
_MORE_MEMORY = "a smaller batch or model, a larger max_memory, or one more device"


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


@dataclass(frozen=True)
class Problem:
    """A chain of L layers to be cut into intervals, each for one of D devices.

    Attributes:
        layers: names.
        devices: names of those that can run at least one layer.
        objective: one of `OBJECTIVES`.
        n_microbatches: of a step.
        forward: (L, D) time of one micro-batch [s]; infinite: the device can't run the layer.
        backward: (L, D) likewise; finite wherever `forward` is.
        overhead: (D, 2) fixed time of a stage's forward and backward call [s].
        contention: (D, 2) how many times as long passes take where devices of two `crews` are used.
        crews: devices that slow those of the others.
        nbytes: (L, D) memory that a layer fills on a device [B].
        latency: (D, D) time of an empty transfer [s]; infinite: no link.
        inverse_bandwidth: (D, D) [s/B].
        output_bytes: (L,) what a layer hands to the next one for one micro-batch [B].
        limits: (D,) memory of each device [B].
        pools: memory that several devices share.
        core_groups: devices that compute on one core, their loads add up; a device without cores is a group of its own.
        conflicts: for each device, the devices that are the same hardware and can't be in one plan with it.
        contiguous: whether a device holds one interval at most; otherwise its stages' loads and bytes add up.
    """

    layers: tuple[str, ...]
    devices: tuple[str, ...]
    objective: str
    n_microbatches: int
    forward: Floats
    backward: Floats
    overhead: Floats
    contention: Floats
    crews: tuple[tuple[int, ...], ...]
    nbytes: NDArray[np.int64]
    latency: Floats
    inverse_bandwidth: Floats
    output_bytes: Floats
    limits: NDArray[np.int64]
    pools: tuple[Pool, ...]
    core_groups: tuple[tuple[int, ...], ...]
    conflicts: tuple[tuple[int, ...], ...]
    contiguous: bool = True

    def transfer(self, layer: int) -> Floats:
        """(D, D) seconds to hand the output of a layer from one device to another; 0 on the diagonal."""
        seconds: Floats = self.latency + self.output_bytes[layer] * self.inverse_bandwidth
        return seconds

    def without(self, device: str) -> Problem:
        """The same problem where that device can run nothing."""
        forward = self.forward.copy()
        forward[:, self.devices.index(device)] = np.inf
        return dataclasses.replace(self, forward=forward)

    def cases(self) -> list[Problem]:
        """Problems without contention; each placement costs as much in the cheapest one as it does here.

        One where contention is always charged, and for each crew one where the others can run nothing.
        """
        if len(self.crews) < 2:
            return [self]
        plain = dataclasses.replace(self, contention=np.ones_like(self.contention), crews=())
        forward, backward = self.forward * self.contention[:, 0], self.backward * self.contention[:, 1]
        overhead = self.overhead * self.contention
        result = [dataclasses.replace(plain, forward=forward, backward=backward, overhead=overhead)]
        for crew in self.crews:
            forward = self.forward.copy()
            forward[:, [device for other in self.crews if other != crew for device in other]] = np.inf
            result.append(dataclasses.replace(plain, forward=forward))
        return result

    def without_memory_limits(self) -> Problem:
        """The same problem with boundless memory."""
        limits = np.full(len(self.devices), np.iinfo(np.int64).max, np.int64)
        return dataclasses.replace(self, limits=limits, pools=())


def build(
    costs: Costs,
    topology: Topology,
    *,
    objective: str = "train_step",
    n_microbatches: int | None = None,
    max_memory: Mapping[str, int] | None = None,
    pins: Mapping[str, str] | None = None,
    contiguous: bool = True,
) -> Problem:
    """Check everything and put it into arrays.

    Args:
        costs: of the layers for one micro-batch.
        topology: devices and links; `costs.transfers` takes precedence over the links.
        objective: one of `OBJECTIVES`.
        n_microbatches: None or `costs.n_microbatches`.
        max_memory: name of a device or memory pool -> bytes that the plan may fill there.
        pins: name of a layer -> name of the device that has to run it.
        contiguous: whether a device holds one interval of layers at most.

    Raises:
        PlacementError: something is wrong with the request, or a layer can run nowhere or fits nowhere.
    """
    if objective not in OBJECTIVES:
        raise PlacementError(f"unknown objective {objective!r}", expected=" or ".join(OBJECTIVES))
    _check_microbatches(costs, n_microbatches)
    _check_costs(costs)
    pins, max_memory = dict(pins or {}), dict(max_memory or {})
    _check_pins(costs, topology, pins)
    names = [device.name for device in topology.devices]
    able = {layer.name: _able_devices(layer, topology, pins) for layer in costs.layers}
    devices = [topology.device(name) for name in names if any(name in run for run in able.values())]
    limits = _limits(devices, topology, max_memory)
    pools = _pools(devices, topology, max_memory)
    nbytes = np.array([[layer_bytes(layer, costs, d.name) for d in devices] for layer in costs.layers], np.int64)
    for layer, needed in zip(costs.layers, nbytes.tolist(), strict=True):
        _check_fits(layer.name, needed, able[layer.name], devices, limits, pools)
    forward, backward = _times(costs, devices, able)
    latency, inverse_bandwidth = _links(costs, topology, devices)
    overheads = [costs.overheads.get(device.name) for device in devices]
    return Problem(
        layers=tuple(layer.name for layer in costs.layers),
        devices=tuple(device.name for device in devices),
        objective=objective,
        n_microbatches=costs.n_microbatches,
        forward=forward,
        backward=backward,
        overhead=np.array([(o.forward_s, o.backward_s) if o else (0.0, 0.0) for o in overheads]),
        contention=np.array(
            [(o.contended_forward or 1.0, o.contended_backward or 1.0) if o else (1.0, 1.0) for o in overheads]
        ),
        crews=() if objective == "latency" else _crews(devices, costs),
        nbytes=nbytes,
        latency=latency,
        inverse_bandwidth=inverse_bandwidth,
        output_bytes=np.array([layer.output_bytes for layer in costs.layers], float),
        limits=np.array(limits, np.int64),
        pools=pools,
        core_groups=_core_groups(devices),
        conflicts=tuple(tuple(j for j, b in enumerate(devices) if a.overlaps(b)) for a in devices),
        contiguous=contiguous,
    )


def _crews(devices: Sequence[Device], costs: Costs) -> tuple[tuple[int, ...], ...]:
    crews: dict[str, list[int]] = {}
    for d, device in enumerate(devices):
        overhead = costs.overheads.get(device.name)
        if overhead is not None and overhead.contended_forward is not None:
            crews.setdefault(overhead.crew or device.name, []).append(d)
    return tuple(map(tuple, crews.values()))


def layer_bytes(layer: LayerCost, costs: Costs, device: str) -> int:
    """Memory that a layer fills on a device in a training step with all micro-batches in flight [B]."""
    training = math.ceil(costs.optimizer_factor * layer.trainable_bytes)
    own = layer.times.get(device)
    saved = max(layer.saved_bytes, own.call_bytes if own else 0)
    return layer.parameter_bytes + training + saved * costs.n_microbatches + (own.scratch_bytes if own else 0)


def _check_microbatches(costs: Costs, n_microbatches: int | None) -> None:
    if costs.n_microbatches < 1 or (n_microbatches is not None and n_microbatches < 1):
        found = costs.n_microbatches if n_microbatches is None else n_microbatches
        raise PlacementError("a step needs at least one micro-batch", found=str(found), expected="1 or more")
    if n_microbatches not in (None, costs.n_microbatches):
        raise PlacementError(
            "the costs are for another number of micro-batches",
            found=f"n_microbatches={n_microbatches}, costs measured for {costs.n_microbatches}",
            remedy=f"profile again with n_microbatches={n_microbatches}: the time of a micro-batch depends on its size",
        )


def _check_costs(costs: Costs) -> None:
    """Every figure is finite and not negative; there are layers, and their names differ."""
    if not costs.layers:
        raise PlacementError("there are no layers to place")
    names = [layer.name for layer in costs.layers]
    if twice := [name for name in names if names.count(name) > 1]:
        raise PlacementError(f"two layers are called {twice[0]!r}", expected="names that differ")
    _check_figures("costs", {"optimizer_factor": costs.optimizer_factor})
    for layer in costs.layers:
        fields = ("parameter_bytes", "trainable_bytes", "output_bytes", "saved_bytes", "flops")
        _check_figures(f"layer {layer.name!r}", {name: getattr(layer, name) for name in fields})
        for device, time in layer.times.items():
            _check_figures(f"layer {layer.name!r} on {device!r}", vars(time))
    for device, overhead in costs.overheads.items():
        _check_figures(f"overhead of {device!r}", vars(overhead))
        for name in ("contended_forward", "contended_backward"):
            if (ratio := getattr(overhead, name)) is not None and ratio < 1:
                raise PlacementError(f"overhead of {device!r}: {name} is {ratio}", expected="at least 1, or None")
    for pair, (latency, bandwidth) in costs.transfers.items():
        _check_figures(f"transfer {pair!r}", {"latency": latency})
        if not bandwidth > 0:
            raise PlacementError(f"transfer {pair!r}: bandwidth is {bandwidth}", expected="more than 0 B/s")


def _check_figures(what: str, figures: Mapping[str, object]) -> None:
    for name, value in figures.items():
        if isinstance(value, Real) and not (float(value) >= 0 and math.isfinite(float(value))):
            raise PlacementError(f"{what}: {name} is {value}", expected="a finite number, not negative")


def _check_pins(costs: Costs, topology: Topology, pins: Mapping[str, str]) -> None:
    names = [layer.name for layer in costs.layers]
    for layer, device in pins.items():
        if layer not in names:
            raise PlacementError(f"pinned layer {layer!r} does not exist", found=", ".join(names))
        try:
            topology.device(device)
        except DeviceError as error:
            raise PlacementError(
                f"layer {layer!r} is pinned to {device!r}, which does not exist",
                found=error.found,
                remedy=error.remedy,
            ) from None


def _able_devices(layer: LayerCost, topology: Topology, pins: Mapping[str, str]) -> list[str]:
    """Names of the devices that may run a layer; there is at least one."""
    devices = [d for d in topology.devices if d.name in layer.times and (layer.apis is None or d.api in layer.apis)]
    able = [device.name for device in devices]
    if not able:
        _refuse_unrunnable(layer, topology)
    if (pin := pins.get(layer.name)) is None:
        return able
    if pin not in able:
        raise PlacementError(f"layer {layer.name!r} is pinned to {pin!r}, which can't run it", found=", ".join(able))
    return [pin]


def _refuse_unrunnable(layer: LayerCost, topology: Topology) -> NoReturn:
    needed = layer.apis or tuple(layer.times)
    reasons = [f"{a.api} is absent: {a.reason}" for a in topology.absences if a.api in needed]
    remedies = [a.remedy for a in topology.absences if a.api in needed]
    raise PlacementError(
        f"layer {layer.name!r} can run on no device",
        found="; ".join([", ".join(topology.names), *reasons]),
        expected=f"a device of {' or '.join(needed)}" if needed else "costs on at least one device",
        remedy="; ".join(remedies),
    )


def _limits(devices: Sequence[Device], topology: Topology, max_memory: Mapping[str, int]) -> list[int]:
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
    return [int(max_memory.get(device.name, device.memory_bytes)) for device in devices]


def _pools(devices: Sequence[Device], topology: Topology, max_memory: Mapping[str, int]) -> tuple[Pool, ...]:
    """The shared memories; the limit of one is what its largest device may fill."""
    pools = []
    for name in dict.fromkeys(device.memory_pool for device in devices if device.memory_pool):
        members = tuple(k for k, device in enumerate(devices) if device.memory_pool == name)
        largest = max(device.memory_bytes for device in topology.devices if device.memory_pool == name)
        pools.append(Pool(name, members, int(max_memory.get(name, largest))))
    return tuple(pools)


def _check_fits(
    layer: str,
    needed: Sequence[int],
    able: Sequence[str],
    devices: Sequence[Device],
    limits: Sequence[int],
    pools: Sequence[Pool],
) -> None:
    """A layer that is larger than any device that can run it needs no search."""
    free = {
        device.name: min([limits[k], *(pool.limit for pool in pools if k in pool.members)])
        for k, device in enumerate(devices)
        if device.name in able
    }
    wanted = {device.name: nbytes for device, nbytes in zip(devices, needed, strict=True) if device.name in able}
    if all(wanted[name] > free[name] for name in free):
        refuse_memory(layer, min(wanted.values()), free)


def refuse_short_memory(problem: Problem) -> None:
    """Raise the error where the layers need more memory than all devices that can run any have together.

    Found here it costs no search; a search would have to try every way to fill the devices.
    """
    members = [d for d, times in enumerate(problem.forward.T) if np.isfinite(times).any()]
    left, free = set(members), 0
    for pool in problem.pools:
        inside = left & set(pool.members)
        free += min(pool.limit, sum(int(problem.limits[d]) for d in inside))
        left -= inside
    free += sum(int(problem.limits[d]) for d in left)
    least = np.where(np.isfinite(problem.forward), problem.nbytes, np.iinfo(np.int64).max).min(axis=1)
    if (needed := sum(least.tolist())) > free:
        raise PlacementError(
            "the layers need more memory than all devices have together",
            found=f"{free} B free on {', '.join(problem.devices[d] for d in members)}",
            expected=f"{needed} B {_BYTES_OF}",
            remedy=_MORE_MEMORY,
        )


def refuse_memory(layer: str, needed: int, free: Mapping[str, int], *, after: str = "") -> NoReturn:
    """Raise the error for a layer that fits on none of the devices.

    Args:
        layer: its name.
        needed: what it fills [B].
        free: device -> what is free there at best [B].
        after: what fills the rest, in words.
    """
    raise PlacementError(
        f"layer {layer!r} fits on no device{after}",
        found=", ".join(f"{bytes_free} B free on {name}" for name, bytes_free in free.items()),
        expected=f"{needed} B {_BYTES_OF}",
        remedy=_MORE_MEMORY,
    )


def _times(costs: Costs, devices: Sequence[Device], able: Mapping[str, Sequence[str]]) -> tuple[Floats, Floats]:
    forward = np.full((len(costs.layers), len(devices)), np.inf)
    backward = np.full_like(forward, np.inf)
    for i, layer in enumerate(costs.layers):
        for d, device in enumerate(devices):
            if device.name in able[layer.name]:
                forward[i, d] = layer.times[device.name].forward_s
                backward[i, d] = layer.times[device.name].backward_s
    return forward, backward


def _links(costs: Costs, topology: Topology, devices: Sequence[Device]) -> tuple[Floats, Floats]:
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


def _core_groups(devices: Sequence[Device]) -> tuple[tuple[int, ...], ...]:
    """For each core the devices on it, without groups that lie within another one."""
    cores = {core for device in devices for core in device.cores}
    groups = {tuple(k for k, device in enumerate(devices) if core in device.cores) for core in cores}
    groups |= {(k,) for k, device in enumerate(devices) if not device.cores}
    return tuple(sorted(g for g in groups if not any(set(g) < set(other) for other in groups)))
