"""Predicted against measured steps of each arm's plan and its alternatives: `heteroq plan --validate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hetero
import lm
from experiments import planning
from experiments.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.planning import Setting
    from hetero.validation import Outcome, Validation

STEPS = 20
"""Steps to measure of each placement, unless told otherwise."""


def validate_arm(setting: Setting, arm: str, *, steps: int = STEPS) -> tuple[hetero.Plan, Validation]:
    """Plan an arm, write down what its steps should take, and measure them.

    Raises:
        ConfigError: fewer than one step, simulated devices, or the predictions can't be written.
        PlacementError: no placement is possible.
        StageError: a stage fails.
    """
    if steps < 1:
        raise ConfigError(f"--steps has to be at least 1, not {steps}")
    planning.require_real(setting)
    costs = planning.costs_of(setting, arm)
    plan = planning.plan_arm(setting, arm, costs)
    try:
        found = hetero.validate(
            planning.build_arm(setting, arm),
            plan,
            costs,
            planning.validation_batches(setting, steps),
            topology=setting.topology,
            loss=lm.loss,
            steps=steps,
        )
    except OSError as error:
        raise ConfigError(f"can't write the predictions: {error.strerror}", found=str(error.filename)) from None
    return plan, found


def validation_text(plan: hetero.Plan, found: Validation) -> str:
    """Predicted and measured times in a table, and whether the order was the predicted one."""
    rows = [["placement", "predicted [ms]", "expected within", "measured [ms]", "quartiles", "error", "inside"]]
    rows += [_row(one) for one in found.outcomes]
    lines = [f"a training step: {plan.n_microbatches} micro-batches, {plan.schedule}", "", *_table(rows), ""]
    for one in found.outcomes:
        if one.measured_s is None:
            lines.append(f"not measured: {one.prediction.name}: {one.reason}")
    if found.median_error is not None:
        lines.append(f"median error {100 * found.median_error:.1f} %; {_ranking(found)}")
    bases = dict.fromkeys(one.prediction.basis for one in found.outcomes if one.prediction.basis)
    lines += [f"intervals from {basis}" for basis in bases]
    lines.append(f"predictions, written before the first step: {found.file}")
    if not found.is_complete:
        lines.append("interrupted: what was measured so far is kept")
    return "\n".join(lines)


def _row(one: Outcome) -> list[str]:
    prediction = one.prediction
    row = [prediction.name, _ms(prediction.predicted_s), _range_ms(prediction.interval_s)]
    row += [_ms(one.measured_s), _range_ms(one.quartiles_s)]
    row.append("-" if one.error is None else f"{100 * one.error:+.1f} %")
    row.append("-" if one.is_inside is None else "yes" if one.is_inside else "no")
    return row


def _ranking(found: Validation) -> str:
    ranking = found.ranking
    if not ranking.n_apart:
        return "no order was predicted: all intervals overlap"
    right = ranking.n_apart - len(ranking.wrong)
    text = f"order right in {right} of {ranking.n_apart} pairs whose intervals don't overlap"
    wrong = "".join(f"; {slow} was faster than {fast}" for fast, slow in ranking.wrong)
    return text + wrong


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


def _range_ms(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{_ms(interval[0])} to {_ms(interval[1])}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
