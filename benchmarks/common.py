"""What every benchmark shares: interleaved timing of both sides in one process, and a dated data file."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results"
_VERSIONS = ("torch", "pyopencl", "pocl-binary-distribution", "pennylane", "qiskit-aer", "numpy")


def interleaved(
    sides: dict[str, Callable[[], Any]],
    *,
    repetitions: int,
    warm_up: int = 3,
    between: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Times [s] of every side, one call of each in turn, so that a slow moment of the machine hits all alike.

    `between` runs after every call and is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(warm_up + repetitions):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if i >= warm_up:
                times[name].append(elapsed)
            between()
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles [s] of a list of times."""
    low, median, high = statistics.quantiles(times, n=4)
    return {"median_s": median, "low_quartile_s": low, "high_quartile_s": high, "n": len(times)}


def machine() -> dict[str, Any]:
    """Processor, cores, operating system and the versions that a timing depends on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def write(topic: str, command: str, figures: dict[str, Any]) -> Path:
    """Write the figures of a benchmark with date, command and machine to `results/` and return the file."""
    RESULTS.mkdir(exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    target = RESULTS / f"{topic}_{now:%Y-%m-%d}.json"
    record = {"topic": topic, "date": f"{now:%Y-%m-%dT%H:%MZ}", "command": command, "machine": machine()} | figures
    target.write_text(json.dumps(record, indent=2) + "\n")
    return target
