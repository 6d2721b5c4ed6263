"""Reading a topology from YAML: hardware described by hand, or by its model's name in the catalogue.

A file has four sections, all optional but one with devices:

    devices: [...]                      on no host in particular
    hosts: [{name, count, devices}]     machines with devices; `count: 8` makes eight, `name:0` to `name:7`
    racks: [{name, count, hosts}]       groups of machines
    links: [...]                        the first that joins two devices counts

A device within hosts and racks is called `rack:3/host:0/gpu:7`; a pattern in a link (`*/gpu:*`) sees these names.
docs/topologies.md explains every key and has examples.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import yaml

from hetero.device import Device
from hetero.device_catalogue import DTYPES, CatalogueError, device_fields
from hetero.errors import DeviceError
from hetero.topology import Link, Topology
from hetero.yaml_nodes import Reader, compose

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from hetero.yaml_nodes import Read

MAX_DEVICES = 1_000_000
KINDS = ("cpu", "gpu", "tpu", "qpu")

_LISTED = 6


def read(path: Path) -> Topology:
    """The topology that a file describes; see `Topology.from_yaml`.

    Raises:
        DeviceError: the file is missing or wrong.
    """
    reader = _TopologyReader(path)
    topology = reader.topology(compose(path))
    if reader.faults:
        raise DeviceError("\n".join(reader.faults), remedy="correct the topology file")
    return topology


class _TopologyReader(Reader):
    """Turns nodes into devices and links."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._entries: list[tuple[yaml.Node, str, list[Device]]] = []
        self._links: list[tuple[yaml.Node, str, Link]] = []

    def topology(self, root: yaml.Node | None) -> Topology:
        sections: dict[str, Read] = {
            "devices": self.list_of(self._entry(self._device)),
            "hosts": self.list_of(self._entry(self._host)),
            "racks": self.list_of(self._entry(self._rack)),
            "links": self.list_of(self._link),
        }
        self.mapping(root, "", sections)
        devices = [device for _, _, found in self._entries for device in found]
        if not devices and not self.faults:
            self.fault(root, "devices", "there are none; expected some in devices, hosts or racks")
        self._check_names()
        if self.faults:
            return Topology(())
        topology = Topology(tuple(_own_cores(devices)), tuple(link for _, _, link in self._links))
        self._check_links(topology)
        self._check_connected(topology, _value(root, "links"))
        return topology

    def _entry(self, read_devices: Read) -> Read:
        def entry(node: yaml.Node, key: str) -> None:
            self._entries.append((node, key, read_devices(node, key)))

        return entry

    def _rack(self, node: yaml.Node, key: str) -> list[Device]:
        return self._group(node, key, "hosts", self._host, _in_rack)

    def _host(self, node: yaml.Node, key: str) -> list[Device]:
        return self._group(node, key, "devices", self._device_of_host, _in_host)

    def _group(
        self, node: yaml.Node, key: str, inner: str, read_inner: Read, inside: Callable[[Device, str], Device]
    ) -> list[Device]:
        """The devices of a host or rack, or of `count` of them."""
        readers = {"name": self.text, "count": self.count, inner: self.list_of(read_inner)}
        values = self.mapping(node, key, readers, needs=("name", inner))
        members = [device for devices in values.get(inner, []) for device in devices]
        places = self._numbered(node, key, values, len(members))
        return [inside(device, place) for place in places for device in members]

    def _numbered(self, node: yaml.Node, key: str, values: dict[str, Any], size: int = 1) -> list[str]:
        """`name`, or `name:0` and so on where there is a count."""
        name, count = values.get("name", ""), values.pop("count", None)
        if count is None:
            return [name]
        if count * size > MAX_DEVICES:
            self.fault(node, f"{key}.count", f"makes {count * size} devices; expected at most {MAX_DEVICES}")
            return []
        return [f"{name}:{k}" for k in range(count)]

    def _device(self, node: yaml.Node, key: str) -> list[Device]:
        return self._devices(node, key, {"host": self.text, "rack": self.text})

    def _device_of_host(self, node: yaml.Node, key: str) -> list[Device]:
        return self._devices(node, key, {})

    def _devices(self, node: yaml.Node, key: str, more: Mapping[str, Read]) -> list[Device]:
        """A device, or `count` of them."""
        readers: dict[str, Read] = {
            **dict.fromkeys(("name", "model", "api", "memory_pool", "description", "driver"), self.text),
            "kind": self.one_of(*KINDS),
            "count": self.count,
            "dtype": self.one_of(*DTYPES),
            "memory_bytes": self.size,
            "flops": self.quantity("FLOP/s", positive=True),
            "bandwidth": self.quantity("bytes/s", positive=True),
            "launch_s": self.quantity("seconds"),
            "price_usd_h": self.quantity("USD/h"),
            **dict.fromkeys(("power_w", "idle_power_w"), self.quantity("watts")),
            "cores": self.list_of(self.whole),
            "provenance": self.texts,
            **more,
        }
        before = len(self.faults)
        values = self.mapping(node, key, readers, needs=("name",))
        names = self._numbered(node, key, values)
        values = self._with_model(node, key, values)
        if len(self.faults) > before:
            return []
        if missing := [name for name in ("kind", "api", "memory_bytes") if name not in values]:
            self.fault(node, f"{key}.{missing[0]}", "missing; give it, or a model that the catalogue has it of")
            return []
        device = Device(**values | {"cores": tuple(values.get("cores", ())), "simulated": True})
        return [dataclasses.replace(device, name=name) for name in names]

    def _with_model(self, node: yaml.Node, key: str, own: dict[str, Any]) -> dict[str, Any]:
        """The catalogue's figures of a model, but for those that the file gives itself."""
        model, dtype = own.pop("model", None), own.pop("dtype", None)
        if model is None:
            if dtype is not None:
                self.fault(_value(node, "dtype"), f"{key}.dtype", "chooses among the peaks of a model; there is none")
            return own
        try:
            figures = device_fields(model, None if "flops" in own else dtype or "fp32")
        except CatalogueError as error:
            self.fault(_value(node, error.key) or node, f"{key}.{error.key}", str(error))
            return own
        given = dict.fromkeys(own.keys() & figures["provenance"].keys(), "topology file")
        return figures | own | {"provenance": figures["provenance"] | given | own.get("provenance", {})}

    def _link(self, node: yaml.Node, key: str) -> None:
        """Note a link between two devices or patterns of devices, which are checked when all devices are known."""
        readers: dict[str, Read] = {
            **dict.fromkeys(("source", "target", "provenance", "shared"), self.text),
            "latency_s": self.quantity("seconds"),
            "bandwidth": self.quantity("bytes/s", positive=True),
            "duplex": self.one_of("full", "half"),
            "within": self.one_of("host", "rack"),
        }
        before = len(self.faults)
        values = self.mapping(node, key, readers, needs=("source", "target", "latency_s", "bandwidth"))
        if len(self.faults) == before:
            self._links.append((node, key, Link(**values)))

    def _check_names(self) -> None:
        seen: set[str] = set()
        for node, key, devices in self._entries:
            names = [device.name for device in devices]
            if twice := next((name for name, count in Counter(names).items() if count > 1 or name in seen), None):
                self.fault(node, key, f"{twice!r} is listed twice; expected a name of its own for each device")
            seen.update(names)

    def _check_links(self, topology: Topology) -> None:
        """Each link has to lead from some device to another."""
        for node, key, link in self._links:
            reached = [device for device in topology.devices if link.place(device) is not None]
            if not reached:
                self.fault(_value(node, "within"), f"{key}.within", f"no device is in a {link.within}")
                continue
            for end, pattern in (("source", link.source), ("target", link.target)):
                if not any(fnmatchcase(device.name, pattern) for device in reached):
                    names = ", ".join(device.name for device in reached[:_LISTED])
                    self.fault(_value(node, end), f"{key}.{end}", f"{pattern!r} matches no device; there are {names}")

    def _check_connected(self, topology: Topology, node: yaml.Node | None) -> None:
        if not self.faults and len(parts := topology.components()) > 1:
            texts = " | ".join(_listed(part) for part in parts[:_LISTED])
            more = f" | {len(parts) - _LISTED} more" if len(parts) > _LISTED else ""
            self.fault(node, "links", f"nothing joins these parts of the topology: {texts}{more}")


def _in_host(device: Device, host: str) -> Device:
    pool = f"{host}/{device.memory_pool}" if device.memory_pool else ""
    return dataclasses.replace(device, name=f"{host}/{device.name}", host=host, memory_pool=pool)


def _in_rack(device: Device, rack: str) -> Device:
    pool = f"{rack}/{device.memory_pool}" if device.memory_pool else ""
    host = f"{rack}/{device.host}"
    return dataclasses.replace(device, name=f"{rack}/{device.name}", host=host, rack=rack, memory_pool=pool)


def _own_cores(devices: Sequence[Device]) -> list[Device]:
    """The devices with core numbers that no two hosts share: plans add up the loads of devices on one core."""
    numbers: dict[tuple[str, int], int] = {}
    if len({device.host for device in devices if device.cores}) < 2:
        return list(devices)
    return [
        dataclasses.replace(
            device, cores=tuple(numbers.setdefault((device.host, core), len(numbers)) for core in device.cores)
        )
        if device.cores
        else device
        for device in devices
    ]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _value(node: yaml.Node | None, key: str) -> yaml.Node | None:
    """The value of a key in a mapping; the node itself where it has none."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for name, value in pairs if name.value == key), node)
