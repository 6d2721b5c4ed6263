"""The command line: `heteroq devices | plan | run | report | generate | schema`.

Exit codes: 0 done; 1 the run failed; 2 the user's mistake, one message without traceback; 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    Args:
        arguments: words of the command line; None: of this process.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        options = _parse(arguments)
        options.command(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if not isinstance(error, _user_errors()):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the words; overrides may stand before, between and after options, which argparse alone can't do."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    takes_overrides = hasattr(options, "overrides")
    wrong = [word for word in rest if not takes_overrides or word.startswith("-") or "=" not in word]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        options.overrides += rest
    return options


def _user_errors() -> tuple[type[Exception], ...]:
    """Root errors of the packages that are loaded; one that isn't can't have raised."""
    roots = (("hetero.errors", "HeteroError"), ("quantum.errors", "QuantumError"), ("lm.errors", "LMError"))
    return tuple(getattr(sys.modules[module], name) for module, name in roots if module in sys.modules)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heteroq",
        description="Transformers placed on mixed devices by a planner, with quantum layers that earn their cost.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_devices(commands)
    _add_plan(commands)
    _add_run(commands)
    _add_report(commands)
    _add_generate(commands)
    schema = commands.add_parser("schema", help="print the JSON schema of a configuration", allow_abbrev=False)
    schema.set_defaults(command=_schema)
    return parser


def _add_devices(commands: Any) -> None:
    devices = commands.add_parser("devices", help="list the devices and why one is missing", allow_abbrev=False)
    devices.add_argument("--json", action="store_true", help="print JSON")
    devices.add_argument("--measure", action="store_true", help="measure peak, bandwidth and launch latency now")
    devices.add_argument("--subdevices", action="store_true", help="list the parts of OpenCL devices too")
    devices.add_argument("--topology", metavar="FILE", type=Path, help="list the devices of this file instead")
    devices.add_argument("--catalogue", action="store_true", help="list the models that topology files can name")
    devices.set_defaults(command=_devices)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="plan each arm and explain it, without training", allow_abbrev=False)
    plan.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file")
    plan.add_argument("overrides", metavar="a.b=c", nargs="*", help="settings that replace the file's")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument(
        "--trace",
        metavar="FILE",
        type=Path,
        help="write the schedule as a Chrome trace; with --validate also the measured one",
    )
    plan.add_argument("--topology", metavar="FILE", type=Path, help="plan for the devices of this file")
    plan.add_argument("--explain", action="store_true", help="also what one more GiB, GB/s or device would bring")
    plan.add_argument("--why", metavar="LAYER=DEVICE", action="append", help="why a layer is not on a device")
    formats = "accelerate, pipelining, json or schema"
    plan.add_argument("--export", metavar="FORMAT=FILE", action="append", help=f"write the plan; {formats}")
    plan.add_argument("--validate", action="store_true", help="run plan and alternatives; predicted against measured")
    plan.add_argument("--steps", type=int, metavar="N", help="steps of each to measure with --validate (default 20)")
    plan.add_argument("--workload", metavar="FILE", type=Path, help="place the graph of this JSON file instead")
    plan.add_argument("--objective", metavar="NAME", help="with --workload: throughput (default) or latency")
    plan.add_argument(
        "--contiguous", action=argparse.BooleanOptionalAction, help="with --workload: intervals (default)"
    )
    plan.add_argument("--time-limit", metavar="S", type=float, help="with --workload: seconds to search (default 60)")
    plan.set_defaults(command=_plan)


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="plan, train, compare and report", allow_abbrev=False)
    run.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file")
    run.add_argument("overrides", metavar="a.b=c", nargs="*", help="settings that replace the file's")
    run.add_argument("--out", metavar="DIR", type=Path, help="run folder to make; default runs/<name>-<time>-<random>")
    run.add_argument("--plans", metavar="DIR", type=Path, help="use the plans of this run folder again")
    run.add_argument("--resume", metavar="DIR", type=Path, help="go on with an unfinished run")
    run.set_defaults(command=_run)


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="show finished runs and write their HTML reports", allow_abbrev=False)
    report.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="run folders")
    report.add_argument("--html", metavar="FILE", type=Path, help="where to write the report; default DIR/report.html")
    report.add_argument("--json", action="store_true", help="print the summaries as JSON")
    report.set_defaults(command=_report)


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="continue a text with a trained model", allow_abbrev=False)
    generate.add_argument("folder", metavar="RUN_DIR", type=Path, help="run folder")
    generate.add_argument("--prompt", metavar="TEXT", required=True, help="text to continue")
    generate.add_argument("--arm", help="which model; default: the first of the run")
    generate.add_argument("--seed", type=int, help="which seed's weights; default: the first of the run")
    generate.add_argument("--tokens", type=int, default=200, help="how many tokens to add (default 200)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (default 0.8)")
    generate.add_argument("--top-k", type=int, help="draw among so many likeliest tokens")
    generate.add_argument("--sample-seed", type=int, default=0, help="seed of the draws (default 0)")
    generate.set_defaults(command=_generate)


def _devices(options: argparse.Namespace) -> None:
    import hetero
    from experiments.devices_table import catalogue_table, devices_table, groups_table
    from hetero.discovery import measure

    if options.catalogue:
        entries = hetero.catalogue()
        print(_json([entry.to_json() for entry in entries]) if options.json else catalogue_table(entries))
        return
    if options.topology is not None:
        topology = hetero.Topology.from_yaml(options.topology)
        print(_json(topology.to_json()) if options.json else groups_table(topology))
        return
    topology = hetero.discover(subdevices=options.subdevices)
    if options.measure:
        topology = dataclasses.replace(topology, devices=tuple(map(measure, topology.devices)))
    print(_json(topology.to_json()) if options.json else devices_table(topology))


def _plan(options: argparse.Namespace) -> None:
    if options.workload is not None or options.config is None:
        from experiments import plan_workload

        print(plan_workload.command(options))
        return
    from experiments import config_file, plan_answers, planning
    from hetero.planner import draw

    if wrong := next(
        (name for name in ("objective", "contiguous", "time_limit") if vars(options)[name] is not None), ""
    ):
        remedy = "set it in the configuration" if wrong != "time_limit" else ""
        raise ConfigError(f"--{wrong.replace('_', '-')} is for --workload", remedy=remedy)
    loaded = config_file.load(options.config, options.overrides)
    if loaded.config.sweep:
        remedy = "plan one combination: heteroq plan CONFIG sweep={} a.b=c"
        raise loaded.source.error(("sweep",), "several configurations; one is planned at a time", remedy=remedy)
    setting = planning.prepare(loaded, topology_file=options.topology)
    if len(setting.topology.devices) > planning.MOST_DEVICES:
        _plan_fleet(setting, options)
        return
    if options.validate or options.steps is not None:
        _validate(setting, options)
        return
    questions = [plan_answers.split_question(text) for text in options.why or ()]
    exports = [plan_answers.split_export(text) for text in options.export or ()]
    costs = {arm: planning.costs_of(setting, arm) for arm in loaded.config.arms}
    plans = {arm: planning.plan_arm(setting, arm, costs[arm]) for arm in loaded.config.arms}
    if options.trace is not None:
        plan_answers.write_traces(options.trace, plans, setting.topology)
    plan_answers.write_exports(exports, plans, setting.topology)
    found = {}
    if options.explain:
        found = {arm: plan_answers.sensitivity_of(setting, plan, costs[arm]) for arm, plan in plans.items()}
    if options.json:
        arms = {arm: plan.to_json() for arm, plan in plans.items()}
        more = {"sensitivity": {arm: one.to_json() for arm, one in found.items()}} if found else {}
        print(_json({"name": loaded.config.name, "arms": arms} | more))
        return
    for arm, plan in plans.items():
        print(f"== {arm}\n")
        for layer, device in questions:
            print(plan_answers.why_not(setting, plan, costs[arm], layer, device))
        if not questions:
            print(f"{draw(plan, setting.topology)}\n\n{plan.explain(found.get(arm))}")
        print()


def _plan_fleet(setting: Any, options: argparse.Namespace) -> None:
    """Plan each arm's replicas on a fleet."""
    from experiments import planning

    given = ("validate", "steps", "trace", "why", "explain", "export")
    if wrong := next((name for name in given if vars(options).get(name)), ""):
        raise ConfigError(f"--{wrong} is for one pipeline", found=f"{len(setting.topology.devices)} devices: a fleet")
    plans = {arm: planning.fleet_plan_arm(setting, arm) for arm in setting.config.arms}
    if options.json:
        arms = {arm: plan.to_json() for arm, plan in plans.items()}
        print(_json({"name": setting.config.name, "fleet": arms}))
        return
    for arm, plan in plans.items():
        print(f"== {arm}\n\n{plan.explain()}\n")


