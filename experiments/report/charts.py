"""Small charts as inline SVG: scales, axes, marks. Colours come from the page's style sheet through classes.

An arm is drawn in the colour of its class `a0`, `a1`, ..., with a marker and a dash pattern of its own, so that no
figure needs colour to be read. A device is drawn in the colour of `d0`, `d1`, ...
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.report.markup import Markup, el, join, pixels

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

N_COLOURS = 8
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "1 2", "5 2 1 2", "3 3")
_KNOWN_ARMS = ("baseline", "hybrid", "twin", "frozen", "identity")
_KNOWN_APIS = ("cpu", "opencl", "aer", "cuda")


@dataclass(frozen=True)
class Style:
    """How an arm looks: index of its colour, marker and dash pattern."""

    index: int

    @property
    def css(self) -> str:
        """Class that sets the colour."""
        return f"a{self.index}"

    @property
    def dash(self) -> str | None:
        """`stroke-dasharray` of its mean line."""
        return DASHES[self.index] or None


def arm_styles(names: Sequence[str]) -> dict[str, Style]:
    """A style for each arm: the known arms always have the same, the others take what is left."""
    free = iter(range(len(_KNOWN_ARMS), len(_KNOWN_ARMS) + len(names)))
    return {name: Style((_KNOWN_ARMS.index(name) if name in _KNOWN_ARMS else next(free)) % N_COLOURS) for name in names}


def device_class(name: str) -> str:
    """Class of a device's colour, by its api: `opencl:0.1` -> `d1`."""
    api = name.split(":")[0].strip().lower()
    return f"d{_KNOWN_APIS.index(api) if api in _KNOWN_APIS else len(_KNOWN_APIS)}"


