"""Placement without contiguity: value, bound and gap of every throughput workload, within a time limit.

    python benchmarks/planner_noncontiguous.py --limit 60

Each workload starts from the best contiguous placement, whose time counts; the whole is timed from outside the solver,
and the answer is priced again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from common import write

from hetero.planner.graph import plan_workload
from hetero.planner.workload import Workload
from hetero.planner.workload_plan import max_load

SHARED = Path(os.environ.get("HETEROQ_SHARED", Path(__file__).parents[2] / "shared"))
GOAL = 0.02


def measure(path: Path, limit_s: float) -> dict[str, Any]:
    """One row: the contiguous optimum, ours, its bound and gap, seconds of wall and processor time."""
    workload = Workload.from_file(path)
    contiguous = plan_workload(workload, objective="throughput", contiguous=True, time_limit_s=limit_s)
    begun, used = time.perf_counter(), time.process_time()
    placement = plan_workload(workload, objective="throughput", contiguous=False, time_limit_s=limit_s)
    wall_s, cpu_s = time.perf_counter() - begun, time.process_time() - used
    value = max_load(workload, placement.devices, contiguous=False)
    return {
        "operators": len(workload.ids),
        "contiguous": contiguous.value,
        "value": value,
        "lower_bound": placement.lower_bound,
        "gap": (value - placement.lower_bound) / value if value else 0.0,
        "proof": placement.proof,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for each workload")
    parser.add_argument("--workloads", type=Path, default=SHARED / "workloads" / "open", help="folder of JSON files")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names wanted")
    arguments = parser.parse_args()
    cases: dict[str, Any] = {}
    for path in sorted(arguments.workloads.glob("throughput__*.json")):
        if any(part in path.name for part in arguments.only):
            row = cases[path.stem.removeprefix("throughput__")] = measure(path, arguments.limit)
            shown = {key: round(found, 4) if isinstance(found, float) else found for key, found in row.items()}
            print(f"{path.stem}: {shown}", flush=True)
    summary = {
        "workloads": len(cases),
        "never_worse_than_contiguous": sum(row["value"] <= row["contiguous"] for row in cases.values()),
        "proven": sum(row["proof"] == "optimal" for row in cases.values()),
        "gap_within_goal": sum(row["gap"] <= GOAL for row in cases.values()),
        "longest_s": max((row["wall_s"] for row in cases.values()), default=0.0),
    }
    print(summary)
    figures = {"limit_s": arguments.limit, "goal_gap": GOAL, "summary": summary, "cases": cases}
    print(write("planner_noncontiguous", " ".join(["python", *sys.argv]), figures))


if __name__ == "__main__":
    main()
