import itertools
import json
import math

import numpy as np
import pytest

from hetero.planner.plans import PlanStage
from hetero.schedule import Event, simulate_stages
from hetero.trace import chrome_trace, write

METADATA = {
    "process_name": ("name", str),
    "process_sort_index": ("sort_index", int),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}


def check_format(trace):
    """The rules of the Trace Event Format that the events of a schedule have to keep, and those of Perfetto beyond."""
    text = json.dumps(trace, allow_nan=False)
    assert json.loads(text) == trace
    events = trace["traceEvents"]
    for event in events:
        assert event["ph"] in set("XMstfC")
        assert isinstance(event["name"], str)
        assert event["name"]
        assert isinstance(event["pid"], int)
        assert math.isfinite(event["ts"])
        assert event["ts"] >= 0
        assert isinstance(event.get("tid"), int) or event["ph"] == "C"
    named = {"process_name": set(), "thread_name": set()}
    for event in (e for e in events if e["ph"] == "M"):
        key, kind = METADATA[event["name"]]
        assert set(event["args"]) == {key}
        assert isinstance(event["args"][key], kind)
        if event["name"] in named:
            named[event["name"]].add((event["pid"], event["tid"]))
    assert len({e["args"]["name"] for e in events if e["name"] == "process_name"}) == len(named["process_name"])
    check_slices(events, named["thread_name"])
    check_flows(events)
    check_counters(events)


def threads_of(events):
    key = lambda e: (e["pid"], e["tid"])  # noqa: E731
    slices = sorted((e for e in events if e["ph"] == "X"), key=lambda e: (*key(e), e["ts"]))
    return {thread: list(own) for thread, own in itertools.groupby(slices, key=key)}


