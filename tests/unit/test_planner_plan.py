import dataclasses
import itertools
import json
import math
import time

import numpy as np
import pytest

from hetero.cost import Costs, LayerCost, LayerTime, StageOverhead
from hetero.device import Absence, Device
from hetero.errors import DeviceError, PlacementError
from hetero.planner import Alternative, Plan, bounds, draw, evaluate, given_plan, plan
from hetero.planner.labels import LabelSearch
from hetero.planner.plans import NOT_PRICED
from hetero.schedule import simulate
from hetero.topology import Link, Topology

NAMES = ("embedding", "block0.attention", "block0.mlp", "block1.attention", "block1.mlp", "head")
MIB = 2**20


def layer(name, times, *, error=0.1, apis=None, **fields):
    nbytes = {"parameter_bytes": MIB, "trainable_bytes": MIB, "output_bytes": 10**6, "saved_bytes": MIB} | fields
    return LayerCost(
        name, apis, flops=1e6, times={d: LayerTime(*t, error, "given") for d, t in times.items()}, **nbytes
    )


def example(*, quantum=True, n_microbatches=8):
    """A chain of six layers for two one-core devices; layer 4 runs on aer only, which shares the cpu's core."""
    layers = [layer(name, {"cpu": (0.010, 0.020), "opencl:0.1": (0.012, 0.024)}) for name in NAMES]
    if quantum:
        layers[4] = layer(NAMES[4], {"aer": (0.005, 0.010)}, apis=("aer",))
    return Costs(tuple(layers), n_microbatches, {"cpu": StageOverhead(0.001, 0.001)}, {}, 3.0)


def machine():
    devices = (
        Device("cpu", "cpu", "cpu", 2**33, cores=(0,), memory_pool="host"),
        Device("opencl:0.1", "cpu", "opencl", 2**32, cores=(1,), memory_pool="host"),
        Device("aer", "cpu", "aer", 2**33, cores=(0,), memory_pool="host"),
    )
    return Topology(devices, (Link("*", "*", 1e-4, 1e10),))


def refusal(costs, topology, **options):
    with pytest.raises(PlacementError) as error:
        plan(costs, topology, **options)
    return str(error.value)


def test_the_plan_of_the_example_is_the_one_worked_out_by_hand():
    # cpu 0-3 and aer 4 share a core: f 41 + 5, b 81 + 10 ms; opencl 5: f 12, b 24. Two hand-overs of 0.2 ms, 7 bubbles.
    # The other way round opencl alone has f 48, b 96, which is more than the core's 46 and 91.
    made = plan(example(), machine())
    assert [(s.device, s.first, s.last) for s in made.stages] == [("cpu", 0, 3), ("aer", 4, 4), ("opencl:0.1", 5, 5)]
    forward, backward = 0.041 + 0.005 + 0.012, 0.081 + 0.010 + 0.024
    assert made.value == pytest.approx(forward + 7 * 0.046 + backward + 7 * 0.091 + 2 * 2 * 0.0002, rel=1e-12)
    assert (made.proof, made.gap, made.lower_bound) == ("optimal", 0.0, made.value)
    assert made.stages[0].memory_bytes == 4 * (MIB + 3 * MIB + 8 * MIB)
    assert [stage.cores for stage in made.stages] == [(0,), (0,), (1,)]


def test_the_alternatives_are_priced_beside_the_plan():
    made = plan(example(), machine())
    others = {other.name: other for other in made.alternatives}
    assert others["cpu alone"].stages == (("cpu", 0, 3), ("aer", 4, 4), ("cpu", 5, 5))
    assert others["opencl:0.1 alone"].value > made.value
    assert others["runner-up"].value >= made.value
    assert "block1.mlp" in others["best without aer"].reason
    baselines = {"even split", "round-robin", "PipeDream's split", "accelerate's device map"}
    assert baselines | {"best without cpu"} <= set(others)


def test_sharing_a_core_costs_what_the_formula_says():
    stages = [("cpu", 0, 3), ("aer", 4, 4), ("opencl:0.1", 5, 5)]
    costs = example()
    apart = machine()
    apart = dataclasses.replace(apart, devices=tuple(dataclasses.replace(d, cores=()) for d in apart.devices))
    difference = evaluate(stages, costs, machine()).value - evaluate(stages, costs, apart).value
    assert difference == pytest.approx(7 * (0.005 + 0.010), rel=1e-9)


