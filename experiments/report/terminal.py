"""The result for a terminal of 100 columns: table, floors, step times, verdict."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from experiments.report import units
from experiments.report.figures_placement import StepTime, step_times
from experiments.report.reading import ArmRun, Run, arm_order, rows, table
from experiments.report.units import MISSING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH = 100


def text_table(summary: Mapping[str, Any]) -> str:
    """The table of results, the floors, the step times and the verdict, at most 100 columns wide.

    Args:
        summary: content of `summary.json`; fields that are missing become dashes.
    """
    arms = table(summary, "arms")
    listed = [ArmRun(name, table(arms, name), {}, {}, None, None) for name in arm_order(list(arms))]
    run = Run(str(summary.get("name", "run")), summary, listed, "", {})
    blocks = [_heading(run), _results(run), _floors(run), _step_times(run), _verdict(run)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _heading(run: Run) -> str:
    seeds = f"{run.n_seeds} seed{'' if run.n_seeds == 1 else 's'}"
    status = str(run.summary.get("status", "complete"))
    note = "" if status == "complete" else f" ({status})"
    measure = f"{run.metric.replace('_', ' ')} in {run.unit}, lower is better"
    other = "" if run.confidence == "95 %" else f" (differences: {run.confidence})"
    measure += f"; ± is the 95 % interval{other}"
    return _wrap(f"{run.name}{note}: {len(run.arms)} arm{'' if len(run.arms) == 1 else 's'}, {seeds}; {measure}")


def _results(run: Run) -> str:
    loss = units.decimals_for([arm.interval(run.metric) for arm in run.arms])
    against = {arm.name: run.against(arm.name) for arm in run.arms}
    fine = units.decimals_for([c.get("interval") for c in against.values()], default=loss)
    heads = [
        "arm",
        run.metric.replace("_", " "),
        "to baseline",
        "p (Holm)",
        "parameters",
        "wall s",
        "CPU s",
        "circuits",
    ]
    body = [heads]
    for arm in run.arms:
        comparison = against[arm.name]
        difference = _plus_minus(comparison.get("difference"), comparison.get("interval"), fine, sign=True)
        cost = table(arm.summary, "cost")
        body.append(
            [
                _clean(arm.name),
                _plus_minus(arm.mean(run.metric), arm.interval(run.metric), loss),
                difference,
                units.p_value(comparison.get("p_holm")),
                units.count(arm.summary.get("parameters")),
                units.significant(_first(arm.mean("wall_s"), cost.get("wall_s"))),
                units.significant(_first(arm.mean("cpu_s"), cost.get("cpu_s"))),
                units.short_count(cost["circuits"]) if cost.get("circuits") else MISSING,
            ]
        )
    return _columns(body)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _plus_minus(value: Any, interval: Any, decimals: int, *, sign: bool = False) -> str:
    half = units.half_width(interval)
    shown = units.fixed(value, decimals, sign=sign)
    return shown if half is None or shown == MISSING else f"{shown} ±{units.fixed(half, decimals)}"


def _floors(run: Run) -> str:
    found = {str(k): v for k, v in table(run.summary, "floors").items() if units.is_number(v)}
    if not found:
        return ""
    return _wrap("floors: " + ", ".join(f"{_clean(k)} {units.fixed(v, 4)}" for k, v in found.items()) + f" {run.unit}")


def _step_times(run: Run) -> str:
    times = {arm.name: step_times(arm) for arm in run.arms}
    if not any(times.values()):
        return ""
    possible = [time.name for listed in times.values() for time in listed if _is_possible(time)]
    others = [name for name in dict.fromkeys(possible) if name != "plan"]
    wide = [["step time [ms]", "plan predicted", "plan measured", *map(_clean, others)]]
    for arm, listed in times.items():
        by_name = {time.name: time for time in listed}
        plan = by_name.get("plan")
        cells = (
            [_milliseconds(plan.predicted_s, plan.predicted_interval), _milliseconds(plan.measured_s)]
            if plan
            else 2 * [MISSING]
        )
        wide.append([_clean(arm), *cells, *(_measured(by_name.get(name)) for name in others)])
    text = _columns(wide)
    if max(map(len, text.splitlines())) <= WIDTH:
        return text
    return _long_step_times(times)


def _long_step_times(times: Mapping[str, Sequence[StepTime]]) -> str:
    body = [["step time [ms]", "placement", "predicted", "measured"]]
    for arm, listed in times.items():
        for i, time in enumerate(listed):
            predicted = _milliseconds(time.predicted_s, time.predicted_interval)
            body.append([_clean(arm) if i == 0 else "", _clean(time.name)[:40], predicted, _measured(time)])
    return _columns(body, left=2)


def _milliseconds(seconds: float | None, interval: Sequence[float] | None = None) -> str:
    if seconds is None:
        return MISSING
    half = units.half_width(interval)
    return f"{units.significant(1e3 * seconds)}{f' ±{units.significant(1e3 * half, 2)}' if half else ''}"


def _measured(time: StepTime | None) -> str:
    """The measured time; `(55.0)`: predicted only."""
    if time is None or not _is_possible(time):
        return MISSING
    return f"({_milliseconds(time.predicted_s)})" if time.measured_s is None else _milliseconds(time.measured_s)


def _is_possible(time: StepTime) -> bool:
    return time.measured_s is not None or time.predicted_s is not None


def _verdict(run: Run) -> str:
    verdict = str(run.summary.get("verdict") or "").strip()
    lines = [f"verdict: {verdict}"] if verdict else []
    for other in rows(run.summary, "comparisons"):
        if other.get("against") != "baseline" and other.get("verdict"):
            p = units.p_value(other.get("p_holm"))
            shown = units.fixed(other.get("difference"), 4, sign=True)
            lines.append(f"{other.get('arm')} against {other.get('against')}: {shown}, p {p}: {other['verdict']}")
    return "\n".join(_wrap(line) for line in lines)


def _clean(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def _wrap(text: str) -> str:
    return textwrap.fill(_clean(" ".join(text.split())), WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _columns(body: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows with aligned columns: the first `left` ones to the left, the others to the right; a rule below the head."""
    widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
    lines = []
    for row in body:
        cells = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:]])
