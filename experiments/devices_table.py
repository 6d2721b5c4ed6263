"""The table of `heteroq devices`: what is here, how fast it is, and why something is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import hetero

_HEAD = ("name", "kind", "memory", "GFLOP/s", "GB/s", "launch", "cores", "description")
_SCALES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def devices_table(topology: hetero.Topology) -> str:
    """A line for each device, then a line for each runtime that is absent."""
    body = [_HEAD] + [_row(device) for device in topology.devices]
    widths = [max(len(row[i]) for row in body) for i in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body]
    lines.insert(1, "-" * len(lines[0]))
    lines += ["", *_absences(topology)] if topology.absences else []
    if any(device.flops is None and not device.simulated for device in topology.devices):
        lines += ["", "'-': not measured yet; heteroq devices --measure does it"]
    return "\n".join(lines)


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
