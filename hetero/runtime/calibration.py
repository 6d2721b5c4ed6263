"""Times of layers on devices, and what a stage's call costs beside them."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hetero import cache
from hetero.cost import LayerTime, StageOverhead
from hetero.modules import can_run, operation
from hetero.runtime.measurement import Sample, Workload, measure, slowdown
from hetero.runtime.stage import Loss, Stage
from hetero.runtime.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.backends import Context
    from hetero.device import Device
    from hetero.topology import Topology


@dataclass(frozen=True)
class Layer:
    """One layer with what it is called with.

    Attributes:
        name: in the chain.
        module: called `module(x, context) -> x`.
        key: equal for layers that cost the same.
        x: its input for one micro-batch, on the host.
        output_bytes: size of its output [B].
        context: the micro-batch's, with the targets if there is a loss.
        loss: of the last layer; its stage computes it.
    """

    name: str
    module: nn.Module
    key: str
    x: Tensor
    output_bytes: int
    context: Context
    loss: Loss | None

    @cached_property
    def operation(self) -> str:
        """What takes most of a forward pass's operations; the layer runs once to find it."""
        return operation(self.module, self.x, self.context)


@dataclass(frozen=True)
class _Call:
    """What a stage's call costs beside its layers, and how much longer layers take in a chain than alone.

    Attributes:
        overhead: fixed time of a call.
        scale: of the layers' times net of it, forwards and backwards.
    """

    overhead: StageOverhead = field(default_factory=StageOverhead)
    scale: tuple[float, float] = (1.0, 1.0)


@dataclass
class _Known:
    """What is known of a chain on one device.

    Attributes:
        device: which.
        layers: by key, those that the device can run.
        samples: by key; empty where nothing is stored.
        call: cost of a stage's call; None: not measured.
        names: by key, what the cache calls a layer's sample, and at "" the cost of a call.
    """

    device: Device
    layers: dict[str, Layer]
    samples: dict[str, Sample]
    call: _Call | None
    names: dict[str, str]

    def missing(self, chain: list[Layer]) -> tuple[list[Layer], list[Layer]]:
        """Layers to be measured one by one, and those to be measured as one stage as well: all or none of a run."""
        run = _longest_run(chain, self.device) if self.call is None else []
        wanted = {key: layer for key, layer in self.layers.items() if key not in self.samples}
        if len(run) > 1:
            wanted |= {layer.key: layer for layer in run}  # alone and together have to be measured in the same minute
        return list(wanted.values()), run if len(run) > 1 else []

    def store(self, alone: dict[str, Sample], run: list[Layer], together: Sample | None) -> None:
        """Take new samples over and put them into the cache."""
        self.samples |= alone
        for key, sample in alone.items():
            cache.write("profile", self.names[key], sample.to_json())
        if self.call is None:
            self.call = _call([self.samples[layer.key] for layer in run], together)
            fixed = self.call.overhead
            stored = {"forward_s": fixed.forward_s, "backward_s": fixed.backward_s, "scale": self.call.scale}
            cache.write("profile", self.names[""], stored)


def on_devices(
    chain: list[Layer], devices: Sequence[Device], n_microbatches: int, *, refresh: bool
) -> tuple[dict[str, dict[str, LayerTime]], dict[str, StageOverhead]]:
    """Times of the layers on each device that can run some, without the fixed time of a stage's call, and that time.

    The cost of a call belongs to the device and the shapes: it is measured with the first chain, and kept for others.
    What isn't stored is measured on all devices by turns: a machine's speed changes within seconds, and a plan needs
    times that can be compared.
    """
    known = [_known(chain, device, n_microbatches, refresh=refresh) for device in devices]
    known = [one for one in known if one.layers]
    _measure(known, chain, n_microbatches)
    times: dict[str, dict[str, LayerTime]] = {}
    overheads: dict[str, StageOverhead] = {}
    for one in known:
        call = one.call or _Call()
        overheads[one.device.name] = call.overhead
        able = [layer for layer in chain if layer.key in one.layers]
        times[one.device.name] = {layer.name: _net(one.samples[layer.key], call) for layer in able}
    return times, overheads


def _known(chain: list[Layer], device: Device, n_microbatches: int, *, refresh: bool) -> _Known:
    layers = {layer.key: layer for layer in chain if can_run(layer.module, device)}
    names = {key: cache.key(_machine(device), key) for key in layers}
    names[""] = cache.key(_machine(device), "call", _shapes(chain), n_microbatches)
    if refresh:
        return _Known(device, layers, {}, None, names)
    found = {key: cache.read("profile", names[key], Sample.from_json) for key in layers}
    samples = {key: sample for key, sample in found.items() if sample is not None}
    return _Known(device, layers, samples, cache.read("profile", names[""], _stored_call), names)


def add_slowdown(
    overheads: dict[str, StageOverhead],
    chain: list[Layer],
    topology: Topology,
    n_microbatches: int,
    *,
    refresh: bool,
) -> dict[str, StageOverhead]:
    """The fixed times, with how many times as long a pass takes on each device while others compute.

    First all devices at once that have cores of their own. Then each of the rest, which shares a core with one of them,
    against those with which it doesn't; it belongs to the crew of the one whose core it shares.
    """
    real = [device for device in topology.devices if not device.simulated and _longest_run(chain, device)]
    apart: list[Device] = []
    for device in real:
        if len(_longest_run(chain, device)) > 1 and not any(map(device.shares_core, apart)):
            apart.append(device)
    if len(apart) < 2:
        return overheads
    ratios = _ratios(chain, apart, n_microbatches, refresh=refresh)
    found = {device.name: (ratio, device.name) for device, ratio in zip(apart, ratios, strict=True)}
    for device in real:
        hosts = [other for other in apart if device.shares_core(other)]
        rivals = [other for other in apart if other not in hosts]
        if device not in apart and hosts and rivals:
            ratio, *_ = _ratios(chain, [device, *rivals], n_microbatches, refresh=refresh)
            found[device.name] = ratio, hosts[0].name
    return overheads | {
        name: dataclasses.replace(overheads[name], contended_forward=forward, contended_backward=backward, crew=crew)
        for name, ((forward, backward), crew) in found.items()
    }


