"""Reading a topology from YAML, with every fault named by file, line and column."""

from __future__ import annotations

import dataclasses
import math
import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import yaml

from hetero.device import Device
from hetero.errors import DeviceError
from hetero.topology import Link, Topology

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_KINDS = ("cpu", "gpu", "tpu", "qpu")


def read(path: Path) -> Topology:
    """The topology that a file describes; see `Topology.from_yaml`.

    Raises:
        DeviceError: the file is missing or wrong.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise DeviceError(f"can't read the topology {path}", found=error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise DeviceError(f"can't read the topology {path}", found=str(error), expected="UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # a character that YAML forbids has none
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise DeviceError(f"{where}: {problem}", expected="a YAML file") from None
    reader = _Reader(path)
    topology = reader.topology(root)
    if reader.faults:
        raise DeviceError("\n".join(reader.faults), remedy="correct the topology file")
    return topology


class _Reader:
    """Turns nodes into values and collects faults."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.faults: list[str] = []
        self.links: list[tuple[yaml.Node, str, Link]] = []

    def fault(self, node: yaml.Node | None, key: str, text: str) -> None:
        line, column = (node.start_mark.line + 1, node.start_mark.column + 1) if node else (1, 1)
        self.faults.append(f"{self.path}:{line}:{column}: {key}: {text}")

    def topology(self, root: yaml.Node | None) -> Topology:
        sections = self.mapping(root, "topology", {"devices": self._list(self.devices), "links": self._list(self.link)})
        devices = [device for group in sections.get("devices", []) if group for device in group]
        if not devices and not self.faults:
            self.fault(root, "devices", "there are none; expected a list")
        if twice := sorted({d.name for d in devices if [e.name for e in devices].count(d.name) > 1}):
            self.fault(root, "devices", f"{twice[0]!r} is listed twice")
            return Topology(())
        if not self.faults:
            self._check_links([device.name for device in devices])
        return Topology(tuple(devices), tuple(link for _, _, link in self.links))

    def _check_links(self, names: list[str]) -> None:
        for node, key, link in self.links:
            for end, pattern in (("source", link.source), ("target", link.target)):
                if not any(fnmatchcase(name, pattern) for name in names):
                    self.fault(node, f"{key}.{end}", f"{pattern!r} matches no device; there are {', '.join(names[:8])}")

    def mapping(
        self, node: yaml.Node | None, key: str, readers: dict[str, Callable[[yaml.Node, str], Any]]
    ) -> dict[str, Any]:
        """The values of a mapping whose keys are known."""
        if not isinstance(node, yaml.MappingNode):
            self.fault(node, key, f"expected {', '.join(readers)}")
            return {}
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = str(name_node.value)
            inner = f"{key}.{name}" if key != "topology" else name
            if name not in readers:
                self.fault(name_node, inner, f"unknown key; there are {', '.join(readers)}")
            elif name in values:
                self.fault(name_node, inner, "given twice")
            else:
                values[name] = readers[name](value_node, inner)
        return values

    def _list(self, item: Callable[[yaml.Node, str], Any]) -> Callable[[yaml.Node, str], list[Any]]:
        def values(node: yaml.Node, key: str) -> list[Any]:
            if not isinstance(node, yaml.SequenceNode):
                self.fault(node, key, "expected a list")
                return []
            return [item(child, f"{key}[{k}]") for k, child in enumerate(node.value)]

        return values

    def devices(self, node: yaml.Node, key: str) -> list[Device]:
        """A device, or `count` of them."""
        texts, numbers = ("name", "api", "memory_pool", "description", "driver"), ("launch_s", "price_usd_h", "power_w")
        readers: dict[str, Callable[[yaml.Node, str], Any]] = {
            **dict.fromkeys(texts, self.text),
            **dict.fromkeys(numbers, self.number),
            **dict.fromkeys(("flops", "bandwidth"), self.positive),
            "kind": self.kind,
            "count": self.whole,
            "memory_bytes": self.size,
            "cores": self._list(self.whole),
            "provenance": self.texts,
        }
        before = len(self.faults)
        values = self.mapping(node, key, readers)
        for name in ("name", "kind", "api", "memory_bytes"):
            if name not in values and len(self.faults) == before:
                self.fault(node, f"{key}.{name}", "missing")
        if len(self.faults) > before:
            return []
        count = values.pop("count", None)
        device = Device(**values | {"cores": tuple(values.get("cores", ())), "simulated": True})
        if count is None:
            return [device]
        return [dataclasses.replace(device, name=f"{device.name}:{k}") for k in range(count)]

    def link(self, node: yaml.Node, key: str) -> None:
        """Note a link between two devices or patterns of devices, which are checked when all devices are known."""
        readers: dict[str, Callable[[yaml.Node, str], Any]] = {
            "source": self.text, "target": self.text, "latency_s": self.number, "bandwidth": self.positive,
            "provenance": self.text,
        }  # fmt: skip
        before = len(self.faults)
        values = self.mapping(node, key, readers)
        for name in ("source", "target", "latency_s", "bandwidth"):
            if name not in values and len(self.faults) == before:
                self.fault(node, f"{key}.{name}", "missing")
        if len(self.faults) == before:
            self.links.append((node, key, Link(**values)))

    def text(self, node: yaml.Node, key: str) -> str:
        if isinstance(node, yaml.ScalarNode) and node.value:
            return str(node.value)
        self.fault(node, key, "expected a text")
        return ""

    def texts(self, node: yaml.Node, key: str) -> dict[str, str]:
        if isinstance(node, yaml.MappingNode):
            return {str(name.value): self.text(value, f"{key}.{name.value}") for name, value in node.value}
        self.fault(node, key, "expected field: source")
        return {}

    def kind(self, node: yaml.Node, key: str) -> str:
        value = self.text(node, key)
        if value and value not in _KINDS:
            self.fault(node, key, f"{value!r}; expected {' or '.join(_KINDS)}")
        return value

    def number(self, node: yaml.Node, key: str) -> float:
        """Not negative; `1e9`, which YAML 1.1 takes for a text, is a number here."""
        try:
            value = float(node.value) if isinstance(node, yaml.ScalarNode) else math.nan
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            self.fault(node, key, f"{_shown(node)}; expected a number, not negative")
        return value

    def positive(self, node: yaml.Node, key: str) -> float:
        before = len(self.faults)
        value = self.number(node, key)
        if value == 0 and len(self.faults) == before:
            self.fault(node, key, "0; expected more")
        return value

    def whole(self, node: yaml.Node, key: str) -> int:
        if isinstance(node, yaml.ScalarNode) and re.fullmatch(r"\d+", str(node.value)):
            return int(node.value)
        self.fault(node, key, f"{_shown(node)}; expected a whole number")
        return 0

    def size(self, node: yaml.Node, key: str) -> int:
        """Bytes: `85899345920`, `8e10` or `80 GiB`."""
        match = re.fullmatch(r"([\d.]+(?:[eE]\+?\d+)?)\s*([A-Za-z]*)", str(node.value))
        unit = _UNITS.get(match[2].upper()) if match else None
        try:
            return round(float(match[1]) * unit) if match and unit else self._no_size(node, key)
        except (ValueError, OverflowError):
            return self._no_size(node, key)

    def _no_size(self, node: yaml.Node, key: str) -> int:
        self.fault(node, key, f"{_shown(node)}; expected bytes, such as 80 GiB")
        return 0


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
