"""Figures about placement: layers on devices, schedules of a step, predicted against measured step times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.report import charts, units
from experiments.report.charts import Scale, device_class
from experiments.report.figures_accuracy import shorten
from experiments.report.markup import Markup, el, join
from experiments.report.reading import ArmRun, rows, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from experiments.report.schedules import Block

_LANE = 58
_BOX = 42


@dataclass(frozen=True)
class _Box:
    """A stage in the picture: its device, layers, the text of its tool tip and the first layer's position."""

    device: str
    layers: tuple[str, ...]
    tip: str
    first: int


def _boxes(arm: ArmRun) -> list[_Box]:
    boxes, first = [], 0
    for stage in arm.stages:
        layers = tuple(str(name) for name in stage.get("layers") or ())
        if not layers:
            continue
        device = str(stage.get("device", "?"))
        boxes.append(_Box(device, layers, _stage_tip(device, layers, stage), first))
        first += len(layers)
    return boxes


def _stage_tip(device: str, layers: Sequence[str], stage: Mapping[str, Any]) -> str:
    times = [
        f"{name} {units.duration(stage[key])}"
        for name, key in (("forward", "forward_s"), ("backward", "backward_s"))
        if units.is_number(stage.get(key))
    ]
    cost = f" ({', '.join(times)} a micro-batch, predicted)" if times else ""
    return f"{device}: {', '.join(layers)}{cost}"


def devices_of(arm: ArmRun) -> list[str]:
    """Devices of the plan in the order of their first stage."""
    return list(dict.fromkeys(box.device for box in _boxes(arm)))


def placement(arm: ArmRun, *, wide: bool) -> Markup | None:
    """Layers as boxes in their order on the lanes of the devices, with arrows where activations change device."""
    boxes = _boxes(arm)
    if not boxes:
        return None
    return _placement_wide(arm.name, boxes) if wide else _placement_narrow(arm.name, boxes)


def _placement_wide(name: str, boxes: Sequence[_Box]) -> Markup:
    width, left, gap, top = 920.0, 104.0, 30.0, 6.0
    devices = list(dict.fromkeys(box.device for box in boxes))
    n_layers = sum(len(box.layers) for box in boxes)
    cell = min(130.0, (width - left - gap * (len(boxes) - 1) - 4) / n_layers)
    parts: list[object] = []
    for i, device in enumerate(devices):
        y = top + _LANE * i
        parts.append(charts.rect(0, y, width, _LANE - 6, "lane"))
        parts.append(charts.text(12, y + 30, shorten(device, 13), class_="t b"))
    previous: tuple[float, float] | None = None
    for i, box in enumerate(boxes):
        x = left + cell * box.first + gap * i
        y = top + _LANE * devices.index(box.device) + (_LANE - 6 - _BOX) / 2
        if previous:
            parts.append(_hand_over(*previous, x, y + _BOX / 2))
        parts.append(_stage_wide(box, x, y, cell))
        previous = (x + cell * len(box.layers), y + _BOX / 2)
    label = f"placement of {name}: " + "; then ".join(f"{', '.join(b.layers)} on {b.device}" for b in boxes)
    return charts.svg(width, top + _LANE * len(devices), *parts, label=label, class_="chart wide")


def _stage_wide(box: _Box, x: float, y: float, cell: float) -> Markup:
    parts = [charts.rect(x, y, cell * len(box.layers), _BOX, "stage", rx=6)]
    if cell < 50:
        parts.append(_collapsed(box, x, y, cell * len(box.layers)))
    else:
        for i, layer in enumerate(box.layers):
            if i:
                parts.append(charts.line(x + cell * i, y + 6, x + cell * i, y + _BOX - 6, "divider"))
            parts.append(_layer_label(layer, x + cell * (i + 0.5), y + _BOX / 2, cell))
    return el("g", el("title", box.tip), *parts, class_=device_class(box.device))


