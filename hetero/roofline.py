"""Time of a layer from a data sheet, for devices that nobody has here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetero.cost import LayerTime
from hetero.efficiency import ASSUMED_FACTOR, Observation, bound_s, efficiency
from hetero.errors import DeviceError
from hetero.modules import moved_bytes, stated_cost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.device import Device
    from hetero.runtime.calibration import Layer

ROOFLINE = "roofline"
"""First word of the source of such a time."""


def roofline(layer: Layer, flops: float, device: Device, observations: Sequence[Observation]) -> LayerTime:
    """Predicted time of a layer on a device known by its figures alone.

    The larger of compute time and memory time over the efficiency that measured layers reach, plus one launch; the
    backward pass computes twice as much (gradients of input and of weights) and moves twice as much. A module's own
    statement (`layer_cost`) goes before. The source says where the efficiency comes from.

    Args:
        layer: with its input for one micro-batch.
        flops: of its forward pass, where the module states none for this device [FLOP].
        device: with `flops` and `bandwidth`.
        observations: of layers that were measured, from `hetero.efficiency.recorded`.

    Raises:
        DeviceError: the device lacks one of the two.

    Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
    """
    module, x = layer.module, layer.x
    stated = stated_cost(module, device.api, tuple(x.shape))
    if stated.get("seconds_forward") is not None:
        forward = float(stated["seconds_forward"])
        backward = float(stated.get("seconds_backward") or 2 * forward)
        return LayerTime(forward, backward, float(stated.get("error") or ASSUMED_FACTOR - 1.0), "given")
    if not device.flops or not device.bandwidth:
        raise DeviceError(
            f"{device.name!r} can't be priced",
            found=f"flops: {device.flops}, bandwidth: {device.bandwidth}",
            remedy="give both in the topology file",
        )
    flops = stated.get("flops") or flops
    nbytes = stated.get("bytes") or moved_bytes(module, x, layer.output_bytes)
    reached = efficiency(device.kind, device.api, layer.operation, flops, nbytes, observations)
    busy, launch = bound_s(flops, nbytes, device.flops, device.bandwidth), device.launch_s or 0.0
    return LayerTime(
        busy / reached.forward + launch,
        2 * busy / reached.backward + launch,
        reached.error,
        f"{ROOFLINE}, {reached.basis}",
    )
