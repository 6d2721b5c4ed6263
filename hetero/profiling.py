"""What each layer costs on each device: measured where there is one, by the roofline where there is only a data sheet.

Layers run as they will run in a step: through `Stage`, in a thread pinned to the device's cores, with all slots of a
step filled before the first backward pass, on activations that the model itself has made.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hetero import cache
from hetero.backends import backend
from hetero.cost import Costs, LayerCost, LayerTime
from hetero.efficiency import Observation, record, recorded
from hetero.modules import apis_of, can_run, forward_flops, moved_bytes, saved_bytes, signature
from hetero.roofline import roofline
from hetero.runtime.calibration import Layer, add_slowdown, on_devices
from hetero.runtime.measurement import handover_s
from hetero.runtime.pipeline import Batch, split
from hetero.runtime.stage import TARGETS, Chain, Loss
from hetero.runtime.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.device import Device
    from hetero.topology import Topology

ZERO_COPY_BANDWIDTH = 1e18
"""Stands for "nothing is copied" [B/s]: large enough that no activation's size shows in a time, and legal JSON."""


def profile(
    layers: Sequence[tuple[str, nn.Module]],
    batch: Batch,
    topology: Topology,
    *,
    n_microbatches: int = 8,
    loss: Loss | None = None,
    refresh: bool = False,
) -> Costs:
    """Time and memory of each layer on each device that can run it, for one micro-batch.

    Times are medians over rounds of `n_microbatches` passes; their error is half of the range between the rounds' 10th
    and 90th percentile, relative to the median. A stage's fixed time has two parts: what a call costs beside its
    layers, and what the layers lose when the other devices work at the same time (shared caches, memory and Python's
    lock). All of it is stored on disk by structure, shapes, devices, drivers and versions: it is measured once.

    What is measured also shows what part of their bounds layers reach, from which simulated devices are priced
    (`hetero.efficiency`); for that, the peak of each measured device is measured once.

    Saved bytes are what torch's autograd keeps on the host. A backend that plans its memory says more: a layer's times
    on an OpenCL device have the bytes of a call in flight and the scratch memory of its compiled graphs.

    Args:
        layers: of the chain, each called `module(x, context) -> x`.
        batch: B rows, of which one micro-batch is used, the largest: ceil(B / n_microbatches) rows.
        topology: of the devices; simulated ones are priced by the roofline.
        n_microbatches: parts a step is cut into.
        loss: (output, targets) -> mean; the last layer's times and saved bytes include it. None: they don't.
        refresh: measure again what is stored.

    Raises:
        DeviceError: a device's runtime is unusable, or a simulated device lacks the figures for a roofline.
        ValueError: the batch has fewer rows than micro-batches, or no target that counts.
    """
    copies = [(name, copy.deepcopy(module)) for name, module in layers]  # theirs: gradients, counters, the device
    chain = _prepare(copies, batch, n_microbatches, loss)
    costs = [_cost(layer) for layer in chain]
    real = [device for device in topology.devices if not device.simulated]
    times, overheads = on_devices(chain, real, n_microbatches, refresh=refresh)
    for device in real:
        _observe(chain, costs, times.get(device.name, {}), device, refresh=refresh)
    observations = recorded() if len(real) < len(topology.devices) else []
    kinds = {layer.key: (layer, cost.flops) for layer, cost in zip(chain, costs, strict=True)}
    for group in topology.classes():  # ten thousand alike devices are priced once, and so are alike layers
        if group.device.simulated:
            priced = {
                key: roofline(layer, flops, group.device, observations)
                for key, (layer, flops) in kinds.items()
                if can_run(layer.module, group.device)
            }
            own = {layer.name: priced[layer.key] for layer in chain if layer.key in priced}
            times |= dict.fromkeys(group.members, own)
    overheads = add_slowdown(overheads, chain, topology, n_microbatches, refresh=refresh)
    return Costs(
        layers=tuple(_with_times(cost, times) for cost in costs),
        n_microbatches=n_microbatches,
        overheads=overheads,
        transfers=_transfers(topology, chain, refresh=refresh),
    )


