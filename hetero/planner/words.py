"""Figures as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def seconds(value: float) -> str:
    """A duration with three significant digits: `1.23 ms`."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{_three(value / factor)} {unit}"
    return f"{_three(value / 1e-9)} ns" if value else "0 s"


def amount(value: float, unit: str) -> str:
    """A plan's value with three significant digits, in its unit: `s`, `J` or `USD`."""
    if unit == "s":
        return seconds(value)
    if unit == "J" and value:
        for factor, prefix in ((1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ")):
            if value >= factor:
                return f"{_three(value / factor)} {prefix}J"
    return f"{value:.3g} {unit}"


def nbytes(value: float) -> str:
    """A size with three significant digits: `1.23 MiB`."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{_three(value / factor)} {unit}"
    return f"{value:.0f} B"


def against(value: float, best: float) -> str:
    """How much slower a value is than the best one; several times as slow as a factor."""
    if not best:
        return "-"
    ratio = value / best
    percent = 100 * (ratio - 1)
    if abs(percent) < 1e-7:
        return "equal"
    return f"{ratio:.2f} x" if ratio >= 2 else f"{percent:+.1f} %" if abs(percent) >= 0.1 else f"{percent:+.1g} %"


def placement(stages: Sequence[tuple[str, int, int]]) -> str:
    """Stages (device, first, last) as `cpu 0-3, aer 4`."""
    return ", ".join(
        f"{device} {first}-{last}" if last > first else f"{device} {first}" for device, first, last in stages
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equally many cells as lines with aligned columns."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
