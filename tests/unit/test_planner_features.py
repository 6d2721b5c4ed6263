"""What a plan may be asked for beside a fast step: colocation, recomputation, 1F1B, shared links, energy, dollars."""

import dataclasses
import json

import pytest

from hetero.cost import Costs, LayerCost, LayerTime
from hetero.device import Device
from hetero.errors import PlacementError
from hetero.planner import Plan, evaluate, given_plan, plan
from hetero.planner.chain import solve
from hetero.planner.plans import unit
from hetero.planner.problem import build
from hetero.schedule import simulate
from hetero.topology import Link, Topology

MIB = 2**20


def layer(name, times, **fields):
    nbytes = {"parameter_bytes": 0, "trainable_bytes": 0, "output_bytes": MIB, "saved_bytes": 4 * MIB} | fields
    return LayerCost(name, None, flops=1.0, times={d: LayerTime(*t, 0.1, "given") for d, t in times.items()}, **nbytes)


def chain(n, times, *, m=4, **fields):
    return Costs(tuple(layer(f"l{i}", times, **fields) for i in range(n)), m)


def devices(*names, memory=2**40, **figures):
    return tuple(Device(name, "gpu", "cuda", memory, **figures) for name in names)


def joined(*devices, **figures):
    return Topology(devices, (Link("*", "*", 0.0, 1e18, **figures),))


def refusal(costs, topology, **options):
    with pytest.raises(PlacementError) as error:
        plan(costs, topology, **options)
    return str(error.value)


def where(made):
    return [stage.device for stage in made.stages for _ in range(stage.first, stage.last + 1)]


EQUAL = {"a": (1.0, 2.0), "b": (1.0, 2.0)}


# Colocation


def test_a_colocated_group_takes_all_between_it_along_where_a_device_holds_one_run():
    topology = joined(*devices("a", "b"))
    assert len(set(where(plan(chain(4, EQUAL), topology)))) == 2
    made = plan(chain(4, EQUAL), topology, colocate=[("l0", "l2")])
    assert len(set(where(made)[:3])) == 1
    assert made.proof == "optimal"
    assert len(set(where(plan(chain(4, EQUAL), topology, colocate=[("l0", "l2"), ("l2", "l3")])))) == 1


def test_a_colocated_group_leaves_out_what_lies_between_where_a_device_may_hold_several_runs():
    topology = joined(*devices("a", "b"))
    made = plan(chain(4, EQUAL), topology, colocate=[("l0", "l3")], contiguous=False)
    device = where(made)
    assert device[0] == device[3]
    assert len(set(device)) == 2
    assert made.value == pytest.approx(plan(chain(4, EQUAL), topology).value)


def test_a_baseline_that_tears_a_colocated_group_apart_is_not_possible():
    made = plan(chain(4, EQUAL), joined(*devices("a", "b")), colocate=[("l0", "l3")])
    even = next(other for other in made.alternatives if other.name == "even split")
    assert (even.value, even.reason) == (None, "'l0', 'l1', 'l2', 'l3' have to be on one device")


def test_layers_that_no_device_can_run_together_are_refused_with_their_devices():
    costs = Costs((layer("embed", {"a": (1.0, 1.0)}), layer("head", {"b": (1.0, 1.0)})), 4)
    text = refusal(costs, joined(*devices("a", "b")), colocate=[("embed", "head")])
    assert "layers 'embed', 'head' have to be on one device" in text
    assert "'embed' can run on a; 'head' can run on b" in text


def test_layers_that_fit_on_no_device_together_are_refused_with_bytes_needed_and_free():
    text = refusal(chain(3, EQUAL), joined(*devices("a", "b", memory=40 * MIB)), colocate=[("l0", "l2")])
    assert "layers 'l0', 'l1', 'l2': together they fit on no device" in text
    assert f"{48 * MIB} B" in text
    assert f"{40 * MIB} B free on a" in text


@pytest.mark.parametrize(("groups", "part"), [([("l0", "tail")], "'tail' does not exist"), (["l0"], "is no group")])
def test_a_colocation_that_makes_no_sense_is_refused(groups, part):
    assert part in refusal(chain(3, EQUAL), joined(*devices("a", "b")), colocate=groups)


# Recomputation


