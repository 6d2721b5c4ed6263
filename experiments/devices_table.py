"""The tables of `heteroq devices`: what is here and how fast, why something is missing, and what one may plan for."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import hetero
    from hetero.device_catalogue import Entry, Figure

_HEAD = ("name", "kind", "memory", "GFLOP/s", "GB/s", "launch", "cores", "description")
_CATALOGUE = (
    ("GB", "memory_bytes", 1e9),
    ("GB/s", "bandwidth", 1e9),
    ("fp32 TFLOP/s", "flops.fp32", 1e12),
    ("bf16", "flops.bf16", 1e12),
    ("link GB/s", "link_bandwidth", 1e9),
    ("W", "power_w", 1.0),
    ("USD/h", "price_usd_h", 1.0),
    ("qubits", "n_qubits", 1.0),
)
_MARKS = {"maker": "", "quoted": "~", "other": "!", "unverified": "?"}
_MEANING = {
    "maker": "read in a document of the device's maker",
    "quoted": "read where another reproduces the maker's or the provider's figure",
    "other": "another's figure, of unknown origin",
    "unverified": "from memory, or derived",
}
_SCALES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def devices_table(topology: hetero.Topology) -> str:
    """A line for each device, then a line for each runtime that is absent."""
    lines = _table([_HEAD] + [_row(device) for device in topology.devices])
    lines += ["", *_absences(topology)] if topology.absences else []
    if any(device.flops is None and not device.simulated for device in topology.devices):
        lines += ["", "'-': not measured yet; heteroq devices --measure does it"]
    return "\n".join(lines)


def groups_table(topology: hetero.Topology) -> str:
    """A line for each group of alike devices, and how they are linked."""
    rows = [("devices", "count", "kind", "memory", "GFLOP/s", "GB/s", "W", "USD/h", "description")]
    for group in topology.classes():
        device = group.device
        power, price = (str(value) if value is not None else "-" for value in (device.power_w, device.price_usd_h))
        _, kind, memory, flops, bandwidth, *_, description = _row(device)
        rows.append((group.name, str(len(group.members)), kind, memory, flops, bandwidth, power, price, description))
    links = [
        f"{link.source} - {link.target}{f' within a {link.within}' if link.within else ''}: "
        f"{_seconds(link.latency_s)}, {link.bandwidth / 1e9:.4g} GB/s, {link.duplex} duplex"
        f"{f', shared: {link.shared}' if link.shared else ''}"
        for link in topology.links
    ]
    return "\n".join([*_table(rows), "", *links] if links else _table(rows))


def catalogue_table(entries: Sequence[Entry]) -> str:
    """A line for each model of device, its figures marked by who says so."""
    rows = [tuple(head for head, _, _ in _CATALOGUE)]
    rows = [("model", "kind", "api", *rows[0])]
    for entry in entries:
        figures = (_marked(entry.figures.get(name), scale) for _, name, scale in _CATALOGUE)
        rows.append((entry.model, entry.kind, entry.api, *figures))
    counts = Counter(figure.mark for entry in entries for figure in entry.figures.values())
    legend = [f"{sign or '(none)'} {mark}: {counts[mark]} figures, {_MEANING[mark]}" for mark, sign in _MARKS.items()]
    return "\n".join([*_table(rows), "", *legend, "", "sources of each figure: heteroq devices --catalogue --json"])


def _marked(figure: Figure | None, scale: float) -> str:
    return "-" if figure is None else f"{figure.value / scale:.4g}{_MARKS[figure.mark]}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return lines


def _row(device: hetero.Device) -> tuple[str, ...]:
    return (
        device.name,
        device.kind + (" (simulated)" if device.simulated else ""),
        f"{device.memory_bytes / 2**30:.1f} GiB",
        "-" if device.flops is None else f"{device.flops / 1e9:.1f}",
        "-" if device.bandwidth is None else f"{device.bandwidth / 1e9:.1f}",
        "-" if device.launch_s is None else _seconds(device.launch_s),
        _ranges(device.cores) or "-",
        f"{device.description} ({device.driver})" if device.driver else device.description,
    )


def _absences(topology: hetero.Topology) -> list[str]:
    return [f"{absence.api}: not here: {absence.reason}; {absence.remedy}" for absence in topology.absences]


def _seconds(value: float) -> str:
    scale, unit = next(((s, u) for s, u in _SCALES if value >= s), _SCALES[-1])
    return f"{value / scale:.3g} {unit}"


def _ranges(cores: Sequence[int]) -> str:
    """Core numbers as `0-3,6`."""
    parts: list[list[int]] = []
    for core in sorted(cores):
        if parts and core == parts[-1][1] + 1:
            parts[-1][1] = core
        else:
            parts.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
