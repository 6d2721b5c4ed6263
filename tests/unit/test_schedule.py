import functools
import itertools

import numpy as np
import pytest

from hetero.cost import Costs, LayerCost, LayerTime
from hetero.device import Device
from hetero.errors import PlacementError
from hetero.planner import given_plan
from hetero.planner.plans import PlanStage
from hetero.schedule import Work, held_over_time, simulate, simulate_stages, step_time, work_order
from hetero.topology import Link, Topology

TOLERANCE = 1e-12  # relative; sums of a few hundred times


def stage(device, forward, backward=0.0, saved_bytes=0):
    return PlanStage(device, 0, 0, ("layer",), forward, backward, 0.0, 0, saved_bytes=saved_bytes)


def random_pipeline(seed):
    r = np.random.default_rng(seed)
    n, m = int(r.integers(2, 6)), int(r.integers(1, 9))
    forward, backward, hops = r.random(n), r.random(n), r.random(n - 1) * 0.3
    if seed % 3 == 0:  # zeros and ties
        forward, backward, hops = np.floor(3 * forward), np.floor(3 * backward), np.floor(9 * hops)
    stages = [stage(f"d{k}", forward[k], backward[k]) for k in range(n)]
    return stages, forward, backward, hops, m


def wires(n, *, full_duplex):
    """A medium for each hand-over, and in full duplex one for each way."""
    return [(f"{k}", f"{k} back" if full_duplex else f"{k}") for k in range(n - 1)]