def _layer_label(layer: str, x: float, y: float, cell: float) -> Markup:
    most = max(4, int(cell / 6.6))
    block, _, part = layer.rpartition(".")
    if not block:
        return charts.text(x, y + 4, shorten(part, most), anchor="middle", class_="t k")
    upper = charts.text(x, y - 4, shorten(block, most), anchor="middle", class_="t s m")
    return Markup(upper + charts.text(x, y + 11, shorten(part, most), anchor="middle", class_="t k"))


def _collapsed(box: _Box, x: float, y: float, width: float) -> Markup:
    count = len(box.layers)
    if width < 60:
        return charts.text(x + width / 2, y + _BOX / 2 + 4, count if width > 16 else "", anchor="middle", class_="t k")
    span = box.layers[0] if count == 1 else f"{box.layers[0]} … {box.layers[-1]}"
    upper = charts.text(x + width / 2, y + 17, f"{count} layers", anchor="middle", class_="t k")
    lower = charts.text(x + width / 2, y + 33, shorten(span, int(width / 6)), anchor="middle", class_="t s m")
    return Markup(upper + lower)


def _hand_over(x1: float, y1: float, x2: float, y2: float) -> Markup:
    middle = (x1 + x2) / 2
    d = f"M{x1 + 1:.1f} {y1:.1f}C{middle + 6:.1f} {y1:.1f} {middle - 6:.1f} {y2:.1f} {x2 - 6:.1f} {y2:.1f}"
    head = f"M{x2 - 8:.1f} {y2 - 4:.1f}L{x2 - 1:.1f} {y2:.1f}L{x2 - 8:.1f} {y2 + 4:.1f}Z"
    return Markup(el("path", d=d, class_="arrow") + el("path", d=head, class_="head"))


def _placement_narrow(name: str, boxes: Sequence[_Box]) -> Markup:
    """The same picture turned: devices side by side, layers from top to bottom."""
    width, top, gap, row = 360.0, 30.0, 20.0, 24.0
    devices = list(dict.fromkeys(box.device for box in boxes))
    lane = width / len(devices)
    tall = sum(len(box.layers) for box in boxes) <= 16
    heights = [row * len(box.layers) if tall else 44.0 for box in boxes]
    height = top + sum(heights) + gap * (len(boxes) - 1) + 8
    parts: list[object] = []
    for i, device in enumerate(devices):
        parts.append(charts.rect(lane * i + 2, 0, lane - 4, height, "lane"))
        parts.append(charts.text(lane * (i + 0.5), 19, shorten(device, int(lane / 8)), anchor="middle", class_="t b"))
    y, previous = top, None
    for box, tall_box in zip(boxes, heights, strict=True):
        x = lane * devices.index(box.device) + 10
        if previous is not None:
            parts.append(_hand_over_down(previous, y - gap, x + (lane - 20) / 2, y))
        parts.append(_stage_narrow(box, x, y, lane - 20, tall_box, row if tall else None))
        previous, y = x + (lane - 20) / 2, y + tall_box + gap
    return charts.svg(width, height, *parts, label=f"placement of {name}", class_="chart narrow")


def _stage_narrow(box: _Box, x: float, y: float, width: float, height: float, row: float | None) -> Markup:
    parts = [charts.rect(x, y, width, height, "stage", rx=6)]
    most = int(width / 6.2)
    if row is None:
        upper = f"{len(box.layers)} layers" if len(box.layers) > 1 else box.layers[0]
        parts.append(charts.text(x + width / 2, y + 26, shorten(upper, most), anchor="middle", class_="t k"))
    else:
        for i, layer in enumerate(box.layers):
            middle = y + row * (i + 0.5) + 4
            parts.append(charts.text(x + width / 2, middle, shorten(layer, most), anchor="middle", class_="t s k"))
    return el("g", el("title", box.tip), *parts, class_=device_class(box.device))


def _hand_over_down(x1: float, y1: float, x2: float, y2: float) -> Markup:
    middle = (y1 + y2) / 2
    d = f"M{x1:.1f} {y1 + 1:.1f}C{x1:.1f} {middle + 4:.1f} {x2:.1f} {middle - 4:.1f} {x2:.1f} {y2 - 6:.1f}"
    head = f"M{x2 - 4:.1f} {y2 - 8:.1f}L{x2:.1f} {y2 - 1:.1f}L{x2 + 4:.1f} {y2 - 8:.1f}Z"
    return Markup(el("path", d=d, class_="arrow") + el("path", d=head, class_="head"))


