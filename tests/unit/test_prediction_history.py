"""The history of predictions: what is kept, what is passed over, and how often its intervals hold."""

from __future__ import annotations

import json
import math
import multiprocessing

import numpy as np
import pytest

from hetero import history
from hetero.cost import Costs, LayerCost, LayerTime
from hetero.device import Device
from hetero.history import COVERAGE, Kind, Pair
from hetero.planner import given_plan
from hetero.planner.plans import FROM_COSTS
from hetero.topology import Topology

KIND = Kind("a processor, 2 cores", (("cpu", "a processor", "torch", 1),), "train_step", "profiled")


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HETEROQ_CACHE", str(tmp_path))


def pair(predicted: float, measured: float, kind: Kind = KIND) -> Pair:
    return Pair(kind, predicted, (0.9 * predicted, 1.1 * predicted), measured, 20)


def test_what_was_added_is_read_in_its_order_with_date_and_versions():
    history.append([pair(1.0, 2.0), pair(3.0, 4.0)])
    history.append([pair(5.0, 6.0)])
    found = history.read()
    assert [(one.predicted_s, one.measured_s) for one in found] == [(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)]
    assert all(one.kind == KIND and one.date and one.versions["torch"] for one in found)
    assert len(history.file().read_text().splitlines()) == 3


def test_no_history_is_empty():
    assert history.read() == []


@pytest.mark.parametrize(
    "broken",
    [
        "no JSON",
        "[1, 2]",
        "{}",
        '{"form": 1}',
        json.dumps({"form": 99}),
        json.dumps({"form": 1, "kind": {"machine": "", "devices": [[1]], "objective": "", "figures": ""}}),
        '{"form": 1, "ki',
        "\ufffd\x00",
    ],
)
def test_a_broken_line_is_passed_over_with_a_warning(broken, caplog):
    history.append([pair(1.0, 2.0)])
    with history.file().open("a", encoding="utf-8") as file:
        file.write(broken + "\n")
    history.append([pair(3.0, 4.0)])
    assert [one.predicted_s for one in history.read()] == [1.0, 3.0]
    assert "passed over" in caplog.text
    assert "history.jsonl:2" in caplog.text


