"""Which devices there are and what lies between them: found on this machine, or read from a file."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
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
        bandwidth: sustained, in one direction [B/s]; `inf` where nothing has to be copied.
        provenance: where the figures come from.
        duplex: `full`: both directions have the bandwidth at the same time; `half`: they share it.
        shared: name of the medium that the links of this name share; transfers of these take turns. Empty: a wire of
            its own for each pair of devices. Where `within` is set, each host (or rack) has such a medium of its own.
        within: `host`: joins devices of one host alone; `rack`: of one rack alone; empty: wherever they are.
    """

    source: str
    target: str
    latency_s: float
    bandwidth: float
    provenance: str = ""
    duplex: str = "full"
    shared: str = ""
    within: str = ""

    def seconds(self, nbytes: float) -> float:
        """Time to send `nbytes` [B] over it [s]."""
        return self.latency_s + nbytes / self.bandwidth

    def joins(self, source: str, target: str) -> bool:
        """Whether its patterns lead from `source` to `target`, in this direction."""
        return fnmatchcase(source, self.source) and fnmatchcase(target, self.target)

    def place(self, device: Device) -> str | None:
        """The host or rack within which it joins this device to others; None: it doesn't reach the device."""
        if not self.within:
            return ""
        return (device.host if self.within == "host" else device.rack) or None


@dataclass(frozen=True)
class DeviceGroup:
    """Devices of a kind: equal in every figure and joined to the others by the same links.

    Attributes:
        name: what their names have in common, `h100` of `h100:0` to `h100:7`; the name of the first where that isn't
            only theirs.
        members: their names, in the topology's order.
        device: the first of them.
    """

    name: str
    members: tuple[str, ...]
    device: Device


