"""Figures about accuracy and what it cost: losses by arm, differences, loss curves, accuracy against cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from experiments.report import charts, units
from experiments.report.charts import Scale, Style
from experiments.report.markup import Markup, el, join
from experiments.report.reading import ArmRun, Curve, Run, mean_curve, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

METRIC_TITLES = {
    "test_loss": "test loss",
    "val_loss": "validation loss",
    "wall_s": "wall time of training",
    "cpu_s": "CPU time of training",
}
_ROW = 34


def metric_title(metric: str) -> str:
    """The name of a metric in words."""
    return METRIC_TITLES.get(metric, metric.replace("_", " "))


def loss_by_arm(run: Run, styles: Mapping[str, Style]) -> Markup | None:
    """One row an arm: every seed as a small mark, the mean with its interval."""
    arms = [arm for arm in run.arms if arm.values(run.metric) or arm.mean(run.metric) is not None]
    if len(arms) < 2 and not any(len(arm.values(run.metric)) > 1 for arm in arms):
        return None  # a single point is better read in the table
    values = [v for arm in arms for v in [*arm.values(run.metric), *(arm.interval(run.metric) or [])]]
    values += [mean for arm in arms if (mean := arm.mean(run.metric)) is not None]
    width, top, left = 400, 12, 84
    bottom = top + _ROW * len(arms)
    x = charts.scale(values, left + 8, width - 12)
    parts = [charts.x_axis(x, bottom, top, title=f"{metric_title(run.metric)} [{run.unit}], lower is better", about=4)]
    for i, arm in enumerate(arms):
        parts.append(_arm_row(arm, run.metric, x, top + _ROW * (i + 0.5), styles[arm.name], left))
    label = f"{metric_title(run.metric)} of each arm: seeds, mean and 95 % interval"
    return charts.svg(width, bottom + 42, *parts, label=label)


def _arm_row(arm: ArmRun, metric: str, x: Scale, y: float, style: Style, left: float) -> Markup:
    parts = [charts.text(left - 8, y + 4, shorten(arm.name), anchor="end", class_="t b")]
    for seed, figures in arm.seeds.items():
        value = figures.get(metric)
        if units.is_number(value):
            tip = f"{arm.name}, seed {seed}: {units.fixed(value, 4)}"
            parts.append(el("circle", el("title", tip), cx=x(value), cy=y + 8.0, r=2.6, class_="seed"))
    interval, mean = arm.interval(metric), arm.mean(metric)
    if interval:
        parts.append(charts.whisker(x(interval[0]), x(interval[1]), y - 3))
    if mean is not None:
        tip = f"{arm.name}: {units.fixed(mean, 4)} {units.interval(interval, 4) if interval else '(no interval)'}"
        parts.append(charts.marker(x(mean), y - 3, style, tip=tip))
    return el("g", *parts, class_=style.css)


def differences(run: Run, styles: Mapping[str, Style], margin: float | None) -> Markup | None:
    """One row a comparison: paired difference with its interval, against zero and the margin of equivalence."""
    found = [c for c in run.comparisons if units.is_number(c.get("difference"))]
    if not found:
        return None
    values = [0.0, *(c["difference"] for c in found)]
    values += [v for c in found if units.is_interval(c.get("interval")) for v in c["interval"]]
    values += [-margin, margin] if margin else []
    width, top, left = 400, 12, 140
    bottom = top + _ROW * len(found)
    x = charts.scale(values, left + 8, width - 12)
    parts: list[Markup] = []
    if margin:
        parts.append(
            charts.rect(x(-margin), top, x(margin) - x(-margin), bottom - top, "margin", tip=f"margin ±{margin}")
        )
    parts.append(charts.x_axis(x, bottom, top, title=f"paired difference [{run.unit}], left of 0 is better", about=4))
    parts.append(charts.line(x(0), top, x(0), bottom, "zero"))
    for i, comparison in enumerate(found):
        parts.append(_difference_row(comparison, x, top + _ROW * (i + 0.5), styles, left))
    label = f"paired differences between arms with {run.confidence} intervals"
    return charts.svg(width, bottom + 42, *parts, label=label)


def _difference_row(
    comparison: Mapping[str, Any], x: Scale, y: float, styles: Mapping[str, Style], left: float
) -> Markup:
    arm, against = str(comparison.get("arm", "?")), str(comparison.get("against", "?"))
    style = styles.get(arm, Style(0))
    interval = comparison.get("interval")
    difference = units.fixed(comparison["difference"], 4, sign=True)
    tip = f"{arm} − {against}: {difference} {units.interval(interval, 4, sign=True) if interval else ''}"
    p = f"p = {units.p_value(comparison.get('p_holm'))}".replace("= <", "< ")
    return el(
        "g",
        charts.text(left - 8, y, f"{shorten(arm)} − {shorten(against)}", anchor="end", class_="t b"),
        charts.text(left - 8, y + 13, f"{p} (Holm)", anchor="end", class_="t s m"),
        charts.whisker(x(interval[0]), x(interval[1]), y) if units.is_interval(interval) else None,
        charts.marker(x(comparison["difference"]), y, style, tip=tip),
        class_=style.css,
    )


def shorten(name: str, most: int = 12) -> str:
    """A name that fits beside a chart."""
    return name if len(name) <= most else name[: most - 1] + "…"


def overlay(run: Run, styles: Mapping[str, Style], split: str, *, wide: bool) -> Markup | None:
    """Losses of all arms on one split: each seed thin, the mean thick; floors as lines."""
    arms = [arm for arm in run.arms if arm.curves.get(split)]
    if not arms:
        return None
    width, height, left, right = (920, 380, 48, 96) if wide else (360, 300, 40, 12)
    x, y = _loss_scales(
        [arm.curves[split] for arm in arms], floors(run, split), (left, width - right), (height - 44, 30)
    )
    title = f"{metric_title(split + '_loss')} [{run.unit}]"
    parts = [charts.y_axis(y, left, width - right, title=title), charts.x_axis(x, height - 44, 30, title="step")]
    parts += [floor_line(name, value, y, left, width - right) for name, value in floors(run, split).items()]
    means = {arm.name: mean_curve(arm.curves[split]) for arm in arms}
    parts += [_curves(arm.curves[split], means[arm.name], styles[arm.name], x, y) for arm in arms]
    if wide:
        parts.append(_end_labels(means, styles, x, y))
    geometry = f"{x.low} {x.high} {x.start} {x.end} {y.end} {y.start}"
    label = f"{title} against step for {len(arms)} arms"
    variant = "chart wide" if wide else "chart narrow"
    return charts.svg(width, height, *parts, label=label, class_=variant, data_split=split, data_geometry=geometry)


def gaps(run: Run, styles: Mapping[str, Style], split: str, *, wide: bool) -> Markup | None:
    """Losses of each arm minus the baseline's of the same seed at the same step: seeds thin, mean thick."""
    base = next((arm.curves.get(split, {}) for arm in run.arms if arm.name == "baseline"), {})
    found = {arm.name: _gap_curves(arm.curves.get(split, {}), base) for arm in run.arms if arm.name != "baseline"}
    found = {name: curves for name, curves in found.items() if curves}
    if not found:
        return None
    width, height, left, right = (920, 320, 52, 96) if wide else (360, 280, 44, 12)
    x, y = _loss_scales([*found.values()], {"zero": 0.0}, (left, width - right), (height - 44, 30))
    title = f"{metric_title(split + '_loss')} minus baseline's [{run.unit}]"
    parts = [charts.y_axis(y, left, width - right, title=title), charts.x_axis(x, height - 44, 30, title="step")]
    parts.append(charts.line(left, y(0), width - right, y(0), "zero"))
    means = {name: mean_curve(curves) for name, curves in found.items()}
    parts += [_curves(curves, means[name], styles[name], x, y) for name, curves in found.items()]
    if wide:
        parts.append(_end_labels(means, styles, x, y))
    return charts.svg(width, height, *parts, label=title, class_="chart wide" if wide else "chart narrow")


