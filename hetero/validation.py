"""Predictions held against the clock: written down first, then measured.

The prediction of a plan and of its alternatives goes to a file before the first step is run. Then all of them that can
run here take a few steps by turns, on batches that nothing was profiled with. What came out is kept beside the
prediction and in the history (`hetero.history`), which sets the intervals of later predictions.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import secrets
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hetero import cache, history
from hetero.errors import PlacementError
from hetero.planner.pricing import evaluate
from hetero.runtime.stage import Loss, token_cross_entropy
from hetero.runtime.turns import Arrangement, measure_in_turn, placed_copies, quartiles

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from hetero.cost import Costs
    from hetero.planner.plans import Plan
    from hetero.runtime.pipeline import Batch
    from hetero.runtime.turns import Stages
    from hetero.topology import Topology

_LEAST_STEPS = 5  # the median of fewer says more about the moment than about the prediction: no entry in the history


@dataclass(frozen=True)
class Prediction:
    """What a training step in one placement should take.

    Attributes:
        name: `plan`, or the alternative's name; those of equal placements are joined.
        stages: (device, first layer, last layer) of each stage.
        recomputed: names of the layers that are run again in their backward pass.
        predicted_s: time of a step [s]; None: not possible.
        interval_s: (low, high) of it [s]; None likewise.
        basis: what the interval rests on, in words.
        reason: why there is no prediction.
    """

    name: str
    stages: Stages
    recomputed: tuple[str, ...]
    predicted_s: float | None
    interval_s: tuple[float, float] | None
    basis: str
    reason: str = ""

    @property
    def arrangement(self) -> Arrangement:
        """What is to be run."""
        return Arrangement(self.stages, self.recomputed)


@dataclass(frozen=True)
class Outcome:
    """A prediction and what came true.

    Attributes:
        prediction: as it was written before the first step.
        measured_s: median of the steps [s]; None: not measured.
        quartiles_s: of the steps [s]; None likewise.
        n_steps: that were measured.
        error: (predicted - measured) / measured; None likewise.
        is_inside: whether the measured time lies in the interval; None likewise.
        reason: why it wasn't measured.
    """

    prediction: Prediction
    measured_s: float | None = None
    quartiles_s: tuple[float, float] | None = None
    n_steps: int = 0
    error: float | None = None
    is_inside: bool | None = None
    reason: str = ""


@dataclass(frozen=True)
class Ranking:
    """Whether what was predicted to be faster was faster.

    Attributes:
        n_apart: pairs of measured placements whose intervals don't overlap: those of which an order was predicted.
        wrong: (predicted to be faster, but slower than) of those.
        n_overlapping: other pairs.
    """

    n_apart: int
    wrong: tuple[tuple[str, str], ...]
    n_overlapping: int


@dataclass(frozen=True)
class Validation:
    """The outcome of a plan's validation.

    Attributes:
        file: where the predictions were written before the first step; the outcomes lie beside it.
        outcomes: the plan's first, then its alternatives'.
        ranking: over those that were measured.
        median_error: median of the absolute relative errors; None: nothing was measured.
        is_complete: whether all steps were run; otherwise Ctrl-C came.
    """

    file: Path
    outcomes: tuple[Outcome, ...]
    ranking: Ranking
    median_error: float | None
    is_complete: bool

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self) | {"file": str(self.file)}


def validate(
    model: nn.Module,
    plan: Plan,
    costs: Costs,
    batches: Sequence[Batch],
    *,
    topology: Topology,
    loss: Loss = token_cross_entropy,
    steps: int = 20,
    file: Path | None = None,
) -> Validation:
    """Predict training steps of a plan and of its alternatives, write that down, and then measure.

    What is predicted and run is a step in the plan's schedule, whatever objective the plan was made for. The model is
    copied, and not changed. Ctrl-C ends the measuring; what was measured so far is kept.

    Args:
        model: whose layers were planned.
        plan: of them.
        costs: for which the plan was made.
        batches: to train on, by turns; others than the profile's, of its size.
        topology: for which the plan was made.
        loss: (output, targets) -> mean.
        steps: to measure of each placement.
        file: for the predictions; None: a new one in the folder of `hetero.cache`.

    Raises:
        PlacementError: the plan is for other layers.
        StageError: a stage fails.
        OSError: the predictions can't be written; nothing is run then.
    """
    layers: Sequence[tuple[str, nn.Module]] = model.layers()  # type: ignore[operator]  # any that has it
    planned = [layer.name for layer in costs.layers]
    if (names := [name for name, _ in layers]) != planned:
        raise PlacementError(
            "the plan is for another model", found=f"layers {', '.join(planned)}", expected=f"layers {', '.join(names)}"
        )
    predicted = predictions(plan, costs, topology)
    file = write_predictions(plan, predicted, file)
    times: dict[Arrangement, list[float]] = {}
    reasons: dict[Arrangement, str] = {}
    is_complete = True
    try:
        wanted = [one.arrangement for one in predicted if one.predicted_s is not None]
        m, schedule = plan.n_microbatches, plan.schedule
        with placed_copies(model, wanted, topology, reasons, loss=loss, n_microbatches=m, schedule=schedule) as placed:
            measure_in_turn(placed, batches, steps, times)
    except KeyboardInterrupt:
        is_complete = False
    outcomes = tuple(
        _outcome(one, times.get(one.arrangement, []), reasons.get(one.arrangement, "")) for one in predicted
    )
    errors = [abs(one.error) for one in outcomes if one.error is not None]
    median_error = statistics.median(errors) if errors else None
    result = Validation(file, outcomes, ranking(outcomes), median_error, is_complete)
    cache.write_json(measured_file(file), result.to_json())
    history.append(_pairs(outcomes, costs, topology))
    return result


def predictions(plan: Plan, costs: Costs, topology: Topology) -> tuple[Prediction, ...]:
    """What steps of the plan and of its alternatives should take, with intervals from the history where it can tell."""
    of_plan = Arrangement(tuple((s.device, s.first, s.last) for s in plan.stages), plan.recomputed)
    names: dict[Arrangement, list[str]] = {of_plan: ["plan"]}
    impossible = []
    for other in plan.alternatives:
        if other.stages:
            names.setdefault(Arrangement(tuple(other.stages), other.recomputed), []).append(other.name)
        else:
            impossible.append(Prediction(other.name, (), (), None, None, "", other.reason))
    pairs = history.read()
    return (
        *(_predict(", ".join(own), one, plan, costs, topology, pairs) for one, own in names.items()),
        *impossible,
    )


def _predict(
    name: str, one: Arrangement, plan: Plan, costs: Costs, topology: Topology, pairs: Sequence[history.Pair]
) -> Prediction:
    try:
        priced = evaluate(one.stages, costs, topology, "train_step", recomputed=one.recomputed, schedule=plan.schedule)
    except PlacementError as error:
        return Prediction(name, *one, None, None, "", error.message)
    kind = history.kind_of((device for device, _, _ in one.stages), costs, topology)
    interval, basis = history.interval_s(priced.value, priced.interval_s, kind, pairs)
    return Prediction(name, *one, priced.value, interval, basis)


def write_predictions(plan: Plan, predicted: Sequence[Prediction], file: Path | None = None) -> Path:
    """Write predictions to a file as a whole, on the disk before this returns.

    Raises:
        OSError: they can't be written.
    """
    now = datetime.datetime.now(datetime.UTC)
    if file is None:
        file = cache.folder() / "predictions" / f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    made = now.isoformat(timespec="milliseconds")
    record = {"form": 1, "made": made, "predictions": [dataclasses.asdict(one) for one in predicted]}
    cache.write_json(file, record | {"plan": plan.to_json()})
    return file


def measured_file(file: Path) -> Path:
    """Where the outcomes of the predictions in a file are written."""
    return file.with_name(f"{file.stem}.measured.json")


def ranking(outcomes: Sequence[Outcome]) -> Ranking:
    """Whether the measured order is the predicted one, of placements whose intervals don't overlap."""
    apart, overlapping, wrong = 0, 0, []
    measured = [
        (one.prediction.interval_s, one.measured_s, one.prediction.name)
        for one in outcomes
        if one.measured_s is not None and one.prediction.interval_s is not None
    ]
    for (fast, fast_s, fast_name), (slow, slow_s, slow_name) in itertools.combinations(sorted(measured), 2):
        if fast[1] >= slow[0]:
            overlapping += 1
        else:
            apart += 1
            if fast_s >= slow_s:
                wrong.append((fast_name, slow_name))
    return Ranking(apart, tuple(wrong), overlapping)


def _outcome(prediction: Prediction, times: Sequence[float], reason: str) -> Outcome:
    if not times or prediction.predicted_s is None or prediction.interval_s is None:
        return Outcome(prediction, reason=prediction.reason or reason or "interrupted before its first timed step")
    low, median, high = quartiles(times)
    inside = prediction.interval_s[0] <= median <= prediction.interval_s[1]
    return Outcome(prediction, median, (low, high), len(times), (prediction.predicted_s - median) / median, inside)


def _pairs(outcomes: Sequence[Outcome], costs: Costs, topology: Topology) -> list[history.Pair]:
    return [
        history.Pair(
            history.kind_of((device for device, _, _ in one.prediction.stages), costs, topology),
            one.prediction.predicted_s,
            one.prediction.interval_s,
            one.measured_s,
            one.n_steps,
        )
        for one in outcomes
        if one.prediction.predicted_s and one.prediction.interval_s and one.measured_s and one.n_steps >= _LEAST_STEPS
    ]