def _validate(setting: Any, options: argparse.Namespace) -> None:
    """Plan each arm and hold its prediction against the clock; with Ctrl-C what was measured so far is printed."""
    from experiments.plan_answers import measured_events, write_traces
    from experiments.validation import STEPS, validate_arm, validation_text

    if not options.validate:
        raise ConfigError("--steps is for --validate")
    if options.explain or options.why or options.export:
        raise ConfigError("--validate measures; --explain, --why and --export are for a call of their own")
    plans, found = {}, {}
    for arm in setting.config.arms:
        plans[arm], found[arm] = validate_arm(setting, arm, steps=STEPS if options.steps is None else options.steps)
        if not options.json:
            print(f"== {arm}\n\n{validation_text(plans[arm], found[arm])}\n")
        if not found[arm].is_complete:
            break
    if options.trace is not None and all(one.is_complete for one in found.values()):
        measured = {arm: measured_events(setting, arm, plan) for arm, plan in plans.items()}
        write_traces(options.trace, plans, setting.topology, measured)
    if options.json:
        arms = {arm: plan.to_json() for arm, plan in plans.items()}
        validations = {arm: one.to_json() for arm, one in found.items()}
        print(_json({"name": setting.config.name, "arms": arms, "validations": validations}))
    if not all(one.is_complete for one in found.values()):
        raise KeyboardInterrupt