def test_the_interval_is_every_layer_at_its_slow_or_its_fast_end():
    layers = (layer("a", {"d": (1.0, 2.0)}, error=0.5), layer("b", {"d": (1.0, 1.0)}, error=0.1))
    topology = Topology((Device("d", "cpu", "cpu", 2**40),))
    priced = evaluate([("d", 0, 1)], Costs(layers, 1, {"d": StageOverhead(1.0, 0.0)}), topology)
    assert priced.value == 6.0
    assert priced.interval_s == pytest.approx((1 + 3 / 1.5 + 2 / 1.1, 1 + 4.5 + 2.2))
    assert priced.stages[0].error == pytest.approx((1.5 + 0.2) / 6)


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ([("cpu", 0, 3)], "4 of 6 layers"),
        ([("cpu", 0, 3), ("aer", 4, 4), ("cpu", 4, 5)], "no placement"),
        ([("cpu", 0, 5)], "'block1.mlp' can't run on 'cpu'"),
    ],
)
def test_what_is_no_placement_has_no_price(stages, text):
    with pytest.raises(PlacementError, match=text):
        evaluate(stages, example(), machine())


def test_a_placement_on_an_unknown_device_has_no_price():
    with pytest.raises(DeviceError, match="'tpu' does not exist"):
        evaluate([("tpu", 0, 5)], example(quantum=False), machine())


def test_a_device_and_its_part_are_never_in_one_plan():
    devices = tuple(Device(name, "cpu", "opencl", 2**33) for name in ("opencl:0", "opencl:0.0", "opencl:0.1"))
    topology = Topology(devices, (Link("*", "*", 0.0, 1e12),))
    times = {"opencl:0": (0.9, 0.9), "opencl:0.0": (1.0, 1.0), "opencl:0.1": (1.0, 1.0)}
    costs = Costs(tuple(layer(name, times) for name in NAMES), 8)
    assert {stage.device for stage in plan(costs, topology).stages} == {"opencl:0.0", "opencl:0.1"}
    with pytest.raises(PlacementError, match="same hardware"):
        evaluate([("opencl:0", 0, 2), ("opencl:0.0", 3, 5)], costs, topology)


def test_a_pin_is_kept():
    made = plan(example(), machine(), pins={"embedding": "cpu"})
    assert made.stages[0].device == "cpu"


def test_given_stages_become_a_plan():
    stages = [("cpu", 0, 3), ("aer", 4, 4), ("cpu", 5, 5)]
    made = given_plan(stages, example(), machine())
    assert (made.proof, made.solver) == ("heuristic", "given")
    assert made.value == evaluate(stages, example(), machine()).value


def test_a_plan_survives_json():
    made = plan(example(), machine())
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_the_simulated_schedule_of_a_plan_takes_its_value_where_no_cores_are_shared():
    for objective in ("train_step", "latency"):
        made = plan(example(quantum=False), machine().only(["cpu", "opencl:0.1"]), objective=objective)
        assert simulate(made, machine()).makespan_s == pytest.approx(made.value, rel=1e-12)


def test_identical_devices_give_one_plan_quickly():
    devices = tuple(Device(f"gpu:{k}", "gpu", "cuda", 2**33) for k in range(6))
    costs = Costs(tuple(layer(f"l{i}", {d.name: (1.0, 2.0) for d in devices}) for i in range(12)), 16)
    made = plan(costs, Topology(devices, (Link("gpu:*", "gpu:*", 1e-5, 1e9),)))
    assert [stage.device for stage in made.stages] == [device.name for device in devices]
    assert made.proof == "optimal"
    assert made.seconds < 20


def test_among_plans_of_one_throughput_the_one_of_least_latency_is_taken():
    times = {"a": (1.0, 1.0), "b": (1.5, 1.0)}
    layers = [layer(f"l{i}", times, parameter_bytes=0) for i in range(3)] + [layer("slow", {"q": (9.0, 9.0)})]
    devices = tuple(Device(name, "cpu", "cpu", 2**33) for name in ("a", "b", "q"))
    made = plan(Costs(tuple(layers), 8), Topology(devices, (Link("*", "*", 0.1, 1e12),)), objective="throughput")
    assert made.value == 9.0
    assert [stage.device for stage in made.stages] == ["a", "q"]


