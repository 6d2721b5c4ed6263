"""The placement problem as arrays, checked: what every solver reads and none has to question.

Memory is counted for training, whatever the objective: parameters, gradients and optimizer state of a layer, and what
its backward pass needs for every micro-batch in flight. Under GPipe that is all of them; under 1F1B stage s of S holds
min(m, S - s). A layer that is recomputed keeps its input only, and while its backward pass runs, the rest of what it
saves for that one micro-batch. Costs of a model that is only run forwards have no trainable and no saved bytes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hetero.errors import PlacementError
from hetero.planner import arrays, checks
from hetero.schedule import GPIPE, ONE_F_ONE_B, SCHEDULES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hetero.cost import Costs, LayerCost
    from hetero.planner.arrays import Pool
    from hetero.topology import Topology

OBJECTIVES = ("latency", "throughput", "train_step", "energy", "dollars")

RECOMPUTE = ("never", "allowed")

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Problem:
    """A chain of L layers to be cut into intervals, each for one of D devices.

    Attributes:
        layers: names.
        devices: names of those that can run at least one layer.
        objective: one of `OBJECTIVES`.
        schedule: `gpipe` or `1f1b`.
        n_microbatches: of a step.
        forward: (L, D) time of one micro-batch [s]; infinite: the device can't run the layer.
        backward: (L, D) likewise; finite wherever `forward` is.
        overhead: (D, 2) fixed time of a stage's forward and backward call [s].
        contention: (D, 2) how many times as long passes take where devices of two `crews` are used.
        crews: devices that slow those of the others.
        rate: (D,) what a second of a step costs for each device that is used [J/s or USD/s]; 0 in other objectives.
        busy_rate: (D,) what m seconds of work cost beside that [J/s].
        calls: (L, D) what a step's calls of a layer cost beside that [USD].
        fixed: (L, D) memory that a layer fills on a device, whatever is in flight [B].
        saved: (L, D) and what it saves there for the backward pass of each micro-batch in flight [B].
        kept: (L, D) the part of it that stays where the layer is recomputed; all of it where it can't be.
        latency: (D, D) time of an empty transfer [s]; infinite: no link.
        inverse_bandwidth: (D, D) [s/B].
        output_bytes: (L,) what a layer hands to the next one for one micro-batch [B].
        limits: (D,) memory of each device [B].
        pools: memory that several devices share.
        core_groups: devices that compute on one core, their loads add up; a device without cores is a group of its own.
        media: (D, D) each: the pairs whose hand-overs one medium carries, where a plan may have several; they add up.
        conflicts: for each device, the devices that are the same hardware and can't be in one plan with it.
        joined: (L,) whether a layer has to be on the device of the layer before it.
        ties: layers that have to be on one device, though others may come between.
        contiguous: whether a device holds one interval at most; otherwise its stages' loads and bytes add up.
    """

    layers: tuple[str, ...]
    devices: tuple[str, ...]
    objective: str
    schedule: str
    n_microbatches: int
    forward: Floats
    backward: Floats
    overhead: Floats
    contention: Floats
    crews: tuple[tuple[int, ...], ...]
    rate: Floats
    busy_rate: Floats
    calls: Floats
    fixed: NDArray[np.int64]
    saved: NDArray[np.int64]
    kept: NDArray[np.int64]
    latency: Floats
    inverse_bandwidth: Floats
    output_bytes: Floats
    limits: NDArray[np.int64]
    pools: tuple[Pool, ...]
    core_groups: tuple[tuple[int, ...], ...]
    media: tuple[NDArray[np.bool_], ...]
    conflicts: tuple[tuple[int, ...], ...]
    joined: NDArray[np.bool_]
    ties: tuple[tuple[int, ...], ...] = ()
    contiguous: bool = True

    @property
    def nbytes(self) -> NDArray[np.int64]:
        """(L, D) memory of layers that save everything for all micro-batches [B]: the most that they can fill."""
        return self.fixed + self.n_microbatches * self.saved

    @property
    def least_bytes(self) -> NDArray[np.int64]:
        """(L, D) the least that they fill in any plan [B]."""
        return self.fixed + (self.n_microbatches if self.schedule == GPIPE else 1) * self.kept

    @property
    def can_recompute(self) -> bool:
        """Whether there is a layer that needs less memory when it is run again in its backward pass."""
        return bool((self.kept < self.saved).any())

    @property
    def is_plain(self) -> bool:
        """Whether only times, memory, pins and links matter: not colocation, recomputation, media, 1F1B, rates."""
        is_bound = self.joined.any() or self.ties or self.media or self.can_recompute
        return self.schedule == GPIPE and self.objective not in ("energy", "dollars") and not is_bound

    def transfer(self, layer: int) -> Floats:
        """(D, D) seconds to hand the output of a layer from one device to another; 0 on the diagonal."""
        seconds: Floats = self.latency + self.output_bytes[layer] * self.inverse_bandwidth
        return seconds

    def without(self, device: str) -> Problem:
        """The same problem where that device can run nothing."""
        forward = self.forward.copy()
        forward[:, self.devices.index(device)] = np.inf
        return dataclasses.replace(self, forward=forward)

    def only(self, devices: Sequence[int]) -> Problem:
        """The same problem with these devices alone, in this order."""
        of = {d: k for k, d in enumerate(devices)}
        chosen = list(devices)
        pair = np.ix_(chosen, chosen)

        def inside(groups: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
            return tuple(kept for group in groups if (kept := tuple(of[d] for d in group if d in of)))

        pools = (dataclasses.replace(p, members=m) for p in self.pools for m in inside([p.members]))
        tables = ("forward", "backward", "calls", "fixed", "saved", "kept")
        rows = ("overhead", "contention", "rate", "busy_rate", "limits")
        return dataclasses.replace(
            self,
            devices=tuple(self.devices[d] for d in chosen),
            **{name: getattr(self, name)[:, chosen] for name in tables},
            **{name: getattr(self, name)[chosen] for name in rows},
            latency=self.latency[pair],
            inverse_bandwidth=self.inverse_bandwidth[pair],
            crews=inside(self.crews),
            pools=tuple(pools),
            core_groups=tuple(dict.fromkeys(inside(self.core_groups))),
            media=tuple(medium[pair] for medium in self.media),
            conflicts=tuple(tuple(of[k] for k in self.conflicts[d] if k in of) for d in chosen),
        )

    def reversed(self) -> Problem:
        """The same problem with the layers from the last to the first; hand-overs lead the other way."""
        tables = ("forward", "backward", "calls", "fixed", "saved", "kept")
        n = len(self.layers)
        return dataclasses.replace(
            self,
            layers=self.layers[::-1],
            **{name: getattr(self, name)[::-1] for name in tables},
            latency=self.latency.T,
            inverse_bandwidth=self.inverse_bandwidth.T,
            output_bytes=np.append(self.output_bytes[-2::-1], 0.0),
            joined=np.append(False, self.joined[:0:-1]),
            ties=tuple(tuple(n - 1 - i for i in reversed(tie)) for tie in self.ties),
        )

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
    schedule: str = GPIPE,
    n_microbatches: int | None = None,
    max_memory: Mapping[str, int] | None = None,
    pins: Mapping[str, str] | None = None,
    colocate: Sequence[Sequence[str]] = (),
    recompute: str = "never",
    contiguous: bool = True,
) -> Problem:
    """Check everything and put it into arrays.

    Args:
        costs: of the layers for one micro-batch.
        topology: devices and links; `costs.transfers` takes precedence over the links' times.
        objective: one of `OBJECTIVES`.
        schedule: `gpipe` or `1f1b`.
        n_microbatches: None or `costs.n_microbatches`.
        max_memory: name of a device or memory pool -> bytes that the plan may fill there.
        pins: name of a layer -> name of the device that has to run it.
        colocate: groups of names of layers that have to be on one device.
        recompute: `never`, or `allowed`: layers may be run again in their backward pass, where the device can do that.
        contiguous: whether a device holds one interval of layers at most.

    Raises:
        PlacementError: something is wrong with the request, or a layer can run nowhere or fits nowhere.
    """
    _check_options(objective, schedule, recompute, contiguous)
    checks.check_microbatches(costs, n_microbatches)
    checks.check_costs(costs)
    checks.check_links(topology)
    pins, max_memory = dict(pins or {}), dict(max_memory or {})
    checks.check_pins(costs, topology, pins)
    groups = colocated(costs, colocate, contiguous=contiguous)
    able = [_able_devices(layer, topology, pins) for layer in costs.layers]
    _narrow(able, groups, costs)
    devices = [device for device in topology.devices if any(device.name in names for names in able)]
    checks.check_figures_of(devices, objective)
    forward, backward, calls = arrays.times(costs, devices, able)
    fixed, saved, kept = arrays.memory(costs, devices, recompute=recompute == "allowed")
    latency, inverse_bandwidth = arrays.links(costs, topology, devices)
    overheads = [costs.overheads.get(device.name) for device in devices]
    rate, busy_rate = arrays.rates(devices, objective, costs.n_microbatches)
    problem = Problem(
        layers=tuple(layer.name for layer in costs.layers),
        devices=tuple(device.name for device in devices),
        objective=objective,
        schedule=schedule,
        n_microbatches=costs.n_microbatches,
        forward=forward,
        backward=backward,
        overhead=np.array([(o.forward_s, o.backward_s) if o else (0.0, 0.0) for o in overheads]),
        contention=np.array(
            [(o.contended_forward or 1.0, o.contended_backward or 1.0) if o else (1.0, 1.0) for o in overheads]
        ),
        crews=() if objective == "latency" else arrays.crews(devices, costs),
        rate=rate,
        busy_rate=busy_rate,
        calls=calls * (costs.n_microbatches if objective == "dollars" else 0),
        fixed=fixed,
        saved=saved,
        kept=kept,
        latency=latency,
        inverse_bandwidth=inverse_bandwidth,
        output_bytes=np.array([layer.output_bytes for layer in costs.layers], float),
        limits=np.array(arrays.limits(devices, topology, max_memory), np.int64),
        pools=arrays.pools(devices, topology, max_memory),
        core_groups=arrays.core_groups(devices),
        media=arrays.media(devices, topology, contiguous=contiguous) if objective == "throughput" else (),
        conflicts=tuple(tuple(j for j, b in enumerate(devices) if a.overlaps(b)) for a in devices),
        joined=np.array([i > 0 and any({i - 1, i} <= set(g) for g in groups) for i in range(len(able))]),
        ties=() if contiguous else tuple(groups),
        contiguous=contiguous,
    )
    checks.check_fits(problem)
    return problem


def _check_options(objective: str, schedule: str, recompute: str, contiguous: bool) -> None:
    if objective not in OBJECTIVES:
        raise PlacementError(f"unknown objective {objective!r}", expected=" or ".join(OBJECTIVES))
    if schedule not in SCHEDULES:
        raise PlacementError(f"unknown schedule {schedule!r}", expected=" or ".join(SCHEDULES))
    if recompute not in RECOMPUTE:
        raise PlacementError(f"recompute is {recompute!r}", expected=" or ".join(RECOMPUTE))
    if schedule == ONE_F_ONE_B and (objective != "train_step" or not contiguous):
        raise PlacementError(
            "1f1b is a schedule of training steps in which a device holds one stage",
            found=f"objective {objective!r}, contiguous={contiguous}",
            expected="objective 'train_step', contiguous=True",
            remedy="leave one of them out, or use schedule='gpipe'",
        )


def colocated(costs: Costs, colocate: Sequence[Sequence[str]], *, contiguous: bool) -> list[tuple[int, ...]]:
    """Groups of layers (indices, rising) that have to be on one device; no layer is in two of them.

    Where a device holds one interval of layers, a group comes with all layers between its own.
    """
    index = {layer.name: i for i, layer in enumerate(costs.layers)}
    found: list[set[int]] = []
    for names in colocate:
        if isinstance(names, str) or (unknown := [name for name in names if name not in index]):
            what = f"{names!r} is no group" if isinstance(names, str) else f"layer {unknown[0]!r} does not exist"
            raise PlacementError(
                f"colocate: {what}", found=", ".join(index), expected="groups of layers' names, e.g. [('a', 'b')]"
            )
        group = {index[name] for name in names}
        if contiguous and group:
            group = set(range(min(group), max(group) + 1))
        for other in [other for other in found if other & group]:
            group |= other
            found.remove(other)
        found.append(group)
    return [tuple(sorted(group)) for group in found if len(group) > 1]


def _narrow(able: list[list[str]], groups: Sequence[tuple[int, ...]], costs: Costs) -> None:
    """Leave each layer of a group the devices that can run all of the group."""
    for group in groups:
        common = [name for name in able[group[0]] if all(name in able[i] for i in group)]
        if not common:
            raise PlacementError(
                f"layers {', '.join(repr(costs.layers[i].name) for i in group)} have to be on one device",
                found="; ".join(f"{costs.layers[i].name!r} can run on {', '.join(able[i])}" for i in group),
                expected="a device that can run all of them",
                remedy="colocate fewer layers, remove a pin, or contiguous=False: it leaves out those between them",
            )
        for i in group:
            able[i] = common


def _able_devices(layer: LayerCost, topology: Topology, pins: Mapping[str, str]) -> list[str]:
    """Names of the devices that may run a layer; there is at least one."""
    devices = [d for d in topology.devices if d.name in layer.times and (layer.apis is None or d.api in layer.apis)]
    able = [device.name for device in devices]
    if not able:
        checks.refuse_unrunnable(layer, topology)
    if (pin := pins.get(layer.name)) is None:
        return able
    if pin not in able:
        raise PlacementError(f"layer {layer.name!r} is pinned to {pin!r}, which can't run it", found=", ".join(able))
    return [pin]
