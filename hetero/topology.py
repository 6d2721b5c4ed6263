"""Which devices there are and what lies between them: found on this machine, or read from a file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero.device import Absence, Device
from hetero.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterable

_GIB = 2**30


@dataclass(frozen=True)
class Link:
    """The way between two devices, used in both directions.

    Attributes:
        source: name of a device, or a pattern like `h100:*` (as in `fnmatch`) for many alike.
        target: likewise.
        latency_s: time of an empty transfer [s].
        bandwidth: sustained [B/s]; `inf` where nothing has to be copied.
        provenance: where the figures come from.
    """

    source: str
    target: str
    latency_s: float
    bandwidth: float
    provenance: str = ""

    def seconds(self, nbytes: float) -> float:
        """Time to send `nbytes` [B] over it [s]."""
        return self.latency_s + nbytes / self.bandwidth

    def joins(self, source: str, target: str) -> bool:
        """Whether it leads from `source` to `target`, in this direction."""
        return fnmatchcase(source, self.source) and fnmatchcase(target, self.target)


@dataclass(frozen=True)
class Topology:
    """Devices, the links between them, and the runtimes that are not usable here.

    Attributes:
        devices: in the order in which they are listed; names are unique.
        links: the first one that joins two devices counts, in the direction asked before the reverse.
        absences: why a runtime is missing.
    """

    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()
    absences: tuple[Absence, ...] = ()

    def __post_init__(self) -> None:
        names = [device.name for device in self.devices]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DeviceError(f"device {twice[0]!r} is listed twice", expected="a name of its own for each device")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the devices."""
        return tuple(device.name for device in self.devices)

    def device(self, name: str) -> Device:
        """The device of that name.

        Raises:
            DeviceError: there is none; the message lists what exists and why a runtime is absent.
        """
        for device in self.devices:
            if device.name == name:
                return device
        found = ", ".join(_describe(device) for device in self.devices) or "no device"
        api = name.split(":")[0]
        absent = "".join(f"; {a.api} is absent: {a.reason} ({a.remedy})" for a in self.absences if a.api == api)
        raise DeviceError(
            f"device {name!r} does not exist", found=found + absent, remedy="list them with: heteroq devices"
        )

    def only(self, names: Iterable[str]) -> Topology:
        """The same with these devices alone, in this order.

        Raises:
            DeviceError: one of them does not exist.
        """
        return dataclasses.replace(self, devices=tuple(self.device(name) for name in names))

    def link(self, source: str, target: str) -> Link:
        """The link from one device to another.

        Devices of one memory pool need none: what the one writes the other reads in place.

        Raises:
            DeviceError: a device does not exist, or nothing joins them.
        """
        first, second = self.device(source), self.device(target)
        for link in self.links:
            if link.joins(source, target):
                return link
        for link in self.links:
            if link.joins(target, source):
                return link
        if source == target or (first.memory_pool and first.memory_pool == second.memory_pool):
            return Link(source, target, 0.0, float("inf"), provenance="same memory")
        raise DeviceError(
            f"no link between {source!r} and {target!r}",
            found=", ".join(f"{link.source} - {link.target}" for link in self.links) or "no links",
            remedy="add one to the topology's links, with latency_s and bandwidth",
        )

    def transfer_s(self, source: str, target: str, nbytes: float) -> float:
        """Time to hand `nbytes` [B] from one device to another [s]; 0 on the same device.

        Raises:
            DeviceError: as `link`.
        """
        return 0.0 if source == target else self.link(source, target).seconds(nbytes)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; an infinite bandwidth is null."""
        links = [dataclasses.asdict(link) for link in self.links]
        for link in links:
            link["bandwidth"] = None if link["bandwidth"] == float("inf") else link["bandwidth"]
        return {
            "devices": [device.to_json() for device in self.devices],
            "links": links,
            "absences": [dataclasses.asdict(absence) for absence in self.absences],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Topology:
        """The inverse of `to_json`."""
        links = (
            Link(**{**link, "bandwidth": float("inf") if link["bandwidth"] is None else link["bandwidth"]})
            for link in data["links"]
        )
        return cls(
            devices=tuple(Device.from_json(device) for device in data["devices"]),
            links=tuple(links),
            absences=tuple(Absence(**absence) for absence in data["absences"]),
        )

    @classmethod
    def from_yaml(cls, path: str | Path) -> Topology:
        """A topology from a file, for hardware that one doesn't have; its devices are simulated.

        The file has a list `devices` (the fields of `Device`; sizes may be written `80 GiB`; `count: 8` makes eight
        of a kind, `name:0` to `name:7`) and a list `links` (the fields of `Link`).

        Raises:
            DeviceError: the file is missing or wrong; each fault is named as `file:line:column: key: text`.
        """
        from hetero.topology_file import read

        return read(Path(path))


def _describe(device: Device) -> str:
    size = f"{device.memory_bytes / _GIB:.1f} GiB"
    return f"{device.name} ({device.description}, {size})" if device.description else f"{device.name} ({size})"
