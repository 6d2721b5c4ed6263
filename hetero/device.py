"""What a device is: the one description that discovery, topology files, profiles and plans share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

RECOMPUTING_APIS = ("cpu", "cuda")
"""Runtimes that can drop what a layer saved and run it again in its backward pass: torch's own, op by op."""


@dataclass(frozen=True)
class Device:
    """One place where layers can run.

    Attributes:
        name: `cpu`, `cuda:0`, `opencl:0` (first device of the first platform, flattened), `opencl:0.1` (its second
            sub-device), `aer`.
        kind: `cpu`, `gpu`, `tpu` or `qpu`.
        api: the runtime that executes there: a name of the entry-point group `hetero.backends`.
        memory_bytes: memory that a plan may fill [B].
        flops: peak of a float32 matrix product [FLOP/s]; None: not measured and not given.
        bandwidth: peak of a copy in the device's memory [B/s]; None as above.
        launch_s: time from a call to the end of an empty kernel [s]; None as above.
        cores: host cores that the device computes on. Loads of devices that share a core add up.
        memory_pool: devices of one pool share its limit.
        price_usd_h: price [USD/h]; None: unknown.
        power_w: power at full load [W]; None: unknown.
        idle_power_w: power while it waits [W]; None: unknown.
        host: the machine that it is in; empty: not said.
        rack: what holds that machine, one tier of network further out; empty: not said.
        simulated: known from a file only; nothing can run there.
        description: the name that the driver or data sheet gives it.
        driver: runtime and version; with `description` the key of cached measurements.
        provenance: field name -> where its figure comes from.
    """

    name: str
    kind: str
    api: str
    memory_bytes: int
    flops: float | None = None
    bandwidth: float | None = None
    launch_s: float | None = None
    cores: tuple[int, ...] = ()
    memory_pool: str = ""
    price_usd_h: float | None = None
    power_w: float | None = None
    idle_power_w: float | None = None
    host: str = ""
    rack: str = ""
    simulated: bool = False
    description: str = ""
    driver: str = ""
    provenance: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"cores": list(self.cores), "provenance": dict(self.provenance)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Device:
        """The inverse of `to_json`."""
        return cls(**{**data, "cores": tuple(data.get("cores", ()))})

    def shares_core(self, other: Device) -> bool:
        """Whether both compute on one core of the host."""
        return not set(self.cores).isdisjoint(other.cores)

    def overlaps(self, other: Device) -> bool:
        """Whether both names denote the same hardware: a device and its own sub-device."""
        return self.name != other.name and (
            self.name.startswith(other.name + ".") or other.name.startswith(self.name + ".")
        )


@dataclass(frozen=True)
class Absence:
    """A runtime that is not usable here."""

    api: str
    reason: str
    remedy: str
