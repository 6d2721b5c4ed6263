"""One experiment from its YAML file to its report.

The way of the data: configuration -> devices and text -> for each arm: model, profile, plan (written before the first
step), measured alternatives -> for each seed: place, train, evaluate -> comparison -> summary -> report. Every step is
on disk when it is done, so that a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import config_file, record
from experiments.errors import RunFailedError, RunFolderError
from experiments.interrupts import Interrupts
from experiments.progress import Progress

# What imports torch and PennyLane (seconds) is imported when something runs: `heteroq schema` shouldn't wait for it.
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import hetero
    from experiments.config_file import Loaded
    from experiments.measure import StepTime
    from experiments.planning import Setting
    from experiments.training import Surroundings

DEFAULT_ROOT = Path("runs")


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        out: its folder.
        summary: the content of `summary.json` there.
    """

    out: Path
    summary: dict[str, Any]


def run(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    plans: str | Path | None = None,
) -> RunResult:
    """Run an experiment, or each combination of its sweep.

    Args:
        config: a YAML file, or the same as a dict.
        overrides: settings as `train.steps=100`, by the rules of the file.
        out: folder to make; None: `runs/<name>-<time>-<random>`.
        plans: folder of an earlier run whose plans are used again.

    Raises:
        ConfigError: the configuration, a device, the text or the folder is wrong; nothing has been started.
        RunFailedError: the training failed; what it had reached is in the folder.
        RunInterruptedError: SIGINT or SIGTERM; it can be resumed.
    """
    loaded = config_file.load(config, overrides)
    if loaded.config.sweep:
        from experiments import sweep

        return sweep.run(loaded, out=_path(out), plans=_path(plans))
    return start(loaded, out=_path(out), plans=_path(plans))


def start(loaded: Loaded, *, out: Path | None = None, plans: Path | None = None) -> RunResult:
    """Run one configuration without a sweep in a folder of its own."""
    setting, given = prepare(loaded, plans)
    name = loaded.config.name
    folder = record.new_folder(name, DEFAULT_ROOT) if out is None else record.make_folder(out)
    with record.locked(folder):
        record.refuse_used(folder)
        with record.undone_if_refused(folder):
            environment = record.environment(record.command_line(), setting.topology.to_json())
            record.write_json(folder / "environment.json", environment)
            for arm, plan in given.items():
                record.write_json(record.make_folder(folder / "arms" / arm) / "plan.json", plan.to_json())
            record.write_text(folder / "config.yaml", config_file.resolved_yaml(loaded.config))
            return _execute(setting, folder)


def prepare(loaded: Loaded, plans: Path | None = None) -> tuple[Setting, dict[str, hetero.Plan]]:
    """Devices, text and the plans of an earlier run: all that can be wrong is found before a folder is made.

    Returns:
        The setting, and arm -> plan; empty without `plans`.

    Raises:
        ConfigError: the devices or the text can't be used.
        RunFolderError: a plan is missing, or was made for another configuration.
    """
    from experiments import planning

    setting = planning.prepare(loaded)
    planning.require_real(setting)
    arms = loaded.config.arms if plans is not None else ()
    return setting, {arm: planning.read_plan(setting, Path(plans or "", "arms", arm, "plan.json")) for arm in arms}


def resume(folder: str | Path) -> RunResult:
    """Go on with a run that was interrupted, killed, or failed; a finished one is only read.

    Raises:
        RunFolderError: there is no run in the folder.
        RunFolderBusyError: another process works there.
    """
    folder = Path(folder)
    if (folder / "sweep.json").exists():
        from experiments import sweep

        return sweep.resume(folder)
    if not (folder / "config.yaml").exists():
        found = "no such folder" if not folder.is_dir() else "no config.yaml in it"
        raise RunFolderError(f"{folder} holds no run", found=found, remedy="start one with: heteroq run CONFIG")
    with record.locked(folder):
        from experiments import report

        if (folder / "summary.json").exists():
            if not (folder / "report.html").exists():
                report.write(folder)
            return RunResult(folder, record.finished_summary(folder))

        setting, _ = prepare(config_file.load(folder / "config.yaml"))
        return _execute(setting, folder)


def _path(name: str | Path | None) -> Path | None:
    return None if name is None else Path(name).expanduser()