def _run(options: argparse.Namespace) -> None:
    from experiments import report
    from experiments.run import resume, run

    if options.resume is not None:
        if options.config is not None or options.out is not None or options.plans is not None:
            raise ConfigError("--resume takes the folder alone; its configuration and plans are in it")
        result = resume(options.resume)
    elif options.config is None:
        raise ConfigError("no configuration", remedy="heteroq run CONFIG, or heteroq run --resume DIR")
    else:
        result = run(options.config, options.overrides, out=options.out, plans=options.plans)
    if (result.out / "table.txt").exists():
        print((result.out / "table.txt").read_text("utf-8"), end="")
        print(f"folder: {result.out}")
        return
    print(report.text_table(result.summary), end="")
    print(f"report: {result.out / 'report.html'}")


def _report(options: argparse.Namespace) -> None:
    from experiments import record, report, sweep

    folders = [one for folder in options.folders for one in sweep.run_folders(folder)]
    if options.html is not None and len(folders) > 1:
        raise ConfigError("--html names one file for several runs", remedy="give one run's DIR, or leave --html out")
    summaries = [record.finished_summary(folder) for folder in folders]
    for folder, summary in zip(folders, summaries, strict=True):
        try:
            target = report.write(folder, options.html)
        except OSError as error:
            raise ConfigError(f"can't write the report: {error.strerror}", found=str(error.filename)) from None
        if not options.json:
            print(report.text_table(summary), end="")
            print(f"report: {target}")
    if options.json:
        print(_json(summaries[0] if len(summaries) == 1 else summaries))


def _generate(options: argparse.Namespace) -> None:
    from experiments.sample import sample

    text = sample(
        options.folder,
        options.prompt,
        arm=options.arm,
        seed=options.seed,
        n_tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        sample_seed=options.sample_seed,
    )
    print(text)


def _schema(options: argparse.Namespace) -> None:
    from experiments.config import Config

    schema = Config.model_json_schema()
    print(_json({"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema))


def _version() -> str:
    from experiments.record import version

    return f"heteroq {version()}"


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
