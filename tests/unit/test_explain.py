import dataclasses
import importlib
import itertools
import json
import sys
import time

import numpy as np
import pytest

from experiments.cli import main
from hetero.cost import Costs, LayerCost, LayerTime
from hetero.device import Device
from hetero.errors import DeviceError, PlacementError
from hetero.planner import plan
from hetero.planner.baselines import by_accelerate, pipedream
from hetero.planner.plans import NOT_PRICED
from hetero.planner.sensitivity import sensitivity, why
from hetero.planner.sensitivity_text import answer_text
from hetero.planner.words import against, amount
from hetero.topology import Link, Topology

MIB = 2**20
TIMES = {"fast": (1e-3, 2e-3), "slow": (3e-3, 6e-3)}


def chain(n=6, *, m=4, only=None, **times):
    """Layers of 16 MiB for training on one or two devices; `only`: the layer that runs on the slow one alone."""
    layers = []
    for i in range(n):
        own = {name: LayerTime(*pair, 0.1, "given") for name, pair in (times or TIMES).items()}
        if i == only:
            own.pop("fast")
        layers.append(LayerCost(f"l{i}", None, 4 * MIB, 4 * MIB, 10**6, 0, 1.0, own))
    return Costs(tuple(layers), m)


def machine(fast=2**33, slow=2**33, *, bandwidth=1e9, links=True):
    devices = (Device("fast", "gpu", "cuda", fast), Device("slow", "cpu", "cpu", slow))
    return Topology(devices, (Link("fast", "slow", 1e-4, bandwidth),) if links else ())


def answers(costs, topology, **options):
    made = plan(costs, topology, **options)
    return made, sensitivity(costs, topology, made)


def test_a_gib_has_a_price_where_memory_binds_and_none_where_it_does_not():
    made, found = answers(chain(), machine(fast=33 * MIB))
    prices = {answer.subject: answer.change for answer in found.memories}
    assert prices["slow"] == 0.0
    assert prices["fast"] < 0
    assert plan(chain(), machine(fast=33 * MIB + 2**30)).value - made.value == pytest.approx(prices["fast"])


def test_a_link_has_a_price_where_a_plan_uses_it():
    costs = chain(fast=(1e-3, 2e-3), slow=(2e-3, 4e-3))
    made, found = answers(costs, machine(bandwidth=3e8))
    (answer,) = found.links
    assert answer.subject == "fast - slow"
    assert answer.change == pytest.approx(plan(costs, machine(bandwidth=1.3e9)).value - made.value)
    assert answer.change < 0
    _, alone = answers(costs, machine(links=False))
    assert alone.links == ()


def test_one_more_device_is_worth_what_the_plan_with_it_saves():
    made, found = answers(chain(fast=(1e-3, 2e-3)), machine().only(["fast"]))
    (answer,) = found.devices
    # Two equal devices with three layers each and a hand-over of 1.1 ms: the slowest link of the only device is none.
    assert answer.change == 0.0
    topology = Topology((Device("d:0", "gpu", "cuda", 2**33),), (Link("d:*", "d:*", 1e-4, 1e9),))
    made, found = answers(chain(**{"d:0": (1e-3, 2e-3)}), topology)
    (answer,) = found.devices
    assert answer.stages == (("d:0", 0, 2), ("another d:0", 3, 5))
    assert answer.value == pytest.approx(2 * 3e-3 + 3 * 3e-3 + 2 * 6e-3 + 3 * 6e-3 + 2 * 1.1e-3)
    assert "one more like d:0" in made.explain(found)


def test_a_layer_is_not_where_it_can_not_run_fit_or_be_reached():
    def reason(costs, topology, layer, device, **options):
        made = plan(costs, topology, **options)
        answer = why(costs, topology, made, layer, device, **options)
        assert answer.value is None
        return answer_text(made, answer)

    assert "l2 is not on fast: fast can't run it" in reason(chain(only=2), machine(), "l2", "fast")
    text = reason(chain(), machine(slow=15 * MIB), "l0", "slow")
    assert f"needed: {16 * MIB} B" in text
    assert f"{15 * MIB} B free on slow" in text
    assert "link" in reason(chain(only=0), machine(links=False), "l3", "fast")
    assert reason(chain(), machine(), "l1", "slow", pins={"l1": "fast"}).endswith("the layer is pinned to fast")


