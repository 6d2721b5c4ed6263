"""Time of a layer from a data sheet, for devices that nobody has here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetero.cost import LayerTime
from hetero.errors import DeviceError
from hetero.modules import stated_cost

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hetero.device import Device

ROOFLINE_ERROR = 0.5
"""Half width of the interval around a roofline's time: layers reach a third to all of a peak (a judgement)."""


def roofline(module: nn.Module, x: Tensor, output_bytes: int, flops: float, device: Device) -> LayerTime:
    """Predicted time of a layer on a device known by its figures alone.

    The larger of compute time and memory time, plus one launch; the backward pass computes twice as much (gradients of
    input and of weights) and moves twice as much. A module's own statement (`layer_cost`) goes before.

    Args:
        module: the layer.
        x: its input for one micro-batch.
        output_bytes: size of its output [B].
        flops: of its forward pass, where the module states none for this device [FLOP].
        device: with `flops` and `bandwidth`.

    Raises:
        DeviceError: the device lacks one of the two.

    Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
    """
    stated = stated_cost(module, device.api, tuple(x.shape))
    if stated.get("seconds_forward") is not None:
        forward = float(stated["seconds_forward"])
        backward = float(stated.get("seconds_backward") or 2 * forward)
        return LayerTime(forward, backward, float(stated.get("error") or ROOFLINE_ERROR), "given")
    if not device.flops or not device.bandwidth:
        raise DeviceError(
            f"{device.name!r} can't be priced",
            found=f"flops: {device.flops}, bandwidth: {device.bandwidth}",
            remedy="give both in the topology file",
        )
    flops = stated.get("flops") or flops
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    nbytes = stated.get("bytes") or parameters + x.numel() * x.element_size() + output_bytes
    busy = max(flops / device.flops, nbytes / device.bandwidth)
    launch = device.launch_s or 0.0
    return LayerTime(busy + launch, 2 * busy + launch, ROOFLINE_ERROR, "roofline")
