"""Times of layers on one device, and what a stage's call costs beside them."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hetero import cache
from hetero.cost import LayerTime, StageOverhead
from hetero.modules import can_run
from hetero.runtime.measurement import Sample, Workload, measure, slowdown
from hetero.runtime.stage import Loss, Stage
from hetero.runtime.worker import Worker

if TYPE_CHECKING:
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


def on_device(
    chain: list[Layer], device: Device, n_microbatches: int, *, refresh: bool
) -> tuple[dict[str, LayerTime], StageOverhead]:
    """Times of the layers that the device can run, without the fixed time of a stage's call, and that time.

    The fixed time belongs to the device and the shapes: it is measured with the first chain, and kept for others.
    """
    usable = {layer.key: layer for layer in chain if can_run(layer.module, device)}
    names = {key: cache.key(_machine(device), key) for key in usable}
    overhead_name = cache.key(_machine(device), "overhead", _shapes(chain), n_microbatches)
    stored, overhead = {}, None
    if not refresh:
        found = {key: cache.read("profile", name, Sample.from_json) for key, name in names.items()}
        stored = {key: sample for key, sample in found.items() if sample is not None}
        overhead = cache.read("profile", overhead_name, _fixed_time)
    run = _longest_run(chain, device) if overhead is None else []
    missing = {key: layer for key, layer in usable.items() if key not in stored}
    if len(run) > 1:
        missing |= {layer.key: layer for layer in run}  # alone and together have to be measured in the same minute
    if missing:
        samples, together = _measure(list(missing.values()), run, device, n_microbatches)
        stored |= samples
        for key, sample in samples.items():
            cache.write("profile", names[key], sample.to_json())
        if overhead is None:
            overhead = _overhead([stored[layer.key] for layer in run], together)
            cache.write("profile", overhead_name, dataclasses.asdict(overhead))
    fixed = overhead or StageOverhead()
    return {layer.name: _net(stored[layer.key], fixed) for layer in chain if layer.key in usable}, fixed


def add_slowdown(
    overheads: dict[str, StageOverhead],
    times: dict[str, dict[str, LayerTime]],
    chain: list[Layer],
    topology: Topology,
    n_microbatches: int,
    *,
    refresh: bool,
) -> dict[str, StageOverhead]:
    """The fixed times, raised by what the devices take from each other.

    While all of k devices compute, a pass on device d takes r times as long. A plan that uses all of them gives each
    about a k-th of the chain, whose whole time there is T; so its stage loses (r - 1) T / k in each call. Plans with
    fewer devices are charged as well, for one stage: their prediction is too high by up to (r - 1) / k.
    """
    devices: list[Device] = []
    for device in topology.devices:
        is_apart = not any(set(device.cores) & set(other.cores) for other in devices)
        if not device.simulated and is_apart and len(_longest_run(chain, device)) > 1:
            devices.append(device)
    if len(devices) < 2:
        return overheads
    name = cache.key("slowdown", [_machine(device) for device in devices], _shapes(chain), n_microbatches)
    ratios = None if refresh else cache.read("profile", name, lambda stored: _pairs(stored, len(devices)))
    if ratios is None:
        ratios = _slowdown(chain, devices, n_microbatches)
        cache.write("profile", name, ratios)
    raised = dict(overheads)
    for device, (forward, backward) in zip(devices, ratios, strict=True):
        fixed, own = overheads[device.name], times[device.name].values()
        raised[device.name] = StageOverhead(
            fixed.forward_s + (forward - 1) * sum(time.forward_s for time in own) / len(devices),
            fixed.backward_s + (backward - 1) * sum(time.backward_s for time in own) / len(devices),
        )
    return raised


def _fixed_time(stored: Any) -> StageOverhead:
    return StageOverhead(float(stored["forward_s"]), float(stored["backward_s"]))


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


def _measure(
    layers: list[Layer], run: list[Layer], device: Device, n_microbatches: int
) -> tuple[dict[str, Sample], Sample | None]:
    """Each layer alone, by its key, and the run as one stage (None if it isn't one)."""
    groups = [[layer] for layer in layers] + ([run] if len(run) > 1 else [])
    worker = Worker(device)
    try:
        workloads = [_workload(group, device) for group in groups]
        samples = worker.call(lambda: measure(workloads, n_microbatches))
    finally:
        worker.close()
    alone = {layer.key: sample for layer, sample in zip(layers, samples, strict=False)}
    return alone, samples[-1] if len(run) > 1 else None


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


def _overhead(alone: list[Sample], together: Sample | None) -> StageOverhead:
    """Fixed time of a stage's call.

    n units alone take Σ tᵢ = n·o + Σ netᵢ, the chain of them o + Σ netᵢ; so o = (Σ tᵢ - chain) / (n - 1). It is not
    negative, and no larger than the quickest unit.
    """
    if together is None:
        return StageOverhead()
    result = []
    for phase in ("forward_s", "backward_s"):
        times = [getattr(sample, phase) for sample in alone]
        fixed = (sum(times) - getattr(together, phase)) / (len(times) - 1)
        result.append(min(max(fixed, 0.0), min(times)))
    return StageOverhead(*result)


def _net(sample: Sample, fixed: StageOverhead) -> LayerTime:
    return LayerTime(
        max(sample.forward_s - fixed.forward_s, 0.0),
        max(sample.backward_s - fixed.backward_s, 0.0),
        sample.error,
        "profiled",
    )
