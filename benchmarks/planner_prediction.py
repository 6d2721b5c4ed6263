"""Claims: a plan's step takes what was predicted before it ran, and two one-core devices beat the best one of them.

    python benchmarks/planner_prediction.py [--steps 8] [--rows NAME ...] [--tiny]

Each row is a model on sets of one-core devices. Its layers are profiled anew; the prediction of the plan and of its
alternatives is written to a file; then all of them run by turns, on other batches (`hetero.validate`). A step is the
forward and backward passes of 8 micro-batches.

`error`: |predicted - measured| / measured of the medians. `inside`: share of measured medians in their intervals.
`ranking`: pairs whose intervals don't overlap, and how many of them were measured in the predicted order.
`speed`: of the plan with the smallest predicted step over all device sets, against each device alone with the number of
micro-batches that suits it best (of 1, 2, 4, 8, found by trying), for models of width 256 and more. `bubble_limit` is
what 8 micro-batches allow on so many equal devices without any other loss: devices * 8 / (8 + devices - 1).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from common import interleaved, summary, write

import hetero
import lm

if TYPE_CHECKING:
    from collections.abc import Callable

    from hetero.validation import Validation

M = 8
VOCABULARY = 96
MODELS = {  # layers, width, heads, sequence length, rows
    "6x64": (6, 64, 4, 64, 32),
    "4x128": (4, 128, 4, 64, 16),
    "4x256": (4, 256, 4, 128, 16),
    "3x384": (3, 384, 6, 128, 16),
}
TINY = {"2x16": (2, 16, 2, 16, 8), "1x256": (1, 256, 4, 8, 8)}
PAIRS = (("cpu", "opencl:0.1"), ("opencl:0.0", "opencl:0.1"))
SPLITS = (1, 2, 4, 8)
WIDE = 256


def make(n_layer: int, d_model: int, n_head: int, seq_len: int) -> lm.Transformer:
    config = lm.ModelConfig(n_layer=n_layer, d_model=d_model, n_head=n_head, vocab_size=VOCABULARY, seq_len=seq_len)
    return lm.Transformer(config, generator=torch.Generator().manual_seed(0))


def batch_of(rows: int, seq_len: int, seed: int) -> SimpleNamespace:
    tokens = torch.randint(VOCABULARY, (rows, seq_len + 1), generator=torch.Generator().manual_seed(seed))
    return SimpleNamespace(inputs=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous(), context={})


def predict_and_measure(
    model: lm.Transformer, rows: int, devices: tuple[str, ...], steps: int
) -> tuple[hetero.Plan, hetero.Topology, Validation]:
    """Profile, plan, write the prediction down, and measure."""
    topology, seq_len = hetero.discover(devices), model.config.seq_len
    example = batch_of(rows, seq_len, 0)
    costs = hetero.profile(model.layers(), example, topology, n_microbatches=M, loss=lm.loss, refresh=True)
    plan = hetero.plan(costs, topology, n_microbatches=M, objective="train_step")
    others = [batch_of(rows, seq_len, seed) for seed in range(1, 9)]
    return plan, topology, hetero.validate(model, plan, costs, others, topology=topology, loss=lm.loss, steps=steps)


def figures_of(plan: hetero.Plan, found: Validation) -> dict[str, Any]:
    outcomes = [one for one in found.outcomes if one.measured_s is not None]
    return {
        "plan": [[stage.device, *stage.layers[:: max(1, len(stage.layers) - 1)]] for stage in plan.stages],
        "proof": plan.proof,
        "predictions_file": found.file.name,
        "placements": [
            {
                "name": one.prediction.name,
                "stages": one.prediction.stages,
                "predicted_s": one.prediction.predicted_s,
                "interval_s": one.prediction.interval_s,
                "basis": one.prediction.basis,
                "measured_s": one.measured_s,
                "quartiles_s": one.quartiles_s,
                "error": one.error,
                "inside": one.is_inside,
            }
            for one in outcomes
        ],
        "median_error": found.median_error,
        "pairs_apart": found.ranking.n_apart,
        "pairs_wrong": found.ranking.wrong,
    }


def speed(model: lm.Transformer, rows: int, plan: hetero.Plan, topology: hetero.Topology, steps: int) -> dict[str, Any]:
    """The plan against each device alone at its own best number of micro-batches, by turns."""
    batch, last = batch_of(rows, model.config.seq_len, 100), len(model.layers()) - 1
    names = sorted({name for pair in PAIRS for name in pair} - {"opencl:0.0"})  # 0.0 is 0.1 on the other core
    placed = {"plan": hetero.place(copy.deepcopy(model), plan, topology=topology, loss=lm.loss)}
    for name in names:
        alone = hetero.discover([name, *({"opencl:0.1"} - {name})]).only([name])  # the cpu gets one core
        placed[name] = hetero.place_stages(copy.deepcopy(model), [(name, 0, last)], alone, lm.loss)

    def step(name: str, m: int) -> Callable[[], None]:
        def one() -> None:
            for parameter in placed[name].parameters():
                parameter.grad = None
            placed[name].step(batch, m)

        return one

    try:
        tried = interleaved({f"{name}/{m}": step(name, m) for name in names for m in SPLITS}, repetitions=4, warm_up=2)
        split = {name: min(SPLITS, key=lambda m: statistics.median(tried[f"{name}/{m}"])) for name in names}
        sides = {"plan": step("plan", M)} | {name: step(name, split[name]) for name in names}
        times = interleaved(sides, repetitions=steps, warm_up=2)
    finally:
        for one in placed.values():
            one.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(names, key=lambda name: medians[name])
    n = len({stage.device for stage in plan.stages})
    return {
        "devices": [stage.device for stage in plan.stages],
        "times": {name: summary(values) for name, values in times.items()},
        "best_split": split,
        "best_single": best,
        "speed_of_plan": medians[best] / medians["plan"],
        "bubble_limit": n * M / (M + n - 1),
        "stage_shares": [
            (stage.forward_s + stage.backward_s) / sum(s.forward_s + s.backward_s for s in plan.stages)
            for stage in plan.stages
        ],
    }


def row(name: str, shape: tuple[int, ...], steps: int) -> dict[str, Any]:
    """All figures of a model."""
    *size, rows = shape
    model, width = make(*size), shape[1]
    pairs = PAIRS if width >= WIDE else PAIRS[:1]
    plans, found = {}, {}
    for devices in pairs:
        key = " + ".join(devices)
        plan, topology, validation = predict_and_measure(model, rows, devices, steps)
        plans[key], found[key] = (plan, topology), figures_of(plan, validation)
        for one in found[key]["placements"]:
            print(
                f"{name:6} {key:24} {one['name'][:40]:40} {1e3 * one['predicted_s']:8.2f} "
                f"{1e3 * one['measured_s']:8.2f} ms {100 * one['error']:+6.1f} % "
                f"{'inside' if one['inside'] else 'outside'}",
                flush=True,
            )
    result: dict[str, Any] = {"shape": shape, "devices": found}
    if width >= WIDE:
        plan, topology = min(plans.values(), key=lambda pair: pair[0].value)
        result["speed"] = speed(model, rows, plan, topology, steps)
        print(f"{name:6} speed over the best device alone: {result['speed']['speed_of_plan']:.2f}", flush=True)
    return result


def totals(rows: dict[str, Any]) -> dict[str, Any]:
    """Over all placements of all rows."""
    sets = [one for row in rows.values() for one in row["devices"].values()]
    placements = [one for found in sets for one in found["placements"]]
    return {
        "n_placements": len(placements),
        "median_error": statistics.median(abs(one["error"]) for one in placements),
        "median_error_of_plans": statistics.median(abs(found["placements"][0]["error"]) for found in sets),
        "inside": sum(one["inside"] for one in placements) / len(placements),
        "pairs_apart": sum(found["pairs_apart"] for found in sets),
        "pairs_wrong": sum(len(found["pairs_wrong"]) for found in sets),
        "speed": {name: row["speed"]["speed_of_plan"] for name, row in rows.items() if "speed" in row},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps of each placement")
    parser.add_argument("--rows", nargs="+", choices=MODELS, help="these models only; nothing is written")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that it works; nothing is written")
    options = parser.parse_args()
    models = TINY if options.tiny else MODELS
    chosen = options.rows or models
    rows = {name: row(name, shape, options.steps) for name, shape in models.items() if name in chosen}
    summed = totals(rows)
    print(
        f"median error {100 * summed['median_error']:.1f} % over {summed['n_placements']} placements "
        f"({100 * summed['median_error_of_plans']:.1f} % of the plans), {100 * summed['inside']:.0f} % inside; "
        f"{summed['pairs_wrong']} of {summed['pairs_apart']} pairs in wrong order"
    )
    if not options.tiny and not options.rows:
        command = f"python benchmarks/planner_prediction.py --steps {options.steps}"
        print(write("planner_prediction", command, {"n_microbatches": M, "totals": summed, "rows": rows}))


if __name__ == "__main__":
    main()