def gantt(arm: ArmRun, *, wide: bool) -> Markup | None:
    """The predicted and the measured schedule of one step, one above the other on one time axis."""
    shown = [(title, s) for title, s in (("predicted", arm.predicted), ("measured", arm.measured)) if s]
    if not shown:
        return None
    width, left, row = (920.0, 104.0, 26.0) if wide else (360.0, 72.0, 22.0)
    devices = list(dict.fromkeys([*devices_of(arm), *(d for _, s in shown for d in s.devices)]))
    links = [device for device in devices if "->" in device]
    devices = [device for device in devices if device not in links]
    longest = max(schedule.length_s for _, schedule in shown) or 1.0
    factor, unit = (1e3, "ms") if longest < 2 else (1.0, "s")
    x = Scale(0.0, longest * factor, left, width - 8)
    block = 24 + row * len(devices) + (14 if links else 0) + 8
    bottom = block * len(shown)
    parts: list[object] = [
        charts.x_axis(x, bottom, 24, title=f"time since the step began [{unit}]", about=8 if wide else 4)
    ]
    for i, (title, schedule) in enumerate(shown):
        top = block * i + 24
        heading = f"{title}: {units.duration(schedule.length_s)}"
        parts.append(charts.text(0, top - 8, heading, class_="t b"))
        for j, device in enumerate(devices):
            y = top + row * j
            parts.append(
                charts.text(left - 8, y + row / 2 + 3, shorten(device, 12 if wide else 10), anchor="end", class_="t s")
            )
            mine = [b for b in schedule.blocks if b.device == device]
            parts.append(_lane(mine, x, y, row, factor))
        if links:  # all of them share one thin lane
            y = top + row * len(devices)
            parts.append(charts.text(left - 8, y + 10, "hand-over", anchor="end", class_="t s m"))
            parts.append(_lane([b for b in schedule.blocks if b.device in links], x, y, 14, factor))
    label = f"schedule of one step of {arm.name}: {' and '.join(title for title, _ in shown)}"
    return charts.svg(width, bottom + 40, *parts, label=label, class_="chart wide" if wide else "chart narrow")


def _lane(blocks: Sequence[Block], x: Scale, y: float, row: float, factor: float) -> Markup:
    parts: list[object] = [charts.rect(x.start, y + 1, x.end - x.start, row - 2, "lane")]
    for b in blocks:
        x1, x2 = x(b.start_s * factor), x(b.end_s * factor)
        number = f", micro-batch {b.label}" if b.label else ""
        tip = f"{b.device}: {b.name}{number}, {units.duration(b.start_s)} to {units.duration(b.end_s)}"
        parts.append(charts.rect(x1, y + 3, max(0.8, x2 - x1 - 0.5), row - 6, f"bar {b.phase}", tip=tip))
        if b.label and x2 - x1 > 7 + 6 * len(b.label):
            parts.append(
                charts.text((x1 + x2) / 2, y + row / 2 + 4, b.label, anchor="middle", class_=f"t s in-{b.phase}")
            )
    return el("g", *parts, class_=device_class(blocks[0].device) if blocks else None)


@dataclass(frozen=True)
class StepTime:
    """Predicted and measured time of a step for one placement [s]; `reason`: why there is none."""

    name: str
    predicted_s: float | None
    predicted_interval: Sequence[float] | None
    measured_s: float | None
    measured_iqr: Sequence[float] | None
    reason: str = ""


def step_times(arm: ArmRun) -> list[StepTime]:
    """The plan first, then each alternative."""
    plan = table(arm.summary, "plan")
    predicted = plan.get("predicted_s", arm.plan.get("value"))
    found = []
    if units.is_number(predicted) or units.is_number(plan.get("measured_s")):
        interval = plan.get("interval_s", arm.plan.get("interval_s"))
        found.append(_step_time("plan", {**plan, "predicted_s": predicted, "interval_s": interval}))
    found += [_step_time(str(a.get("name", "?")), a) for a in rows(arm.summary, "alternatives")]
    return found


