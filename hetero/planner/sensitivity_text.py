"""The answers of `hetero.planner.sensitivity` as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetero.planner.plans import unit
from hetero.planner.words import against, amount, placement, table

if TYPE_CHECKING:
    from hetero.planner.plans import Plan
    from hetero.planner.sensitivity import Answer, Sensitivity

_MORE = {"memory": "1 GiB more: {}", "link": "1 GB/s more: {}", "device": "one more like {}"}
_MOST_NOTES = 8


def sensitivity_text(plan: Plan, found: Sensitivity) -> list[str]:
    """Lines with two tables: what one more of each thing would bring, and what each layer would cost elsewhere."""
    rows = [["changed", "best plan", "against the plan", "placement"]]
    for answer in (*found.memories, *found.links, *found.devices):
        name = _MORE[answer.kind].format(answer.subject)
        if answer.value is None:
            rows.append([name, "-", "-", answer.reason])
        else:
            rows.append([name, _amount(answer.value, plan), _effect(answer, plan), placement(answer.stages)])
    return [*table(rows), "", *_layer_table(plan, found)]


def answer_text(plan: Plan, answer: Answer) -> str:
    """Why a layer is not on a device, in one sentence or two."""
    layer, device = answer.subject.rsplit("=", 1)
    if answer.value is None:
        return f"{layer} is not on {device}: {answer.reason}"
    best = f"best plan with it there: {_amount(answer.value, plan)}, {placement(answer.stages)}"
    if any(stage.device == device and layer in stage.layers for stage in plan.stages):
        return f"{layer} is on {device}"
    if not answer.change:
        return f"{layer} might as well be on {device}; {best}"
    effect = f"{_effect(answer, plan)} against the plan's {_amount(plan.value, plan)}"
    return f"{layer} is not on {device}: {effect}; {best}"


def _amount(value: float, plan: Plan) -> str:
    return amount(value, unit(plan.objective))


def _layer_table(plan: Plan, found: Sensitivity) -> list[str]:
    """Each layer's row: its device, and what the best plan with the layer on each other kind of device costs."""
    answers = {tuple(answer.subject.rsplit("=", 1)): answer for answer in found.layers}
    if not answers:
        return []
    columns = list(dict.fromkeys(device for _, device in answers))
    notes: dict[str, str] = {}
    rows = [["layer", "on", *(f"held on {device}" for device in columns)]]
    for stage in plan.stages:
        for layer in stage.layers:
            cells = [_cell(answers.get((layer, device)), plan, notes) for device in columns]
            rows.append([layer, stage.device, *cells])
    shown = [f"{mark} {reason}" for reason, mark in notes.items()]
    more = [f"and {len(shown) - _MOST_NOTES} more reasons"] if len(shown) > _MOST_NOTES else []
    return [*table(rows), *shown[:_MOST_NOTES], *more]


def _cell(answer: Answer | None, plan: Plan, notes: dict[str, str]) -> str:
    if answer is None:
        return "as planned"
    if answer.value is not None:
        return _effect(answer, plan)
    return "no " + notes.setdefault(answer.reason, f"[{len(notes) + 1}]")


def _effect(answer: Answer, plan: Plan) -> str:
    assert answer.value is not None
    words = against(answer.value, plan.value) if answer.change else "no change"
    return words if answer.proof == "optimal" else f"{words} (search not complete)"
