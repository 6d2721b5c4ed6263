"""Step times of a plan and of its alternatives, measured in turn on a throw-away copy of the model."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import hetero
import lm
from experiments import arms, planning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.planning import Setting

TURN = 5  # steps of one placement after another; the first finds the caches as the placement before left them

Stages = tuple[tuple[str, int, int], ...]


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
    predicted: list[tuple[str, Stages, float | None, str]] = [("plan", planning.stages_of(plan), plan.value, "")]
    predicted += [(other.name, other.stages, other.value, other.reason) for other in plan.alternatives]
    wanted = {tuple(stages): None for name, stages, _, _ in predicted if stages and is_measured(name)}
    found = _interleaved(setting, arm, list(wanted), plan.n_microbatches, steps) if steps else {}
    times = []
    for name, stages, value, reason in predicted:
        if quartiles := found.get(tuple(stages)):
            low, median, high = quartiles
            times.append(StepTime(name, value, median, (low, high)))
        else:
            times.append(StepTime(name, value, reason=reason or "not measured"))
    return times


def is_measured(name: str) -> bool:
    """The plan and single devices; other alternatives are priced only, unless they are the same placement."""
    return name == "plan" or name.endswith(" alone")


def _interleaved(
    setting: Setting, arm: str, placements: Sequence[Stages], m: int, steps: int
) -> dict[Stages, tuple[float, float, float]]:
    """Quartiles of the step time [s] of each placement."""
    config = setting.config
    model = arms.build(config, arm, config.seeds[0], setting.corpus.tokenizer.vocab_size)
    times: dict[Stages, list[float]] = {stages: [] for stages in placements}
    with contextlib.ExitStack() as stack:
        copies = {stages: copy.deepcopy(model) for stages in placements}  # placing moves a model to its devices
        placed = {
            stages: stack.enter_context(
                hetero.place_stages(one, stages, setting.topology, loss=lm.loss, n_microbatches=m)
            )
            for stages, one in copies.items()
        }
        for turn in range(1 + math.ceil(steps / (TURN - 1))):  # the first turn is to warm up
            for stages, one in placed.items():
                for k in range(TURN):
                    batch = planning.example_batch(setting, turn * TURN + k)
                    copies[stages].zero_grad()
                    start = time.perf_counter()
                    one.step(batch)
                    if turn > 0 and k > 0 and len(times[stages]) < steps:
                        times[stages].append(time.perf_counter() - start)
    return {stages: _quartiles(values) for stages, values in times.items()}


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