def test_a_slow_link_limits_the_throughput():
    layers = (layer("a", {"x": (1.0, 1.0)}), layer("b", {"y": (1.0, 1.0)}))
    topology = Topology(
        (Device("x", "cpu", "cpu", 2**33), Device("y", "cpu", "cpu", 2**33)), (Link("x", "y", 0.0, 1e5),)
    )
    made = plan(Costs(layers, 8), topology, objective="throughput")
    assert made.value == 10.0
    assert "hand-over" in made.binding_constraint


def test_several_runs_a_device_are_found_when_asked_for():
    made = plan(example(), machine())
    several = plan(example(), machine(), contiguous=False)
    devices = [stage.device for stage in several.stages]
    assert len(set(devices)) < len(devices)
    assert several.value < made.value
    assert {other.name: other.value for other in made.alternatives}["several runs a device"] == pytest.approx(
        several.value, rel=1e-12
    )


# Time


def uneven(n_layers=10, n_devices=5):
    """Layers and devices of random speeds: a narrow search proves nothing about them."""
    r = np.random.default_rng(3)
    devices = tuple(Device(f"d{k}", "cpu", "cpu", 2**33) for k in range(n_devices))
    layers = (layer(f"l{i}", {d.name: tuple(map(float, r.random(2))) for d in devices}) for i in range(n_layers))
    return Costs(tuple(layers), 8), Topology(devices, (Link("*", "*", 0.01, 1e9),))


def count_seconds(monkeypatch, step_s):
    """A clock on which each look takes so many seconds."""
    clock = itertools.count(0.0, step_s)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))


def test_bounds_are_sharpened_no_longer_than_the_time_limit(monkeypatch):
    monkeypatch.setattr("hetero.planner.chain._BEAMS", (1, 1))
    monkeypatch.setattr("hetero.planner.labels._HURRIED_BEAM", 1)
    tables, original = [], bounds.completion
    monkeypatch.setattr(bounds, "completion", lambda *a: (tables.append(1), original(*a))[1])
    costs, topology = uneven()
    with monkeypatch.context() as patch:
        count_seconds(patch, 1.0)
        made = plan(costs, topology, time_limit_s=15.0)
    assert made.proof == "bounded"
    assert 0 < made.lower_bound < made.value
    assert 1 < len(tables) < 10


def test_alternatives_for_which_no_time_is_left_are_named_and_not_priced(monkeypatch):
    with monkeypatch.context() as patch:
        count_seconds(patch, 10.0)
        made = plan(example(), machine(), time_limit_s=20.0)
    reasons = {other.name: other.reason for other in made.alternatives}
    assert reasons["runner-up"] == reasons["best without cpu"] == NOT_PRICED == "not priced: out of time"
    assert "not possible" not in next(line for line in made.explain().splitlines() if line.startswith("runner-up"))


def test_the_reason_of_a_refusal_is_looked_for_within_the_time_limit(monkeypatch):
    deadlines, run = [], LabelSearch.run
    monkeypatch.setattr(
        LabelSearch, "run", lambda self, **options: (deadlines.append(options["deadline"]), run(self, **options))[1]
    )
    refusal(example(quantum=False), machine(), max_memory={"cpu": 20 * MIB, "opencl:0.1": 54 * MIB})
    assert len(deadlines) > 1
    assert max(deadlines) < math.inf


def test_too_little_memory_in_total_is_refused_without_a_search(monkeypatch):
    monkeypatch.setattr(LabelSearch, "run", lambda *_, **__: pytest.fail("searched"))
    text = refusal(example(), machine(), max_memory={"host": 40 * MIB})
    assert "more memory than all devices have together" in text
    assert f"{40 * MIB} B free on cpu, opencl:0.1, aer" in text
    assert f"{6 * 12 * MIB} B" in text


# Words


def shared_core_apart(m=2):
    """Three layers of 1 s forwards and backwards for a device each; the first and the last device share a core."""
    devices = tuple(Device(name, "cpu", "cpu", 2**33, cores=(core,)) for name, core in (("a", 0), ("b", 1), ("q", 0)))
    layers = tuple(layer(f"l{i}", {device.name: (1.0, 1.0)}) for i, device in enumerate(devices))
    return Costs(layers, m), Topology(devices, (Link("*", "*", 0.0, float("inf")),))


