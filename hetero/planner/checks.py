"""What is wrong with a request for a plan, found before any search, and the one message that says so."""

from __future__ import annotations

import itertools
import math
from numbers import Real
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from hetero.errors import DeviceError, PlacementError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hetero.cost import Costs, LayerCost
    from hetero.device import Device
    from hetero.planner.problem import Problem
    from hetero.topology import Topology

_BYTES_OF = "(parameters, gradients, optimizer state, activations of all micro-batches in flight)"
_MOST_BYTES = 2**62
_MORE_MEMORY = "a smaller batch or model, a larger max_memory, recompute='allowed', or one more device"


def check_microbatches(costs: Costs, n_microbatches: int | None) -> None:
    """The number of micro-batches is that of the costs, and there is one at least."""
    if costs.n_microbatches < 1 or (n_microbatches is not None and n_microbatches < 1):
        found = costs.n_microbatches if n_microbatches is None else n_microbatches
        raise PlacementError("a step needs at least one micro-batch", found=str(found), expected="1 or more")
    if n_microbatches not in (None, costs.n_microbatches):
        raise PlacementError(
            "the costs are for another number of micro-batches",
            found=f"n_microbatches={n_microbatches}, costs measured for {costs.n_microbatches}",
            remedy=f"profile again with n_microbatches={n_microbatches}: the time of a micro-batch depends on its size",
        )


def check_costs(costs: Costs) -> None:
    """Every figure is finite and not negative; there are layers, and their names differ."""
    if not costs.layers:
        raise PlacementError("there are no layers to place")
    names = [layer.name for layer in costs.layers]
    if twice := [name for name in names if names.count(name) > 1]:
        raise PlacementError(f"two layers are called {twice[0]!r}", expected="names that differ")
    _check_figures("costs", {"optimizer_factor": costs.optimizer_factor})
    for layer in costs.layers:
        fields = ("parameter_bytes", "trainable_bytes", "output_bytes", "saved_bytes", "recompute_bytes", "flops")
        _check_figures(f"layer {layer.name!r}", {name: getattr(layer, name) for name in fields})
        for device, time in layer.times.items():
            _check_figures(f"layer {layer.name!r} on {device!r}", vars(time))
        _check_size(layer, costs)
    for device, overhead in costs.overheads.items():
        _check_figures(f"overhead of {device!r}", vars(overhead))
        for name in ("contended_forward", "contended_backward"):
            if (ratio := getattr(overhead, name)) is not None and ratio < 1:
                raise PlacementError(f"overhead of {device!r}: {name} is {ratio}", expected="at least 1, or None")
    for pair, (latency, bandwidth) in costs.transfers.items():
        _check_link(f"transfer {pair!r}", latency, bandwidth)


def _check_size(layer: LayerCost, costs: Costs) -> None:
    """The planner adds sizes up in 64 bits."""
    state = layer.parameter_bytes + costs.optimizer_factor * layer.trainable_bytes
    saved = max([layer.saved_bytes, *(time.call_bytes for time in layer.times.values())])
    scratch = max((time.scratch_bytes for time in layer.times.values()), default=0)
    if len(costs.layers) * (most := state + costs.n_microbatches * saved + scratch) > _MOST_BYTES:
        raise PlacementError(f"layer {layer.name!r} needs {most:.3g} B", expected="less: sizes are counted in 64 bits")


def check_links(topology: Topology) -> None:
    """Latencies are finite and not negative, bandwidths more than nothing."""
    for link in topology.links:
        _check_link(f"link {link.source!r} - {link.target!r}", link.latency_s, link.bandwidth)


def _check_link(what: str, latency: float, bandwidth: float) -> None:
    _check_figures(what, {"latency": latency})
    if not bandwidth > 0:
        raise PlacementError(f"{what}: bandwidth is {bandwidth}", expected="more than 0 B/s")


