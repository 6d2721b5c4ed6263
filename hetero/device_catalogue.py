"""The devices of catalogue.yaml: figures by model, each with its source or marked unverified.

    for entry in hetero.catalogue():
        print(entry.model, {name: (figure.value, figure.mark) for name, figure in entry.figures.items()})

A topology file takes them with `model: "NVIDIA H100 SXM5 80GB"`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero.errors import DeviceError
from hetero.yaml_nodes import Reader, compose, did_you_mean

if TYPE_CHECKING:
    import yaml

    from hetero.yaml_nodes import Read

DTYPES = ("fp32", "tf32", "bf16", "fp16", "int8")
FILE = Path(__file__).with_name("catalogue.yaml")

MAKER, QUOTED, OTHER, UNVERIFIED = "maker", "quoted", "other", "unverified"


@dataclass(frozen=True)
class Source:
    """A document that a figure was read in.

    Attributes:
        title: what it is, and whose.
        url: where it is.
        by: `maker`: the device's maker wrote it; `quoted`: another reproduces what the maker or provider wrote;
            `other`: another's own figures.
        checked: the day on which it was read.
    """

    title: str
    url: str
    by: str
    checked: str


@dataclass(frozen=True)
class Figure:
    """One figure of a device.

    Attributes:
        value: in SI units, bytes, or USD/h.
        source: where it was read; None: unverified.
        note: what it covers, or how it was derived.
    """

    value: float
    source: Source | None = None
    note: str = ""

    @property
    def mark(self) -> str:
        """`maker`, `quoted`, `other` or `unverified`."""
        return self.source.by if self.source else UNVERIFIED

    @property
    def provenance(self) -> str:
        """In words, for `Device.provenance`."""
        where = f"{self.source.title}, {self.source.url}, read {self.source.checked}" if self.source else UNVERIFIED
        return f"{where} ({self.note})" if self.note else where


@dataclass(frozen=True)
class Entry:
    """A model of device.

    Attributes:
        model: its name.
        kind: as in `Device`.
        api: the runtime that executes there, as in `Device`.
        figures: `memory_bytes` [B], `bandwidth` of its memory [B/s], `flops.<dtype>` of a dense matrix product
            [FLOP/s], `link_bandwidth` of its links to devices of its kind together, in one direction [B/s], `power_w`
            and `idle_power_w` [W], `price_usd_h` [USD/h], `n_qubits`; what is unknown is missing.
    """

    model: str
    kind: str
    api: str
    figures: dict[str, Figure]

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The data types whose peak is known."""
        return tuple(dtype for dtype in DTYPES if f"flops.{dtype}" in self.figures)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; each figure with its mark."""
        figures = {name: dataclasses.asdict(figure) | {"mark": figure.mark} for name, figure in self.figures.items()}
        return {"model": self.model, "kind": self.kind, "api": self.api, "figures": figures}


class CatalogueError(DeviceError):
    """A model, or a peak of one, that the catalogue doesn't have.

    Attributes:
        key: the setting that asked for it: `model` or `dtype`.
    """

    def __init__(self, key: str, message: str) -> None:
        self.key = key
        super().__init__(message)


def catalogue() -> tuple[Entry, ...]:
    """All devices, in the file's order."""
    return tuple(_entries().values())


def device_fields(model: str, dtype: str | None) -> dict[str, Any]:
    """What the catalogue knows of a model, as arguments for `Device`.

    Args:
        model: as in the catalogue; case doesn't count.
        dtype: whose peak becomes `flops`; None: none.

    Raises:
        CatalogueError: there is no such model, or no such peak of it.
    """
    entries = {name.lower(): entry for name, entry in _entries().items()}
    if (entry := entries.get(model.lower())) is None:
        raise CatalogueError("model", f"{model!r} is not in the catalogue; {did_you_mean(model, _entries())}")
    names = [name for name in _FIELDS if name in entry.figures]
    figures = {name: entry.figures[name] for name in names}
    provenance = {name: figure.provenance for name, figure in figures.items()}
    fields: dict[str, Any] = {name: figure.value for name, figure in figures.items()}
    if "memory_bytes" in fields:
        fields["memory_bytes"] = round(fields["memory_bytes"])
    if dtype is not None and entry.dtypes:
        if dtype not in entry.dtypes:
            known = f"{dtype} peak of {entry.model!r} is not in the catalogue; it has {', '.join(entry.dtypes)}"
            raise CatalogueError("dtype", f"{known}; choose one with dtype, or give flops")
        peak = entry.figures[f"flops.{dtype}"]
        fields["flops"], provenance["flops"] = peak.value, f"{dtype} peak: {peak.provenance}"
    return {"kind": entry.kind, "api": entry.api, "description": entry.model, **fields, "provenance": provenance}


