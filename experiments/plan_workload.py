"""`heteroq plan --workload FILE`: place a graph of operators and tell how good the placement is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from experiments.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from hetero.planner.workload import Workload
    from hetero.planner.workload_plan import Placement


def command(options: argparse.Namespace) -> str:
    """What the command prints.

    Raises:
        ConfigError: options that don't go together.
        PlacementError: see `plan_file`.
    """
    refuse_other_options(options)
    objective, contiguous = options.objective or "throughput", options.contiguous is not False
    limit = 60.0 if options.time_limit is None else options.time_limit
    workload, placement = plan_file(options.workload, objective=objective, contiguous=contiguous, time_limit_s=limit)
    if options.json:
        return json.dumps(placement.to_json(workload), indent=2, ensure_ascii=False)
    return text(workload, placement, objective=objective, contiguous=contiguous)


def plan_file(file: Path, *, objective: str, contiguous: bool, time_limit_s: float) -> tuple[Workload, Placement]:
    """The workload of a file and its placement.

    Raises:
        PlacementError: the file is wrong, or no placement is possible.
    """
    from hetero.planner.graph import plan_workload
    from hetero.planner.workload import Workload

    workload = Workload.from_file(file)
    return workload, plan_workload(workload, objective=objective, contiguous=contiguous, time_limit_s=time_limit_s)


def refuse_other_options(options: argparse.Namespace) -> None:
    """Refuse what has no meaning for the graph of a file.

    Raises:
        ConfigError: names the option.
    """
    ways = "heteroq plan CONFIG, or heteroq plan --workload FILE"
    if options.workload is None:
        raise ConfigError("neither a configuration nor a workload is given", remedy=ways)
    if options.config is not None:
        both = f"{options.config} and --workload {options.workload}"
        raise ConfigError("a configuration and a workload are given", found=both, remedy=ways)
    ours = {"command", "config", "workload", "objective", "contiguous", "json", "time_limit"}
    others = [name for name, value in vars(options).items() if name not in ours and value not in (None, False, [])]
    if others:
        name = "a.b=c" if others[0] == "overrides" else f"--{others[0].replace('_', '-')}"
        raise ConfigError(f"{name} is for the plan of a configuration, not for --workload")


def text(workload: Workload, placement: Placement, *, objective: str, contiguous: bool) -> str:
    """Value, bound and proof; the devices with their loads; simple placements for comparison."""
    what = "busiest device" if objective == "throughput" else "one sample"
    shape = "contiguous" if contiguous else "any placement"
    proof = "optimal" if placement.proof == "optimal" else f"{placement.proof}, gap {placement.gap:.2%}"
    lines = [
        f"{objective}, {shape}: {what} {placement.value:.6g} ({proof}, lower bound {placement.lower_bound:.6g})",
        f"{len(workload.ids)} operators, {len(workload.edges)} edges; {placement.solver}, {placement.seconds:.2f} s",
        "",
        *_device_rows(workload, placement, marked=objective == "throughput"),
    ]
    if objective == "throughput":
        lines += ["", *_baseline_rows(workload, placement, contiguous=contiguous)]
    return "\n".join(lines)


def _device_rows(workload: Workload, placement: Placement, *, marked: bool) -> list[str]:
    from hetero.planner.workload_plan import loads

    rows = [("device", "operators", "compute", "transfers", "load", "memory [B]", "")]
    found = loads(workload, placement.devices)
    top = max(load.total for load in found)
    for name, load in zip(workload.devices, found, strict=True):
        mark = "<- binds" if marked and load.total == top and top else ""
        figures = (f"{load.compute:.6g}", f"{load.transfers:.6g}", f"{load.total:.6g}", f"{load.nbytes:.0f}")
        rows.append((name, str(load.operators), *figures, mark))
    return _table(rows)


def _baseline_rows(workload: Workload, placement: Placement, *, contiguous: bool) -> list[str]:
    from hetero.planner.workload_baselines import baselines

    rows = [("for comparison", "value", "times the plan's", "")]
    for one in baselines(workload, contiguous=contiguous):
        if one.value is None:
            rows.append((one.name, "-", "-", one.reason))
        else:
            ratio = one.value / placement.value if placement.value else 1.0
            rows.append((one.name, f"{one.value:.6g}", f"{ratio:.3f}", ""))
    return _table(rows)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their longest cell; the first and the last to the left, figures to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if k in (0, last) else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
