"""Contiguous throughput of operator graphs: value, proof and time, against known optima and the authors' program.

    python benchmarks/planner_graphs.py
    python benchmarks/planner_graphs.py --workloads FOLDER --authors PATH/dp --repetitions 5

Ours is timed in this process, from the parsed workload to the priced placement; reading the file is a figure of its
own, as is a command line from outside. The authors' program (msr-fiddle/dnn-partitioning, throughput-dp/dp.cpp, built
with `g++ -O3`) reads the file from its standard input and is timed from outside, once. Without it, `authors_code_wall`
of EXPECTED.json stands in, which was measured on another day, and on another machine as far as this script knows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import summary, write

from hetero.planner import contiguous
from hetero.planner.graph import plan_workload
from hetero.planner.workload import Workload
from hetero.planner.workload_plan import max_load

SHARED = Path(os.environ.get("HETEROQ_SHARED", Path(__file__).parents[2] / "shared"))
# Below this the authors' program is fast enough for anyone; no ratio is claimed.
SLOW_S = 5.0


def ours(path: Path, repetitions: int, limit_s: float) -> dict[str, Any]:
    """Value, proof, effort and times [s]; the price is that of the independent formula."""
    began = time.process_time()
    workload = Workload.from_file(path)
    read_s = time.process_time() - began
    plan_workload(workload, time_limit_s=limit_s)  # reads the compiled code
    wall, cpu = [], []
    for _ in range(repetitions):
        begun, used = time.perf_counter(), time.process_time()
        placement = plan_workload(workload, time_limit_s=limit_s)
        wall.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - used)
    effort = contiguous.Effort()
    contiguous.solve(workload, time_limit_s=limit_s, effort=effort)
    return {
        "value": max_load(workload, placement.devices, contiguous=True),
        "lower_bound": placement.lower_bound,
        "proof": placement.proof,
        "operators": len(workload.ids),
        **vars(effort),
        "read_cpu_s": read_s,
        "wall_s": summary(wall),
        "cpu_s": summary(cpu),
    }


def command(path: Path, repetitions: int) -> dict[str, float]:
    """Wall time [s] of the whole command, interpreter and imports included."""
    words = [sys.executable, "-m", "experiments.cli", "plan", "--workload", str(path), "--json"]
    times = []
    for _ in range(repetitions):
        begun = time.perf_counter()
        subprocess.run(words, check=True, capture_output=True)
        times.append(time.perf_counter() - begun)
    return summary(times)


def authors(program: Path, path: Path, limit_s: float) -> dict[str, Any]:
    """Value and times [s] of the authors' program, run once."""
    begun, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    try:
        with path.open() as file:
            done = subprocess.run(
                [str(program)], stdin=file, capture_output=True, text=True, timeout=limit_s, check=False
            )
    except subprocess.TimeoutExpired:
        return {"source": "run now", "value": None, "wall_s": None, "failed": f"no result in {limit_s:.0f} s"}
    figures = {
        "source": "run now",
        "wall_s": time.perf_counter() - begun,
        "cpu_s": resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used,
    }
    if done.returncode:
        return figures | {"value": None, "failed": (done.stderr or done.stdout).strip().splitlines()[-1:]}
    return figures | {"value": json.loads(done.stdout)["maxLoad"]}


def recorded(known: dict[str, Any]) -> dict[str, Any]:
    """What EXPECTED.json says about the authors' program."""
    found = re.fullmatch(r"(\d+)m([\d.]+)s", str(known.get("authors_code_wall")))
    wall_s = 60 * int(found[1]) + float(found[2]) if found else None
    return {"source": "EXPECTED.json", "value": known.get("authors_code_value"), "wall_s": wall_s}


def row(path: Path, known: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one workload."""
    figures = ours(path, options.repetitions, options.limit) | {"command_wall_s": command(path, options.repetitions)}
    optimum = known.get("optimum")
    figures["reference"] = optimum
    figures["relative_to_reference"] = None if optimum is None else figures["value"] / optimum - 1
    theirs = recorded(known) if options.authors is None else authors(options.authors, path, options.authors_limit)
    figures["authors"] = theirs
    if theirs["wall_s"] is not None:
        figures["times_faster"] = theirs["wall_s"] / figures["wall_s"]["median_s"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workloads", type=Path, default=SHARED / "workloads" / "open", help="folder of JSON files")
    parser.add_argument("--authors", type=Path, help="the authors' program, compiled")
    parser.add_argument("--authors-limit", type=float, default=300.0, help="seconds for each workload")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for ours, each workload")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names wanted")
    options = parser.parse_args()
    expected = options.workloads / "EXPECTED.json"
    known = json.loads(expected.read_text()) if expected.exists() else {}
    cases: dict[str, Any] = {}
    for path in sorted(options.workloads.glob("throughput__*.json")):
        if any(part in path.name for part in options.only):
            one = cases[path.stem.removeprefix("throughput__")] = row(path, known.get(path.stem, {}), options)
            shown = {key: one[key] for key in ("value", "relative_to_reference", "proof", "ideals", "pairs")}
            shown |= {key: round(one[key]["median_s"], 3) for key in ("wall_s", "cpu_s", "command_wall_s")}
            print(f"{path.stem}: {shown}, times faster: {one.get('times_faster')}", flush=True)
    slow = [one["times_faster"] for one in cases.values() if (one["authors"]["wall_s"] or 0) > SLOW_S]
    totals = {
        "proven": f"{sum(one['proof'] == 'optimal' for one in cases.values())} of {len(cases)}",
        "slowest_wall_s": max((one["wall_s"]["median_s"] for one in cases.values()), default=None),
        f"least_times_faster_where_theirs_takes_over_{SLOW_S:.0f}_s": min(slow, default=None),
        "median_times_faster_there": statistics.median(slow) if slow else None,
    }
    print(totals)
    print(write("planner_graphs", " ".join(["python", *sys.argv]), {"summary": totals, "cases": cases}))


if __name__ == "__main__":
    main()
