"""Claim: fleets of 10,000 and 100,000 devices are planned within a certified fraction of a per cent.

    python benchmarks/planner_fleets.py [--seeds N]

Synthetic fleets (the seed is the row's): classes whose speeds differ by up to 20 times and memories by up to 7, counts
drawn from a flat Dirichlet distribution, layers within 10 % of each other, any two classes linked. The time is that of
all of `hetero.plan_fleet`, its limit the bar of the row; the gap is (upper bound - throughput) / upper bound.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from common import write

import hetero
from hetero.cost import Costs, LayerCost, LayerTime
from hetero.device import Device
from hetero.topology import Link, Topology

SHAPES = {
    "10,000 devices, 6 classes, 96 layers": (96, 6, 10_000, 10.0),
    "10,000 devices, 12 classes, 96 layers": (96, 12, 10_000, 30.0),
    "100,000 devices, 6 classes, 200 layers": (200, 6, 100_000, 30.0),
}


def instance(n_layers: int, n_classes: int, n_devices: int, seed: int) -> tuple[Costs, Topology]:
    """Costs of one device of each class, and all devices."""
    r = np.random.default_rng(seed)
    kinds = range(n_classes)
    work, nbytes = r.uniform(0.9, 1.1, n_layers), r.uniform(0.9, 1.1, n_layers) * 1e6
    sent = r.uniform(0.5, 1.0, n_layers) * 1e6
    speed, memory = np.exp(r.uniform(0, 3, n_classes)), np.exp(r.uniform(1.2, 3.2, n_classes)) * 1e6
    counts = np.maximum(1, (r.dirichlet(np.ones(n_classes)) * n_devices).astype(int)).tolist()
    layers = []
    for i in range(n_layers):
        times = {f"k{c}:0": LayerTime(float(work[i] / speed[c]), 0.0, 0.0, "given") for c in kinds}
        layers.append(LayerCost(f"l{i}", None, int(nbytes[i]), 0, int(sent[i]), 0, 1.0, times))
    devices = tuple(Device(f"k{c}:{k}", "gpu", "x", int(memory[c])) for c in kinds for k in range(counts[c]))
    links = tuple(Link(f"k{a}:*", f"k{b}:*", 0.002, float(r.uniform(5e6, 1e8))) for a in kinds for b in kinds if a <= b)
    return Costs(tuple(layers), 1), Topology(devices, links)


def measure(shape: tuple[int, int, int, float], seed: int) -> dict[str, Any]:
    """Seconds, CPU seconds and gap of a plan."""
    *size, limit = shape
    costs, topology = instance(*size, seed)
    start, start_cpu = time.perf_counter(), time.process_time()
    plan = hetero.plan_fleet(costs, topology, time_limit_s=limit - 1)  # the limit is the search's: 1 s for the rest
    return {
        "seconds": time.perf_counter() - start,
        "cpu_s": time.process_time() - start_cpu,
        "limit_s": limit,
        "throughput": plan.throughput,
        "upper_bound": plan.upper_bound,
        "gap": plan.gap,
        "devices": sum(plan.devices.values()),
        "idle": sum(plan.devices.values()) - sum(plan.used.values()),
        "pipelines": len(plan.replicas),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    measure((8, 2, 20, 2.0), 0)
    cases: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        rows = [measure(shape, seed) for seed in range(arguments.seeds)]
        gaps, times = [row["gap"] for row in rows], [row["seconds"] for row in rows]
        cases[name] = {"median_gap": statistics.median(gaps), "worst_gap": max(gaps), "rows": rows}
        print(
            f"{name}: gap median {100 * statistics.median(gaps):.3f} %, worst {100 * max(gaps):.3f} %; "
            f"median {statistics.median(times):.1f} s, worst {max(times):.1f} s",
            flush=True,
        )
    print(write("planner_fleets", " ".join(["python", *sys.argv]), {"cases": cases}))


if __name__ == "__main__":
    main()