@dataclass(frozen=True)
class Topology:
    """Devices, the links between them, and the runtimes that are not usable here.

    Attributes:
        devices: in the order in which they are listed; names are unique.
        links: the first one that joins two devices counts, whichever of them is its source. Where the list also has one
            with the same ends the other way round, that one is for the way back.
        absences: why a runtime is missing.
    """

    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()
    absences: tuple[Absence, ...] = ()

    def __post_init__(self) -> None:
        if twice := sorted(name for name, count in Counter(self.names).items() if count > 1):
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
        if (device := self._by_name.get(name)) is not None:
            return device
        found = ", ".join(_describe(device) for device in self.devices[:_SHOWN]) or "no device"
        more = f" and {len(self.devices) - _SHOWN} more" if len(self.devices) > _SHOWN else ""
        api = name.split(":")[0]
        absent = "".join(f"; {a.api} is absent: {a.reason} ({a.remedy})" for a in self.absences if a.api == api)
        raise DeviceError(
            f"device {name!r} does not exist", found=found + more + absent, remedy="list them with: heteroq devices"
        )

    def only(self, names: Iterable[str]) -> Topology:
        """The same with these devices alone, in this order.

        Raises:
            DeviceError: one of them does not exist.
        """
        return dataclasses.replace(self, devices=tuple(self.device(name) for name in names))

    def link(self, source: str, target: str) -> Link:
        """The link from one device to another, in constant time however many devices there are.

        Devices of one memory pool need none: what the one writes the other reads in place.

        Raises:
            DeviceError: a device does not exist, or nothing joins them.
        """
        first, second = self.device(source), self.device(target)
        near = self._reaching[bool(first.host) and first.host == second.host][
            bool(first.rack) and first.rack == second.rack
        ]
        (out, back), (there, here) = self._ends(first), self._ends(second)
        if found := (out & here | back & there) & near:
            bit = found & -found  # the lowest: the first of them
            k = bit.bit_length() - 1
            link = self.links[k if out & here & bit else self._way_back[k]]
            if link.shared and link.within:
                return dataclasses.replace(link, shared=f"{link.shared} of {link.place(first)}")
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

    def classes(self) -> tuple[DeviceGroup, ...]:
        """The devices grouped by kind, in the order of their first members.

        Members differ in name, host, rack, in which cores and which memory pool of their host they have, and in
        nothing else. The link between two of them may depend on whether they share a host or a rack.
        """
        groups: dict[tuple[Any, ...], list[Device]] = defaultdict(list)
        for device in self.devices:
            groups[(*_figures(device), *self._ends(device))].append(device)
        names = Counter(_stem(members[0].name) for members in groups.values() if len(members) > 1)
        return tuple(
            DeviceGroup(
                name=stem if len(members) > 1 and names[stem := _stem(members[0].name)] == 1 else members[0].name,
                members=tuple(device.name for device in members),
                device=members[0],
            )
            for members in groups.values()
        )

    def components(self) -> tuple[tuple[str, ...], ...]:
        """Names of the devices that can reach each other, over links or shared memory; one part if all can."""
        parts = _Parts(self.names)
        for bit, link in reversed([*enumerate(self.links)]):  # what is general comes last in the list
            if parts.count == 1:
                break
            ends: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
            for device in self.devices:
                if (place := link.place(device)) is not None:
                    for end, mask in zip(ends[place], self._ends(device), strict=True):
                        if mask >> bit & 1:
                            end.append(device.name)
            for sources, targets in ends.values():
                if sources and targets:  # each source reaches each target, and through them all the others
                    parts.join([*sources, *targets])
        pools: dict[str, list[str]] = defaultdict(list)
        for device in self.devices:
            pools[device.memory_pool or device.name].append(device.name)
        for members in pools.values():
            parts.join(members)
        return parts.all()

    @cached_property
    def _by_name(self) -> dict[str, Device]:
        return {device.name: device for device in self.devices}

    @cached_property
    def _known_ends(self) -> dict[str, tuple[int, int]]:
        return {}

    def _ends(self, device: Device) -> tuple[int, int]:
        """Two sets of links as bits: those whose source is the device, and those whose target it is."""
        if (ends := self._known_ends.get(device.name)) is None:
            sources = sum(1 << k for k, link in enumerate(self.links) if fnmatchcase(device.name, link.source))
            targets = sum(1 << k for k, link in enumerate(self.links) if fnmatchcase(device.name, link.target))
            ends = self._known_ends[device.name] = sources, targets
        return ends

    @cached_property
    def _way_back(self) -> list[int]:
        """For each link the one with its ends the other way round; itself where there is none."""
        first: dict[tuple[str, str, str], int] = {}
        for k, link in enumerate(self.links):
            first.setdefault((link.source, link.target, link.within), k)
        return [first.get((link.target, link.source, link.within), k) for k, link in enumerate(self.links)]

    @cached_property
    def _reaching(self) -> list[list[int]]:
        """[same host][same rack] -> the links that may join two such devices, as bits."""

        def bits(*places: str) -> int:
            return sum(1 << k for k, link in enumerate(self.links) if link.within in places)

        return [[bits(""), bits("", "rack")], [bits("", "host"), bits("", "host", "rack")]]

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

        The file's sections are described in `hetero.topology_file` and, with examples, in docs/topologies.md.

        Raises:
            DeviceError: the file is missing or wrong; each fault is named as `file:line:column: key: text`.
        """
        from hetero.topology_file import read

        return read(Path(path))


class _Parts:
    """Names in disjoint parts, which can be joined (union-find with path halving)."""

    def __init__(self, names: Iterable[str]) -> None:
        self._parent = {name: name for name in names}
        self.count = len(self._parent)

    def _root(self, name: str) -> str:
        parent = self._parent
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    def join(self, names: Iterable[str]) -> None:
        first, *rest = names
        for name in rest:
            if (root := self._root(name)) != self._root(first):
                self._parent[root] = self._root(first)
                self.count -= 1

    def all(self) -> tuple[tuple[str, ...], ...]:
        parts: dict[str, list[str]] = defaultdict(list)
        for name in self._parent:
            parts[self._root(name)].append(name)
        return tuple(map(tuple, parts.values()))


_SHOWN = 16
"""Devices that a message lists."""

_OWN = ("name", "host", "rack", "cores", "memory_pool", "provenance")


def _figures(device: Device) -> tuple[Any, ...]:
    """What devices of a kind have in common."""
    pool = device.memory_pool.removeprefix(f"{device.host}/")
    alike = (getattr(device, field.name) for field in dataclasses.fields(device) if field.name not in _OWN)
    return (*alike, len(device.cores), pool)


def _stem(name: str) -> str:
    """A name without its numbers: `rack/host/gpu` of `rack:3/host:0/gpu:7`."""
    return re.sub(r":\d+(?=/|$)", "", name)


def _describe(device: Device) -> str:
    size = f"{device.memory_bytes / _GIB:.1f} GiB"
    return f"{device.name} ({device.description}, {size})" if device.description else f"{device.name} ({size})"
