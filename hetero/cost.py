"""What layers cost on devices: the table that profiling fills and the planner reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerTime:
    """Time of one layer for one micro-batch on one device.

    Attributes:
        forward_s: median of a forward pass [s], without the fixed cost of entering a stage.
        backward_s: median of a backward pass [s], likewise.
        error: both times t are expected within t / (1 + error) and t (1 + error); from the spread of the repetitions.
        source: `profiled`, `roofline` or `given`.
        call_bytes: what one micro-batch in flight keeps there as the layer is compiled for the device [B]; where it is
            more than the layer's `saved_bytes`, it counts instead.
        scratch_bytes: memory beside that which the layer needs on the device while it runs [B]. Layers of a stage share
            it, so their sum is an upper bound.
        usd: what one micro-batch of a step costs there beside the device's rent, as calls of a quantum processor do
            [USD].
    """

    forward_s: float
    backward_s: float
    error: float
    source: str
    call_bytes: int = 0
    scratch_bytes: int = 0
    usd: float = 0.0


@dataclass(frozen=True)
class LayerCost:
    """One layer of the chain.

    Attributes:
        name: the layer's name in `model.layers()`.
        apis: runtimes that can execute it; None: any but those that only run what names them.
        parameter_bytes: parameters that the layer owns [B].
        trainable_bytes: the part of them that gets gradients and optimizer state [B].
        output_bytes: activation handed to the next layer for one micro-batch [B].
        saved_bytes: activations kept for the backward pass of one micro-batch [B].
        flops: of a forward pass of one micro-batch [FLOP].
        times: device name -> time; a device that is missing can't run the layer.
        recompute_bytes: the part of `saved_bytes` that stays where the layer is run a second time in its backward pass:
            its input [B]; None: the output of the layer before it, nothing for the first layer.
    """

    name: str
    apis: tuple[str, ...] | None
    parameter_bytes: int
    trainable_bytes: int
    output_bytes: int
    saved_bytes: int
    flops: float
    times: dict[str, LayerTime]
    recompute_bytes: int | None = None


@dataclass(frozen=True)
class StageOverhead:
    """Fixed time of one call of a stage on a device, however many layers it holds.

    Attributes:
        forward_s: of a forward call [s].
        backward_s: of a backward call [s].
        contended_forward: how many times as long a forward pass takes where a plan also gives stages to a device of
            another crew that has these figures, so that both compute at the same time; None: not known, or not so.
        contended_backward: likewise.
        crew: devices of one crew take turns on a core; None: the device is a crew of its own.
    """

    forward_s: float = 0.0
    backward_s: float = 0.0
    contended_forward: float | None = None
    contended_backward: float | None = None
    crew: str | None = None


@dataclass(frozen=True)
class Costs:
    """Costs of a chain of layers for one micro-batch.

    Attributes:
        layers: in execution order.
        n_microbatches: the number of micro-batches a step is cut into; all figures are for one of them.
        overheads: device name -> fixed time of a stage's call.
        transfers: `"a->b"` -> (latency [s], bandwidth [B/s]) between devices; missing: from the topology.
        optimizer_factor: bytes of gradients and optimizer state per byte of trainable parameter (AdamW: 3).
    """

    layers: tuple[LayerCost, ...]
    n_microbatches: int
    overheads: dict[str, StageOverhead] = field(default_factory=dict)
    transfers: dict[str, tuple[float, float]] = field(default_factory=dict)
    optimizer_factor: float = 3.0

    def kept_bytes(self, layer: int) -> int:
        """What stays of a micro-batch where that layer is run a second time in its backward pass [B]."""
        if (given := self.layers[layer].recompute_bytes) is not None:
            return given
        return self.layers[layer - 1].output_bytes if layer else 0

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Costs:
        """The inverse of `to_json`."""
        layers = tuple(
            LayerCost(
                **{
                    **layer,
                    "apis": None if layer["apis"] is None else tuple(layer["apis"]),
                    "times": {device: LayerTime(**time) for device, time in layer["times"].items()},
                }
            )
            for layer in data["layers"]
        )
        return cls(
            layers=layers,
            n_microbatches=data["n_microbatches"],
            overheads={device: StageOverhead(**value) for device, value in data["overheads"].items()},
            transfers={key: (value[0], value[1]) for key, value in data["transfers"].items()},
            optimizer_factor=data["optimizer_factor"],
        )