def test_a_formula_that_the_simulated_schedule_beats_is_said_to_be_one():
    # The core of a and q is never idle (a, a, q, q, then back): 8 s. The formula adds b's 1 s each way: 10 s.
    made = plan(*shared_core_apart())
    assert made.value == made.lower_bound == 10.0
    assert simulate(made).makespan_s == 8.0
    words = "formula 10.0 s; simulated schedule 8.00 s: stages that share a core overlap better than the formula"
    assert words in made.explain()
    assert words in draw(made)
    assert "optimal under the step-time formula" in made.explain()
    assert "no placement" not in made.explain()


def test_a_formula_that_the_simulated_schedule_keeps_is_not_remarked_upon():
    costs, topology = shared_core_apart()
    apart = dataclasses.replace(topology, devices=tuple(dataclasses.replace(d, cores=()) for d in topology.devices))
    made = plan(costs, apart)
    assert "simulated schedule" not in made.explain() + draw(made)


def test_explain_says_value_bound_proof_binding_constraint_and_alternatives():
    text = plan(example(), machine()).explain()
    for part in (
        "lower bound",
        "gap 0.00 %",
        "optimal",
        "share the busiest core",
        "runner-up",
        "not possible",
    ):
        assert part in text
    assert max(map(len, text.splitlines()[:4])) < 120


def test_the_binding_constraint_names_a_memory_limit_that_costs_time():
    made = plan(example(quantum=False), machine(), max_memory={"cpu": 13 * MIB})
    assert made.binding_constraint.startswith("memory: cpu")
    assert plan(example(quantum=False), machine()).binding_constraint.startswith("compute")


def test_the_binding_constraint_names_devices_that_share_the_busiest_core():
    costs = example()
    slow = dataclasses.replace(costs.layers[4], times={"aer": LayerTime(0.5, 0.5, 0.1, "given")})
    costs = dataclasses.replace(costs, layers=(*costs.layers[:4], slow, costs.layers[5]))
    made = plan(costs, machine())
    assert "aer and cpu share the busiest core" in made.binding_constraint
    assert "with cores of their own" in made.binding_constraint


def test_a_faster_placement_outside_the_search_is_noted():
    made = plan(example(), machine(), objective="latency")
    assert "cpu alone is faster: it gives a device several runs of layers" in made.explain()


def test_a_difference_of_rounding_is_no_faster_placement():
    made = plan(example(quantum=False), machine().only(["cpu", "opencl:0.1"]))
    equal = Alternative("twin", (("cpu", 0, 5),), made.value * (1 - 1e-14))
    assert "faster" not in dataclasses.replace(made, alternatives=(equal,)).explain().split("\n\n")[-1]


def test_a_faster_placement_that_the_search_did_not_reach_is_not_said_to_be_of_another_kind():
    made = plan(example(quantum=False), machine().only(["cpu", "opencl:0.1"]))
    faster = Alternative("cpu alone", (("cpu", 0, 5),), made.value / 2)
    text = dataclasses.replace(made, alternatives=(faster,)).explain()
    assert "cpu alone is faster: the search was not complete" in text


def test_a_baseline_that_breaks_a_pin_is_not_possible():
    made = plan(example(quantum=False), machine().only(["cpu", "opencl:0.1"]), pins={"head": "opencl:0.1"})
    others = {other.name: other for other in made.alternatives}
    assert (others["cpu alone"].value, others["cpu alone"].reason) == (None, "breaks the pin of 'head'")
    assert others["opencl:0.1 alone"].value is not None


@pytest.mark.parametrize("objective", ["train_step", "throughput", "latency"])
def test_the_drawing_has_a_row_for_each_device_and_the_schedule(objective):
    made = plan(example(), machine(), objective=objective)
    picture = draw(made, machine(), width=60)
    rows = picture.splitlines()
    assert sum(row.startswith("opencl:0.1") for row in rows) == 2
    assert "▓" in picture
    assert ("░" in picture.replace("░ backward", "")) == (objective == "train_step")
    assert max(map(len, rows)) <= 60 + len("opencl:0.1 ")
    assert draw(made)


# Refusals


def test_a_layer_that_no_device_can_run_names_the_device_that_is_needed():
    topology = machine().only(["cpu", "opencl:0.1"])
    topology = dataclasses.replace(
        topology, absences=(Absence("aer", "qiskit-aer is missing", "pip install qiskit-aer"),)
    )
    text = refusal(example(), topology)
    for part in ("'block1.mlp'", "a device of aer", "qiskit-aer is missing", "pip install qiskit-aer"):
        assert part in text


