"""Single-sample latency on operator graphs: the authors' greedy rule, ours, its bound and its proof.

    python benchmarks/planner_latency.py [--time-limit 60] [--files FILE ...]

Every file is planned in a process of its own, as `heteroq plan --workload FILE --objective latency` does it; the value
is priced again by `hetero.planner.workload_latency`. `authors_greedy` comes from EXPECTED.json beside the files where
it is there, `greedy` is our own run of the same rule (ties in the order may differ).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from common import write

from hetero.planner.graph_latency_greedy import greedy
from hetero.planner.workload import Workload
from hetero.planner.workload_latency import latency

SHARED = Path(os.environ.get("HETEROQ_SHARED", Path(__file__).parents[2] / "shared"))


def measure(path: Path, time_limit_s: float) -> dict[str, Any]:
    """One row."""
    workload = Workload.from_file(path)
    command = [sys.executable, "-m", "experiments.cli", "plan", "--workload", str(path), "--objective", "latency"]
    begin = time.perf_counter()
    ran = subprocess.run(
        [*command, "--json", "--time-limit", str(time_limit_s)], capture_output=True, text=True, check=True
    )
    wall = time.perf_counter() - begin
    answer = json.loads(ran.stdout)
    number = {name: k for k, name in enumerate(workload.devices)}
    priced = latency(workload, [number[answer["assignment"][str(name)]] for name in workload.ids], contiguous=True)
    return {
        "authors_greedy": expected(path),
        "greedy": greedy(workload).value,
        "ours": priced,
        "lower_bound": answer["lower_bound"],
        "gap": (priced - answer["lower_bound"]) / priced,
        "proof": answer["proof"],
        "seconds": answer["seconds"],
        "wall_s": wall,
    }


def expected(path: Path) -> float | None:
    """The authors' greedy value, where it is known."""
    table = path.parent / "EXPECTED.json"
    known = json.loads(table.read_text()) if table.exists() else {}
    value = known.get(path.stem, {}).get("authors_greedy")
    return None if value is None else float(value)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("--files", type=Path, nargs="+", default=sorted((SHARED / "workloads/open").glob("latency__*")))
    arguments = parser.parse_args()
    cases = {}
    for path in arguments.files:
        row = cases[path.stem] = measure(path, arguments.time_limit)
        shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        print(f"{path.stem}: {shown}", flush=True)
    print(
        write(
            "planner_latency",
            " ".join(["python", *sys.argv]),
            {"time_limit_s": arguments.time_limit} | {"cases": cases},
        )
    )


if __name__ == "__main__":
    main()