def _prepare(
    layers: Sequence[tuple[str, nn.Module]], batch: Batch, n_microbatches: int, loss: Loss | None
) -> list[Layer]:
    """Run one micro-batch through the chain on the host and note each layer's input."""
    if (rows := batch.inputs.shape[0]) < n_microbatches:
        raise ValueError(f"a batch of {rows} rows has no {n_microbatches} micro-batches")
    part = split(batch, n_microbatches)[0]
    x, chain = part.inputs.clone(), []  # copies: what autograd keeps of a view counts as all that it is a view of
    everything = {key: value.clone() for key, value in part.context.items()}
    plain = {key: value for key, value in everything.items() if key != TARGETS}
    for i, (name, module) in enumerate(layers):
        layer_loss = loss if i == len(layers) - 1 else None
        context = plain if layer_loss is None else everything
        with torch.no_grad():
            y = module(x, plain)
        shapes = [list(x.shape), str(x.dtype), sorted((k, list(v.shape), str(v.dtype)) for k, v in context.items())]
        key = cache.key(signature(module), shapes, n_microbatches, _name(layer_loss))
        chain.append(Layer(name, module, key, x, y.numel() * y.element_size(), context, layer_loss))
        x = y
    return chain


def _name(loss: Loss | None) -> str:
    return "" if loss is None else f"{loss.__module__}.{getattr(loss, '__qualname__', type(loss).__qualname__)}"


def _cost(layer: Layer) -> LayerCost:
    apis = apis_of(layer.module)
    parameters = list(layer.module.parameters())
    whole = layer.module if layer.loss is None else Chain([layer.module], layer.loss)
    return LayerCost(
        name=layer.name,
        apis=None if apis is None else tuple(sorted(apis)),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        trainable_bytes=sum(p.numel() * p.element_size() for p in parameters if p.requires_grad),
        output_bytes=layer.output_bytes,
        saved_bytes=saved_bytes(whole, layer.x, layer.context),
        flops=forward_flops(layer.module, layer.x, layer.context),
        times={},
    )


def _with_times(cost: LayerCost, times: dict[str, dict[str, LayerTime]]) -> LayerCost:
    return dataclasses.replace(cost, times={name: own[cost.name] for name, own in times.items() if cost.name in own})


def _observe(
    chain: list[Layer], costs: list[LayerCost], times: dict[str, LayerTime], device: Device, *, refresh: bool
) -> None:
    """Keep what part of its bound each layer reaches on a device; a quantum one has none."""
    if device.kind == "qpu":
        return
    peaks = None
    for layer, cost in {layer.key: (layer, cost) for layer, cost in zip(chain, costs, strict=True)}.values():
        name = cache.key(layer.key, _identity(device))
        if layer.name not in times or (not refresh and cache.read("efficiency", name, bool)):
            continue
        peaks = peaks or _peaks(device)
        time = times[layer.name]
        record(
            name,
            Observation(
                device=_identity(device),
                kind=device.kind,
                api=device.api,
                operation=layer.operation,
                flops=cost.flops,
                nbytes=moved_bytes(layer.module, layer.x, layer.output_bytes),
                forward_s=time.forward_s,
                backward_s=time.backward_s,
                peak_flops=peaks["flops"],
                bandwidth=peaks["bandwidth"],
                launch_s=peaks["launch_s"],
            ),
        )


def _identity(device: Device) -> str:
    return f"{device.description}, {device.driver}, {len(device.cores)} cores"


def _peaks(device: Device) -> dict[str, float]:
    """Peak [FLOP/s], bandwidth [B/s] and launch [s] of a real device: known, stored, or measured now."""
    known = {"flops": device.flops, "bandwidth": device.bandwidth, "launch_s": device.launch_s}
    if device.flops and device.bandwidth and device.launch_s is not None:
        return {name: float(value or 0.0) for name, value in known.items()}
    name = cache.key(_identity(device), torch.__version__)
    stored = cache.read("peaks", name, lambda found: {key: float(found[key]) for key in known})
    if stored is None:
        worker = Worker(device)
        try:
            stored = worker.call(lambda: backend(device.api).measure(device))
        finally:
            worker.close()
        cache.write("peaks", name, stored)
    return stored


def _transfers(topology: Topology, chain: list[Layer], *, refresh: bool) -> dict[str, tuple[float, float]]:
    """(latency [s], bandwidth [B/s]) between real devices; the links of simulated ones are the topology's."""
    real = [device for device in topology.devices if not device.simulated]
    result: dict[str, tuple[float, float]] = {}
    for source in real:
        for target in real:
            if source.name == target.name or source.overlaps(target):
                continue
            name = cache.key("transfer", [(d.name, d.cores, d.driver) for d in (source, target)], torch.__version__)
            stored = None if refresh else cache.read("profile", name, _transfer)
            if stored is None:
                latency, bandwidth = handover_s(source, target, chain[0].output_bytes)
                stored = latency, bandwidth or ZERO_COPY_BANDWIDTH
                cache.write("profile", name, stored)
            result[f"{source.name}->{target.name}"] = stored
    return result


def _transfer(stored: Any) -> tuple[float, float]:
    latency, bandwidth = stored
    return float(latency), float(bandwidth)
