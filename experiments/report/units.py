"""Figures as a reader wants them: units, significant digits, a true minus sign, and a dash for what isn't there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MISSING = "–"
_MINUS = "−"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether the value is a finite number (not a bool)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_interval(value: Any) -> TypeGuard[Sequence[float]]:
    """Whether the value is a pair of finite numbers."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(is_number(v) for v in value)


def fixed(value: Any, decimals: int, *, sign: bool = False) -> str:
    """A number with fixed decimals, thousands separated by commas: `1.8730`, `+0.0058`, `−12.0`."""
    if not is_number(value):
        return MISSING
    text = f"{abs(value):,.{decimals}f}"
    negative = value < 0 and any(c in "123456789" for c in text)
    return (_MINUS if negative else "+" if sign else "") + text


def interval(value: Any, decimals: int, *, sign: bool = False) -> str:
    """`[1.8611, 1.8853]`, or a dash."""
    if not is_interval(value):
        return MISSING
    return f"[{fixed(value[0], decimals, sign=sign)}, {fixed(value[1], decimals, sign=sign)}]"


def half_width(value: Any) -> float | None:
    """Half the length of an interval; None where there is none."""
    return abs(value[1] - value[0]) / 2 if is_interval(value) else None


def decimals_for(intervals: Iterable[Any], *, default: int = 4, least: int = 2, most: int = 5) -> int:
    """Decimals that show two significant digits of the narrowest interval, so that a column shares one format."""
    widths = [w for w in map(half_width, intervals) if w]
    if not widths:
        return default
    return max(least, min(most, 1 - math.floor(math.log10(min(widths)))))


def significant(value: Any, digits: int = 3) -> str:
    """A positive quantity with that many significant digits, integers never rounded: `0.0123`, `28.1`, `1,234`."""
    if not is_number(value):
        return MISSING
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")  # first, so that 9.996 becomes 10.0 and not 10.00
    return fixed(value, max(0, digits - 1 - math.floor(math.log10(abs(rounded)))))


def count(value: Any) -> str:
    """A whole number: `103,425`."""
    return fixed(value, 0)


def short_count(value: Any) -> str:
    """A count; from a hundred thousand on with three digits and a decimal prefix: `17.5 M`."""
    if not is_number(value) or abs(value) < 1e5:
        return count(value)
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{significant(value / 10**power)} {prefix}"
    return count(value)


def duration(seconds: Any) -> str:
    """`41.2 ms`, `28.1 s`, `3.42 min`, `5.21 h`, `12.3 d`, `4.10 yr`."""
    if not is_number(seconds):
        return MISSING
    if seconds == 0:
        return "0 s"
    year = 365.25 * 86400
    for unit, name in (
        (year, "yr"),
        (86400.0, "d"),
        (3600.0, "h"),
        (60.0, "min"),
        (1.0, "s"),
        (1e-3, "ms"),
        (1e-6, "µs"),
    ):
        if abs(seconds) >= unit * (2 if unit > 1 else 0.9995):
            return f"{significant(seconds / unit)} {name}"
    return f"{significant(seconds / 1e-9)} ns"


def duration_range(interval: Any) -> str:
    """`30.5 – 35.1 ms`; the unit is said once where both ends have the same."""
    if not is_interval(interval):
        return MISSING
    (low, low_unit), (high, high_unit) = (duration(value).rsplit(" ", 1) for value in interval)
    return f"{low} – {high} {high_unit}" if low_unit == high_unit else f"{low} {low_unit} – {high} {high_unit}"


def size(n_bytes: Any) -> str:
    """`512 B`, `32.0 KiB`, `8.20 GiB`."""
    if not is_number(n_bytes):
        return MISSING
    for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(n_bytes) >= 1024**power:
            return f"{significant(n_bytes / 1024**power)} {name}"
    return f"{count(n_bytes)} B"


def p_value(value: Any) -> str:
    """`0.25`, `0.031`, `<0.001`."""
    if not is_number(value):
        return MISSING
    return "<0.001" if value < 0.001 else fixed(value, 2 if value >= 0.1 else 3)


def dollars(value: Any) -> str:
    """`$0.52`, `$12,300`, `$4.21 M`."""
    if not is_number(value):
        return MISSING
    return f"${short_count(value)}" if abs(value) >= 1e5 else f"${fixed(value, 2 if abs(value) < 100 else 0)}"