def _gap_curves(curves: Mapping[str, Curve], base: Mapping[str, Curve]) -> dict[str, Curve]:
    result = {}
    for seed in curves.keys() & base.keys():
        reference = dict(zip(base[seed].steps, base[seed].losses, strict=True))
        pairs = zip(curves[seed].steps, curves[seed].losses, strict=True)
        shared = [(step, loss - reference[step]) for step, loss in pairs if step in reference]
        if shared:
            result[seed] = Curve(tuple(s for s, _ in shared), tuple(v for _, v in shared))
    return dict(sorted(result.items()))


def small_multiples(run: Run, styles: Mapping[str, Style], split: str) -> list[Markup]:
    """One small figure an arm, all with the same axes; the baseline's mean is drawn in each as a reference."""
    arms = [arm for arm in run.arms if arm.curves.get(split)]
    if not arms:
        return []
    width, height, left = 300, 210, 38
    x, y = _loss_scales([arm.curves[split] for arm in arms], floors(run, split), (left, width - 14), (height - 40, 40))
    reference = next((mean_curve(arm.curves[split]) for arm in arms if arm.name == "baseline"), None)
    figures = []
    for arm in arms:
        style = styles[arm.name]
        curves = arm.curves[split]
        parts = [
            el("g", charts.marker(7, 11, style), class_=style.css),
            charts.text(18, 15, arm.name, class_="t b"),
            charts.y_axis(y, left, width - 14, title="", about=4),
            charts.x_axis(x, height - 40, 40, title="step", about=4),
            _curves(curves, mean_curve(curves), style, x, y),
            *(floor_line(name, value, y, left, width - 14) for name, value in floors(run, split).items()),
        ]
        if reference and arm.name != "baseline":
            dotted = charts.path([*map(x, reference.steps)], [*map(y, reference.losses)], "reference")
            parts.append(el("g", dotted, class_=Style(0).css))
        label = f"{split} loss of {arm.name} against step, {len(curves)} seeds"
        geometry = f"{x.low} {x.high} {x.start} {x.end} {y.end} {y.start}"
        figures.append(
            charts.svg(width, height, *parts, label=label, data_split=split, data_arm=arm.name, data_geometry=geometry)
        )
    return figures


