"""Everything that a run found out, as the content of `summary.json`; the report reads nothing else but records."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from experiments import arms, comparison, cost, record, statistics, usage
from quantum import resources

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import hetero
    import quantum
    from experiments.measure import StepTime
    from experiments.planning import Setting

SeedResults = dict[int, dict[str, Any]]

_AVERAGED = ("val_loss", "test_loss", "perplexity", "bits_per_byte", "train_loss", "wall_s", "cpu_s", "tokens_per_s")
UNIT = "nat/token"


def summarise(
    setting: Setting,
    results: Mapping[str, SeedResults],
    plans: Mapping[str, hetero.Plan],
    times: Mapping[str, Sequence[StepTime]],
    *,
    floors: Mapping[str, Mapping[str, float]],
    tuning: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        setting: of the run.
        results: arm -> seed -> what `training.train_seed` returned.
        plans: arm -> plan.
        times: arm -> predicted and measured step times, the plan's first.
        floors: split -> `unigram`, `bigram` [nat/token].
        tuning: where the learning rates come from.
    """
    config = setting.config
    settings = config.comparison
    floor = floors[settings.metric.removesuffix("_loss")]
    losses = {
        arm: {seed: result[settings.metric] for seed, result in by_seed.items()} for arm, by_seed in results.items()
    }
    compared = comparison.compare(losses, metric=settings.metric, margin=settings.margin, alpha=settings.alpha)
    means = {arm: math.fsum(values.values()) / len(values) for arm, values in losses.items()}
    return {
        "name": config.name,
        "created": record.now(),
        "heteroq_version": record.version(),
        "status": "complete",
        "n_seeds": len(config.seeds),
        "seeds": list(config.seeds),
        "metric": settings.metric,
        "unit": UNIT,
        "margin": settings.margin,
        "alpha": settings.alpha,
        "floors": dict(floor),
        "floors_by_split": {split: dict(values) for split, values in floors.items()},
        "data": _data(setting),
        "arms": {arm: _arm(setting, arm, results[arm], plans[arm], times[arm]) for arm in results},
        "comparisons": [one.to_json() for one in compared],
        "verdict": comparison.overall_verdict(compared, means, floor, unit=UNIT),
        "tuning": dict(tuning),
    }


def _data(setting: Setting) -> dict[str, Any]:
    corpus = setting.corpus
    return {
        "name": corpus.source,
        "sha256": corpus.sha256,
        "tokenizer": setting.config.data.tokenizer,
        "vocab_size": corpus.tokenizer.vocab_size,
        "train_tokens": len(corpus.train),
        "val_tokens": len(corpus.val),
        "test_tokens": len(corpus.test),
    }


def _arm(
    setting: Setting, arm: str, results: SeedResults, plan: hetero.Plan, times: Sequence[StepTime]
) -> dict[str, Any]:
    config = setting.config
    model = arms.build(config, arm, config.seeds[0], setting.corpus.tokenizer.vocab_size)
    parameters, trainable = arms.count_parameters(model)
    values = {name: [result[name] for result in results.values()] for name in _AVERAGED}
    used = [usage.Usage.from_json(result["usage"]) for result in results.values()]
    launches: usage.Launches = {}
    for one in used:
        launches = usage.add_launches(launches, one.counted.launches)
    layer = arms.circuit_layer(model)
    return {
        "parameters": parameters,
        "trainable_parameters": trainable,
        "learning_rate": config.train.rate(arm),
        "seeds": {str(seed): _without_usage(result) for seed, result in results.items()},
        "mean": {name: math.fsum(v) / len(v) for name, v in values.items()},
        "interval": {name: statistics.mean_interval(v) for name, v in values.items() if len(v) > 1},
        "cost": _cost(used, layer) | {"parameter_bytes": sum(p.nbytes for p in model.parameters())},
        "plan": _plan(plan, times[0]),
        "alternatives": [time.to_json() for time in times[1:]],
        "launches": launches,
    }


def _without_usage(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "usage"}


def _plan(plan: hetero.Plan, time: StepTime) -> dict[str, Any]:
    return {
        "predicted_s": plan.value,
        "interval_s": list(plan.interval_s),
        "lower_bound_s": plan.lower_bound,
        "proof": plan.proof,
        "measured_s": time.measured_s,
        "measured_iqr_s": time.measured_iqr_s,
        "stages": [{"device": stage.device, "layers": list(stage.layers)} for stage in plan.stages],
    }


def _cost(used: Sequence[usage.Usage], layer: quantum.QuantumLayer | None) -> dict[str, Any]:
    """Mean cost of one training of the arm; circuits, gates, depth and shots as a QPU would have to run them."""
    n = len(used)
    energies = [one.spent.energy_j for one in used]
    energy = None if None in energies else math.fsum(e for e in energies if e is not None) / n
    return {
        "wall_s": math.fsum(one.spent.wall_s for one in used) / n,
        "cpu_s": math.fsum(one.spent.cpu_s for one in used) / n,
        "energy_j": energy,
        "energy_note": cost.NOT_MEASURED if energy is None else "processor packages (RAPL), whole machine",
        "peak_rss_bytes": max(one.spent.peak_rss_bytes for one in used),
    } | _circuits(used[0], layer)


def _circuits(used: usage.Usage, layer: quantum.QuantumLayer | None) -> dict[str, Any]:
    """Circuits, gates and shots of one training, with the time and price that a quantum processor would take."""
    if layer is None:
        counts = dict.fromkeys(("circuits", "gates_1q", "gates_2q", "depth", "shots"), 0)
        return counts | {"qpu_s": 0.0, "usd": 0.0, "usd_note": "no circuits"}
    one = resources.count(layer, 1, backward=False)
    counts = {name: n if name == "depth" else n * used.counted.circuits for name, n in one.items()}
    price = resources.qpu_cost(counts)
    assumed = "" if layer.shots else f"; {resources.ASSUMED_SHOTS} shots a circuit assumed, simulated exactly"
    note = f"estimate from prices of {price['provider']}, {price['date']} ({price['source']}){assumed}"
    return counts | {"qpu_s": price["seconds"], "usd": price["usd"], "usd_note": note}