def check_gpipe(seed):
    """The formula, and what becomes of it where transfers take turns on wires of their own or block their sender."""
    stages, f, b, hops, m = random_pipeline(seed)
    total = f.sum() + b.sum() + 2 * hops.sum()
    after, before = np.append(hops, 0.0), np.append(0.0, hops)  # what a stage sends on, and back
    maxima = {
        (True, None): f.max() + b.max(),
        (True, seed % 2 == 0): max(*f, *hops) + max(*b, *hops),
        (False, None): (f + after).max() + (b + before).max(),
        (False, seed % 2 == 0): (f + after).max() + (b + before).max(),
    }
    for (overlap, full_duplex), most in maxima.items():
        channels = None if full_duplex is None else wires(len(stages), full_duplex=full_duplex)
        simulated = simulate_stages(stages, hops, {}, m, overlap=overlap, channels=channels).makespan_s
        assert simulated == pytest.approx(total + (m - 1) * most, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("block", range(5))
def test_gpipe_takes_what_the_formula_says_where_nothing_is_shared(block):
    for seed in range(60 * block, 60 * block + 60):
        check_gpipe(seed)


def longest_path(f, b, hops, m, *, overlap):
    """A 1F1B step as the longest way through the rules "after" of its order: no clock, no queue.

    With n stages after stage s, forward pass k of it comes after backward pass k - n - 1 if there is one, else after
    forward pass k - 1; backward pass k comes after forward pass k + n, or after backward pass k - 1 once all are done.
    """
    n_stages = len(f)

    @functools.cache
    def end(s, phase, k):
        later = n_stages - 1 - s
        own = f[s] if phase == "f" else b[s]
        if phase == "f":
            ready = end(s - 1, "f", k) + hops[s - 1] if s else 0.0
            previous = ("b", k - later - 1) if k > later else ("f", k - 1)
        else:
            ready = end(s + 1, "b", k) + hops[s] if later else end(s, "f", k)
            previous = ("f", k + later) if k + later < m else ("b", k - 1)
            if k == 0 and previous[0] == "b":
                previous = ("f", m - 1)
        free = 0.0
        if previous[1] >= 0:
            free = end(s, *previous)
            if not overlap:
                free += (hops[s] if later else 0.0) if previous[0] == "f" else (hops[s - 1] if s else 0.0)
        return max(ready, free) + own

    return max(end(s, "b", m - 1) for s in range(n_stages))


def check_1f1b(seed):
    stages, f, b, hops, m = random_pipeline(seed)
    for overlap in (True, False):
        expected = longest_path(f, b, hops, m, overlap=overlap)
        simulated = simulate_stages(stages, hops, {}, m, schedule="1f1b", overlap=overlap).makespan_s
        assert simulated == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
        assert step_time(f, b, hops, m, overlap=overlap) == simulated


@pytest.mark.parametrize("block", range(5))
def test_1f1b_takes_the_longest_path_through_its_order(block):
    for seed in range(60 * block, 60 * block + 60):
        check_1f1b(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_simulated_steps_take_what_they_should_in_thousands_of_pipelines(block):
    for seed in range(1000 * block, 1000 * block + 1000):
        check_gpipe(seed)
        check_1f1b(seed)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("seed", range(30))
def test_a_medium_carries_one_transfer_at_a_time(seed, schedule):
    stages, _, _, hops, m = random_pipeline(seed)
    free = simulate_stages(stages, hops, {}, m, schedule=schedule)
    one_bus = [("bus", "bus")] * (len(stages) - 1)
    crowded = simulate_stages(stages, hops, {}, m, schedule=schedule, channels=one_bus)
    sent = sorted((e.start_s, e.end_s) for e in crowded.events if e.phase == "transfer")
    assert all(later[0] >= earlier[1] - TOLERANCE for earlier, later in itertools.pairwise(sent))
    assert len(sent) == 2 * m * np.count_nonzero(hops)
    assert crowded.makespan_s >= 2 * m * hops.sum() * (1 - TOLERANCE)
    if schedule == "gpipe":  # in 1f1b a later gradient may let a more urgent activation pass
        assert crowded.makespan_s >= free.makespan_s * (1 - TOLERANCE)


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


def test_a_sender_that_blocks_works_on_only_when_its_transfer_has_arrived():
    stages = [stage("a", 1.0), stage("b", 1.0)]
    schedule = simulate_stages(stages, [2.0], {}, 2, backward=False, overlap=False)
    assert [(e.device, e.start_s, e.end_s) for e in schedule.events if e.stage == 0] == [
        ("a", 0.0, 1.0),
        ("a->b", 1.0, 3.0),
        ("a", 3.0, 4.0),
        ("a->b", 4.0, 6.0),
    ]
    assert schedule.makespan_s == 7.0


@pytest.mark.parametrize(("schedule", "expected"), [("gpipe", [6, 6, 6, 6]), ("1f1b", [4, 3, 2, 1])])
def test_memory_in_flight_is_the_saved_bytes_of_the_micro_batches_a_stage_holds(schedule, expected):
    saved = [100, 10, 0, 7]
    stages = [stage(f"d{k}", 1.0, 2.0, saved[k]) for k in range(4)]
    found = simulate_stages(stages, [0.5] * 3, {}, 6, schedule=schedule)
    assert found.in_flight == tuple(expected)
    assert found.peak_bytes == tuple(n * nbytes for n, nbytes in zip(expected, saved, strict=True))
    curves = held_over_time(found.events, 4)
    assert [max(n for _, n in curve) for curve in curves] == expected
    assert [curve[-1][1] for curve in curves] == [0] * 4
    assert all(sorted(when for when, _ in curve) == [when for when, _ in curve] for curve in curves)


def test_forward_passes_alone_hold_nothing():
    found = simulate_stages([stage("a", 1.0, 0.0, 5), stage("b", 1.0, 0.0, 5)], [0.0], {}, 3, backward=False)
    assert (found.in_flight, found.peak_bytes) == ((0, 0), (0, 0))
    assert held_over_time(found.events, 2) == [[], []]


def test_zero_times_hide_no_micro_batch_in_flight():
    found = simulate_stages([stage("a", 0.0), stage("b", 0.0)], [0.0], {}, 5)
    assert found.in_flight == (5, 5)


def test_the_order_of_work_of_1f1b_is_the_papers():
    order = work_order(["a", "b", "c"], 4, schedule="1f1b")
    shown = {device: " ".join(f"{w.phase[0]}{w.microbatch}" for w in queue) for device, queue in order.items()}
    assert shown == {
        "a": "f0 f1 f2 b0 f3 b1 b2 b3",
        "b": "f0 f1 b0 f2 b1 f3 b2 b3",
        "c": "f0 b0 f1 b1 f2 b2 f3 b3",
    }


def test_the_order_of_work_of_gpipe_goes_stage_by_stage():
    order = work_order(["a", "b", "a"], 2)
    passes = [(0, "forward"), (2, "forward"), (2, "backward"), (0, "backward")]
    assert order["a"] == [Work(s, phase, k) for s, phase in passes for k in range(2)]
    assert list(work_order(["a", "b", "a"], 2, backward=False)["a"]) == order["a"][:4]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(PlacementError, match="unknown schedule 'zero bubble'"):
        work_order(["a"], 2, schedule="zero bubble")


def three_in_a_row(duplex, shared="", hop=2.0):
    """A plan over three devices of 1 s forwards and backwards a layer for 3 micro-batches, and its topology."""
    devices = tuple(Device(name, "cpu", "cpu", 2**33) for name in "abc")
    topology = Topology(devices, (Link("*", "*", hop, float("inf"), duplex=duplex, shared=shared),))
    times = {name: LayerTime(1.0, 1.0, 0.0, "given") for name in "abc"}
    costs = Costs(tuple(LayerCost(f"l{i}", None, 0, 0, 8, 4, 0.0, times) for i in range(3)), 3)
    return given_plan([("a", 0, 0), ("b", 1, 1), ("c", 2, 2)], costs, topology), topology


def test_links_carry_one_transfer_at_a_time_only_where_that_is_asked_for():
    plan, topology = three_in_a_row("full")
    assert simulate(plan, topology).makespan_s == plan.value == 3 + 2 + 3 + 2 + 8
    own = simulate(plan, topology, take_turns=True)
    assert own.makespan_s == 3 + 4 + 3 + 4 + 8  # the hand-overs' 2 s are the maxima
    bus_plan, bus = three_in_a_row("half", shared="pcie")
    sent = [e for e in simulate(bus_plan, bus, take_turns=True).events if e.phase == "transfer"]
    assert all(later.start_s >= earlier.end_s for earlier, later in itertools.pairwise(sent))
    with pytest.raises(PlacementError, match="give the topology"):
        simulate(plan, take_turns=True)


def test_a_half_duplex_link_lets_gradients_wait_for_activations():
    half, full = three_in_a_row("half", hop=5.0), three_in_a_row("full", hop=5.0)
    both = [simulate(*pair, schedule="1f1b", take_turns=True) for pair in (half, full)]

    def most_at_once(schedule):
        sent = [e for e in schedule.events if e.phase == "transfer" and "c" in e.device]
        return max(sum(x.start_s <= e.start_s < x.end_s for x in sent) for e in sent)

    assert [most_at_once(schedule) for schedule in both] == [1, 2]
