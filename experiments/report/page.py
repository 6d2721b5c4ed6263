"""The page: sections in the order in which a reader asks, and everything it needs inside one file."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import TYPE_CHECKING

from experiments.report import charts, embed, figures_accuracy, figures_placement, tables, tables_run, units, wording
from experiments.report.markup import Markup, el, join
from experiments.report.reading import ArmRun, Run, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from experiments.report.charts import Style

Section = tuple[str, str, Markup]


def render(run: Run) -> str:
    """The report as one HTML document that loads nothing."""
    styles = charts.arm_styles([arm.name for arm in run.arms])
    sections = [
        ("result", "Result", _result(run, styles)),
        ("cost", "Cost", _cost(run, styles)),
        ("curves", "Loss curves", _curves(run, styles)),
        ("placement", "Placement and step time", _placement(run, styles)),
        ("launches", "Launches", _launches(run, styles)),
        ("method", "Method and limits", _method(run)),
        ("environment", "Environment and configuration", _environment(run)),
    ]
    shown = [(key, title, body) for key, title, body in sections if body]
    contents = el(
        "nav", el("ol", *(el("li", el("a", title, href=f"#{key}")) for key, title, _ in shown)), aria_label="contents"
    )
    main = el("main", _header(run, styles), *(el("section", el("h2", t, id=k), b) for k, t, b in shown), _footer(run))
    return _document(run, el("div", contents, main, class_="page"))


def _document(run: Run, body: Markup) -> str:
    css, script = _asset("page.css"), _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = [
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="generator", content=f"heteroq {run.summary.get('heteroq_version', '')}".strip()),
        el("title", f"{run.name}: heteroq report"),
        el("style", Markup(css)),
    ]
    data = el("script", Markup(embed.script_json(embed.data(run))), type="application/json", id="report-data")
    tail = [el("div", id="tip", role="status", hidden=True), data, el("script", Markup(script))]
    document = el("html", el("head", *head), el("body", body, *tail), lang="en")
    return f"<!DOCTYPE html>\n{document}\n"


def _asset(name: str) -> str:
    return resources.files("experiments.report").joinpath(name).read_text(encoding="utf-8")


def _header(run: Run, styles: Mapping[str, Style]) -> Markup:
    status = str(run.summary.get("status") or "incomplete")
    verdict = str(run.summary.get("verdict") or "").strip()
    parts: list[object] = [el("p", "heteroq experiment report", class_="kicker"), el("h1", run.name)]
    if status != "complete":
        parts.append(el("p", el("b", f"This run is {status}. "), wording.progress(run), class_="status"))
    parts.append(el("p", verdict or "No verdict yet.", class_="verdict"))
    parts.append(el("p", el("b", "Asked: "), wording.question(run), class_="asked"))
    parts.append(tables.facts(wording.key_facts(run)))
    known = [arm.name for arm in run.arms if arm.name in wording.ARMS]
    if len(known) > 1:
        parts.append(el("dl", *(_arm_entry(name, styles[name]) for name in known), class_="arms"))
    return el("header", *parts)


def _arm_entry(name: str, style: Style) -> Markup:
    what, tells = wording.ARMS[name]
    return join([el("dt", tables.arm_name(name, style)), el("dd", what, el("span", tells, class_="tells"))])


def _figure(content: Sequence[Markup | None], caption: str, *, class_: str | None = None) -> Markup | None:
    shown = [part for part in content if part]
    if not shown:
        return None
    return el("figure", el("div", *shown, class_=class_), el("figcaption", caption))


def _result(run: Run, styles: Mapping[str, Style]) -> Markup:
    margin = wording.margin(run)
    spread = "the mean and its 95 % interval" if run.n_seeds > 1 else "one each, so that there is no interval"
    caption = f"Loss of each arm: seeds (open circles), {spread}."
    if run.comparisons and run.n_seeds > 1:
        caption += f" Differences are paired by seed, with {run.confidence} intervals: one that holds zero shows none."
    if margin and run.comparisons:
        caption += f" The shaded band is the margin of equivalence, ±{margin:g} {run.unit}."
    figure = _figure(
        [figures_accuracy.loss_by_arm(run, styles), figures_accuracy.differences(run, styles, margin)],
        caption,
        class_="pair",
    )
    floors = tables.floors(run, figures_accuracy.floors(run), styles)
    return join(p for p in [figure, tables.accuracy(run, styles), tables.comparisons(run), floors] if p)


def _cost(run: Run, styles: Mapping[str, Style]) -> Markup:
    figure = _figure(
        [figures_accuracy.accuracy_cost(run, styles, "cpu_s"), figures_accuracy.accuracy_cost(run, styles, "wall_s")],
        "Accuracy against the time that training one seed took: seeds (open circles) and means with 95 % intervals. "
        "Low and left is better.",
        class_="pair",
    )
    legend = _legend(run, styles) if figure else None
    return join(p for p in [legend, figure, tables.cost(run, styles), tables.quantum_cost(run, styles)] if p)


def _legend(run: Run, styles: Mapping[str, Style]) -> Markup:
    items = []
    for arm in run.arms:
        style = styles[arm.name]
        sample = charts.line(0, 6, 34, 6, "thick", stroke_dasharray=style.dash)
        swatch = el(
            "svg", sample, charts.marker(17, 6, style), class_="swatch", viewBox="0 0 34 12", aria_hidden="true"
        )
        items.append(el("li", swatch, el("b", arm.name), class_=style.css))
    return el("ul", *items, class_="legend")


def _curves(run: Run, styles: Mapping[str, Style]) -> Markup:
    validation = [figures_accuracy.overlay(run, styles, "val", wide=wide) for wide in (True, False)]
    gaps = [figures_accuracy.gaps(run, styles, "val", wide=wide) for wide in (True, False)]
    training = figures_accuracy.small_multiples(run, styles, "train")
    has_reference = len(training) > 1 and any(arm.name == "baseline" for arm in run.arms)
    reference = "; the dotted line is the baseline's mean" if has_reference else ""
    thinned = " Points are means of consecutive steps, so that no curve has more than 300." if _is_thinned(run) else ""
    parts = [
        _figure(validation, "Validation loss on the whole split: seeds thin, their mean thick; n-gram floors dashed."),
        _figure(
            gaps,
            "The same, each arm minus the baseline of the same seed: above zero is worse than the baseline.",
        ),
        _figure(
            training,
            f"Training loss of each step, all on the same axes: seeds thin, their mean thick{reference}.{thinned}",
            class_="multiples",
        ),
    ]
    found = [part for part in parts if part]
    return join([_legend(run, styles), *found]) if found else Markup()


def _is_thinned(run: Run) -> bool:
    """Whether a drawn point of a training curve stands for several steps."""
    curves = [curve for arm in run.arms for curve in arm.curves.get("train", {}).values()]
    return any(
        step != int(step) or curve.steps[-1] > 2 * len(curve.steps) for curve in curves for step in curve.steps[:1]
    )


def _placement(run: Run, styles: Mapping[str, Style]) -> Markup:
    times = [figures_placement.step_time_chart(run.arms, styles, wide=wide) for wide in (True, False)]
    figure = _figure(
        times,
        "Time of one step, forward and backward, of the plan and of every alternative on one device. Band and vertical "
        "stroke: predicted before the first step, with its interval. Marker and whiskers: measured, with quartiles.",
    )
    placed = [arm for arm in run.arms if arm.stages or arm.predicted or arm.measured]
    if not placed:
        return join([figure]) if figure else Markup()
    first = max(placed, key=lambda arm: len(figures_placement.devices_of(arm)))
    details = [_arm_details(arm, styles[arm.name], is_open=arm is first) for arm in placed]
    heading = el("h3", "Plan and schedule of each arm")
    return join(p for p in [figure, tables_run.step_time_table(run, styles), heading, *details] if p)


def _arm_details(arm: ArmRun, style: Style, *, is_open: bool) -> Markup:
    head = el(
        "summary",
        tables.arm_name(arm.name, style),
        el("span", figures_placement.placement_sentence(arm), class_="where"),
    )
    placement = _figure(
        [figures_placement.placement(arm, wide=wide) for wide in (True, False)],
        "The layers in their order, on the devices that run them; arrows are hand-overs.",
    )
    missing = [name for name, s in (("predicted", arm.predicted), ("measured", arm.measured)) if s is None]
    absent = f" No {' and no '.join(missing)} schedule was recorded." if missing else ""
    schedule = _figure(
        [figures_placement.gantt(arm, wide=wide) for wide in (True, False)],
        f"One step: forward passes filled, backward passes light; numbers are micro-batches.{absent}",
    )
    inside = [_plan_facts(arm), placement, schedule, tables_run.stages(arm)]
    return el("details", head, el("div", *inside, class_="inside"), open=is_open)


def _plan_facts(arm: ArmRun) -> Markup | None:
    plan, made = table(arm.summary, "plan"), arm.plan
    bound = plan.get("lower_bound_s", made.get("lower_bound"))
    interval = plan.get("interval_s", made.get("interval_s"))
    gap = f"{100 * made['gap']:.1f} %" if units.is_number(made.get("gap")) else None
    solver = made.get("solver") and f"{made['solver']}, {units.duration(made.get('seconds'))}"
    facts = [
        ("predicted step", units.duration(plan.get("predicted_s", made.get("value")))),
        ("expected between", units.duration_range(interval)),
        ("measured step", units.duration(plan.get("measured_s"))),
        ("lower bound", units.duration(bound)),
        ("proof", plan.get("proof", made.get("proof"))),
        ("gap", gap),
        ("solver", solver),
        ("micro-batches", made.get("n_microbatches")),
        ("binding constraint", made.get("binding_constraint")),
    ]
    shown = [(key, value) for key, value in facts if value not in (None, "", units.MISSING)]
    return tables.facts(shown) if shown else None


def _launches(run: Run, styles: Mapping[str, Style]) -> Markup:
    counted = tables_run.launches(run, styles)
    return counted or Markup()


def _method(run: Run) -> Markup:
    return join(
        [
            el("ul", *(el("li", sentence) for sentence in wording.methods(run))),
            el("h3", "Limits of the claim"),
            el("ul", *(el("li", sentence) for sentence in wording.limits(run))),
        ]
    )


def _environment(run: Run) -> Markup:
    command = run.environment.get("command") or "heteroq run config.yaml"
    command = " ".join(map(str, command)) if isinstance(command, list) else str(command)
    encoded = base64.b64encode(embed.seed_csv(run).encode()).decode()
    text = [(f"text: {key}", tables_run.plain(value, key)) for key, value in table(run.summary, "data").items()]
    parts: list[Markup | None] = [
        el("h3", "Reproduce"),
        el("p", "With the configuration below saved as ", el("code", "config.yaml"), ", of the same version and text:"),
        el("pre", el("code", f"heteroq run config.yaml\n# this run: {command}"), class_="command"),
        el("p", "Same configuration, seeds, plans and thread count give the same losses bit for bit."),
        el(
            "p",
            el(
                "a",
                "All data (JSON)",
                id="download",
                href="#report-data",
                download=f"{_slug(run.name)}.json",
                hidden=True,
            ),
            el("a", "Seeds (CSV)", href=f"data:text/csv;base64,{encoded}", download=f"{_slug(run.name)}.csv"),
            class_="buttons",
        ),
        el("noscript", el("p", "All data is in this file, in the element with the id report-data.", class_="note")),
        tables.facts(text, class_="facts long") if text else None,
        el("h3", "Machine and versions") if run.environment else None,
        tables_run.environment(run.environment) if run.environment else None,
        el("h3", "Configuration, with all defaults") if run.config_text else None,
        el("pre", el("code", run.config_text), tabindex="0") if run.config_text else None,
    ]
    return join(part for part in parts if part)


def _slug(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name) or "run"


def _footer(run: Run) -> Markup:
    version = run.summary.get("heteroq_version")
    made = f"Written by heteroq {version}" if version else "Written by heteroq"
    return el("footer", f"{made}. This file is complete: it loads nothing from anywhere.")