def _ratios(
    chain: list[Layer], devices: list[Device], n_microbatches: int, *, refresh: bool
) -> list[tuple[float, float]]:
    """Of each device while all of them compute, from the cache or measured."""
    name = cache.key("slowdown", [_machine(device) for device in devices], _shapes(chain), n_microbatches)
    ratios = None if refresh else cache.read("profile", name, lambda stored: _pairs(stored, len(devices)))
    if ratios is None:
        ratios = _slowdown(chain, devices, n_microbatches)
        cache.write("profile", name, ratios)
    return ratios


def _stored_call(stored: Any) -> _Call:
    forward, backward = stored["scale"]
    return _Call(
        StageOverhead(float(stored["forward_s"]), float(stored["backward_s"])), (float(forward), float(backward))
    )


def _pairs(stored: Any, n: int) -> list[tuple[float, float]]:
    pairs = [(float(forward), float(backward)) for forward, backward in stored]
    if len(pairs) != n:
        raise ValueError(f"{len(pairs)} pairs, not {n}")
    return pairs


def _machine(device: Device) -> list[object]:
    return [device.name, device.description, device.driver, device.cores, torch.__version__, version("heteroq")]


def _shapes(chain: list[Layer]) -> list[str]:
    return sorted({str(tuple(layer.x.shape)) for layer in chain})


def _longest_run(chain: list[Layer], device: Device) -> list[Layer]:
    """The longest sequence of neighbours that the device can run."""
    best: list[Layer] = []
    here: list[Layer] = []
    for layer in chain:
        here = [*here, layer] if can_run(layer.module, device) else []
        best = here if len(here) > len(best) else best
    return best


def _measure(known: list[_Known], chain: list[Layer], n_microbatches: int) -> None:
    """Measure what is missing, and note and store it."""
    wanted = [(one, *one.missing(chain)) for one in known]
    wanted = [(one, layers, run) for one, layers, run in wanted if layers]
    if not wanted:
        return
    workers: list[Worker] = []
    try:
        workers += [Worker(one.device) for one, _, _ in wanted]
        groups = [[[layer] for layer in layers] + ([run] if run else []) for _, layers, run in wanted]
        workloads = [
            [_workload(group, one.device) for group in own] for (one, _, _), own in zip(wanted, groups, strict=True)
        ]
        samples = measure(workers, workloads, n_microbatches)
    finally:
        for worker in workers:
            worker.close()
    for (one, layers, run), own in zip(wanted, samples, strict=True):
        alone = {layer.key: sample for layer, sample in zip(layers, own, strict=False)}
        one.store(alone, run, own[-1] if run else None)


def _slowdown(chain: list[Layer], devices: list[Device], n_microbatches: int) -> list[tuple[float, float]]:
    workers = [Worker(device) for device in devices]
    try:
        workloads = [_workload(_longest_run(chain, device), device) for device in devices]
        return slowdown(workers, workloads, n_microbatches)
    finally:
        for worker in workers:
            worker.close()


def _workload(group: list[Layer], device: Device) -> Workload:
    """The layers as one stage: copies, since measuring leaves gradients and may move modules to the device.

    Its input lies there already: the way from another device is a hand-over, with a time of its own.
    """
    first, last = group[0], group[-1]
    stage = Stage(
        [layer.name for layer in group],
        [copy.deepcopy(layer.module) for layer in group],
        device,
        loss=last.loss,
        input_grad=first.x.is_floating_point(),
    )
    return Workload(stage, *stage.here(first.x, last.context))


def _call(alone: list[Sample], together: Sample | None) -> _Call:
    """What a stage's call costs, from units alone and from the chain of them as one stage.

    n units alone take Σ tᵢ = n·o + Σ netᵢ, the chain of them o + Σ netᵢ; so o = (Σ tᵢ - chain) / (n - 1). It is kept
    between 0 and the time of the quickest unit in the chain, min tᵢ · chain / Σ tᵢ. Where that binds, units take longer
    in a chain than alone (their weights have left the caches meanwhile), or shorter; then all nets are scaled, by
    s = (chain - o) / (Σ tᵢ - n·o), so that the stage of all units takes what was measured. Elsewhere s is 1.
    """
    if together is None:
        return _Call()
    fixed, scales = [], []
    for phase in ("forward_s", "backward_s"):
        times, chain = [getattr(sample, phase) for sample in alone], getattr(together, phase)
        n, total = len(times), sum(times)
        overhead = min(max((total - chain) / (n - 1), 0.0), min(times) * chain / total)
        fixed.append(overhead)
        scales.append((chain - overhead) / (total - n * overhead))
    return _Call(StageOverhead(*fixed), (scales[0], scales[1]))


def _net(sample: Sample, call: _Call) -> LayerTime:
    return LayerTime(
        call.scale[0] * max(sample.forward_s - call.overhead.forward_s, 0.0),
        call.scale[1] * max(sample.backward_s - call.overhead.backward_s, 0.0),
        sample.error,
        "profiled",
        sample.call_bytes,
        sample.scratch_bytes,
    )
