"""A grid of runs, one after another: every combination is validated, counted and named before the first one starts.

OUT/  sweep.json (each run's whole configuration)  config.yaml  table.txt  table.json
OUT/run-000/  run-001/  ...   each a run folder like any other
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import config_file, record
from experiments.errors import RunInterruptedError
from experiments.progress import Progress
from experiments.run import DEFAULT_ROOT, RunResult, prepare, start
from experiments.run import resume as resume_run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from experiments.config_file import Loaded

INDEX = "sweep.json"


def run(loaded: Loaded, *, out: Path | None = None, plans: Path | None = None) -> RunResult:
    """Run every combination of the sweep's values."""
    runs = config_file.expand(loaded)
    for _, one in runs:
        prepare(one, plans)
    folder = record.new_folder(loaded.config.name, DEFAULT_ROOT) if out is None else record.make_folder(out)
    with record.locked(folder):
        record.refuse_used(folder)
        with record.undone_if_refused(folder):
            index = [
                {"run": f"run-{i:03d}", "settings": settings, "config": one.config.model_dump(mode="json")}
                for i, (settings, one) in enumerate(runs)
            ]
            given = {"name": loaded.config.name, "plans": None if plans is None else str(plans.absolute())}
            record.write_json(folder / INDEX, given | {"created": record.now(), "runs": index})
            record.write_text(folder / "config.yaml", config_file.resolved_yaml(loaded.config))
            return _execute(loaded.config.name, runs, folder, plans)


def resume(folder: Path) -> RunResult:
    """Go on with a sweep: finished runs are kept, the unfinished one is resumed, the others are started."""
    with record.locked(folder):
        content = record.read_json(folder / INDEX)
        runs = [(entry["settings"], config_file.load(entry["config"])) for entry in content["runs"]]
        plans = None if content["plans"] is None else Path(content["plans"])
        return _execute(content["name"], runs, folder, plans)


def combined_table(runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """One line for each run and arm: the varied settings, the loss with its interval, the wall time.

    Args:
        runs: (dotted key -> value, summary) of each run.
    """
    keys = list(runs[0][0]) if runs else []
    body = [[*keys, "arm", "loss", "interval", "wall s"]]
    for settings, summary in runs:
        metric = summary["metric"]
        for arm, content in summary["arms"].items():
            interval = content["interval"].get(metric)
            span = "one seed" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
            figures = [f"{content['mean'][metric]:.4f}", span, f"{content['mean']['wall_s']:.1f}"]
            body.append([*(str(settings[key]) for key in keys), arm, *figures])
    widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]]) + "\n"


def _execute(name: str, runs: Sequence[tuple[dict[str, Any], Loaded]], folder: Path, plans: Path | None) -> RunResult:
    progress = Progress()
    progress.say(f"sweep of {len(runs)} runs in {folder}")
    finished = []
    for i, (settings, one) in enumerate(runs):
        target = folder / f"run-{i:03d}"
        progress.say(f"run {i + 1} of {len(runs)}: {', '.join(f'{key}={value}' for key, value in settings.items())}")
        try:
            resumes = (target / "config.yaml").exists()
            result = resume_run(target) if resumes else start(one, out=target, plans=plans)
        except RunInterruptedError as error:
            raise RunInterruptedError(
                error.message,
                signal_number=error.exit_code - 128,
                remedy=f"go on with: heteroq run --resume {folder}",
            ) from None
        finished.append((settings, result.summary))
    text = combined_table(finished)
    record.write_text(folder / "table.txt", text)
    content = {
        "name": name,
        "status": "complete",
        "runs": [
            {"run": f"run-{i:03d}", "settings": settings, "verdict": summary["verdict"], "arms": _losses(summary)}
            for i, (settings, summary) in enumerate(finished)
        ],
    }
    record.write_json(folder / "table.json", content)
    return RunResult(folder, content)


def _losses(summary: Mapping[str, Any]) -> dict[str, float]:
    return {arm: content["mean"][summary["metric"]] for arm, content in summary["arms"].items()}


def run_folders(folder: Path) -> list[Path]:
    """The runs of a sweep; the folder itself where there is no sweep."""
    if not (folder / INDEX).exists():
        return [folder]
    return [folder / entry["run"] for entry in record.read_json(folder / INDEX)["runs"]]
