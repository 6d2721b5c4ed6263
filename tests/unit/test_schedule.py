import itertools
import json

import numpy as np
import pytest

from hetero.errors import PlacementError
from hetero.planner.plan import PlanStage
from hetero.schedule import Event, simulate_stages
from hetero.trace import chrome_trace, write

TOLERANCE = 1e-12  # relative; sums of a few hundred times


def stage(device, forward, backward=0.0):
    return PlanStage(device, 0, 0, ("layer",), forward, backward, 0.0, 0)


def random_pipeline(seed):
    r = np.random.default_rng(seed)
    n, m = int(r.integers(2, 6)), int(r.integers(1, 9))
    forward, backward, hops = r.random(n), r.random(n), r.random(n - 1) * 0.3
    stages = [stage(f"d{k}", forward[k], backward[k]) for k in range(n)]
    return stages, forward, backward, hops, m


@pytest.mark.parametrize("seed", range(50))
def test_gpipe_takes_what_the_formula_says_where_nothing_is_shared(seed):
    stages, f, b, hops, m = random_pipeline(seed)
    formula = f.sum() + (m - 1) * f.max() + b.sum() + (m - 1) * b.max() + 2 * hops.sum()
    assert simulate_stages(stages, hops, {}, m).makespan_s == pytest.approx(formula, rel=TOLERANCE)


@pytest.mark.parametrize("seed", range(50))
def test_shared_cores_keep_the_step_between_its_bounds(seed):
    stages, f, b, hops, m = random_pipeline(seed)
    makespan = simulate_stages(stages, hops, {"d0": (0,), "d1": (0, 1)}, m).makespan_s
    work = f + b
    assert makespan >= m * max(work[0] + work[1], work.max()) * (1 - TOLERANCE)
    assert makespan <= (m * work.sum() + 2 * m * hops.sum()) * (1 + TOLERANCE)


@pytest.mark.parametrize("seed", range(20))
def test_one_micro_batch_shares_no_core_with_itself(seed):
    stages, f, b, hops, _ = random_pipeline(seed)
    shared = simulate_stages(stages, hops, {f"d{k}": (0,) for k in range(len(stages))}, 1)
    assert shared.makespan_s == pytest.approx(f.sum() + b.sum() + 2 * hops.sum(), rel=TOLERANCE)


def test_even_sharing_can_be_slower_than_the_formula():
    # After a has handed over micro-batch 0 at 1, a and b run at half speed from 1 to 3 and c waits for b until 3.
    stages = [stage("a", 1.0), stage("b", 1.0), stage("c", 2.0)]
    schedule = simulate_stages(stages, [0.0, 0.0], {"a": (0,), "b": (0,)}, 2, backward=False)
    formula = 4.0 + 2.0
    assert schedule.makespan_s == 7.0 > formula


def test_stages_apart_on_one_core_can_be_faster_than_the_formula():
    # The core works without a pause (a, a, then c, c) while b in between counts in the formula once more.
    stages = [stage("a", 1.0), stage("b", 1.0), stage("c", 1.0)]
    schedule = simulate_stages(stages, [0.0, 0.0], {"a": (0,), "c": (0,)}, 2, backward=False)
    formula = 3.0 + 2.0
    assert schedule.makespan_s == 4.0 < formula


def test_a_device_with_two_stages_finishes_the_first_before_the_second():
    stages = [stage("a", 1.0), stage("b", 1.0), stage("a", 1.0)]
    schedule = simulate_stages(stages, [0.0, 0.0], {}, 3, backward=False)
    work = [(event.stage, event.microbatch) for event in schedule.events if event.device == "a"]
    assert work == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2)]
    assert schedule.makespan_s == 6.0


def test_1f1b_holds_fewer_micro_batches_and_is_as_fast_where_stages_are_even():
    stages = [stage(f"d{k}", 1.0, 2.0) for k in range(4)]
    gpipe = simulate_stages(stages, [0.0] * 3, {}, 8)
    alternating = simulate_stages(stages, [0.0] * 3, {}, 8, schedule="1f1b")
    assert gpipe.in_flight == (8, 8, 8, 8)
    assert alternating.in_flight == (4, 3, 2, 1)
    assert alternating.makespan_s == gpipe.makespan_s == 33.0


@pytest.mark.parametrize("m", [1, 2, 3])
def test_1f1b_ends_with_fewer_micro_batches_than_stages(m):
    stages = [stage(f"d{k}", 1.0, 1.0) for k in range(5)]
    schedule = simulate_stages(stages, [0.0] * 4, {}, m, schedule="1f1b")
    assert len(schedule.events) == 5 * 2 * m


def test_1f1b_refuses_a_device_with_two_stages():
    with pytest.raises(PlacementError, match="1f1b"):
        simulate_stages([stage("a", 1.0), stage("a", 1.0)], [0.0], {}, 2, schedule="1f1b")


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("seed", range(10))
def test_no_device_does_two_things_at_once_and_each_piece_waits_for_its_input(seed, schedule):
    stages, _, _, hops, m = random_pipeline(seed)
    events = simulate_stages(stages, hops, {"d0": (0,), "d1": (0,)}, m, schedule=schedule).events
    work = {(e.stage, e.microbatch, e.phase): e for e in events if e.phase != "transfer"}
    assert len(work) == 2 * m * len(stages)
    for device in {e.device for e in work.values()}:
        own = sorted((e.start_s, e.end_s) for e in work.values() if e.device == device)
        assert all(b[0] >= a[1] - TOLERANCE for a, b in itertools.pairwise(own))
    for (s, k, phase), event in work.items():
        before = (s - 1, k, phase) if phase == "forward" else (s + 1, k, phase)
        if before in work:
            assert event.start_s >= work[before].end_s + hops[min(s, before[0])] - TOLERANCE


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
