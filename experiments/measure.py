"""Step times of a plan and of its alternatives, measured in turn on a throw-away copy of the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import lm
from experiments import planning
from hetero.runtime.turns import Arrangement, measure_in_turn, placed_copies, quartiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    import hetero
    from experiments.planning import Setting


@dataclass(frozen=True)
class StepTime:
    """What a step (forward and backward passes) takes in one placement.

    Attributes:
        name: `plan`, or the alternative's name.
        predicted_s: what the planner expects [s]; None: not possible.
        measured_s: median [s]; None: not measured.
        measured_iqr_s: quartiles [s]; None: not measured.
        reason: why it is not possible or was not measured.
    """

    name: str
    predicted_s: float | None
    measured_s: float | None = None
    measured_iqr_s: tuple[float, float] | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def step_times(setting: Setting, arm: str, plan: hetero.Plan) -> list[StepTime]:
    """Measure the plan and each single device, a few steps of each in turn.

    In turn, so that a slow moment of the machine hits all alike. The models are copies: training is not touched.

    Args:
        setting: of the run.
        arm: whose model.
        plan: of the arm, with its alternatives.

    Returns:
        The plan first, then its alternatives in their order.
    """
    steps = setting.config.plan.alternative_steps
    of_plan = Arrangement(planning.stages_of(plan), plan.recomputed)
    predicted: list[tuple[str, Arrangement, float | None, str]] = [("plan", of_plan, plan.value, "")]
    for other in plan.alternatives:
        predicted.append((other.name, Arrangement(other.stages, other.recomputed), other.value, other.reason))
    wanted = {one: None for name, one, _, _ in predicted if one.stages and is_measured(name)}
    reasons: dict[Arrangement, str] = {}
    found = _interleaved(setting, arm, plan, list(wanted), steps, reasons) if steps else {}
    times = []
    for name, one, value, reason in predicted:
        if one in found:
            low, median, high = found[one]
            times.append(StepTime(name, value, median, (low, high)))
        else:
            times.append(StepTime(name, value, reason=reason or reasons.get(one, "not measured")))
    return times


def is_measured(name: str) -> bool:
    """The plan and single devices; other alternatives are priced only, unless they are the same placement."""
    return name == "plan" or name.endswith(" alone")


def _interleaved(
    setting: Setting,
    arm: str,
    plan: hetero.Plan,
    arrangements: Sequence[Arrangement],
    steps: int,
    reasons: dict[Arrangement, str],
) -> dict[Arrangement, tuple[float, float, float]]:
    """Quartiles of the step time [s] of each arrangement; `reasons` gets why one could not be run."""
    model = planning.build_arm(setting, arm)
    times: dict[Arrangement, list[float]] = {}
    m, schedule = plan.n_microbatches, plan.schedule
    with placed_copies(
        model, arrangements, setting.topology, reasons, loss=lm.loss, n_microbatches=m, schedule=schedule
    ) as placed:
        measure_in_turn(placed, planning.validation_batches(setting, steps), steps, times)
    return {one: quartiles(values) for one, values in times.items()}