_FIELDS = ("memory_bytes", "bandwidth", "power_w", "idle_power_w", "price_usd_h")
_DIMENSIONS = {
    "memory_bytes": "bytes",
    "bandwidth": "bytes/s",
    "link_bandwidth": "bytes/s",
    "power_w": "watts",
    "idle_power_w": "watts",
    "price_usd_h": "USD/h",
}


@cache
def _entries() -> dict[str, Entry]:
    return read(FILE)


def read(path: Path) -> dict[str, Entry]:
    """Model -> entry, of a file written like catalogue.yaml.

    Raises:
        DeviceError: the file is wrong; each fault is named as `file:line:column: key: text`.
    """
    reader = _CatalogueReader(path)
    entries = reader.entries(compose(path))
    if reader.faults:
        raise DeviceError("\n".join(reader.faults), remedy="correct the catalogue")
    return entries


class _CatalogueReader(Reader):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._sources: dict[str, Source] = {}

    def entries(self, root: yaml.Node | None) -> dict[str, Entry]:
        readers: dict[str, Read] = {"sources": self._read_sources, "devices": self.list_of(self._entry)}
        devices: list[Entry] = self.mapping(root, "", readers, needs=readers).get("devices", [])
        entries = {entry.model: entry for entry in devices}
        if len(entries) < len(devices):
            self.fault(root, "devices", "a model is listed twice")
        return entries

    def _read_sources(self, node: yaml.Node, key: str) -> None:
        source = {
            **dict.fromkeys(("title", "url", "checked"), self.text),
            "by": self.one_of(MAKER, QUOTED, OTHER),
        }
        names = [str(name.value) for name, _ in node.value]
        each = {name: lambda n, k: self.mapping(n, k, source, needs=source) for name in names}
        found = self.mapping(node, key, each)
        self._sources = {name: Source(**given) for name, given in found.items() if given.keys() >= source.keys()}

    def _entry(self, node: yaml.Node, key: str) -> Entry | None:
        figures: dict[str, Read] = {name: self._figure(self.quantity(unit)) for name, unit in _DIMENSIONS.items()}
        peaks = {dtype: self._figure(self.quantity("FLOP/s")) for dtype in DTYPES}
        readers: dict[str, Read] = {
            **dict.fromkeys(("model", "kind", "api"), self.text),
            **figures,
            "flops": lambda node, key: self.mapping(node, key, peaks),
            "n_qubits": self._figure(self.whole),
        }
        before = len(self.faults)
        values = self.mapping(node, key, readers, needs=("model", "kind", "api"))
        if len(self.faults) > before:
            return None
        found = {f"flops.{dtype}": peak for dtype, peak in values.pop("flops", {}).items()}
        found |= {name: values[name] for name in (*_DIMENSIONS, "n_qubits") if name in values}
        return Entry(values["model"], values["kind"], values["api"], found)

    def _figure(self, value: Read) -> Read:
        def figure(node: yaml.Node, key: str) -> Figure:
            readers: dict[str, Read] = {"value": value, "source": self._source, "note": self.text}
            given = self.mapping(node, key, readers, needs=("value", "source"))
            return Figure(float(given.get("value", 0)), given.get("source"), given.get("note", ""))

        return figure

    def _source(self, node: yaml.Node, key: str) -> Source | None:
        name = self.text(node, key)
        if name in self._sources or name == UNVERIFIED:
            return self._sources.get(name)
        self.fault(node, key, f"{name!r} is not among the sources; {did_you_mean(name, self._sources)}")
        return None
