"""A plan in words and in characters, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetero.planner.plans import CHAIN, unit
from hetero.planner.sensitivity_text import sensitivity_text
from hetero.planner.words import against, amount, nbytes, placement, seconds, table
from hetero.schedule import BACKWARD, FORWARD, GPIPE, ONE_F_ONE_B, Schedule, simulate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.planner.plans import Alternative, Plan
    from hetero.planner.sensitivity import Sensitivity
    from hetero.topology import Topology

_OBJECTIVES = {
    "latency": "time of one micro-batch, forwards through all stages",
    "throughput": "time from one micro-batch to the next, forwards",
    "train_step": "forward and backward of a step",
    "energy": "energy of a step, forward and backward",
    "dollars": "price of a step, forward and backward",
}
_PROOFS = {
    "optimal": "optimal under {}",
    "bounded": "bounded under {}: the search ran out of time",
    "heuristic": "heuristic: the placement was given, not searched for, and has no bound",
}
_ROUNDING = 1e-9  # a part of the value: the solvers add the same times in another order
_PRICES = {GPIPE: "the step-time formula", ONE_F_ONE_B: "the simulated schedule"}


def explain(plan: Plan, sensitivity: Sensitivity | None = None) -> str:
    """The plan in words: value, bound, gap, proof, binding constraint and what the alternatives would cost.

    Args:
        plan: to be explained.
        sensitivity: of `hetero.planner.sensitivity`: also what one more GiB, GB/s or device would bring, and what each
            layer would cost elsewhere.
    """
    low, high = plan.interval_s
    proof = _PROOFS[plan.proof].format(_PRICES[plan.schedule])
    lines = [
        f"{_OBJECTIVES[plan.objective]}, {plan.n_microbatches} micro-batches, {plan.schedule}",
        f"  predicted    {_amount(plan, plan.value)}  (expected within {_amount(plan, low)} to {_amount(plan, high)}, "
        f"from {plan.interval_basis})",
        f"  lower bound  {_amount(plan, plan.lower_bound)}, gap {100 * plan.gap:.2f} %: {proof}",
        *(f"  schedule     {text}" for text in _difference(plan, simulate(plan))),
        f"  solver       {plan.solver}, {seconds(plan.seconds)}",
        f"  binding      {plan.binding_constraint}",
        "",
        *_stage_table(plan),
    ]
    if plan.alternatives:
        lines += ["", *_alternative_table(plan), *_faster_alternatives(plan)]
    if sensitivity is not None:
        lines += ["", *sensitivity_text(plan, sensitivity)]
    return "\n".join(lines)


def draw(plan: Plan, topology: Topology | None = None, *, width: int = 72) -> str:
    """The plan as a picture: which device runs which layers, and the schedule of a step.

    Args:
        plan: to be drawn.
        topology: says which devices share cores; None: those of the plan do, for which it was priced.
        width: of the picture in columns, without the device names.
    """
    return "\n".join([*_chain(plan, width), "", *_gantt(plan, topology, width)])


def _amount(plan: Plan, value: float) -> str:
    return amount(value, unit(plan.objective))


def _stage_table(plan: Plan) -> list[str]:
    m = 1 if plan.objective == "latency" else plan.n_microbatches
    is_forward = plan.objective in ("latency", "throughput")
    whole = m * plan.value if plan.objective == "throughput" else simulate(plan).makespan_s
    rows = [["stage", "device", "layers", "forward", "backward", "+-", "busy", "memory"]]
    for k, stage in enumerate(plan.stages):
        work = stage.forward_s + (0.0 if is_forward else stage.backward_s)
        busy = f"{100 * m * work / whole:.0f} %" if whole else "-"
        times = [seconds(stage.forward_s), seconds(stage.backward_s), f"{100 * stage.error:.0f} %"]
        rows.append([str(k), stage.device, _span(stage.layers), *times, busy, nbytes(stage.memory_bytes)])
    return table(rows)


def _alternative_table(plan: Plan) -> list[str]:
    rows = [["alternative", "value", "against the plan", "placement"]]
    for other in plan.alternatives:
        if other.value is None:
            status = "-" if other.reason.startswith("not priced") else "not possible"
            rows.append([other.name, "-", status, other.reason])
        else:
            figures = [_amount(plan, other.value), against(other.value, plan.value)]
            rows.append([other.name, *figures, placement(other.stages)])
    return table(rows)


def _faster_alternatives(plan: Plan) -> list[str]:
    """A note where a placement that the search did not see is faster, with the reason why it did not."""
    least = plan.value * (1 - _ROUNDING)
    faster = [other for other in plan.alternatives if other.value is not None and other.value < least]
    return [f"note: {other.name} is faster: {_why_unseen(plan, other)}" for other in faster]


def _why_unseen(plan: Plan, other: Alternative) -> str:
    devices = [device for device, _, _ in other.stages]
    if plan.solver == CHAIN and len(set(devices)) < len(devices):
        return "it gives a device several runs of layers, searched with contiguous=False only"
    return "the search was not complete"


def _difference(plan: Plan, schedule: Schedule) -> list[str]:
    """A line where the formula, which the planner optimises, and the simulated step differ."""
    simulated = schedule.makespan_s
    # The other objectives are not the time of a schedule, and that of 1f1b is the simulated one.
    is_formula = plan.objective in ("latency", "train_step") and plan.schedule == GPIPE
    if not is_formula or abs(simulated - plan.value) <= 1e-3 * plan.value:
        return []
    how = "better" if simulated < plan.value else "worse"
    return [
        f"formula {seconds(plan.value)}; simulated schedule {seconds(simulated)}: "
        f"stages that share a core overlap {how} than the formula assumes"
    ]


def _span(layers: Sequence[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} … {layers[-1]} ({len(layers)})"


def _chain(plan: Plan, width: int) -> list[str]:
    """One row for each device; a column (or more) for each layer, in order."""
    n_layers = plan.stages[-1].last + 1
    cell = max(1, min(3, width // n_layers))
    devices = list(dict.fromkeys(stage.device for stage in plan.stages))
    margin = max(len(device) for device in devices)
    numbers = "".join(str(i).rjust(cell) if i % _every(n_layers, cell) == 0 else " " * cell for i in range(n_layers))
    lines = [f"{'layer'.ljust(margin)} {numbers}"]
    for device in devices:
        inside = {i for stage in plan.stages if stage.device == device for i in range(stage.first, stage.last + 1)}
        lines.append(
            f"{device.ljust(margin)} " + "".join(("█" if i in inside else "·") * cell for i in range(n_layers))
        )
    return lines


def _every(n_layers: int, cell: int) -> int:
    """Every how many layers a number fits into the columns."""
    return 1 if cell > len(str(n_layers - 1)) else 1 + len(str(n_layers)) // cell * 2


def _gantt(plan: Plan, topology: Topology | None, width: int) -> list[str]:
    """The schedule: each device's share of forward (▓) and backward (░) work in each column's time."""
    schedule = simulate(plan, topology)
    if not schedule.makespan_s:
        return []
    devices = list(dict.fromkeys(stage.device for stage in plan.stages))
    margin = max(len(device) for device in devices)
    column = schedule.makespan_s / width
    lines = []
    for device in devices:
        events = [event for event in schedule.events if event.device == device]
        line = ""
        for k in range(width):
            middle = (k + 0.5) * column
            phase = next((e.phase for e in events if e.start_s <= middle < e.end_s), "")
            line += {FORWARD: "▓", BACKWARD: "░"}.get(phase, " ")
        lines.append(f"{device.ljust(margin)} {line}".rstrip())
    end = seconds(schedule.makespan_s)
    lines.append(f"{' ' * margin} 0{end.rjust(width - 1)}")
    return [*lines, f"{' ' * margin} ▓ forward  ░ backward, simulated", *_difference(plan, schedule)]