def test_a_layer_elsewhere_costs_what_the_best_plan_with_it_there_costs_more():
    costs, topology = chain(), machine()
    made = plan(costs, topology)
    on_slow = {layer for stage in made.stages if stage.device == "slow" for layer in stage.layers}
    layer = next(layer.name for layer in costs.layers if layer.name not in on_slow)
    answer = why(costs, topology, made, layer, "slow")
    assert answer.value == plan(costs, topology, pins={layer: "slow"}).value
    assert f"{layer} is not on slow: +" in answer_text(made, answer)
    assert answer_text(made, why(costs, topology, made, layer, "fast")) == f"{layer} is on fast"


def test_questions_for_which_no_time_is_left_are_not_priced(monkeypatch):
    costs, topology = chain(), machine()
    made = plan(costs, topology)
    clock = itertools.count(0.0, 100.0)
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(clock))
        found = sensitivity(costs, topology, made, time_limit_s=50.0)
    for answer in (*found.memories, *found.links, *found.devices):
        assert (answer.value, answer.proof, answer.reason) == (None, "bounded", NOT_PRICED)
    assert NOT_PRICED in made.explain(found)


def test_a_plan_of_other_inputs_is_refused():
    made = plan(chain(), machine())
    with pytest.raises(PlacementError, match="made from other costs"):
        sensitivity(chain(fast=(1e-3, 1e-3), slow=(1.0, 1.0)), machine(), made)
    with pytest.raises(PlacementError, match="layer 'l9' does not exist"):
        why(chain(), machine(), made, "l9", "fast")
    with pytest.raises(DeviceError, match="'gpu' does not exist"):
        why(chain(), machine(), made, "l0", "gpu")


def test_the_table_of_layers_says_where_each_is_and_what_it_costs_elsewhere():
    made, found = answers(chain(only=2), machine())
    rows = made.explain(found).splitlines()
    header = next(i for i, row in enumerate(rows) if row.startswith("layer  "))
    assert {row.split()[0] for row in rows[header + 1 : header + 7]} == {f"l{i}" for i in range(6)}
    assert any("as planned" in row for row in rows[header + 1 : header + 7])
    assert any(row == "[1] fast can't run it: the costs have no time of it there" for row in rows)
    assert "no change" in "\n".join(rows)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.00123, "s", "1.23 ms"),
        (1234.0, "J", "1.23 kJ"),
        (0.5, "J", "500 mJ"),
        (0.0, "J", "0 J"),
        (12.5, "USD", "12.5 USD"),
    ],
)
def test_amounts_are_shown_in_their_unit(value, unit, text):
    assert amount(value, unit) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "equal"), (1.05, "+5.0 %"), (0.5, "-50.0 %"), (3.0, "3.00 x"), (1.00002, "+0.002 %")]
)
def test_values_are_compared_in_percent_or_as_a_factor(value, text):
    assert against(value, 1.0) == text


# Baselines


def slowest(costs, cuts, hop):
    """What PipeDream's split minimises: the slowest stage on the first device, or hand-over there and back."""
    ends = [0, *cuts, len(costs.layers)]
    times = [
        sum(layer.times["fast"].forward_s + layer.times["fast"].backward_s for layer in costs.layers[a:b])
        for a, b in itertools.pairwise(ends)
    ]
    return max([*times, *(2 * hop(costs.layers[cut - 1].output_bytes) for cut in cuts)])


@pytest.mark.parametrize("seed", range(30))
def test_pipedreams_split_is_the_best_of_all_cuts_for_devices_like_the_first(seed):
    r = np.random.default_rng(seed)
    n, d = int(r.integers(1, 7)), int(r.integers(2, 5))
    names = ["fast", *(f"x{k}" for k in range(d - 1))]
    layers = []
    for i in range(n):
        times = {name: LayerTime(*map(float, r.integers(0, 4, 2)), 0.1, "given") for name in names}
        layers.append(LayerCost(f"l{i}", None, 1, 1, int(r.integers(0, 3)), 0, 1.0, times))
    costs = Costs(tuple(layers), 4)
    topology = Topology(tuple(Device(name, "gpu", "cuda", 2**33) for name in names), (Link("*", "*", 0.25, 1.0),))
    wish = pipedream(costs, topology, names)
    cuts = [i for i in range(1, n) if wish[i] != wish[i - 1]]
    assert [wish[i] for i in (0, *cuts)] == names[: len(cuts) + 1]
    hop = lambda nbytes: 0.25 + nbytes  # noqa: E731
    every = [c for k in range(min(n, d)) for c in itertools.combinations(range(1, n), k)]
    least = min(slowest(costs, c, hop) for c in every)
    assert slowest(costs, cuts, hop) == pytest.approx(least)
    assert len(cuts) == min(len(c) for c in every if slowest(costs, c, hop) <= least * (1 + 1e-12))


