"""Quantities written with their units, as people write them in files: `80 GiB`, `25 GB/s`, `5 us`, `67 TFLOP/s`."""

from __future__ import annotations

import re
from fractions import Fraction

_DECIMAL = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BYTES = {"B": Fraction(1), "KB": Fraction(1000)} | {f"{p}B": Fraction(f) for p, f in _DECIMAL.items()}
_BYTES |= {"KiB": Fraction(2**10), "MiB": Fraction(2**20), "GiB": Fraction(2**30), "TiB": Fraction(2**40)}
_BITS = {f"{p}{bit}": Fraction(f, 8) for p, f in _DECIMAL.items() for bit in ("bit/s", "b/s", "bps")}
_SECONDS = {unit: Fraction(1, f) for unit, f in (("s", 1), ("ms", 10**3), ("us", 10**6), ("µs", 10**6), ("ns", 10**9))}
_FLOPS = {f"{p}{flop}": Fraction(f) for p, f in ({"": 1} | _DECIMAL).items() for flop in ("FLOP/s", "FLOPS")}

UNITS: dict[str, dict[str, Fraction]] = {
    "bytes": _BYTES,
    "bytes/s": {f"{unit}/s": factor for unit, factor in _BYTES.items()} | _BITS,
    "seconds": _SECONDS,
    "FLOP/s": _FLOPS,
    "watts": {"W": Fraction(1), "mW": Fraction(1, 1000), "kW": Fraction(1000)},
    "USD/h": {"USD/h": Fraction(1)},
}
"""Dimension -> unit -> factor to the SI unit (or byte, or USD/h) in which everything here is kept.

Case counts: `Gb/s` is a bit, `GB/s` a byte. Factors are exact, so that `5 us` is the same float as `5e-6`.
"""

EXAMPLES = {
    "bytes": "80 GiB or 80e9",
    "bytes/s": "25 GB/s, 400 Gbit/s or 25e9",
    "seconds": "5 us or 5e-6",
    "FLOP/s": "67 TFLOP/s or 67e12",
    "watts": "700 W or 700",
    "USD/h": "2.5 USD/h or 2.5",
}


def parse(text: str, dimension: str) -> float:
    """The value of a quantity in the unit of its dimension; a bare number is in that unit already.

    Args:
        text: a number that is finite and not negative, perhaps followed by a unit.
        dimension: a key of `UNITS`.

    Raises:
        ValueError: it is none; the message says what was expected.
    """
    match = re.fullmatch(r"\+?((?:[0-9]{1,400}\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)\s*(\S*)", text.strip())
    factor = UNITS[dimension].get(match[2]) if match and match[2] else Fraction(1)
    try:
        if match and factor is not None:
            return float(Fraction(match[1].rstrip(".")) * factor)
    except (ValueError, OverflowError):  # more digits than Python reads as a number; more than a float holds
        pass
    raise ValueError(f"expected {EXAMPLES[dimension]}, not negative")
