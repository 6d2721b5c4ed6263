"""The parts of the report: units, scales, curves, schedules, the table for the terminal."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import report
from experiments.report import charts, units
from experiments.report.markup import Markup, el
from experiments.report.reading import Curve, mean_curve, thin
from experiments.report.schedules import read_schedules

_SPEC = importlib.util.spec_from_file_location("report_fixture", Path(__file__).parents[1] / "report_fixture.py")
fixture = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fixture)

_PROPERTY = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (units.duration, 0.0412, "41.2 ms"),
        (units.duration, 28.13, "28.1 s"),
        (units.duration, 90, "90.0 s"),
        (units.duration, 205.2, "3.42 min"),
        (units.duration, 3 * 3600, "3.00 h"),
        (units.duration, 40 * 86400, "40.0 d"),
        (units.duration, 5 * 365.25 * 86400, "5.00 yr"),
        (units.duration, 2.1e-5, "21.0 µs"),
        (units.duration, 3e-9, "3.00 ns"),
        (units.duration, 0, "0 s"),
        (units.duration, None, "–"),
        (units.duration, float("nan"), "–"),
        (units.duration_range, [0.0305, 0.0351], "30.5 – 35.1 ms"),
        (units.duration_range, [0.5, 1.5], "500 ms – 1.50 s"),
        (units.count, 103425, "103,425"),
        (units.short_count, 99_999, "99,999"),
        (units.short_count, 17_510_000, "17.5 M"),
        (units.short_count, 999_960, "1.00 M"),
        (units.short_count, 3e12, "3.00 T"),
        (units.size, 512, "512 B"),
        (units.size, 32768, "32.0 KiB"),
        (units.size, 8.2 * 2**30, "8.20 GiB"),
        (units.p_value, 0.25, "0.25"),
        (units.p_value, 0.03125, "0.031"),
        (units.p_value, 0.0004, "<0.001"),
        (units.p_value, True, "–"),
        (units.dollars, 0.516, "$0.52"),
        (units.dollars, 12_300, "$12,300"),
        (units.dollars, 4_210_000, "$4.21 M"),
        (units.significant, 1234.5, "1,234"),
        (units.significant, 0.01234, "0.0123"),
    ],
)
def test_figures_have_a_unit_and_three_digits(function: Any, value: Any, expected: str) -> None:
    assert function(value) == expected


@pytest.mark.parametrize(
    ("value", "decimals", "sign", "expected"),
    [
        (-0.0058, 4, True, "−0.0058"),
        (0.0058, 4, True, "+0.0058"),
        (-0.00001, 2, False, "0.00"),
        (1e6, 0, False, "1,000,000"),
    ],
)
def test_fixed_numbers_have_a_true_minus_and_no_negative_zero(
    value: float, decimals: int, sign: bool, expected: str
) -> None:
    assert units.fixed(value, decimals, sign=sign) == expected


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [([[1.0, 1.02], None], 3), ([[1.0, 1.0004]], 5), ([[1, 9]], 2), ([None, [1.0, 1.0]], 4)],
)
def test_decimals_show_two_digits_of_the_narrowest_interval(intervals: list[Any], expected: int) -> None:
    assert units.decimals_for(intervals) == expected


def test_elements_escape_everything_that_is_not_markup() -> None:
    assert el("b", "<i>", Markup("<i></i>"), title='"&') == '<b title="&quot;&amp;">&lt;i&gt;<i></i></b>'
    assert (
        el("rect", x=1.25, y=-0.01, class_="a", hidden=True, rx=None) == '<rect x="1.2" y="0" class="a" hidden></rect>'
    )
    assert "\x00" not in el("b", "a\x00\ud800b")


@_PROPERTY
@given(st.floats(-1e6, 1e6, allow_nan=False), st.floats(1e-6, 1e6), st.integers(2, 9), st.booleans())
def test_ticks_are_round_inside_the_scale_and_few(low: float, width: float, about: int, zero: bool) -> None:
    scale = charts.scale([low, low + width], 0.0, 100.0, zero=zero and low > 0)
    ticks = scale.ticks(about)
    assert 1 <= len(ticks) <= 2 * about + 1
    slack = 1e-6 * (abs(low) + width)
    assert all(scale.low - slack <= tick <= scale.high + slack for tick in ticks)
    assert ticks == sorted(ticks)


@pytest.mark.parametrize(
    ("ticks", "expected"),
    [
        ([0.0, 2.5, 5.0], ["0.0", "2.5", "5.0"]),
        ([1.96, 1.98], ["1.96", "1.98"]),
        ([0, 1000], ["0", "1,000"]),
        ([-0.25, 0.0], ["−0.25", "0.00"]),
        ([], []),
    ],
)
def test_tick_labels_share_one_format(ticks: list[float], expected: list[str]) -> None:
    assert charts.tick_labels(ticks) == expected


def test_logarithmic_scale_is_taken_only_where_it_is_needed() -> None:
    assert charts.scale([1.0, 100.0], 0, 100, allow_log=True).log
    assert not charts.scale([1.0, 10.0], 0, 100, allow_log=True).log
    assert not charts.scale([0.0, 100.0], 0, 100, allow_log=True).log
    scale = charts.scale([1.0, 100.0], 0, 100, allow_log=True)
    assert scale(10.0) == pytest.approx(50.0)
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks(5))


@_PROPERTY
@given(st.lists(st.floats(0, 300), min_size=1, max_size=8))
def test_labels_are_spread_in_order_and_never_overlap(wanted: list[float]) -> None:
    at = charts.spread(wanted, least=17, low=0, high=300)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [at[i] for i in order]
    assert all(b - a >= 17 - 1e-9 for a, b in itertools.pairwise(placed))
    assert placed[0] >= -1e-9
    assert placed[-1] <= 300 + 1e-9


@_PROPERTY
@given(st.integers(1, 2500), st.integers(1, 300))
def test_thinning_keeps_the_mean_and_the_limit(n: int, most: int) -> None:
    points = [(float(i), float(i % 7)) for i in range(n)]
    curve = thin(points, most)
    assert len(curve.steps) <= most
    group = -(-n // most)
    weights = [min(group, n - i * group) for i in range(len(curve.steps))]
    assert sum(w * v for w, v in zip(weights, curve.losses, strict=True)) == pytest.approx(sum(v for _, v in points))


def test_mean_curve_uses_only_steps_that_all_seeds_have() -> None:
    curves = {"0": Curve((1, 2, 3), (1.0, 2.0, 3.0)), "1": Curve((2, 3, 4), (4.0, 5.0, 6.0))}
    assert mean_curve(curves) == Curve((2, 3), (3.0, 4.0))
    assert mean_curve({}) == Curve((), ())


def test_arms_keep_their_look_and_unknown_ones_get_one_of_their_own() -> None:
    styles = charts.arm_styles(["new", "hybrid", "newer"])
    assert styles["hybrid"] == charts.arm_styles(["baseline", "hybrid"])["hybrid"]
    assert len({style.index for style in styles.values()}) == 3


def test_one_trace_file_may_hold_both_schedules(tmp_path: Path) -> None:
    from hetero import trace
    from hetero.schedule import Event

    predicted = [Event("cpu", 0, 0, "forward", 0.0, 0.001), Event("cpu", 0, 0, "backward", 0.001, 0.003)]
    measured = [Event("cpu", 0, 0, "forward", 5.0, 5.002), Event("cpu->aer", 0, 0, "transfer", 5.002, 5.0021)]
    trace.write(tmp_path / "trace.json", predicted=predicted, measured=measured)
    first, second = read_schedules([tmp_path])
    assert first is not None
    assert second is not None
    assert first.length_s == pytest.approx(0.003)
    assert second.length_s == pytest.approx(0.0021)
    assert [(b.device, b.phase, b.label) for b in second.blocks] == [
        ("cpu", "forward", "0"),
        ("cpu->aer", "transfer", "0"),
    ]


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = fixture.write_run(tmp_path_factory.mktemp("run"), n_seeds=3, steps=20)
    return json.loads((folder / "summary.json").read_text())


def test_terminal_table_has_arms_floors_step_times_and_verdict_in_this_order(summary: dict[str, Any]) -> None:
    text = report.text_table(summary)
    landmarks = ["test loss", "baseline", "hybrid", "twin", "frozen", "identity", "floors: unigram 3.1184"]
    landmarks += ["step time [ms]", "cpu alone", "opencl:0.1 alone", "verdict: hybrid against baseline"]
    positions = [text.index(landmark) for landmark in landmarks]
    assert positions == sorted(positions)


def test_terminal_table_is_aligned_and_at_most_100_columns_wide(summary: dict[str, Any]) -> None:
    lines = report.text_table(summary).splitlines()
    assert max(map(len, lines)) <= 100
    rule = next(i for i, line in enumerate(lines) if line.startswith("──"))
    assert {len(line) for line in lines[rule - 1 : rule + 6]} == {len(lines[rule])}


def test_terminal_table_stays_narrow_with_many_alternatives(summary: dict[str, Any]) -> None:
    others = [{"name": f"opencl:{i} alone, rest on cpu", "predicted_s": 0.05, "measured_s": None} for i in range(9)]
    arms = {name: {**arm, "alternatives": others} for name, arm in summary["arms"].items()}
    text = report.text_table({**summary, "arms": arms})
    assert max(map(len, text.splitlines())) <= 100
    assert "(50.0)" in text  # predicted, not measured
    assert "opencl:8 alone" in text


def test_terminal_table_shows_means_with_their_intervals(summary: dict[str, Any]) -> None:
    arm = summary["arms"]["hybrid"]
    low, high = arm["interval"]["test_loss"]
    line = next(line for line in report.text_table(summary).splitlines() if line.startswith("hybrid"))
    assert f"{arm['mean']['test_loss']:.4f} ±{(high - low) / 2:.4f}" in line


def test_terminal_heading_says_how_sure_the_intervals_of_differences_are(summary: dict[str, Any]) -> None:
    text = " ".join(report.text_table({**summary, "alpha": 0.01}).split())
    assert "± is the 95 % interval (differences: 99 %)" in text


def test_terminal_obeys_no_control_characters_from_a_file(summary: dict[str, Any]) -> None:
    spoiled = {**summary, "name": "a\x1b[2Jb", "verdict": "v\x07w", "floors": {"\x1b[31m": 1.0}}
    text = report.text_table(spoiled)
    assert all(c.isprintable() or c == "\n" for c in text)


def test_terminal_table_of_nothing_is_still_a_text() -> None:
    assert "0 arms" in report.text_table({})