def floors(run: Run, split: str = "") -> dict[str, float]:
    """Name -> loss of the n-gram models on a split, unless one is named on that of the run's metric."""
    found = table(table(run.summary, "floors_by_split"), split) if split else table(run.summary, "floors")
    return {str(k): float(v) for k, v in found.items() if units.is_number(v)}


def _loss_scales(
    groups: Sequence[Mapping[str, Curve]], lines: Mapping[str, float], xs: tuple[float, float], ys: tuple[float, float]
) -> tuple[Scale, Scale]:
    curves = [curve for group in groups for curve in group.values()]
    steps = [step for curve in curves for step in curve.steps]
    losses = [loss for curve in curves for loss in curve.losses]
    x = Scale(min(0.0, min(steps)), max(steps) or 1.0, *xs)
    return x, charts.scale([*losses, *lines.values()], *ys)


def floor_line(name: str, value: float, y: Scale, left: float, right: float) -> Markup:
    """A labelled horizontal line."""
    tip = el("title", f"{name} model: {units.fixed(value, 4)}")
    label = charts.text(right - 4, y(value) - 4, f"{name} {units.fixed(value, 2)}", anchor="end", class_="t s m halo")
    return el("g", tip, charts.line(left, y(value), right, y(value), "floor"), label)


def _curves(curves: Mapping[str, Curve], mean: Curve, style: Style, x: Scale, y: Scale) -> Markup:
    thin = [charts.path([*map(x, c.steps)], [*map(y, c.losses)], "thin") for c in curves.values()]
    xs, ys = [*map(x, mean.steps)], [*map(y, mean.losses)]
    marks = [charts.marker(a, b, style, size=3.6) for a, b in zip(xs, ys, strict=True)] if len(xs) <= 12 else []
    thick = charts.path(xs, ys, "thick", stroke_dasharray=style.dash)
    return el("g", *thin, thick, *marks, class_=style.css)