def test_layers_are_recomputed_where_memory_binds_and_nowhere_else():
    one = {"a": (1.0, 2.0)}
    topology = Topology(devices("a"))
    assert plan(chain(3, one), topology, recompute="allowed").recomputed == ()
    # Stored, a layer fills 16 MiB; recomputed 4 of its input (the first one 0), and once 3 (4) MiB while it runs again.
    made = plan(chain(3, one), topology, recompute="allowed", max_memory={"a": 39 * MIB})
    assert len(made.recomputed) == 1
    assert made.value == plan(chain(3, one), topology).value + 4 * 1.0
    made = plan(chain(3, one), topology, recompute="allowed", max_memory={"a": 12 * MIB})
    assert made.recomputed == ("l0", "l1", "l2")
    assert made.stages[0].memory_bytes == 4 * 2 * MIB + 4 * MIB
    assert made.stages[0].saved_bytes == 2 * MIB
    text = refusal(chain(3, one), topology, recompute="allowed", max_memory={"a": 11 * MIB})
    assert "'l2' fits on no device after the 2 layers before it" in text
    text = refusal(chain(3, one), topology, max_memory={"a": 39 * MIB})
    assert f"{39 * MIB} B free on a; the largest is layer 'l0' with {16 * MIB} B" in text
    assert f"{48 * MIB} B" in text
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_of_objectives_that_a_second_forward_pass_costs_nothing_no_layer_is_recomputed_in_vain():
    one = {"a": (1.0, 2.0)}
    for objective in ("latency", "throughput"):
        made = plan(
            chain(3, one), Topology(devices("a")), objective=objective, recompute="allowed", max_memory={"a": 39 * MIB}
        )
        assert len(made.recomputed) == 1


def test_an_opencl_device_recomputes_nothing():
    topology = Topology((Device("a", "gpu", "opencl", 39 * MIB),))
    assert "more memory than all devices" in refusal(chain(3, {"a": (1.0, 2.0)}), topology, recompute="allowed")


# Links


def test_transfers_on_a_shared_medium_add_up_in_the_throughput():
    costs = Costs(tuple(layer(f"l{i}", {name: (0.1, 0.1)}) for i, name in enumerate("abc")), 4)
    links = [Link("a", "b", 1.0, 1e18), Link("b", "c", 2.0, 1e18)]
    own, half = Topology(devices(*"abc"), tuple(links)), []
    for duplex in ("full", "half"):
        wires = tuple(dataclasses.replace(link, shared="bridge", duplex=duplex) for link in links)
        half.append(plan(costs, Topology(devices(*"abc"), wires), objective="throughput").value)
    assert plan(costs, own, objective="throughput").value == pytest.approx(2.0)
    assert half == [pytest.approx(3.0)] * 2
    assert plan(costs, own).value == plan(costs, Topology(devices(*"abc"), tuple(links))).value


@pytest.mark.parametrize(("duplex", "value"), [("full", 1.0), ("half", 2.0)])
def test_there_and_back_on_one_link_adds_up_in_half_duplex_only(duplex, value):
    costs = Costs(tuple(layer(f"l{i}", {name: (0.1, 0.1)}) for i, name in enumerate("aba")), 4)
    topology = Topology(devices("a", "b"), (Link("a", "b", 1.0, 1e18, duplex=duplex),))
    assert plan(costs, topology, objective="throughput", contiguous=False).value == pytest.approx(value)
    # In GPipe all activations have passed before the first gradient does; and a latency has one transfer at a time.
    assert plan(costs, topology, contiguous=False).value == pytest.approx(0.6 + 3 * 0.4 + 2 * 2.0)


# Energy and dollars


def test_energy_is_idle_power_of_used_devices_for_the_step_and_the_rest_for_the_work():
    first, second = devices("a", "b", power_w=100.0)
    topology = joined(dataclasses.replace(first, idle_power_w=40.0), second)
    made = given_plan([("a", 0, 0), ("b", 1, 1)], chain(2, EQUAL), topology, objective="energy")
    step = 2 * 3.0 + 3 * 3.0
    assert made.value == pytest.approx(40.0 * step + (60.0 + 100.0) * 4 * 3.0)
    assert unit(made.objective) == "J"


def test_the_least_energy_is_that_of_the_frugal_device_and_the_least_time_is_not():
    costs = chain(4, {"fast": (1.0, 1.0), "frugal": (2.0, 2.0)})
    (fast,), (frugal,) = devices("fast", power_w=300.0), devices("frugal", power_w=50.0)
    topology = joined(fast, frugal)
    made = plan(costs, topology, objective="energy")
    assert set(where(made)) == {"frugal"}
    assert made.value == pytest.approx(50.0 * 4 * 4 * 4.0)
    assert made.proof == "optimal"
    assert "fast" in where(plan(costs, topology))


