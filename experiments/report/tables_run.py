"""Tables about how and where a run took place: stages, step times, launches, environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experiments.report import units
from experiments.report.figures_placement import StepTime, step_times
from experiments.report.markup import Markup, el, join
from experiments.report.reading import ArmRun, Run, rows, table
from experiments.report.tables import arm_name, facts, grid
from experiments.report.units import MISSING

if TYPE_CHECKING:
    from experiments.report.charts import Style


def stages(arm: ArmRun) -> Markup | None:
    """The plan's stages with their predicted times and the hand-over to the next one."""
    found = arm.stages
    if not found:
        return None
    transfers = rows(arm.plan, "transfers")
    body = []
    for i, stage in enumerate(found):
        after = transfers[i] if i < len(transfers) else {}
        hand_over = f"{units.size(after.get('bytes'))}, {units.duration(after.get('seconds'))}" if after else MISSING
        names = [str(name) for name in stage.get("layers") or ()]
        span = ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]} ({len(names)} layers)"
        error = f"±{100 * stage['error']:.0f} %" if units.is_number(stage.get("error")) else MISSING
        times = [units.duration(stage.get("forward_s")), units.duration(stage.get("backward_s"))]
        body.append([stage.get("device", "?"), span, *times, error, units.size(stage.get("memory_bytes")), hand_over])
    heads = ["device", "layers", "forward", "backward", "error", "memory", "hand-over to the next"]
    return grid("Stages; times are predicted, for one micro-batch.", heads, body, text_columns=(0, 1))


def step_time_table(run: Run, styles: Mapping[str, Style]) -> Markup | None:
    """Predicted and measured step time of the plan and of each alternative, with the deviation."""
    body: list[list[object]] = []
    for arm in run.arms:
        for i, time in enumerate(step_times(arm)):
            name = arm_name(arm.name, styles[arm.name])
            body.append([el("span", name, class_="again") if i else name, *_step_cells(time)])
    heads = ["arm", "placement", "predicted", "expected between", "measured", "quartiles", "measured / predicted"]
    caption = "Step times: forward and backward of one whole step, without the optimizer."
    return grid(caption, heads, body, text_columns=(0, 1)) if body else None


def _step_cells(time: StepTime) -> list[object]:
    if time.predicted_s is None and time.measured_s is None:
        return [time.name, el("span", "not possible", title=time.reason), MISSING, MISSING, MISSING, MISSING]
    ratio = time.measured_s / time.predicted_s if time.measured_s is not None and time.predicted_s else None
    return [
        el("b", time.name) if time.name == "plan" else time.name,
        units.duration(time.predicted_s),
        units.duration_range(time.predicted_interval),
        units.duration(time.measured_s)
        if time.measured_s is not None
        else el("span", "not measured", title=time.reason),
        units.duration_range(time.measured_iqr),
        units.fixed(ratio, 2),
    ]


def launches(run: Run, styles: Mapping[str, Style]) -> Markup | None:
    """Launches by device and operation, one column an arm."""
    counted = {arm.name: table(arm.summary, "launches") for arm in run.arms}
    arms = [arm for arm in run.arms if any(isinstance(ops, Mapping) and ops for ops in counted[arm.name].values())]
    totals: dict[tuple[str, str], float] = {}
    for arm in arms:
        for device, ops in counted[arm.name].items():
            for op, n in (ops if isinstance(ops, Mapping) else {}).items():
                totals[str(device), str(op)] = totals.get((str(device), str(op)), 0) + (n if units.is_number(n) else 0)
    if not totals:
        return None
    body: list[list[object]] = []
    for device in dict.fromkeys(device for device, _ in sorted(totals)):
        mine = sorted((key for key in totals if key[0] == device), key=lambda key: (-totals[key], key[1]))
        sums = [sum(v for v in table(counted[arm.name], device).values() if units.is_number(v)) for arm in arms]
        body.append([el("b", device), el("b", "all"), *(el("b", units.count(n)) if n else MISSING for n in sums)])
        for _, op in mine:
            cells = [table(counted[arm.name], device).get(op) for arm in arms]
            body.append([el("span", device, class_="again"), el("code", op), *(units.count(n) for n in cells)])
    caption = (
        "Launches counted while each arm trained, all seeds together, by device and operation: what really ran where."
    )
    heads: list[object] = ["device", "operation", *(arm_name(arm.name, styles[arm.name]) for arm in arms)]
    return grid(caption, heads, body, text_columns=(0, 1))


_RATES = {"flops": "GFLOP/s", "bandwidth": "GB/s"}


def environment(data: Mapping[str, Any]) -> Markup:
    """Everything in `environment.json`, nested keys joined by dots; a list of mappings as a table of its own."""
    flat: list[tuple[str, str]] = []
    lists: dict[str, list[Mapping[str, Any]]] = {}
    _flatten({key: value for key, value in data.items() if key != "command"}, "", flat, lists)
    parts = [facts(flat, class_="facts long")] if flat else []
    for key, found in lists.items():
        keys = dict.fromkeys(name for row in found for name in row if name != "provenance")
        heads = [name for name in keys if any(row.get(name) not in (None, "", [], False) for row in found)]
        body = [[plain(row.get(head), head) for head in heads] for row in found]
        titles = [head.removesuffix("_bytes").removesuffix("_s").replace("_", " ") for head in heads]
        words = [i for i, head in enumerate(heads) if any(isinstance(row.get(head), str) for row in found)]
        parts.append(grid(key.replace("_", " "), titles, body, text_columns=words))
    return join(parts)


def _flatten(
    data: Mapping[str, Any], prefix: str, flat: list[tuple[str, str]], lists: dict[str, list[Mapping[str, Any]]]
) -> None:
    for key, value in data.items():
        if value in (None, "", [], {}):
            continue
        if isinstance(value, Mapping):
            _flatten(value, f"{prefix}{key}.", flat, lists)
        elif found := rows(data, key):
            lists[f"{prefix}{key}".replace("devices.", "")] = found
        else:
            flat.append((f"{prefix}{key}".replace("versions.", ""), plain(value, str(key))))


def plain(value: Any, key: str = "") -> str:
    """A value from a JSON file as text, with the unit that its key names."""
    if value is None or value in ("", [], {}):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes") and units.is_number(value):
        return units.size(value)
    if key in _RATES and units.is_number(value):
        return f"{units.significant(value / 1e9)} {_RATES[key]}"
    if key.endswith("_s") and units.is_number(value):
        return units.duration(value)
    if key.endswith("_tokens"):
        return units.count(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value)
    return str(value)