def check_slices(events, named):
    """No slice overlaps another on its thread, in whole nanoseconds; every thread has a name of its own."""
    threads = threads_of(events)
    assert set(threads) == named
    names = [(e["pid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"]
    assert len(set(names)) == len(names)
    for own in threads.values():
        for event in own:
            assert event["dur"] >= 0
            assert set(event["args"]) == {"stage", "microbatch"}
        nanoseconds = [(round(e["ts"] * 1e3), round((e["ts"] + e["dur"]) * 1e3)) for e in own]
        assert all(later[0] >= earlier[1] for earlier, later in itertools.pairwise(nanoseconds))


def check_flows(events):
    """Each arrow has one start, one end, equal names, rising times; each of its points lies in a slice."""
    threads = threads_of(events)
    flows = sorted((e for e in events if e["ph"] in "stf"), key=lambda e: e["id"])
    for _, group in itertools.groupby(flows, key=lambda e: e["id"]):
        arrow = list(group)
        assert "".join(e["ph"] for e in arrow) in {"sf", "stf"}
        assert len({(e["name"], e["cat"], e["pid"]) for e in arrow}) == 1
        assert [e.get("bp") for e in arrow] == [None] * (len(arrow) - 1) + ["e"]
        assert [e["ts"] for e in arrow] == sorted(e["ts"] for e in arrow)
        for point in arrow:
            inside = (e for e in threads[point["pid"], point["tid"]] if e["ts"] <= point["ts"] <= e["ts"] + e["dur"])
            assert any(inside)


def check_counters(events):
    counters = sorted((e for e in events if e["ph"] == "C"), key=lambda e: (e["pid"], e["name"]))
    for _, group in itertools.groupby(counters, key=lambda e: (e["pid"], e["name"])):
        own = list(group)
        assert [e["ts"] for e in own] == sorted(e["ts"] for e in own)
        assert all(len(e["args"]) == 1 and all(v >= 0 for v in e["args"].values()) for e in own)
        assert list(own[-1]["args"].values()) == [0]


def pipeline(seed):
    r = np.random.default_rng(seed)
    n, m = int(r.integers(1, 5)), int(r.integers(1, 7))
    devices = [f"d{k}" for k in range(n)]
    schedule = str(r.choice(["gpipe", "1f1b"]))
    if schedule == "gpipe" and n > 2 and r.random() < 0.5:
        devices[2] = devices[0]
    times = (r.integers(0, 3, n), r.integers(0, 3, n)) if r.random() < 0.3 else (r.random(n), r.random(n))
    hops = r.random(n - 1) * r.integers(0, 3, n - 1)
    saved = r.integers(0, 1000, n).tolist()
    stages = [
        PlanStage(d, 0, 0, ("l",), float(f), float(b), 0.0, 0, saved_bytes=s)
        for d, f, b, s in zip(devices, *times, saved, strict=True)
    ]
    overlap, backward = bool(r.random() < 0.5), bool(r.random() < 0.8)
    found = simulate_stages(stages, hops, {}, m, schedule=schedule, overlap=overlap, backward=backward)
    return found, saved, n, m, hops, backward


@pytest.mark.parametrize("block", range(4))
def test_traces_of_random_schedules_keep_the_rules_of_the_format(block):
    for seed in range(50 * block, 50 * block + 50):
        found, saved, n, m, hops, backward = pipeline(seed)
        trace = chrome_trace(predicted=found.events, measured=found.events, saved_bytes=saved)
        check_format(trace)
        events = trace["traceEvents"]
        phases = [e["ph"] for e in events]
        ways = 2 if backward else 1
        assert phases.count("X") == 2 * (ways * n * m + ways * m * np.count_nonzero(hops))
        assert phases.count("s") == phases.count("f") == 2 * ways * (n - 1) * m
        assert phases.count("t") == 2 * ways * m * np.count_nonzero(hops)
        assert {e["pid"] for e in events} == {1, 2}


def test_counters_show_the_bytes_that_a_device_keeps():
    stages = [PlanStage(d, 0, 0, ("l",), 1.0, 1.0, 0.0, 0, saved_bytes=s) for d, s in (("a", 10), ("b", 3), ("a", 4))]
    found = simulate_stages(stages, [0.0, 0.0], {}, 2)
    events = chrome_trace(predicted=found.events, saved_bytes=[10, 3, 4])["traceEvents"]
    levels = {name: [] for name in ("in flight on a", "in flight on b")}
    for event in events:
        if event["ph"] == "C":
            levels[event["name"]].append(event["args"]["bytes"])
    assert levels == {"in flight on a": [10, 20, 24, 28, 24, 20, 10, 0], "in flight on b": [3, 6, 3, 0]}
    unit = next(e for e in chrome_trace(predicted=found.events)["traceEvents"] if e["ph"] == "C")["args"]
    assert unit == {"micro-batches": 1}


def test_transfers_under_way_at_once_have_threads_of_their_own():
    stages = [PlanStage(d, 0, 0, ("l",), 1.0, 0.0, 0.0, 0) for d in "ab"]
    found = simulate_stages(stages, [2.5], {}, 3, backward=False)
    events = chrome_trace(predicted=found.events)["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(names.values()) == ["a", "a->b", "a->b (2)", "a->b (3)", "b"]
    check_format({"traceEvents": events})


def test_an_arrow_leads_from_a_pass_over_its_transfer_to_the_pass_that_waits_for_it():
    stages = [PlanStage(d, 0, 0, ("l",), 1.0, 1.0, 0.0, 0) for d in "ab"]
    events = chrome_trace(predicted=simulate_stages(stages, [1.0], {}, 1).events)["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    arrows = [(e["name"], e["ph"], names[e["tid"]], e["ts"]) for e in events if e["ph"] in "stf"]
    assert arrows == [
        ("activation", "s", "a", 0.5e6),
        ("activation", "t", "a->b", 1e6),
        ("activation", "f", "b", 2e6),
        ("gradient", "s", "b", 3.5e6),
        ("gradient", "t", "b->a", 4e6),
        ("gradient", "f", "a", 5e6),
    ]


def test_a_trace_has_a_process_for_each_schedule_and_a_thread_for_each_device(tmp_path):
    predicted = [Event("cpu", 0, 0, "forward", 0.0, 0.001), Event("gpu", 1, 0, "forward", 0.001, 0.003)]
    measured = [Event("cpu", 0, 0, "forward", 0.0, 0.002)]
    path = tmp_path / "deep" / "trace.json"
    write(path, predicted=predicted, measured=measured)
    events = json.loads(path.read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {1: "predicted", 2: "measured"}
    assert names == {(1, 1): "cpu", (1, 2): "gpu", (2, 1): "cpu"}
    complete = [(e["pid"], e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert complete == [(1, 1, 0.0, 1000.0), (1, 2, 1000.0, 2000.0), (2, 1, 0.0, 2000.0)]
    assert [p.name for p in path.parent.iterdir()] == ["trace.json"]


def test_a_trace_without_measurement_has_one_process():
    events = chrome_trace(predicted=[Event("cpu", 0, 0, "forward", 0.0, 1.0)])["traceEvents"]
    assert {event["pid"] for event in events} == {1}
