"""What the page carries beside what it shows: every figure as JSON, and the seeds as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.report.reading import Curve, Run
    from experiments.report.schedules import Schedule


def seed_csv(run: Run) -> str:
    """One line for every arm and seed with all its figures."""
    metrics = list(dict.fromkeys(key for arm in run.arms for figures in arm.seeds.values() for key in figures))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arm", "seed", *metrics])
    for arm in run.arms:
        for seed, figures in arm.seeds.items():
            writer.writerow([arm.name, seed, *(figures.get(metric, "") for metric in metrics)])
    return out.getvalue()


def data(run: Run) -> dict[str, Any]:
    """Everything that the figures were drawn from."""
    return {
        "summary": run.summary,
        "environment": run.environment,
        "tuning": run.tuning,
        "config": run.config_text,
        "arms": [
            {
                "name": arm.name,
                "plan": arm.plan,
                "curves": {s: {k: _points(c) for k, c in curves.items()} for s, curves in arm.curves.items()},
                "predicted_schedule": _events(arm.predicted),
                "measured_schedule": _events(arm.measured),
            }
            for arm in run.arms
        ],
    }


def _points(curve: Curve) -> list[list[float]]:
    return [[round(step, 2) for step in curve.steps], [float(f"{loss:.6g}") for loss in curve.losses]]


def _events(schedule: Schedule | None) -> list[list[Any]] | None:
    if schedule is None:
        return None
    return [[b.device, b.phase, b.label, round(b.start_s, 7), round(b.end_s, 7)] for b in schedule.blocks]


def script_json(data: Any) -> str:
    """JSON that can stand inside a script element: no `<`, no non-finite numbers."""
    text = json.dumps(_finite(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
