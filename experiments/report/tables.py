"""The report's tables. Every figure without an interval says so by having none; estimates are marked `est.`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.report import charts, units
from experiments.report.markup import Markup, el, join
from experiments.report.reading import ArmRun, Run, table
from experiments.report.units import MISSING

if TYPE_CHECKING:
    from experiments.report.charts import Style

Column = tuple[str, Callable[[ArmRun], object]]


def grid(
    caption: str, heads: Sequence[object], body: Iterable[Sequence[object]], *, text_columns: Iterable[int] = (0,)
) -> Markup:
    """A table in a box of its own that scrolls sideways; all but the text columns are numbers, aligned right."""
    left = set(text_columns)

    def cell(tag: str, i: int, content: object) -> Markup:
        scope = {"scope": "col"} if tag == "th" else {}
        if tag == "td" and i == 0:
            tag, scope = "th", {"scope": "row"}
        return el(tag, content, class_=("w" if i and len(str(content)) > 24 else None) if i in left else "n", **scope)

    head = el("thead", el("tr", *(cell("th", i, h) for i, h in enumerate(heads))))
    lines = el("tbody", *(el("tr", *(cell("td", i, c) for i, c in enumerate(row))) for row in body))
    scroll = el("div", el("table", head, lines), class_="scroll", tabindex="0", role="region", aria_label=caption)
    return el("div", el("p", caption, class_="caption"), scroll, class_="table")


def arm_name(name: str, style: Style) -> Markup:
    """An arm's name after its marker."""
    mark = el("svg", charts.marker(8, 8, style), class_="key", viewBox="0 0 16 16", aria_hidden="true")
    return el("span", mark, name, class_=f"arm {style.css}")


def estimate(value: str, interval: str = "") -> Markup:
    """A value with its interval beneath."""
    small = el("small", interval) if interval and interval != MISSING else None
    return el("span", value, small, class_="ci") if small else join([value])


def accuracy(run: Run, styles: Mapping[str, Style]) -> Markup:
    """Loss, perplexity, bits per byte, and the difference to the baseline with its p values."""
    decimals = units.decimals_for([arm.interval(run.metric) for arm in run.arms])
    against = [run.against(arm.name) for arm in run.arms]
    fine = units.decimals_for([c.get("interval") for c in against], default=decimals)
    has_tost = any(units.is_number(_p_tost(c)) for c in against)
    body = []
    for arm, comparison in zip(run.arms, against, strict=True):
        difference = units.fixed(comparison.get("difference"), fine, sign=True)
        p_values = [comparison.get("p_permutation"), comparison.get("p_holm"), _p_tost(comparison)][: 2 + has_tost]
        cells = [estimate(difference, units.interval(comparison.get("interval"), fine, sign=True))]
        cells += [join([units.p_value(p)]) for p in p_values]
        body.append(
            [
                arm_name(arm.name, styles[arm.name]),
                _with_interval(arm, run.metric, decimals),
                _with_interval(arm, "perplexity", 2),
                _with_interval(arm, "bits_per_byte", 3),
                *(cells if any(against) else []),
                len(arm.seeds) or MISSING,
            ]
        )
    split = run.metric.split("_")[0]
    caption = f"Accuracy on the {split} split: means over seeds, 95 % intervals (Student's t) beneath"
    caption += f", {run.confidence} for differences. Lower is better." if any(against) else ". Lower is better."
    heads: list[object] = ["arm", join(["loss ", el("small", run.unit)]), "perplexity", "bits per byte"]
    if any(against):
        names = ["permutation", "Holm", "equivalence"][: 2 + has_tost]
        heads += ["difference to baseline", *(join(["p ", el("small", name)]) for name in names)]
    return grid(caption, [*heads, "seeds"], body)


def _with_interval(arm: ArmRun, metric: str, decimals: int) -> Markup:
    return estimate(units.fixed(arm.mean(metric), decimals), units.interval(arm.interval(metric), decimals))


def _p_tost(comparison: Mapping[str, Any]) -> Any:
    """The p value of the equivalence tests, Holm-adjusted where the run has that."""
    return comparison.get("p_tost_holm", comparison.get("p_tost"))


def comparisons(run: Run) -> Markup | None:
    """Every pair that was compared, with its verdict."""
    found = run.comparisons
    if not found:
        return None
    decimals = units.decimals_for(c.get("interval") for c in found)
    body = [
        [
            f"{c.get('arm', '?')} − {c.get('against', '?')}",
            units.fixed(c.get("difference"), decimals, sign=True),
            units.interval(c.get("interval"), decimals, sign=True),
            units.p_value(c.get("p_permutation")),
            units.p_value(c.get("p_holm")),
            units.p_value(_p_tost(c)),
            c.get("n", MISSING),
            c.get("verdict") or MISSING,
        ]
        for c in found
    ]
    heads = [
        "pair",
        "difference",
        f"{run.confidence} interval",
        "p permutation",
        "p Holm",
        "p equivalence",
        "pairs",
        "verdict",
    ]
    caption = (
        f"Comparisons, paired by seed: differences of {run.metric.replace('_', ' ')} in {run.unit}; "
        "negative: the first is better."
    )
    return grid(caption, heads, body, text_columns=(0, 7))


