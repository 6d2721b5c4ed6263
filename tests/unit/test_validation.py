"""Predictions against the clock: what is written when, what the outcome says, and how an order is judged."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments import cli
from hetero import cache, history, validation
from hetero.backends import all_backends, cpu
from hetero.cost import Costs, LayerCost, LayerTime
from hetero.device import Device
from hetero.errors import PlacementError
from hetero.planner import given_plan
from hetero.planner.plans import Alternative
from hetero.runtime.turns import TURN, measure_in_turn
from hetero.topology import Topology
from hetero.validation import Outcome, Prediction, Validation, ranking, validate

D, M, L = 6, 2, 3


class Unit(nn.Module):
    """A linear map that notes its calls."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.map, self.calls = nn.Linear(D, D), calls

    def __deepcopy__(self, memo: dict[int, Any]) -> Unit:
        return Unit(self.calls)

    def forward(self, x: Tensor, context: Any) -> Tensor:
        self.calls.append("run")
        return self.map(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.units = nn.ModuleList(Unit(self.calls) for _ in range(L))

    def layers(self) -> list[tuple[str, nn.Module]]:
        return [(f"unit{k}", unit) for k, unit in enumerate(self.units)]


def squared(y: Tensor, targets: Tensor) -> Tensor:
    return ((y - targets) ** 2).mean()


BATCHES = [SimpleNamespace(inputs=torch.ones(4, D) * k, targets=torch.zeros(4, D), context={}) for k in range(1, 4)]
TIME = LayerTime(1e-3, 2e-3, 0.1, "profiled")


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HETEROQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def topology(monkeypatch):
    monkeypatch.setitem(all_backends(), "fake", cpu)
    cores = cpu.host_cores()
    devices = [
        Device("cpu", "cpu", "cpu", 2**30, cores=cores[:1], memory_pool="host"),
        Device("fake:0", "cpu", "fake", 2**30, cores=cores[-1:], memory_pool="host"),
        Device("sheet:0", "gpu", "cuda", 2**30, memory_pool="host", simulated=True),
    ]
    return Topology(tuple(devices))


@pytest.fixture
def costs():
    times = dict.fromkeys(("cpu", "fake:0", "sheet:0"), TIME)
    return Costs(tuple(LayerCost(f"unit{k}", None, 4, 4, 4, 4, 1.0, times) for k in range(L)), M)


@pytest.fixture
def plan(costs, topology):
    alternatives = (
        Alternative("cpu alone", (("cpu", 0, 2),), 1.0),
        Alternative("sheet:0 alone", (("sheet:0", 0, 2),), 1.0),
        Alternative("runner-up", (("cpu", 0, 2),), 1.0),
        Alternative("best without cpu", (), None, "no room"),
    )
    return dataclasses.replace(
        given_plan([("cpu", 0, 0), ("fake:0", 1, 2)], costs, topology), alternatives=alternatives
    )


def run(plan, costs, topology, **settings: Any) -> Validation:
    return validate(Model(), plan, costs, BATCHES, topology=topology, loss=squared, **{"steps": 6, **settings})


def test_the_plan_and_what_can_be_placed_here_are_measured(plan, costs, topology):
    found = run(plan, costs, topology)
    names = [one.prediction.name for one in found.outcomes]
    assert names == ["plan", "cpu alone, runner-up", "sheet:0 alone", "best without cpu"]  # equal ones are run once
    whole, alone, sheet, impossible = found.outcomes
    for one in (whole, alone):
        assert one.n_steps == 6
        assert one.quartiles_s[0] <= one.measured_s <= one.quartiles_s[1]
        assert one.error == pytest.approx(one.prediction.predicted_s / one.measured_s - 1)
        low, high = one.prediction.interval_s
        assert one.is_inside == (low <= one.measured_s <= high)
    assert whole.prediction.predicted_s == plan.value
    assert whole.prediction.interval_s == plan.interval_s
    assert sheet.measured_s is None
    assert sheet.prediction.predicted_s is not None  # a simulated device is predicted, and not run
    assert "nothing can run on 'sheet:0'" in sheet.reason
    assert (impossible.prediction.predicted_s, impossible.reason) == (None, "no room")
    assert found.is_complete
    assert found.median_error == pytest.approx((abs(whole.error) + abs(alone.error)) / 2)


def test_predictions_are_on_disk_before_the_first_step(plan, costs, topology, tmp_path, monkeypatch):
    file = tmp_path / "predicted.json"
    seen: list[dict[str, Any]] = []

    def measure(*arguments: Any) -> None:
        assert not validation.measured_file(file).exists()
        seen.append(json.loads(file.read_text()))
        measure_in_turn(*arguments)

    monkeypatch.setattr(validation, "measure_in_turn", measure)
    found = run(plan, costs, topology, file=file)
    (before,) = seen
    assert json.loads(file.read_text()) == before  # and they aren't touched afterwards
    assert set(before) == {"form", "made", "predictions", "plan"}
    assert [one["predicted_s"] for one in before["predictions"]] == [
        one.prediction.predicted_s for one in found.outcomes
    ]
    assert json.loads(validation.measured_file(file).read_text()) == json.loads(json.dumps(found.to_json()))


def test_nothing_runs_where_predictions_can_not_be_written(plan, costs, topology, tmp_path):
    (tmp_path / "file").write_text("")
    model = Model()
    with pytest.raises(OSError, match="file"):
        validate(model, plan, costs, BATCHES, topology=topology, loss=squared, file=tmp_path / "file" / "p.json")
    assert model.calls == []


def test_a_plan_for_other_layers_is_refused(plan, costs, topology):
    model = Model()
    model.units.append(Unit(model.calls))
    with pytest.raises(PlacementError, match="another model"):
        validate(model, plan, costs, BATCHES, topology=topology, loss=squared)
    assert not (cache.folder() / "predictions").exists()


def test_pairs_go_to_the_history_of_their_devices(plan, costs, topology):
    found = run(plan, costs, topology)
    pairs = history.read()
    assert [one.predicted_s for one in pairs] == [o.prediction.predicted_s for o in found.outcomes[:2]]
    assert [[name for name, *_ in one.kind.devices] for one in pairs] == [["cpu", "fake:0"], ["cpu"]]
    assert all(one.kind.figures == "profiled" and one.n_steps == 6 for one in pairs)
    run(plan, costs, topology, steps=4)
    assert len(history.read()) == 2  # too few steps to learn from


def test_a_long_history_sets_the_interval(plan, costs, topology):
    kind = history.kind_of(["cpu"], costs, topology)
    history.append([history.Pair(kind, 1.0, (0.9, 1.1), 1.5, 20)] * 9)
    alone = run(plan, costs, topology).outcomes[1].prediction
    assert alone.interval_s == pytest.approx((alone.predicted_s / 1.5, alone.predicted_s * 1.5))
    assert alone.basis.startswith("9 earlier predictions")


def test_ctrl_c_keeps_what_was_measured(plan, costs, topology, monkeypatch):
    original, steps = validation.measure_in_turn, []

    def interrupted(placed: dict[Any, Any], batches: Any, wanted: int, into: dict[Any, list[float]]) -> None:
        last = list(placed.values())[-1]
        step = last.step

        def stop(batch: Any) -> float:
            steps.append(1)
            if len(steps) > TURN:  # the warm-up is over
                raise KeyboardInterrupt
            return step(batch)

        last.step = stop
        original(placed, batches, wanted, into)

    monkeypatch.setattr(validation, "measure_in_turn", interrupted)
    found = run(plan, costs, topology)
    assert not found.is_complete
    assert found.outcomes[0].n_steps == TURN - 1
    assert found.outcomes[1].measured_s is None
    assert "interrupted" in found.outcomes[1].reason
    stored = json.loads(validation.measured_file(found.file).read_text())
    assert stored["outcomes"][0]["measured_s"] == found.outcomes[0].measured_s


def test_the_model_is_not_changed(plan, costs, topology):
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    validate(model, plan, costs, BATCHES, topology=topology, loss=squared, steps=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_schedule_is_the_plans(plan, costs, topology):
    one_f = dataclasses.replace(plan, schedule="1f1b")
    found = run(one_f, costs, topology)
    priced = given_plan([("cpu", 0, 0), ("fake:0", 1, 2)], costs, topology, schedule="1f1b")
    assert found.outcomes[0].prediction.predicted_s == priced.value
    assert found.outcomes[0].n_steps == 6


def outcome(name: str, low: float, high: float, measured: float | None) -> Outcome:
    prediction = Prediction(name, (), (), (low + high) / 2, (low, high), "")
    return Outcome(prediction, measured, None if measured is None else (measured, measured))


def test_only_intervals_that_do_not_overlap_predict_an_order():
    found = ranking([outcome("a", 1, 2, 1.5), outcome("b", 3, 4, 3.5), outcome("c", 1.5, 3.5, 9.0)])
    assert (found.n_apart, found.wrong, found.n_overlapping) == (1, (), 2)


def test_a_wrong_order_is_named_whatever_the_order_of_the_list():
    slow, fast = outcome("slow", 3, 4, 1.0), outcome("fast", 1, 2, 1.5)
    for pair in ([slow, fast], [fast, slow]):
        found = ranking(pair)
        assert (found.n_apart, found.wrong) == (1, (("fast", "slow"),))


def test_intervals_that_touch_overlap_and_a_tie_is_wrong():
    assert ranking([outcome("a", 1, 2, 1.0), outcome("b", 2, 3, 2.0)]).n_overlapping == 1
    assert ranking([outcome("a", 1, 2, 2.0), outcome("b", 2.5, 3, 2.0)]).wrong == (("a", "b"),)


def test_what_was_not_measured_has_no_rank():
    found = ranking([outcome("a", 1, 2, None), outcome("b", 3, 4, 3.5)])
    assert (found.n_apart, found.n_overlapping) == (0, 0)


CONFIG = """
name: tiny
arms: [baseline]
model: {n_layer: 1, d_model: 16, n_head: 2, seq_len: 8}
train: {steps: 1, batch_size: 4, learning_rate: 1e-3}
plan: {devices: [cpu], n_microbatches: 2}
"""


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG)
    return file


def test_the_command_prints_predicted_against_measured(config, capsys):
    assert cli.main(["plan", str(config), "--validate", "--steps", "2"]) == 0
    text = capsys.readouterr().out
    assert "predicted [ms]" in text
    assert "written before the first step" in text
    assert "median error" in text
    assert cli.main(["plan", str(config), "--validate", "--steps", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"name", "arms", "validations"}
    (first, *_) = found["validations"]["baseline"]["outcomes"]
    assert first["prediction"]["name"].startswith("plan")
    assert first["measured_s"] > 0.0
    assert first["prediction"]["predicted_s"] == found["arms"]["baseline"]["value"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "3"], "--steps is for --validate"),
        (["--validate", "--steps", "0"], "--steps has to be at least 1, not 0"),
        (["--validate", "--explain"], "--validate measures"),
    ],
)
def test_a_senseless_request_is_refused(config, capsys, words, message):
    assert cli.main(["plan", str(config), *words]) == 2
    assert message in capsys.readouterr().err


def test_simulated_devices_are_refused(config, capsys, tmp_path):
    (tmp_path / "t.yaml").write_text(
        "devices: [{name: x, kind: gpu, api: cuda, memory_bytes: 1 GiB, flops: 1e12, bandwidth: 1e11}]\n"
    )
    words = ["plan", str(config), "--validate", "--topology", str(tmp_path / "t.yaml")]
    assert cli.main(words) == 2
    assert "nothing can run on simulated devices: x" in capsys.readouterr().err


def test_an_interrupted_command_ends_130_after_its_table(config, capsys, monkeypatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(validation, "measure_in_turn", interrupted)
    assert cli.main(["plan", str(config), "--validate"]) == 130
    text = capsys.readouterr()
    assert "interrupted: what was measured so far is kept" in text.out
    assert text.err == "error: interrupted\n"
    assert list((cache.folder() / "predictions").glob("*.json"))