def test_dollars_rent_every_used_device_for_the_whole_step_and_pay_for_calls():
    (dear,), (cheap,) = devices("dear", price_usd_h=7200.0), devices("cheap", price_usd_h=3600.0)
    topology = joined(dear, cheap)
    costs = chain(2, {"dear": (1.0, 1.0), "cheap": (1.0, 1.0)})
    made = given_plan([("dear", 0, 0), ("cheap", 1, 1)], costs, topology, objective="dollars")
    assert made.value == pytest.approx((2 + 1) * (4.0 + 3 * 2.0))
    best = plan(costs, topology, objective="dollars")
    assert where(best) == ["cheap", "cheap"]
    assert best.value == pytest.approx(4 * 4.0)
    paid = dataclasses.replace(costs.layers[0], times={"cheap": LayerTime(1.0, 1.0, 0.0, "given", usd=0.5)})
    costs = dataclasses.replace(costs, layers=(paid, costs.layers[1]))
    assert plan(costs, topology, objective="dollars").value == pytest.approx(4 * 4.0 + 4 * 0.5)


@pytest.mark.parametrize(("objective", "field"), [("energy", "power_w"), ("dollars", "price_usd_h")])
def test_a_device_without_the_figure_of_the_objective_is_refused(objective, field):
    figures = {"power_w": 1.0, "price_usd_h": 1.0} | {field: None}
    topology = joined(*devices("a", power_w=1.0, price_usd_h=1.0), *devices("b", **figures))
    text = refusal(chain(2, EQUAL), topology, objective=objective)
    assert f"objective '{objective}' needs {field} of device 'b'" in text
    with pytest.raises(PlacementError, match=f"{field} of device 'b'"):
        evaluate([("b", 0, 1)], chain(2, EQUAL), topology, objective)


@pytest.mark.parametrize("objective", ["energy", "dollars"])
def test_plans_of_energy_and_dollars_are_explained_in_their_unit(objective):
    topology = joined(*devices("a", "b", power_w=10.0, price_usd_h=3.0))
    made = plan(chain(3, EQUAL), topology, objective=objective)
    assert f" {unit(objective)}" in made.explain()
    low, high = made.interval_s
    assert low < made.value < high


# 1F1B


def test_a_plan_that_gpipe_has_no_memory_for_fits_under_1f1b():
    # GPipe holds 4 x 4 MiB a layer; under 1F1B the first of two stages holds 2 micro-batches, the second 1.
    topology = joined(*devices("a", "b", memory=16 * MIB))
    costs = chain(4, EQUAL)
    assert "more memory than all devices have" in refusal(costs, topology)
    made = plan(costs, topology, schedule="1f1b")
    assert (made.schedule, made.proof) == ("1f1b", "optimal")
    assert [stage.memory_bytes for stage in made.stages] == [16 * MIB, 8 * MIB]
    assert made.value == pytest.approx((4 + 1) * 6.0)  # equal stages: (m + S - 1)(f + b)
    assert simulate(made).makespan_s == pytest.approx(made.value)
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert "1f1b" in made.explain()


def test_the_local_search_of_1f1b_keeps_a_device_to_one_stage():
    """Moving an end of a stage twice by what was there before the first move once tore a stage in two."""
    at_a = [(7.0, 0.0), (0.0, 9.0), (6.0, 7.0), (2.0, 9.0), (8.0, 1.0)]
    at_b = [(2.0, 4.0), (0.0, 7.0), (8.0, 4.0), (5.0, 2.0), (1.0, 5.0)]
    layers = (layer(f"l{i}", {"a": a, "b": b}) for i, (a, b) in enumerate(zip(at_a, at_b, strict=True)))
    costs = Costs(tuple(layers), 4)
    for latency in range(6):
        topology = Topology(devices("a", "b"), (Link("*", "*", float(latency), 1e18),))
        made = plan(costs, topology, schedule="1f1b")
        cuts = [[("a", 0, 4)], [("b", 0, 4)]]
        cuts += [[(first, 0, i), (second, i + 1, 4)] for i in range(4) for first, second in ("ab", "ba")]
        best = min(evaluate(cut, costs, topology, schedule="1f1b").value for cut in cuts)
        assert made.value == pytest.approx(best, rel=1e-12)


