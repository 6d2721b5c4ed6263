"""Learning rates for a configuration: the same small budget for every arm, chosen on the validation split.

    python benchmarks/tune_learning_rates.py experiments/configs/quickstart.yaml

Each arm is trained with each rate of one grid, with a seed that no shipped configuration uses and as many steps as the
configuration has. The smallest validation loss wins; the test split is never looked at. Prints the lines for the
configuration's `train` section and writes all losses to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import write

import experiments
from experiments import config_file

TUNING_SEED = 1000
GRID = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)


def main() -> None:
    """Tune the configuration of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_args()
    config = config_file.load(options.config, options.overrides).config
    assert TUNING_SEED not in config.seeds
    losses: dict[str, dict[float, float]] = {arm: {} for arm in config.arms}
    with tempfile.TemporaryDirectory() as folder:
        for i, rate in enumerate(GRID):
            fixed = [f"seeds=[{TUNING_SEED}]", f"train.learning_rate={rate}", "plan.alternative_steps=0"]
            out = Path(folder, str(i))
            arms = experiments.run(options.config, [*options.overrides, *fixed], out=out).summary["arms"]
            for arm, content in arms.items():
                losses[arm][rate] = content["mean"]["val_loss"]
    best = {arm: min(by_rate, key=lambda rate: by_rate[rate]) for arm, by_rate in losses.items()}
    for arm, by_rate in losses.items():
        shown = "  ".join(f"{rate:g}: {loss:.4f}" for rate, loss in by_rate.items())
        print(f"{arm:<9} {shown}  best {best[arm]:g}")
        if best[arm] in (GRID[0], GRID[-1]):
            print(f"{arm:<9} the best rate is at the edge of the grid")
    print("  learning_rate: {" + ", ".join(f"{arm}: {rate:g}" for arm, rate in best.items()) + "}")
    print(
        f"  tuning: {len(GRID)} rates from {GRID[0]:g} to {GRID[-1]:g} for each arm, {config.train.steps} steps each, "
        f"seed {TUNING_SEED}, smallest validation loss"
    )
    target = write(
        f"learning_rates_{config.name}",
        f"python benchmarks/tune_learning_rates.py {options.config} {' '.join(options.overrides)}".strip(),
        {"validation_loss": {arm: {f"{r:g}": v for r, v in by.items()} for arm, by in losses.items()}, "best": best},
    )
    print(f"written to {target}")


if __name__ == "__main__":
    main()
