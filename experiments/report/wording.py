"""The report's sentences: what was asked, what the arms are, how it was measured, and the limits of the claim."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from experiments.report import units
from experiments.report.figures_placement import step_times
from experiments.report.reading import Run, table

if TYPE_CHECKING:
    from collections.abc import Mapping

SEEDS_FOR_A_CLAIM = 10

ARMS = {
    "baseline": ("the transformer, untouched", "what there is to beat"),
    "hybrid": ("one residual unit replaced by a bottleneck with a trained quantum circuit", "the claim"),
    "twin": (
        "the same bottleneck with a tanh MLP of at least as many parameters in the circuit's place",
        "whether any small network would do as well",
    ),
    "frozen": ("the same circuit with random angles that are never trained", "whether training the circuit matters"),
    "identity": ("the bottleneck alone", "whether anything in its middle matters"),
}


def config_of(run: Run) -> Mapping[str, Any]:
    """The resolved configuration; empty where it can't be read."""
    try:
        data = yaml.safe_load(run.config_text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def question(run: Run) -> str:
    """What was asked, in a sentence or two."""
    names = [arm.name for arm in run.arms]
    unit = table(config_of(run), "quantum").get("unit")
    replaced = f"the residual unit {unit}" if unit else "one residual unit"
    metric = run.metric.replace("_", " ")
    shared = "All arms share seeds, data order, token budget and the initial values of their common weights."
    if "hybrid" in names and "baseline" in names:
        controls = [name for name in ("twin", "frozen", "identity") if name in names]
        beside = f", and do the controls ({', '.join(controls)}) do as well without it" if controls else ""
        return (
            f"Does a trained quantum circuit in place of {replaced} lower the {metric} of the model{beside}? {shared}"
        )
    if len(names) > 1:
        return f"Which of {', '.join(names)} reaches the lowest {metric}? {shared}"
    return f"Which {metric} does {names[0] if names else 'the model'} reach, on which devices, and at what cost?"


def progress(run: Run) -> str:
    """How far each arm is."""
    parts = []
    for arm in run.arms:
        states = [f"seed {seed} {state}" for seed, state in arm.progress.items() if not state.startswith("complete")]
        done = f"{len(arm.seeds)} seed{'' if len(arm.seeds) == 1 else 's'} with results"
        parts.append(f"{arm.name}: {', '.join([done, *states])}")
    return f"{'; '.join(parts)}." if parts else "Nothing has been trained yet."


def key_facts(run: Run) -> list[tuple[str, str]]:
    """Text, model, training and devices, as far as they are known."""
    config = config_of(run)
    model, train, data = table(config, "model"), table(config, "train"), table(run.summary, "data")
    facts = [
        ("text", _join([data.get("name"), data.get("tokenizer") and f"{data['tokenizer']} tokens"])),
        ("training tokens", units.count(data.get("train_tokens"))),
        ("test tokens", units.count(data.get("test_tokens"))),
        ("model", _join([_times(model.get("n_layer"), "block"), model.get("d_model") and f"width {model['d_model']}"])),
        ("training", _join([_times(train.get("steps"), "step"), _batch(train, model)])),
        ("seeds", f"{run.n_seeds} an arm" if len(run.arms) > 1 else str(run.n_seeds)),
        ("devices", _join(dict.fromkeys(str(s.get("device", "?")) for arm in run.arms for s in arm.stages))),
        ("date", str(run.summary.get("created", ""))[:10]),
    ]
    return [(key, value) for key, value in facts if value and value != units.MISSING]


def _join(parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def _times(n: Any, noun: str) -> str:
    return f"{units.count(n)} {noun}{'' if n == 1 else 's'}" if units.is_number(n) else ""


def _batch(train: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    rows, length = train.get("batch_size"), model.get("seq_len")
    return f"{rows} × {length} tokens each" if units.is_number(rows) and units.is_number(length) else ""


def margin(run: Run) -> float | None:
    """The margin of equivalence that was set before the run."""
    value = run.summary.get("margin")
    return float(value) if units.is_number(value) else None


def methods(run: Run) -> list[str]:
    """How the figures came about."""
    tuning = {**run.tuning, **table(run.summary, "tuning")}
    sentences = [
        "Every arm was trained once with each seed. A seed fixes the initial weights, the order of the data and the "
        "dropout masks; arms are compared seed by seed.",
        f"Intervals are of Student's t distribution over seeds: 95 % for means, {run.confidence} for differences. "
        "p values come from the exact sign-flip permutation test of the paired differences; Holm's method corrects "
        "them for the number of all tests, those of equivalence among them.",
        f"Equivalence is tested by two one-sided tests with a margin of {margin(run):g} {run.unit}, set before the run."
        if margin(run)
        else "No margin of equivalence was set before the run, so equivalence is not tested.",
        f"The {run.metric.replace('_', ' ')} is the mean over the whole split, which training did not see."
        if run.metric == "test_loss"
        else f"The {run.metric.replace('_', ' ')} is the mean over the whole split.",
        "Plans were made, and written down with their predictions, before the first step, from a profile of other "
        "steps.",
    ]
    if tuning.get("note"):
        sentences.append(f"Learning rates: {tuning['note']}.".replace("..", "."))
    return sentences


def limits(run: Run) -> list[str]:
    """What the figures don't show, from what the run itself recorded."""
    found = [*_limits_of_seeds(run), *_limits_of_completeness(run), *_limits_of_floors(run)]
    if any(table(arm.summary, "cost").get("circuits") for arm in run.arms):
        found.append(
            "The circuits ran on a simulator. QPU time and price are estimates from counted circuits and dated price "
            "lists; noise, queues and calibration are not part of them."
        )
    if not any(units.is_number(table(arm.summary, "cost").get("energy_j")) for arm in run.arms):
        found.append("Energy was not measured: this machine offers no counter that can be read.")
    data = table(run.summary, "data").get("name") or "one text"
    found.append(
        f"One text ({data}), one model size, one training length: nothing here says what happens at other ones. "
        "Times hold for this machine with what else it was doing."
    )
    return [*found, *_limits_of_predictions(run)]


def _limits_of_seeds(run: Run) -> list[str]:
    n = run.n_seeds
    if len(run.arms) < 2 or n >= SEEDS_FOR_A_CLAIM:
        return []
    if n <= 1:
        return ["One seed: there is no interval and no test, and a difference between arms may be chance alone."]
    return [
        f"{n} seeds are too few for a claim (at least {SEEDS_FOR_A_CLAIM}): with {n} pairs the permutation test can't "
        f"give a p value below {units.p_value(2 / 2**n)}, and intervals this wide hide small differences."
    ]


def _limits_of_completeness(run: Run) -> list[str]:
    found = []
    empty = [arm.name for arm in run.arms if not arm.seeds]
    if empty:
        found.append(f"Without results: {', '.join(empty)}.")
    fewer = [arm.name for arm in run.arms if 0 < len(arm.seeds) < run.n_seeds]
    if fewer:
        found.append(f"With fewer seeds than the others: {', '.join(fewer)}.")
    if run.missing:
        found.append(f"Missing or unreadable in the run folder: {', '.join(run.missing)}.")
    return found


def _limits_of_floors(run: Run) -> list[str]:
    floor = table(run.summary, "floors").get("bigram")
    if not units.is_number(floor):
        return []
    worse = [arm.name for arm in run.arms if arm.values(run.metric) and max(arm.values(run.metric)) > floor]
    if not worse:
        return []
    return [f"No better than counting pairs of characters (bigram floor), on at least one seed: {', '.join(worse)}."]


def _limits_of_predictions(run: Run) -> list[str]:
    plans = [time for arm in run.arms for time in step_times(arm) if time.name == "plan"]
    checked = [p for p in plans if p.predicted_interval and p.measured_s is not None]
    outside = [p for p in checked if not p.predicted_interval[0] <= (p.measured_s or 0) <= p.predicted_interval[1]]  # type: ignore[index]
    if not outside:
        return []
    return [
        f"The measured step time lies outside of the predicted interval for {len(outside)} of {len(checked)} plans."
    ]
