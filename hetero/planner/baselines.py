"""Placements that need no planner, or a planner that knows less: what a plan has to beat.

Each starts from a wish for every layer. A layer that can't run on the device wished for goes to the device that runs it
fastest among those that can. So a device may hold several stages, which the solvers never allow unless they are told
to.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from hetero.errors import HeteroError
from hetero.planner.plans import Alternative
from hetero.planner.pricing import evaluate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from hetero.cost import Costs, LayerCost, LayerTime
    from hetero.topology import Topology

Stages = tuple[tuple[str, int, int], ...]


def baselines(
    costs: Costs,
    topology: Topology,
    objective: str,
    *,
    max_memory: Mapping[str, int] | None = None,
    pins: Mapping[str, str] | None = None,
    together: Sequence[tuple[int, ...]] = (),
    schedule: str = "gpipe",
) -> tuple[Alternative, ...]:
    """Placements to compare with, priced or with the reason why not.

    Each general device alone; where there are several, also as many layers for each, the layers in turn, the best cuts
    for devices that are all as fast as the first (PipeDream), and what accelerate makes of bytes alone.
    """
    general = general_devices(costs, topology)
    wishes: dict[str, list[str] | str] = {f"{device} alone": [device] * len(costs.layers) for device in general}
    apart = _apart(general, topology)
    if len(apart) > 1:
        wishes["even split"] = even_split(costs, apart)
        wishes["round-robin"] = round_robin(costs, apart)
        wishes["PipeDream's split"] = pipedream(costs, topology, apart)
        wishes["accelerate's device map"] = by_accelerate(costs, topology, apart, max_memory or {})
    found = []
    for name, wish in wishes.items():
        if isinstance(wish, str):
            found.append(Alternative(name, (), None, wish))
            continue
        stages = grant(wish, costs, topology)
        if broken := _broken_pin(stages, costs, pins or {}):
            found.append(Alternative(name, (), None, f"breaks the pin of {broken!r}"))
        elif torn := _apart_layers(stages, costs, together):
            found.append(Alternative(name, (), None, f"{torn} have to be on one device"))
        else:
            found.append(priced(name, stages, costs, topology, objective, max_memory=max_memory, schedule=schedule))
    return tuple(found)


def _broken_pin(stages: Stages, costs: Costs, pins: Mapping[str, str]) -> str | None:
    """The first layer that is not on the device to which it is pinned."""
    placed = [(layer.name, device) for device, i, j in stages for layer in costs.layers[i : j + 1]]
    return next((layer for layer, device in placed if pins.get(layer, device) != device), None)


def _apart_layers(stages: Stages, costs: Costs, together: Sequence[tuple[int, ...]]) -> str:
    """The first group of layers that is not on one device; empty: they all are."""
    placed = [device for device, i, j in stages for _ in range(i, j + 1)]
    broken = next((group for group in together if len({placed[i] for i in group}) > 1), ())
    return ", ".join(repr(costs.layers[i].name) for i in broken)


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


def round_robin(costs: Costs, devices: Sequence[str]) -> list[str]:
    """One layer after the other for one device after the other."""
    return [devices[i % len(devices)] for i in range(len(costs.layers))]


def pipedream(costs: Costs, topology: Topology, devices: Sequence[str]) -> list[str]:
    """The contiguous split that is best if all devices are as fast as the first one, in the order of the devices.

    A(j, k), the time of the slowest stage or hand-over of layers 0 to j on k devices, is the least over i of
    max(A(i, k-1), 2 a_i / B, T(i+1, j)), with T the compute time of a stage on the first device and a_i / B the time to
    hand over the activation of layer i between the first two. A layer without a time there counts with its least.
    Replicas are left out. Of equally fast splits the one with the fewest stages is taken.

    Source: Harlap et al., "PipeDream", arXiv 1806.03377, section 3.2; Narayanan et al., SOSP 2019, section 3.1.
    """
    times = [layer.times.get(devices[0]) or min(layer.times.values(), key=_total) for layer in costs.layers]
    ends = np.cumsum([0.0, *map(_total, times)])
    hop = np.array([_hop(costs, topology, devices[0], devices[1], layer.output_bytes) for layer in costs.layers])
    best, cuts = ends[1:].copy(), []
    options = [(best[-1], 1)]
    for k in range(2, min(len(devices), len(costs.layers)) + 1):
        shorter, best, cut = best, np.full(len(best), np.inf), np.zeros(len(best), np.int64)
        for j in range(k - 1, len(best)):
            slowest = np.maximum(np.maximum(shorter[:j], 2 * hop[:j]), ends[j + 1] - ends[1 : j + 1])
            cut[j] = int(slowest.argmin())  # the last layer of the stage before
            best[j] = slowest[cut[j]]
        cuts.append(cut)
        options.append((best[-1], k))
    _, n_stages = min(options)
    wish, last = [""] * len(best), len(best) - 1
    for k in range(n_stages, 0, -1):
        first = int(cuts[k - 2][last]) + 1 if k > 1 else 0
        wish[first : last + 1] = [devices[k - 1]] * (last + 1 - first)
        last = first - 1
    return wish


def _total(time: LayerTime) -> float:
    return time.forward_s + time.backward_s


def _hop(costs: Costs, topology: Topology, source: str, target: str, nbytes: float) -> float:
    if (given := costs.transfers.get(f"{source}->{target}")) is not None:
        return given[0] + nbytes / given[1]
    try:
        return topology.transfer_s(source, target, nbytes)
    except HeteroError:
        return 0.0  # as PipeDream has one bandwidth for all pairs, and this one has none


def by_accelerate(
    costs: Costs, topology: Topology, devices: Sequence[str], max_memory: Mapping[str, int]
) -> list[str] | str:
    """What `accelerate.infer_auto_device_map` makes of the layers' parameter bytes; the reason where it makes nothing.

    It is called for a stand-in: one indivisible module a layer, with as many bytes of parameters, without storage. It
    knows accelerators by number, in the order of the devices, and one `cpu`, the first one of that kind; like the
    planner it may fill `max_memory`, or all that a device has. It is called where torch is loaded, as wherever there is
    a model: who plans from figures alone need not wait for that.
    """
    if "torch" not in sys.modules:
        return "not priced: accelerate works on modules, and torch is not loaded (import torch)"
    try:
        from accelerate import infer_auto_device_map
        from accelerate.utils import modeling
    except ImportError as error:
        return f"accelerate is absent: {error} (pip install 'heteroq[accelerate]')"
    from torch import empty, nn, uint8

    class Layer(nn.Module):
        def __init__(self, nbytes: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(empty(nbytes, dtype=uint8, device="meta"), requires_grad=False)

    host = next((name for name in devices if topology.device(name).kind == "cpu"), None)
    names: dict[int | str, str] = dict(enumerate(name for name in devices if name != host))
    if host is not None:
        names["cpu"] = host
    limits = {key: max_memory.get(name, topology.device(name).memory_bytes) for key, name in names.items()}
    limits.setdefault("cpu", 0)
    model = nn.ModuleList(Layer(layer.parameter_bytes) for layer in costs.layers)
    with _quiet(modeling.logger):  # it warns that the accelerators aren't in this machine
        found = infer_auto_device_map(model, limits, no_split_module_classes=["Layer"])
    places = [found.get(str(i), found.get("", "disk")) for i in range(len(costs.layers))]
    if "disk" in places:
        return f"accelerate puts {costs.layers[places.index('disk')].name!r} on disk"
    return [names[place] for place in places]


@contextlib.contextmanager
def _quiet(logger: Any) -> Iterator[None]:
    inner = logging.getLogger(logger.name)
    level = inner.level
    inner.setLevel(logging.ERROR)
    try:
        yield
    finally:
        inner.setLevel(level)


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
    schedule: str = "gpipe",
) -> Alternative:
    """A placement with its price, or with the reason why it is impossible."""
    try:
        value = evaluate(stages, costs, topology, objective, max_memory=max_memory, schedule=schedule).value
    except HeteroError as error:
        return Alternative(name, stages, None, " ".join(str(error).split()))
    return Alternative(name, stages, value)