def _check_figures(what: str, figures: Mapping[str, object]) -> None:
    for name, value in figures.items():
        if isinstance(value, Real) and not (float(value) >= 0 and math.isfinite(float(value))):
            raise PlacementError(f"{what}: {name} is {value}", expected="a finite number, not negative")


def check_pins(costs: Costs, topology: Topology, pins: Mapping[str, str]) -> None:
    """Pinned layers and the devices they are pinned to exist."""
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


def refuse_unrunnable(layer: LayerCost, topology: Topology) -> NoReturn:
    """Raise the error for a layer that no device can run."""
    needed = layer.apis or tuple(layer.times)
    reasons = [f"{a.api} is absent: {a.reason}" for a in topology.absences if a.api in needed]
    remedies = [a.remedy for a in topology.absences if a.api in needed]
    raise PlacementError(
        f"layer {layer.name!r} can run on no device",
        found="; ".join([", ".join(topology.names), *reasons]),
        expected=f"a device of {' or '.join(needed)}" if needed else "costs on at least one device",
        remedy="; ".join(remedies),
    )


def check_figures_of(devices: Sequence[Device], objective: str) -> None:
    """What the objective multiplies by is known of every device that a plan may use."""
    field, unit = {"energy": ("power_w", "W"), "dollars": ("price_usd_h", "USD/h")}.get(objective, ("", ""))
    for device in devices if field else ():
        value = getattr(device, field)
        if value is None or not (value >= 0 and math.isfinite(value)):
            raise PlacementError(
                f"objective {objective!r} needs {field} of device {device.name!r}",
                found="unknown" if value is None else str(value),
                expected=f"a finite number of {unit}, not negative",
                remedy=f"give {field} in the topology file, or leave the device out with Topology.only",
            )
        if objective == "energy":
            _check_figures(f"device {device.name!r}", {"idle_power_w": device.idle_power_w})


def check_fits(problem: Problem) -> None:
    """Each layer, and each run of layers that have to be on one device, fits on a device that can run it."""
    starts = [*np.flatnonzero(~problem.joined).tolist(), len(problem.layers)]
    for first, stop in itertools.pairwise(starts):
        run = slice(first, stop)
        able = np.flatnonzero(np.isfinite(problem.forward[run]).all(axis=0))
        free = {
            problem.devices[d]: min(
                [int(problem.limits[d]), *(pool.limit for pool in problem.pools if d in pool.members)]
            )
            for d in able
        }
        needed = {problem.devices[d]: int(problem.least_bytes[run, d].sum()) for d in able}
        if all(needed[name] > free[name] for name in free):
            refuse_memory(problem.layers[run], min(needed.values()), free)


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
    least = np.where(np.isfinite(problem.forward), problem.least_bytes, np.iinfo(np.int64).max).min(axis=1)
    largest = int(least.argmax())
    if (needed := sum(least.tolist())) > free:
        raise PlacementError(
            "the layers need more memory than all devices have together",
            found=f"{free} B free on {', '.join(problem.devices[d] for d in members)}; "
            f"the largest is layer {problem.layers[largest]!r} with {least[largest]} B",
            expected=f"{needed} B {_BYTES_OF}",
            remedy=_MORE_MEMORY,
        )


def refuse_memory(layers: str | Sequence[str], needed: int, free: Mapping[str, int], *, after: str = "") -> NoReturn:
    """Raise the error for a layer that fits on none of the devices, or for several that have to be on one.

    Args:
        layers: names.
        needed: what they fill [B].
        free: device -> what is free there at best [B].
        after: what fills the rest, in words.
    """
    names = [layers] if isinstance(layers, str) else list(layers)
    what = f"layer {names[0]!r} fits" if len(names) == 1 else f"layers {', '.join(map(repr, names))}: together they fit"
    raise PlacementError(
        f"{what} on no device{after}",
        found=", ".join(f"{bytes_free} B free on {name}" for name, bytes_free in free.items()),
        expected=f"{needed} B {_BYTES_OF}",
        remedy=_MORE_MEMORY,
    )