def test_accelerate_is_called_for_modules_of_the_layers_bytes():
    pytest.importorskip("accelerate", reason="pip install accelerate")  # loads torch
    costs, topology = chain(), machine(fast=13 * MIB)
    placed = by_accelerate(costs, topology, ["slow", "fast"], {})
    # Of 13 MiB it keeps room for its largest layer, 4 MiB, beside what it puts there: two layers fit, not three.
    assert placed == ["fast"] * 2 + ["slow"] * 4
    full = by_accelerate(costs, machine(fast=13 * MIB, slow=5 * MIB), ["slow", "fast"], {})
    assert str(full).endswith("on disk")


def test_without_accelerate_the_baseline_says_so(monkeypatch):
    importlib.import_module("torch")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    others = {other.name: other for other in plan(chain(), machine()).alternatives}
    assert others["accelerate's device map"].value is None
    assert "accelerate is absent" in others["accelerate's device map"].reason
    assert "heteroq[accelerate]" in others["accelerate's device map"].reason


def test_planning_from_figures_alone_does_not_load_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    text = plan(chain(), machine()).explain()
    assert "torch" not in sys.modules
    row = next(row for row in text.splitlines() if row.startswith("accelerate's device map"))
    assert "not priced: accelerate works on modules" in row
    assert "not possible" not in row


def test_round_robin_deals_the_layers_out():
    others = {other.name: other for other in plan(chain(4), machine()).alternatives}
    assert [device for device, _, _ in others["round-robin"].stages] == ["fast", "slow", "fast", "slow"]


# Command line


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--why", "head"], "expected: LAYER=DEVICE"),
        (["--export", "onnx=plan.onnx"], "FORMAT=FILE, of accelerate, pipelining, json, schema"),
        (["--export", "json"], "no format and file"),
        (["--steps", "3"], "--steps is for --validate"),
        (["--validate", "--explain"], "for a call of their own"),
    ],
)
def test_questions_that_make_no_sense_are_refused(tmp_path, capsys, words, part):
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    assert main(["plan", str(config), *words]) == 2
    assert part in capsys.readouterr().err


def test_a_plan_is_explained_exported_and_traced_by_one_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HETEROQ_CACHE", str(tmp_path / "cache"))
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    files = [tmp_path / name for name in ("plan.json", "map.json", "split.json", "trace.json")]
    exports = [f"json={files[0]}", f"accelerate={files[1]}", f"pipelining={files[2]}"]
    words = [word for export in exports for word in ("--export", export)]
    assert main(["plan", str(config), "--explain", "--trace", str(files[3]), *words]) == 0
    out = capsys.readouterr().out
    assert "one more like cpu" in out
    made, device_map, points, trace = (json.loads(file.read_text()) for file in files)
    layers = [layer for stage in made["stages"] for layer in stage["layers"]]
    assert device_map == dict.fromkeys(layers, "cpu")
    assert points == {}
    assert {"X", "C", "M"} <= {event["ph"] for event in trace["traceEvents"]}
    assert main(["plan", str(config), "--why", "head=cpu"]) == 0
    assert "head is on cpu" in capsys.readouterr().out
    assert main(["plan", str(config), "--explain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sensitivity"]["baseline"]["devices"][0]["subject"] == "cpu"


TINY = """
name: tiny
data: {name: topics}
model: {family: gpt, n_layer: 1, d_model: 16, n_head: 2, seq_len: 16}
train: {steps: 2, batch_size: 4}
plan: {devices: [cpu], n_microbatches: 2}
arms: [baseline]
"""


def test_layers_of_a_twin_of_a_pooled_device_stay_in_its_memory():
    devices = (
        Device("cpu", "cpu", "cpu", 100 * MIB, cores=(0,), memory_pool="host"),
        Device("cl", "cpu", "opencl", 100 * MIB, cores=(1,), memory_pool="host"),
    )
    costs = chain(cpu=(1e-3, 1e-3), cl=(1e-3, 1e-3))
    made, found = answers(costs, Topology(devices))
    assert [answer.subject for answer in found.memories] == ["host"]
    assert all(answer.change < 0 for answer in found.devices)
    tight = tuple(dataclasses.replace(device, memory_bytes=6 * 16 * MIB) for device in devices)
    assert answers(costs, Topology(tight))[1].devices[0].value == pytest.approx(found.devices[0].value)
    assert made.stages[0].memory_bytes + made.stages[1].memory_bytes == 6 * 16 * MIB