def test_a_layer_larger_than_every_device_is_named_with_the_bytes_needed_and_free():
    text = refusal(example(), machine(), max_memory={"cpu": MIB, "opencl:0.1": 2 * MIB})
    for part in ("'embedding'", f"{12 * MIB} B", f"{MIB} B free on cpu", f"{2 * MIB} B free on opencl:0.1"):
        assert part in text


def test_memory_that_is_enough_in_total_only_names_the_first_layer_that_does_not_fit():
    # One layer of 12 MiB in 20 MiB and four in 54 MiB: the sixth finds 8 and 6 MiB.
    text = refusal(example(quantum=False), machine(), max_memory={"cpu": 20 * MIB, "opencl:0.1": 54 * MIB})
    assert "'head' fits on no device after the 5 layers before it" in text
    assert f"{6 * MIB} B free on opencl:0.1" in text


def test_pins_that_tear_a_device_apart_are_told_from_a_lack_of_memory():
    pins = {"embedding": "cpu", "block0.mlp": "opencl:0.1", "head": "cpu"}
    text = refusal(example(quantum=False), machine(), pins=pins)
    assert "no placement reaches layer 'head'" in text
    assert "memory" not in text.split("remedy")[0]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"pins": {"head": "gpu"}}, "'gpu', which does not exist"),
        ({"pins": {"tail": "cpu"}}, "pinned layer 'tail' does not exist"),
        ({"pins": {"head": "aer"}}, "can't run it"),
        ({"n_microbatches": 0}, "at least one micro-batch"),
        ({"n_microbatches": 4}, "costs measured for 8"),
        ({"objective": "speed"}, "latency or throughput or train_step"),
        ({"max_memory": {"gpu": 1}}, "max_memory names 'gpu'"),
        ({"max_memory": {"cpu": 2**60}}, "that it has"),
        ({"max_memory": {"cpu": -1}}, "that it has"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(options, part):
    assert part in refusal(example(), machine(), **options)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["layer", "overhead", "transfer", "optimizer", "bytes"])
def test_a_cost_that_is_no_cost_is_refused_with_its_place(value, place):
    costs = example()
    if place == "layer":
        broken = dataclasses.replace(costs.layers[0], times={"cpu": LayerTime(1.0, value, 0.1, "given")})
        costs, part = dataclasses.replace(costs, layers=(broken, *costs.layers[1:])), "'embedding' on 'cpu': backward_s"
    elif place == "overhead":
        costs, part = dataclasses.replace(costs, overheads={"cpu": StageOverhead(value, 0.0)}), "overhead of 'cpu'"
    elif place == "transfer":
        costs, part = dataclasses.replace(costs, transfers={"cpu->aer": (value, 1.0)}), "transfer 'cpu->aer'"
    elif place == "optimizer":
        costs, part = dataclasses.replace(costs, optimizer_factor=value), "optimizer_factor"
    else:
        broken = dataclasses.replace(costs.layers[2], saved_bytes=value)
        costs, part = dataclasses.replace(costs, layers=(*costs.layers[:2], broken, *costs.layers[3:])), "saved_bytes"
    assert part in refusal(costs, machine())


def test_a_step_of_no_micro_batches_and_a_chain_of_no_layers_are_refused():
    assert "at least one micro-batch" in refusal(example(n_microbatches=0), machine())
    assert "no layers" in refusal(Costs((), 1), machine())


def test_a_pool_has_the_memory_of_its_largest_device_even_if_that_runs_nothing():
    devices = (
        Device("small", "cpu", "cpu", 20 * MIB, memory_pool="p"),
        Device("idle", "cpu", "aer", 2**33, memory_pool="p"),
    )
    costs = Costs((layer("a", {"small": (1.0, 1.0)}),), 8)
    assert plan(costs, Topology(devices)).stages[0].memory_bytes == 12 * MIB
    assert "fits on no device" in refusal(costs, Topology(devices), max_memory={"p": 11 * MIB})


def test_a_memory_pool_may_be_named_like_a_device():
    devices = (
        Device("a", "cpu", "cpu", 20 * MIB, memory_pool="a"),
        Device("b", "cpu", "cpu", 20 * MIB, memory_pool="a"),
    )
    costs = Costs(tuple(layer(n, {"a": (1.0, 1.0), "b": (1.0, 1.0)}) for n in "xy"), 8)
    with pytest.raises(PlacementError, match="'a' has too little memory"):
        evaluate([("a", 0, 0), ("b", 1, 1)], costs, Topology(devices))