def _end_labels(means: Mapping[str, Curve], styles: Mapping[str, Style], x: Scale, y: Scale) -> Markup:
    shown = [name for name, curve in means.items() if curve.losses]
    wanted = [y(means[name].losses[-1]) for name in shown]
    at = charts.spread(wanted, least=17, low=min(y.start, y.end), high=max(y.start, y.end))
    parts = []
    for name, from_y, to_y in zip(shown, wanted, at, strict=True):
        style = styles[name]
        leader = charts.line(x.end + 2, from_y, x.end + 12, to_y, "leader")
        mark = charts.marker(x.end + 19, to_y, style, size=4)
        parts.append(
            el("g", leader, mark, charts.text(x.end + 28, to_y + 4, shorten(name, 10), class_="t b"), class_=style.css)
        )
    return join(parts)


def accuracy_cost(run: Run, styles: Mapping[str, Style], cost: str) -> Markup | None:
    """Loss against a cost: every seed as a small mark, the means with both intervals."""
    arms = [arm for arm in run.arms if arm.mean(run.metric) is not None and arm.mean(cost) is not None]
    if len(arms) < 2 and not any(len(arm.values(run.metric)) > 1 for arm in arms):
        return None
    width, height, left = 400, 300, 46
    x = charts.scale(_extent(arms, cost), left, width - 14, allow_log=True)
    y = charts.scale(_extent(arms, run.metric), height - 44, 30)
    title = f"{metric_title(cost)} [s]{', logarithmic' if x.log else ''}"
    parts = [
        charts.y_axis(y, left, width - 14, title=f"{metric_title(run.metric)} [{run.unit}]"),
        charts.x_axis(x, height - 44, 30, title=title),
        *(_cost_point(arm, run.metric, cost, styles[arm.name], x, y) for arm in arms),
    ]
    label = f"{metric_title(run.metric)} against {metric_title(cost)}"
    return charts.svg(width, height, *parts, label=label)


def _extent(arms: Sequence[ArmRun], metric: str) -> list[float]:
    values = [v for arm in arms for v in [*arm.values(metric), *(arm.interval(metric) or [])]]
    return [*values, *(mean for arm in arms if (mean := arm.mean(metric)) is not None)]


def _cost_point(arm: ArmRun, metric: str, cost: str, style: Style, x: Scale, y: Scale) -> Markup:
    parts: list[object] = []
    for seed, figures in arm.seeds.items():
        a, b = figures.get(cost), figures.get(metric)
        if units.is_number(a) and units.is_number(b):
            tip = f"{arm.name}, seed {seed}: {units.duration(a)}, {units.fixed(b, 4)} "
            parts.append(el("circle", el("title", tip), cx=x(a), cy=y(b), r=2.6, class_="seed"))
    mean_x, mean_y = x(arm.mean(cost) or 0.0), y(arm.mean(metric) or 0.0)
    across, upright = arm.interval(cost), arm.interval(metric)
    if across:
        parts.append(charts.whisker(x(max(across[0], x.low)), x(across[1]), mean_y))
    if upright:
        parts.append(charts.upright_whisker(mean_x, y(upright[0]), y(upright[1])))
    tip = f"{arm.name}: {units.duration(arm.mean(cost))}, {units.fixed(arm.mean(metric), 4)} on average"
    return el("g", *parts, charts.marker(mean_x, mean_y, style, tip=tip), class_=style.css)
