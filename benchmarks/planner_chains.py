"""Claim: chains on dozens of devices in a few classes are placed optimally in fractions of a second.

    python benchmarks/planner_chains.py [--seeds N] [--repetitions N]

Synthetic instances (the seed is the row's): layer times and sizes uniform within a factor of three, class speeds within
ten, memory for 1.3 to 2.6 times the model over all devices (even seeds) or boundless (odd ones), links of 2 to 20 MB/s
with 10 ms latency against layers of 0.1 to 10 s. `solve`: the search alone, compiled code warm. `plan`: all of
`hetero.plan`, with baselines, runner-up, plans without a device, and the binding constraint.
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
from hetero.planner.class_chain import solve
from hetero.planner.problem import build
from hetero.topology import Link, Topology

SHAPES = {"1000 layers, 2 x 32": (1000, (32, 32)), "100 layers, 4 x 16": (100, (16, 16, 16, 16))}
OBJECTIVES = ("throughput", "latency", "train_step")


def instance(n_layers: int, counts: tuple[int, ...], seed: int) -> tuple[Costs, Topology]:
    """Costs and devices of a synthetic instance."""
    r = np.random.default_rng(seed)
    kinds = range(len(counts))
    speed, work = r.uniform(1, 10, len(counts)), r.uniform(0.5, 1.5, n_layers)
    nbytes, sent = r.uniform(0.5, 1.5, n_layers) * 1e6, r.uniform(0.1, 1.0, n_layers) * 1e6
    share = 1.6 * nbytes.sum() / sum(counts)
    memory = [int(share * r.uniform(0.8, 1.6)) if seed % 2 == 0 else 10**12 for _ in kinds]
    devices = tuple(Device(f"k{c}:{k}", "gpu", "x", memory[c]) for c in kinds for k in range(counts[c]))
    layers = []
    for i in range(n_layers):
        times = {}
        for c in kinds:
            forward = float(work[i] / speed[c] * r.uniform(0.9, 1.1))
            one = LayerTime(forward, float(forward * r.uniform(1.6, 2.2)), 0.0, "given")
            times |= {f"k{c}:{k}": one for k in range(counts[c])}
        layers.append(LayerCost(f"l{i}", None, int(nbytes[i]), 0, int(sent[i]), 0, 1.0, times))
    links = tuple(Link(f"k{a}:*", f"k{b}:*", 0.01, float(r.uniform(2e6, 2e7))) for a in kinds for b in kinds if a <= b)
    return Costs(tuple(layers), 8), Topology(devices, links)


def measure(shape: tuple[int, tuple[int, ...]], objective: str, seed: int, repetitions: int) -> dict[str, Any]:
    """Wall and CPU seconds of the search, seconds of the whole call, and the proof."""
    costs, topology = instance(*shape, seed)
    problem = build(costs, topology, objective=objective)
    solve(problem)
    wall, cpu = [], []
    for _ in range(repetitions):
        start, start_cpu = time.perf_counter(), time.process_time()
        solution = solve(problem)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    start = time.perf_counter()
    plan = hetero.plan(costs, topology, objective=objective)
    seconds = time.perf_counter() - start
    return {
        "solve_s": statistics.median(wall),
        "solve_cpu_s": statistics.median(cpu),
        "plan_s": seconds,
        "value": float(solution.value),
        "lower_bound": float(solution.lower_bound),
        "optimal": bool(solution.is_optimal) and plan.proof == "optimal",
        "stages": len(solution.stages),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    cases: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        for objective in OBJECTIVES:
            rows = [measure(shape, objective, seed, arguments.repetitions) for seed in range(arguments.seeds)]
            times = [row["solve_s"] for row in rows]
            proven = sum(row["optimal"] for row in rows)
            cases[f"{name}, {objective}"] = {"median_s": statistics.median(times), "worst_s": max(times), "rows": rows}
            plan_s = statistics.median(row["plan_s"] for row in rows)
            print(
                f"{name}, {objective}: median {statistics.median(times):.3f} s, worst {max(times):.3f} s, "
                f"{proven} of {len(rows)} proven; whole plan {plan_s:.1f} s",
                flush=True,
            )
    print(write("planner_chains", " ".join(["python", *sys.argv]), {"cases": cases}))


if __name__ == "__main__":
    main()