def _step_time(name: str, data: Mapping[str, Any]) -> StepTime:
    predicted, measured = data.get("predicted_s"), data.get("measured_s")
    interval, iqr = data.get("interval_s"), data.get("measured_iqr_s")
    return StepTime(
        name,
        predicted if units.is_number(predicted) else None,
        interval if units.is_interval(interval) else None,
        measured if units.is_number(measured) else None,
        iqr if units.is_interval(iqr) else None,
        str(data.get("reason") or ""),
    )


def step_time_chart(arms: Sequence[ArmRun], styles: Mapping[str, charts.Style], *, wide: bool) -> Markup | None:
    """One row a placement: predicted time with its interval as a band, measured time with its quartiles."""
    groups = [(arm, times) for arm in arms if (times := step_times(arm))]
    values = [v for _, times in groups for t in times for v in _extent(t)]
    if not values:
        return None
    width, left, row = (920.0, 190.0, 22.0) if wide else (360.0, 122.0, 22.0)
    factor, unit = (1e3, "ms") if max(values) < 2 else (1.0, "s")
    height = sum(row * len(times) + 28 for _, times in groups)
    x = charts.scale([v * factor for v in values], left, width - 14, zero=True)
    parts: list[object] = [charts.x_axis(x, height, 8, title=f"time of a step [{unit}]", about=8 if wide else 4)]
    y = 0.0
    for arm, times in groups:
        parts.append(charts.text(0, y + 19, arm.name, class_="t b"))
        y += 26
        for time in times:
            parts.append(_step_row(time, styles[arm.name], x, y + row / 2, left, factor, wide=wide))
            y += row
        y += 2
    label = "predicted and measured step time of each placement"
    return charts.svg(width, height + 40, *parts, label=label, class_="chart wide" if wide else "chart narrow")


def _extent(time: StepTime) -> list[float]:
    intervals = [*(time.predicted_interval or ()), *(time.measured_iqr or ())]
    return [*intervals, *(v for v in (time.predicted_s, time.measured_s) if v is not None)]


def _step_row(
    time: StepTime, style: charts.Style, x: Scale, y: float, left: float, factor: float, *, wide: bool
) -> Markup:
    name_class = "t b" if time.name == "plan" else "t"
    parts = [charts.text(left - 10, y + 4, shorten(time.name, 26 if wide else 17), anchor="end", class_=name_class)]
    if time.predicted_interval:
        low, high = (x(v * factor) for v in time.predicted_interval)
        tip = f"{time.name}: expected between {' and '.join(map(units.duration, time.predicted_interval))}"
        parts.append(charts.rect(low, y - 6, max(1.0, high - low), 12, "band", tip=tip, rx=3))
    if time.predicted_s is not None:
        at = x(time.predicted_s * factor)
        tip = el("title", f"{time.name}: predicted {units.duration(time.predicted_s)}")
        parts.append(el("path", tip, d=f"M{at:.1f} {y - 8:.1f}v16", class_="predicted"))
    if time.measured_iqr:
        parts.append(charts.whisker(x(time.measured_iqr[0] * factor), x(time.measured_iqr[1] * factor), y, cap=3))
    if time.measured_s is not None:
        tip_text = f"{time.name}: measured {units.duration(time.measured_s)}"
        parts.append(charts.marker(x(time.measured_s * factor), y, style, size=4.5, tip=tip_text))
    if time.predicted_s is None and time.measured_s is None:
        parts.append(
            charts.text(left + 4, y + 4, shorten(f"not possible: {time.reason}", 100 if wide else 34), class_="t s m")
        )
    return el("g", *parts, class_=style.css)


def placement_sentence(arm: ArmRun) -> Markup:
    """The placement in one line: `cpu: embedding … block0.mlp → aer: block1.mlp → ...`."""
    pieces = []
    for box in _boxes(arm):
        span = box.layers[0] if len(box.layers) == 1 else f"{box.layers[0]} … {box.layers[-1]}"
        pieces.append(join([el("b", box.device), f" {span}"]))
    return join(pieces, " → ")