def test_fewer_micro_batches_than_stages_are_refused_under_1f1b():
    apart = Costs(tuple(layer(f"l{i}", {name: (1.0, 1.0)}) for i, name in enumerate("abc")), 2)
    text = refusal(apart, joined(*devices(*"abc")), schedule="1f1b")
    assert "1f1b needs at least as many micro-batches as stages" in text
    assert "2 micro-batches" in text
    with pytest.raises(PlacementError, match="2 micro-batches, 3 stages"):
        evaluate([("a", 0, 0), ("b", 1, 1), ("c", 2, 2)], apart, joined(*devices(*"abc")), schedule="1f1b")
    assert len(plan(apart, joined(*devices(*"abc"))).stages) == 3  # legal under GPipe, if wasteful
    everywhere = chain(3, dict.fromkeys("abc", (1.0, 1.0)), m=2)
    assert len(plan(everywhere, joined(*devices(*"abc")), schedule="1f1b").stages) <= 2


def test_1f1b_is_for_training_steps_with_a_stage_a_device():
    topology = joined(*devices("a", "b"))
    assert "1f1b is a schedule of training steps" in refusal(
        chain(2, EQUAL), topology, schedule="1f1b", objective="latency"
    )
    assert "contiguous=False" in refusal(chain(2, EQUAL), topology, schedule="1f1b", contiguous=False)
    assert "unknown schedule" in refusal(chain(2, EQUAL), topology, schedule="zero bubble")


def test_a_1f1b_search_that_is_cut_short_has_a_bound_and_a_gap():
    r = 1.0
    figures = {}
    for k in range(6):
        r = (r * 7.13) % 1.7 + 0.2
        figures[f"d{k}"] = (r, 2.1 - r / 2)
    costs = chain(14, figures, m=6)
    problem = build(costs, joined(*devices(*figures)), schedule="1f1b")
    cut, full = solve(problem, time_limit_s=0.0), solve(problem, time_limit_s=20.0)
    assert cut.lower_bound <= full.lower_bound <= full.value <= cut.value
    assert cut.is_optimal or cut.lower_bound < cut.value


# Refusals


def test_devices_that_nothing_joins_are_named():
    costs = Costs((layer("x", {"a": (1.0, 1.0)}), layer("y", {"b": (1.0, 1.0)})), 4)
    text = refusal(costs, Topology(devices("a", "b")))
    assert "the topology is not connected" in text
    assert "no link between a and b" in text


def test_a_memory_that_is_too_small_names_layer_device_and_bytes():
    text = refusal(chain(2, EQUAL), joined(*devices("a", "b", memory=15 * MIB)))
    for part in ("'l0' fits on no device", f"{15 * MIB} B free on a", f"{16 * MIB} B"):
        assert part in text


def test_an_unknown_way_to_recompute_is_refused():
    assert "never or allowed" in refusal(chain(2, EQUAL), joined(*devices("a", "b")), recompute="always")


# Figures that make no sense


@pytest.mark.parametrize(
    "figures",
    [{"latency_s": -1.0}, {"latency_s": float("nan")}, {"bandwidth": 0.0}, {"bandwidth": float("nan")}],
    ids=str,
)
def test_a_link_without_sense_is_refused(figures):
    link = Link(**{"source": "a", "target": "b", "latency_s": 0.0, "bandwidth": 1e9} | figures)
    assert "link 'a' - 'b'" in refusal(chain(3, EQUAL), Topology(devices("a", "b"), (link,)))


@pytest.mark.parametrize("idle", [-5.0, float("nan")])
def test_an_idle_power_without_sense_is_refused(idle):
    topology = joined(*devices("a", "b", power_w=10.0, idle_power_w=idle))
    assert "idle_power_w" in refusal(chain(3, EQUAL), topology, objective="energy")


def test_sizes_beyond_64_bits_are_refused_or_as_good_as_boundless():
    assert "layer 'l0'" in refusal(chain(2, EQUAL, saved_bytes=2**62), joined(*devices("a", "b", memory=2**63 - 1)))
    assert "layer 'l0'" in refusal(chain(2, EQUAL, parameter_bytes=10**19), joined(*devices("a", "b")))
    assert plan(chain(2, EQUAL), joined(*devices("a", "b", memory=10**20))).proof == "optimal"