def test_more_devices_than_the_solver_takes_are_refused():
    devices = tuple(Device(f"d{k}", "cpu", "cpu", 2**33) for k in range(49))
    costs = Costs((layer("a", {device.name: (1.0, 1.0) for device in devices}),), 8)
    assert "49 devices are too many" in refusal(costs, Topology(devices))


def rivals(*names):
    return Topology(tuple(Device(name, "cpu", "cpu", 2**40) for name in names), (Link("*", "*", 0.0, 1e18),))


SLOW = StageOverhead(0.0, 0.0, 3.0, 1.0)  # a forward pass takes three times as long beside another such device


def test_devices_that_slow_each_other_are_charged_for_it_only_together():
    layers = [layer(f"l{i}", {"a": (0.001, 0.0), "b": (0.001, 0.0)}) for i in range(4)]
    costs, topology = Costs(tuple(layers), 4, {"a": SLOW, "b": SLOW}), rivals("a", "b")
    assert evaluate([("a", 0, 3)], costs, topology).value == pytest.approx(0.004 + 3 * 0.004)
    both = evaluate([("a", 0, 1), ("b", 2, 3)], costs, topology)
    assert both.value == pytest.approx(3 * (0.004 + 3 * 0.002))
    apart = evaluate([("a", 0, 0), ("b", 1, 1), ("a", 2, 2), ("b", 3, 3)], costs, topology)
    assert apart.value == pytest.approx(both.value)  # the same work, whatever the number of stages
    best = plan(costs, topology)
    assert best.value == pytest.approx(0.016)
    assert len(best.stages) == 1
    assert best.proof == "optimal"


def test_of_equally_fast_throughputs_the_one_of_least_latency_is_taken():
    ends = {"a": (0.001, 0.0), "b": (0.001, 0.0)}
    layers = (layer("l0", ends), layer("circuit", {"q": (0.050, 0.0)}), layer("l2", ends))
    costs = Costs(layers, 2, {"a": SLOW, "b": SLOW})
    best = plan(costs, rivals("a", "b", "q"), objective="throughput", contiguous=False)
    assert best.value == pytest.approx(0.050)
    assert sum(stage.forward_s for stage in best.stages) == pytest.approx(0.052)  # 0.056 on a and b both


# Memory that a device's own compiler has planned


def compiled(costs, device, **own):
    """The costs with memory of compiled graphs on one device."""
    layers = [
        dataclasses.replace(one, times=one.times | {device: dataclasses.replace(one.times[device], **own)})
        for one in costs.layers
    ]
    return dataclasses.replace(costs, layers=tuple(layers))


def test_a_compiled_layer_counts_what_it_keeps_there_instead_of_what_torch_would():
    # 4 MiB of parameters, gradients and optimizer state, 8 slots of 3 MiB, 5 MiB of scratch, against 8 slots of 1 MiB.
    costs = compiled(example(quantum=False), "opencl:0.1", call_bytes=3 * MIB, scratch_bytes=5 * MIB)
    placed = {s.device: s.memory_bytes / (s.last - s.first + 1) for s in plan(costs, machine()).stages}
    assert placed == {"opencl:0.1": 33 * MIB, "cpu": 12 * MIB}
    less = compiled(example(quantum=False), "opencl:0.1", call_bytes=MIB // 2)
    assert {s.memory_bytes // (s.last - s.first + 1) for s in plan(less, machine()).stages} == {12 * MIB}


def test_a_device_too_small_for_what_is_compiled_for_it_gets_less_or_is_refused():
    costs = compiled(example(quantum=False), "opencl:0.1", call_bytes=3 * MIB)
    made = plan(costs, machine(), max_memory={"opencl:0.1": 60 * MIB})  # 28 MiB a layer
    (stage,) = (s for s in made.stages if s.device == "opencl:0.1")
    assert stage.last - stage.first == 1
    with pytest.raises(PlacementError, match="too little memory"):
        evaluate(((("opencl:0.1"), 0, 5),), costs, machine(), "train_step", max_memory={"opencl:0.1": 60 * MIB})
    pinned = dict.fromkeys(NAMES, "opencl:0.1")
    text = refusal(costs, machine(), max_memory={"opencl:0.1": 27 * MIB}, pins=pinned)
    assert f"{28 * MIB} B" in text
    assert f"{27 * MIB} B free on opencl:0.1" in text