@pytest.mark.parametrize("measured", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_is_none_is_passed_over(measured, caplog):
    history.append([pair(1.0, measured), pair(1.0, 1.0)])
    assert len(history.read()) == 1
    assert "not positive and finite" in caplog.text


def test_a_line_that_a_crash_cut_off_does_not_swallow_the_next_one(caplog):
    history.append([pair(1.0, 2.0), pair(3.0, 4.0)])
    text = history.file().read_text()
    history.file().write_text(text[:-10])
    history.append([pair(5.0, 6.0)])
    assert [one.predicted_s for one in history.read()] == [1.0, 5.0]
    assert "unreadable" in caplog.text


def _append_many(start: int) -> None:
    for k in range(50):
        history.append([pair(start + k, 1.0)])


def test_several_processes_may_add_at_once():
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append_many, args=(1000 * n,)) for n in range(1, 5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(one.predicted_s for one in history.read()) == [1000 * n + k for n in range(1, 5) for k in range(50)]


def test_a_history_that_can_not_be_written_is_a_warning(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HETEROQ_CACHE", str(tmp_path / "file"))
    history.append([pair(1.0, 1.0)])
    assert "could not be added to" in caplog.text


def test_too_few_pairs_leave_the_costs_interval():
    pairs = [pair(1.0, 1.0 + 0.01 * k) for k in range(8)]
    assert history.interval_s(2.0, (1.5, 2.5), KIND, pairs) == ((1.5, 2.5), FROM_COSTS)
    interval, basis = history.interval_s(2.0, (1.5, 2.5), KIND, [*pairs, pair(1.0, 0.8)])
    assert interval == pytest.approx((2.0 * 0.8, 2.0 / 0.8))  # of nine pairs the largest score counts
    assert basis == "9 earlier predictions for these devices (90% of such intervals hold)"


def test_pairs_of_other_devices_do_not_count():
    other = Kind(KIND.machine, (("opencl:0.1", "", "", 1),), "train_step", "profiled")
    pairs = [pair(1.0, 1.5, other) for _ in range(20)]
    assert history.interval_s(2.0, (1.5, 2.5), KIND, pairs) == ((1.5, 2.5), FROM_COSTS)


def test_old_pairs_are_forgotten():
    pairs = [pair(1.0, 3.0)] * 50 + [pair(1.0, 1.1)] * history.WINDOW
    interval, _ = history.interval_s(1.0, (0.0, 9.0), KIND, pairs)
    assert interval == pytest.approx((1 / 1.1, 1.1))


@pytest.mark.parametrize(("n", "rank"), [(9, 9), (18, 18), (19, 18), (29, 27), (99, 90)])
def test_the_quantile_is_the_conformal_one(n, rank):
    assert history.conformal([float(k) for k in range(n, 0, -1)]) == rank


@pytest.mark.parametrize("n", range(9))
def test_fewer_scores_than_the_coverage_asks_for_have_no_quantile(n):
    assert history.conformal([1.0] * n) is None


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("normal", lambda r, n: 0.1 * r.standard_normal(n)),
        ("biased", lambda r, n: 0.08 + 0.02 * r.standard_normal(n)),
        ("heavy tails", lambda r, n: 0.02 * r.standard_t(2, n)),
        ("one-sided", lambda r, n: r.exponential(0.1, n)),
    ],
)
@pytest.mark.parametrize("n", [9, 12, 30])
def test_intervals_hold_as_often_as_they_say(name, draw, n):
    """The share of held intervals over 3,000 histories; below the claim by 4 standard errors in 1 of 30,000 runs."""
    r = np.random.default_rng(n)
    trials, held = 3000, 0
    for _ in range(trials):
        *past, new = np.exp(draw(r, n + 1))
        (low, high), _ = history.interval_s(1.0, (1.0, 1.0), KIND, [pair(1.0, float(one)) for one in past])
        held += low <= new <= high
    assert held / trials >= COVERAGE - 4 * math.sqrt(COVERAGE * (1 - COVERAGE) / trials)
    # And no wider than that needs: a conformal interval of continuous scores holds below c + 1 / (n + 1).
    assert held / trials <= COVERAGE + 1 / (n + 1) + 4 * math.sqrt(COVERAGE * (1 - COVERAGE) / trials)


def planned(source: str = "profiled"):
    time = LayerTime(1.0, 2.0, 0.1, source)
    layers = tuple(LayerCost(f"layer{k}", None, 4, 4, 4, 4, 1.0, {"cpu": time}) for k in range(2))
    costs, topology = Costs(layers, 2), Topology((Device("cpu", "cpu", "cpu", 2**30),))
    return given_plan([("cpu", 0, 1)], costs, topology), costs, topology


def test_a_plan_gets_the_interval_that_its_devices_history_gives():
    plan, costs, topology = planned()
    assert history.with_history(plan, costs, topology) == plan
    kind = history.kind_of(["cpu"], costs, topology)
    history.append([pair(1.0, 1.25, kind)] * 9)
    found = history.with_history(plan, costs, topology)
    assert found.interval_s == pytest.approx((plan.value / 1.25, plan.value * 1.25))
    assert found.interval_basis.startswith("9 earlier predictions")
    assert found.value == plan.value


def test_figures_that_nobody_measured_are_named_and_are_a_class_of_their_own():
    plan, costs, topology = planned("roofline, efficiency 0.5 assumed")
    history.append([pair(1.0, 1.25, history.kind_of(["cpu"], planned()[1], topology))] * 9)
    found = history.with_history(plan, costs, topology)
    assert found.interval_s == plan.interval_s
    assert found.interval_basis == f"{FROM_COSTS} (roofline, efficiency 0.5 assumed)"
    assert history.kind_of(["cpu"], costs, topology).figures == "roofline"