def cost(run: Run, styles: Mapping[str, Style]) -> Markup:
    """What each arm cost: parameters, time, energy, memory."""

    def of(arm: ArmRun, key: str) -> Any:
        return table(arm.summary, "cost").get(key)

    columns: list[Column] = [
        ("arm", lambda arm: arm_name(arm.name, styles[arm.name])),
        ("parameters", _parameters),
        ("learning rate", lambda arm: _rate(arm.summary.get("learning_rate"))),
        ("wall time", lambda arm: _seconds(arm, "wall_s", of(arm, "wall_s"))),
        ("CPU time", lambda arm: _seconds(arm, "cpu_s", of(arm, "cpu_s"))),
        ("step, median", lambda arm: units.duration(arm.mean("step_s_median"))),
        ("tokens/s", lambda arm: units.count(arm.mean("tokens_per_s"))),
        ("first step", lambda arm: units.duration(arm.mean("first_step_s"))),
        ("energy", lambda arm: _energy(of(arm, "energy_j"))),
        ("peak memory", lambda arm: units.size(of(arm, "peak_rss_bytes"))),
    ]
    caption = (
        "Cost of training one seed of each arm on this machine, with 95 % intervals beneath. "
        "Peak memory is of the whole process."
    )
    return grid(caption, [head for head, _ in columns], [[value(arm) for _, value in columns] for arm in run.arms])


def _parameters(arm: ArmRun) -> Markup:
    total, trainable = arm.summary.get("parameters"), arm.summary.get("trainable_parameters")
    note = "all trainable" if total == trainable else f"{units.count(trainable)} trainable"
    return estimate(units.count(total), note if units.is_number(trainable) else "")


def _rate(value: Any) -> str:
    return f"{value:g}" if units.is_number(value) else MISSING


def _seconds(arm: ArmRun, metric: str, total: Any) -> Markup:
    mean = arm.mean(metric)
    interval = arm.interval(metric)
    decimals = 1 if (mean or 0) < 1000 else 0
    value = (
        f"{units.fixed(total if mean is None else mean, decimals)} s"
        if mean is not None or units.is_number(total)
        else MISSING
    )
    return estimate(value, units.interval(interval, decimals))


def _energy(value: Any) -> str:
    return f"{units.significant(value)} J" if units.is_number(value) else "not measured"


def quantum_cost(run: Run, styles: Mapping[str, Style]) -> Markup | None:
    """What a QPU would have had to run; None if no arm has a circuit."""
    quantum = [arm for arm in run.arms if table(arm.summary, "cost").get("circuits")]
    if not quantum:
        return None
    body = []
    for arm in quantum:
        spent = table(arm.summary, "cost")
        body.append(
            [
                arm_name(arm.name, styles[arm.name]),
                *(units.short_count(spent.get(key)) for key in ("circuits", "gates_1q", "gates_2q")),
                units.count(spent.get("depth")),
                units.short_count(spent.get("shots")),
                units.duration(spent.get("qpu_s")),
                units.dollars(spent.get("usd")),
            ]
        )
    heads = ["arm", "circuits", "one-qubit gates", "two-qubit gates", "depth of a circuit", "shots"]
    heads_marked = [*heads, join(["QPU time ", el("small", "est.")]), join(["price ", el("small", "est.")])]
    caption = (
        "What a quantum processor would have had to run for the same training: one circuit a token, gradients by "
        "parameter shift. Nothing here ran on one."
    )
    notes = list(dict.fromkeys(str(n) for arm in quantum if (n := table(arm.summary, "cost").get("usd_note"))))
    return join([grid(caption, heads_marked, body), *(el("p", note, class_="note") for note in notes)])


def floors(run: Run, values: Mapping[str, float], styles: Mapping[str, Style]) -> Markup | None:
    """Losses of n-gram models, and by how much each arm's worst seed beats them."""
    if not values:
        return None
    arms = [arm for arm in run.arms if arm.values(run.metric)]
    body = [
        [name, units.fixed(value, 4), *(units.fixed(value - max(arm.values(run.metric)), 3, sign=True) for arm in arms)]
        for name, value in values.items()
    ]
    heads: list[object] = ["floor", f"loss [{run.unit}]", *(arm_name(arm.name, styles[arm.name]) for arm in arms)]
    caption = (
        "Floors: models that only count tokens of the training text. At the right, by how much the worst seed of each "
        "arm is better."
    )
    return grid(caption, heads, body)


def facts(pairs: Iterable[tuple[object, object]], *, class_: str = "facts") -> Markup:
    """A list of terms with their values; class `facts long` gives long values more room."""
    return el("dl", *(el("div", el("dt", key), el("dd", value)) for key, value in pairs), class_=class_)