@dataclass(frozen=True)
class Scale:
    """Maps values linearly, or by their logarithm, to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self._inner(self.low), self._inner(self.high)
        share = (self._inner(value) - low) / (high - low) if high != low else 0.5
        return self.start + share * (self.end - self.start)

    def _inner(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self.log else value

    def ticks(self, about: int) -> list[float]:
        """Round values inside the scale, about so many."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**d for d in decades for m in (1, 2, 5) if self.low <= m * 10.0**d <= self.high]
            return found if len(found) <= 2 * about else [v for v in found if f"{v:e}".startswith("1.")]
        step = _round_step((self.high - self.low) / max(1, about))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def _round_step(raw: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not much below `raw`."""
    if raw <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= 0.75 * raw)


def span(values: Iterable[float], *, pad: float = 0.06, zero: bool = False) -> tuple[float, float]:
    """Lowest and highest value with some room; never empty.

    Args:
        values: finite numbers.
        pad: room on both sides as a share of the span.
        zero: begin at zero.
    """
    found = list(values) or [0.0, 1.0]
    low, high = (0.0 if zero else min(found)), max(found)
    room = (high - low) * pad or abs(high) * 0.05 or 1.0
    return (low if zero else low - room), high + room


def scale(values: Iterable[float], start: float, end: float, *, zero: bool = False, allow_log: bool = False) -> Scale:
    """A scale that holds all values; logarithmic if that is allowed and they span more than a factor of 20."""
    found = list(values)
    if allow_log and found and min(found) > 0 and max(found) > 20 * min(found):
        return Scale(min(found) / 1.5, max(found) * 1.5, start, end, log=True)
    return Scale(*span(found, zero=zero), start, end)


def tick_labels(values: Sequence[float]) -> list[str]:
    """One format for all: just enough decimals to tell neighbours apart, large numbers with commas."""
    steps = [abs(b - a) for a, b in itertools.pairwise(values) if b != a]
    step = min(steps, default=abs(values[0]) if values and values[0] else 1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step * 10**decimals, 6) % 1:  # steps of 2.5 need one decimal more
        decimals += 1
    return [f"{v:,.{decimals}f}".replace("-", "−") for v in values]


def svg(width: float, height: float, *parts: object, label: str, class_: str = "chart", **attributes: object) -> Markup:
    """A drawing that scales with its container; `label` is what a screen reader says."""
    return el(
        "svg",
        *parts,
        class_=class_,
        viewBox=f"0 0 {pixels(width)} {pixels(height)}",
        role="img",
        aria_label=label,
        **attributes,
    )


def text(
    x: float, y: float, content: object, *, anchor: str = "start", class_: str = "t", **attributes: object
) -> Markup:
    """A line of text; y is its base line."""
    return el("text", content, x=float(x), y=float(y), class_=class_, text_anchor=_not_start(anchor), **attributes)


def _not_start(anchor: str) -> str | None:
    return None if anchor == "start" else anchor


def line(x1: float, y1: float, x2: float, y2: float, class_: str, **attributes: object) -> Markup:
    """A straight line."""
    return el("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_, **attributes)


def rect(
    x: float, y: float, width: float, height: float, class_: str, *, tip: str = "", **attributes: object
) -> Markup:
    """A rectangle, with a tool tip."""
    shape = {"x": float(x), "y": float(y), "width": float(max(0.0, width)), "height": float(height)}
    return el("rect", el("title", tip) if tip else None, **shape, class_=class_, **attributes)


def path(xs: Sequence[float], ys: Sequence[float], class_: str, **attributes: object) -> Markup:
    """A line through points."""
    return el("path", d=path_data(xs, ys), class_=class_, **attributes) if xs else Markup()


def path_data(xs: Sequence[float], ys: Sequence[float]) -> str:
    """The `d` of a line through points; a single point becomes a dot."""
    points = " ".join(f"{pixels(x)} {pixels(y)}" for x, y in zip(xs, ys, strict=True))
    return f"M{points}" + ("h0" if len(xs) == 1 else "")


def x_axis(x: Scale, bottom: float, top: float, *, title: str, about: int = 5) -> Markup:
    """Vertical grid lines with labels below and a title at the right end."""
    ticks = x.ticks(about)
    marks = [
        line(x(v), top, x(v), bottom, "grid") + text(x(v), bottom + 16, label, anchor="middle", class_="t m")
        for v, label in zip(ticks, _labels(x, ticks), strict=True)
    ]
    return join([*map(Markup, marks), text(x.end, bottom + 33, title, anchor="end", class_="t m")])


def y_axis(y: Scale, left: float, right: float, *, title: str, about: int = 5) -> Markup:
    """Horizontal grid lines with labels at the left and a title above."""
    ticks = y.ticks(about)
    marks = [
        line(left, y(v), right, y(v), "grid") + text(left - 7, y(v) + 4, label, anchor="end", class_="t m")
        for v, label in zip(ticks, _labels(y, ticks), strict=True)
    ]
    return join([*map(Markup, marks), text(0, y.end - 12, title, class_="t m")])


def _labels(axis: Scale, ticks: Sequence[float]) -> list[str]:
    return [f"{v:,g}" for v in ticks] if axis.log else tick_labels(ticks)


def marker(x: float, y: float, style: Style, *, size: float = 5.0, class_: str = "mark", tip: str = "") -> Markup:
    """The marker of an arm, in its colour if it stands inside a group of its class."""
    s = size
    shapes = (
        [(0.87 * s * math.cos(a * math.pi / 8), 0.87 * s * math.sin(a * math.pi / 8)) for a in range(16)],
        [(-0.85 * s, -0.85 * s), (0.85 * s, -0.85 * s), (0.85 * s, 0.85 * s), (-0.85 * s, 0.85 * s)],
        [(0, -1.1 * s), (s, 0.75 * s), (-s, 0.75 * s)],
        [(0, -1.2 * s), (1.2 * s, 0), (0, 1.2 * s), (-1.2 * s, 0)],
        [(0, 1.1 * s), (s, -0.75 * s), (-s, -0.75 * s)],
        [(-s, -0.35 * s), (s, -0.35 * s), (s, 0.35 * s), (-s, 0.35 * s)],
        [(-0.35 * s, -s), (0.35 * s, -s), (0.35 * s, s), (-0.35 * s, s)],
        [(1.15 * s * math.sin(a * math.pi * 0.4), -1.15 * s * math.cos(a * math.pi * 0.4)) for a in range(5)],
    )
    title = el("title", tip) if tip else None
    if style.index == 0:
        return el("circle", title, cx=float(x), cy=float(y), r=0.95 * s, class_=class_)
    points = " ".join(f"{pixels(x + dx)} {pixels(y + dy)}" for dx, dy in shapes[style.index])
    return el("path", title, d=f"M{points}Z", class_=class_)


def whisker(x1: float, x2: float, y: float, *, tip: str = "", cap: float = 4.0) -> Markup:
    """A horizontal interval with end caps."""
    d = f"M{pixels(x1)} {pixels(y)}H{pixels(x2)}M{pixels(x1)} {pixels(y - cap)}v{pixels(2 * cap)}"
    d += f"M{pixels(x2)} {pixels(y - cap)}v{pixels(2 * cap)}"
    return el("path", el("title", tip) if tip else None, d=d, class_="whisker")


def upright_whisker(x: float, y1: float, y2: float, *, tip: str = "", cap: float = 4.0) -> Markup:
    """A vertical interval with end caps."""
    d = f"M{pixels(x)} {pixels(y1)}V{pixels(y2)}M{pixels(x - cap)} {pixels(y1)}h{pixels(2 * cap)}"
    d += f"M{pixels(x - cap)} {pixels(y2)}h{pixels(2 * cap)}"
    return el("path", el("title", tip) if tip else None, d=d, class_="whisker")


def spread(wanted: Sequence[float], *, least: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, in their order and at least `least` apart, inside [low, high] if they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], placed[-1] + least if placed else low))
    limit = high
    for j in range(len(placed) - 1, -1, -1):
        placed[j] = min(placed[j], limit)
        limit = placed[j] - least
    result = [0.0] * len(wanted)
    for i, position in zip(order, placed, strict=True):
        result[i] = position
    return result
