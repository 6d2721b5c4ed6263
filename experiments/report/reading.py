"""The folder of a run as the report needs it; whatever is absent or unfinished is an empty field, not an error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from experiments.report.schedules import Schedule, read_schedules
from experiments.report.units import is_interval, is_number

if TYPE_CHECKING:
    from pathlib import Path

MAX_POINTS = 300  # of a drawn curve: a figure is about 900 pixels wide, so more can't be seen

_ORDER = ("baseline", "hybrid", "twin", "frozen", "identity")


@dataclass(frozen=True)
class Curve:
    """Losses of one seed on one split, thinned to at most `MAX_POINTS` by the mean of consecutive steps.

    Attributes:
        steps: ascending.
        losses: [nat/token], of the same length.
    """

    steps: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class ArmRun:
    """One arm of a comparison.

    Attributes:
        name: as in the config; untrusted text.
        summary: its part of `summary.json`.
        curves: split -> seed -> curve.
        plan: `plan.json`.
        predicted: the schedule of one step that the planner simulated.
        measured: the schedule of one step that ran.
        progress: seed -> how far its training is, in words.
    """

    name: str
    summary: Mapping[str, Any]
    curves: Mapping[str, Mapping[str, Curve]]
    plan: Mapping[str, Any]
    predicted: Schedule | None
    measured: Schedule | None
    progress: Mapping[str, str] = field(default_factory=dict)

    @property
    def seeds(self) -> Mapping[str, Mapping[str, Any]]:
        """Seed -> its figures."""
        found = table(self.summary, "seeds")
        return {str(seed): figures for seed, figures in found.items() if isinstance(figures, Mapping)}

    @property
    def stages(self) -> list[Mapping[str, Any]]:
        """Stages of the plan, in execution order: at least `device` and `layers`."""
        return rows(self.plan, "stages") or rows(table(self.summary, "plan"), "stages")

    def values(self, metric: str) -> list[float]:
        """One number a seed, where there is one."""
        found = (figures.get(metric) for figures in self.seeds.values())
        return [float(v) for v in found if is_number(v)]

    def mean(self, metric: str) -> float | None:
        """The mean over seeds, as the run computed it or else of the seeds that are here."""
        given = table(self.summary, "mean").get(metric)
        if is_number(given):
            return float(given)
        values = self.values(metric)
        return sum(values) / len(values) if values else None

    def interval(self, metric: str) -> Sequence[float] | None:
        """95 % interval of the mean as the run computed it."""
        given = table(self.summary, "interval").get(metric)
        return given if is_interval(given) else None


@dataclass(frozen=True)
class Run:
    """Everything that the report shows.

    Attributes:
        name: of the experiment.
        summary: `summary.json`; empty if the run hasn't got that far.
        arms: in the order in which they are shown: the known ones first.
        config_text: `config.yaml`.
        environment: `environment.json`.
        tuning: `tuning.json`.
        missing: files that should be there and aren't, or can't be read.
    """

    name: str
    summary: Mapping[str, Any]
    arms: Sequence[ArmRun]
    config_text: str
    environment: Mapping[str, Any]
    tuning: Mapping[str, Any] = field(default_factory=dict)
    missing: Sequence[str] = ()

    @property
    def metric(self) -> str:
        """Name of the primary metric."""
        return str(self.summary.get("metric", "test_loss"))

    @property
    def unit(self) -> str:
        """Unit of the primary metric."""
        return str(self.summary.get("unit", "nat/token"))

    @property
    def comparisons(self) -> list[Mapping[str, Any]]:
        """Comparisons of pairs of arms on the primary metric."""
        return [c for c in rows(self.summary, "comparisons") if c.get("metric", self.metric) == self.metric]

    @property
    def n_seeds(self) -> int:
        """Seeds of the arm that has most."""
        return max((len(arm.seeds) for arm in self.arms), default=0)

    @property
    def confidence(self) -> str:
        """Of the intervals of differences: `95 %` unless the config set another alpha."""
        alpha = self.summary.get("alpha")
        return f"{100 * (1 - alpha):g} %" if is_number(alpha) else "95 %"

    def against(self, arm: str, other: str = "baseline") -> Mapping[str, Any]:
        """The comparison of two arms; empty where there is none."""
        return next((c for c in self.comparisons if c.get("arm") == arm and c.get("against") == other), {})


def table(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """`data[key]` if that is a mapping, otherwise an empty one."""
    value = data.get(key)
    return value if isinstance(value, Mapping) else {}


def rows(data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The mappings in the list `data[key]`."""
    value = data.get(key)
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []


def arm_order(names: Sequence[str]) -> list[str]:
    """Names of arms as they are shown: baseline, hybrid, twin, frozen, identity, then the others by name."""
    return sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))


def load(out_dir: Path) -> Run:
    """Reads the folder of a run.

    Args:
        out_dir: folder with `summary.json` and `arms/`.

    Raises:
        FileNotFoundError: the folder has neither.
    """
    missing: list[str] = []
    summary = _json(out_dir / "summary.json", missing)
    folders = {path.name: path for path in sorted((out_dir / "arms").glob("*")) if path.is_dir()}
    if not summary and not folders:
        raise FileNotFoundError(f"{out_dir}: no run here: neither summary.json nor arms/")
    summaries = table(summary, "arms")
    names = arm_order([*summaries, *(name for name in folders if name not in summaries)])
    config = out_dir / "config.yaml"
    if not config.is_file():
        missing.append("config.yaml")
    return Run(
        name=str(summary.get("name") or out_dir.resolve().name),
        summary=summary,
        arms=[_arm(name, table(summaries, name), folders.get(name)) for name in names],
        config_text=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        environment=_json(out_dir / "environment.json", missing),
        tuning=_json(out_dir / "tuning.json", []),
        missing=missing,
    )


def _json(path: Path, missing: list[str]) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        missing.append(path.name)
        return {}
    return data if isinstance(data, dict) else {}


def _arm(name: str, summary: Mapping[str, Any], folder: Path | None) -> ArmRun:
    if folder is None:
        return ArmRun(name, summary, {}, {}, None, None)
    paths = sorted(folder.glob("seed-*"), key=lambda path: (len(path.name), path.name))
    seeds = {path.name.removeprefix("seed-"): path for path in paths}
    curves: dict[str, dict[str, Curve]] = {}
    for seed, path in seeds.items():
        for split, curve in read_curves(path / "metrics.jsonl").items():
            curves.setdefault(split, {})[seed] = curve
    status = {seed: _json(path / "status.json", []) for seed, path in seeds.items()}
    progress = {
        seed: f"{found['status']} at step {found.get('step', '?')}"
        for seed, found in status.items()
        if "status" in found
    }
    predicted, measured = read_schedules([folder, *paths])
    return ArmRun(
        name,
        summary or _unfinished(folder, status),
        curves,
        _json(folder / "plan.json", []),
        predicted,
        measured,
        progress,
    )


def _unfinished(folder: Path, status: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """What the summary would say of an arm, as far as its own files tell."""
    try:
        times = json.loads((folder / "step_times.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        times = []
    listed = rows({"times": times}, "times")
    results = {seed: table(found, "result") for seed, found in status.items()}
    return {
        "seeds": {
            seed: {k: v for k, v in result.items() if k != "usage"} for seed, result in results.items() if result
        },
        "plan": next((time for time in listed if time.get("name") == "plan"), {}),
        "alternatives": [time for time in listed if time.get("name") != "plan"],
    }


def read_curves(path: Path) -> dict[str, Curve]:
    """Split -> thinned losses of a `metrics.jsonl`; torn or foreign lines and non-finite losses are left out."""
    points: dict[str, list[tuple[float, float]]] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            record = json.loads(line)
            step, loss = float(record["step"]), float(record["loss"])
        except (ValueError, TypeError, KeyError):
            continue
        if math.isfinite(loss):
            points.setdefault(str(record.get("split", "train")), []).append((step, loss))
    return {split: thin(values) for split, values in points.items()}


def thin(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> Curve:
    """Means of consecutive groups of equal size, so that at most `most` points are left."""
    group = max(1, math.ceil(len(points) / most))
    bins = [points[i : i + group] for i in range(0, len(points), group)]
    return Curve(
        steps=tuple(sum(step for step, _ in b) / len(b) for b in bins),
        losses=tuple(sum(loss for _, loss in b) / len(b) for b in bins),
    )


def mean_curve(curves: Mapping[str, Curve]) -> Curve:
    """Mean over the seeds, at the steps that all of them have."""
    by_step = [dict(zip(curve.steps, curve.losses, strict=True)) for curve in curves.values()]
    shared = sorted(set.intersection(*(set(points) for points in by_step))) if by_step else []
    return Curve(
        steps=tuple(shared), losses=tuple(sum(points[step] for points in by_step) / len(by_step) for step in shared)
    )