def _execute(setting: Setting, folder: Path) -> RunResult:
    """Everything after the folder is ours: plan, measure, train, compare, report."""
    import hetero
    import lm
    from experiments import planning, report, summary
    from experiments.training import Surroundings

    floors = {split: lm.ngram_floor(setting.corpus, split) for split in ("val", "test")}
    progress = Progress()
    interrupts = Interrupts(remedy=f"go on with: heteroq run --resume {folder}")
    around = Surroundings(setting, folder, floors, progress, interrupts)
    progress.say(f"run folder: {folder}")
    tuning = _tuning(setting)
    record.write_json(folder / "tuning.json", tuning)
    try:
        with interrupts.handled(), _threads(setting):
            arms: tuple[str, ...] = setting.config.arms
            try:
                plans = {arm: _plan(around, arm) for arm in arms}
                times = {arm: _step_times(around, arm, plans[arm]) for arm in arms}
            except hetero.PlacementError as error:
                raise planning.placed_error(setting.loaded, ("plan",), error) from error
            results = {arm: _train(around, arm, plans[arm]) for arm in arms}
            content = summary.summarise(setting, results, plans, times, floors=floors, tuning=tuning)
            record.write_json(folder / "summary.json", content)
            report.write(folder)
    finally:
        progress.close()
    return RunResult(folder, record.finished_summary(folder))


@contextlib.contextmanager
def _threads(setting: Setting) -> Iterator[None]:
    """Give this thread, which updates the weights, as many torch threads as the cpu device has cores.

    The number decides how sums are split and so their last bits; it has to follow from the configuration and the
    machine, not from OMP_NUM_THREADS.
    """
    import torch

    before = torch.get_num_threads()
    cores = [len(device.cores) for device in setting.topology.devices if device.api == "cpu"]
    torch.set_num_threads(max([1, *cores]))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _plan(around: Surroundings, arm: str) -> hetero.Plan:
    """The arm's plan: made once, on disk before anything is trained, and used again by every resume."""
    from experiments import planning
    from hetero import trace
    from hetero.schedule import simulate

    folder = record.make_folder(around.folder / "arms" / arm)
    file = folder / "plan.json"
    if file.exists():
        plan = planning.read_plan(around.setting, file)
    else:
        around.progress.say(f"{arm}: profiling and planning")
        plan = planning.plan_arm(around.setting, arm)
        record.write_json(file, plan.to_json())
    trace.write(folder / "predicted_trace.json", predicted=simulate(plan, around.setting.topology).events)
    stages = ", ".join(f"{stage.device}: {_span(stage.layers)}" for stage in plan.stages)
    around.progress.say(f"{arm}: {1e3 * plan.value:.1f} ms a step predicted ({plan.proof}); {stages}")
    return plan


def _span(layers: Sequence[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"


def _step_times(around: Surroundings, arm: str, plan: hetero.Plan) -> list[StepTime]:
    """Step times of the plan and its alternatives: measured once, before the arm's first training."""
    from experiments import measure

    file = around.folder / "arms" / arm / "step_times.json"
    if file.exists():
        return [measure.StepTime(**entry) for entry in record.read_json(file)]
    times = measure.step_times(around.setting, arm, plan)
    record.write_json(file, [time.to_json() for time in times])
    measured = [time for time in times if time.measured_s is not None and measure.is_measured(time.name)]
    shown = [f"{time.name} {1e3 * (time.measured_s or 0):.1f} ms" for time in measured]
    around.progress.say(f"{arm}: measured {', '.join(shown) or 'nothing'}")
    return times


def _train(around: Surroundings, arm: str, plan: hetero.Plan) -> dict[int, dict[str, Any]]:
    """Train an arm with every seed; a failure closes the record and ends the run."""
    import hetero
    import lm
    import quantum
    from experiments import training

    results = {}
    for seed in around.setting.config.seeds:
        try:
            results[seed] = training.train_seed(around, arm, seed, plan)
        except (hetero.HeteroError, quantum.QuantumError, lm.LMError) as error:
            way_on = f"go on with: heteroq run --resume {around.folder}"
            if isinstance(error, lm.NonFiniteError):  # resumed, it takes the same steps to the same end
                way_on = "start a new run with --out DIR"
            raise RunFailedError(
                f"{arm}, seed {seed}: {error.message}",
                found=error.found,
                expected=error.expected,
                remedy="; ".join(filter(None, [error.remedy, way_on])),
            ) from error
    return results


def _tuning(setting: Setting) -> dict[str, Any]:
    """Where the learning rates come from, in the words of the configuration."""
    train = setting.config.train
    return {
        "learning_rates": {arm: train.rate(arm) for arm in setting.config.arms},
        "note": train.tuning or "the configuration doesn't say how they were found (train.tuning)",
    }
