"""Costs of layers: what is measured, what is shared, what is stored, and the roofline's figures by hand."""

from __future__ import annotations

import copy
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetero.backends import all_backends, cpu
from hetero.cost import Costs, StageOverhead
from hetero.device import Device
from hetero.errors import DeviceError
from hetero.modules import signature
from hetero.profiling import profile
from hetero.runtime import calibration, measurement
from hetero.topology import Topology

B, D, M = 8, 6, 2


class Slow(nn.Module):
    """A linear map whose forward and backward passes take a known time."""

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.map = nn.Linear(D, D)
        self.forward_s, self.backward_s = forward_s, backward_s
        self.calls = 0

    def forward(self, x: Tensor, context: Any) -> Tensor:
        self.calls += 1
        time.sleep(self.forward_s)
        return SlowGradient.apply(self.map(x), self.backward_s)


class SlowGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.backward_s)
        return grad, None


class Quick(nn.Module):
    """A linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(D, D)

    def forward(self, x: Tensor, context: Any) -> Tensor:
        return torch.tanh(self.map(x))


class Quantum(Quick):
    """Runs on aer alone and states its cost."""

    device_apis = frozenset({"aer"})

    def layer_cost(self, api: str, shape: tuple[int, ...]) -> dict[str, Any]:
        return {"flops": 1234.0, "seconds_forward": 0.5, "seconds_backward": 2.0, "error": 0.1}


def squared(y: Tensor, targets: Tensor) -> Tensor:
    return ((y - targets) ** 2).mean()


BATCH = SimpleNamespace(inputs=torch.ones(B, D), targets=torch.zeros(B, D), context={})
CPU = Device("cpu", "cpu", "cpu", 2**30, cores=cpu.host_cores()[:1], memory_pool="host")
FAKE = Device("fake:0", "cpu", "fake", 2**30, cores=cpu.host_cores()[-1:], memory_pool="host")
AER = Device("aer", "qpu", "aer", 2**30, cores=cpu.host_cores()[:1], memory_pool="host")
SHEET = Device("h100:0", "gpu", "cuda", 2**30, flops=1e9, bandwidth=1e6, launch_s=1e-3, simulated=True)


@pytest.fixture(autouse=True)
def _quick_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("HETEROQ_CACHE", str(tmp_path))
    monkeypatch.setattr(measurement, "_BUDGET_S", 0.02)
    monkeypatch.setattr(measurement, "_TURN_S", 0.02)
    monkeypatch.setattr(cpu, "measure", lambda _: {"flops": 1e9, "bandwidth": 1e9, "launch_s": 1e-6})
    monkeypatch.setitem(all_backends(), "fake", cpu)
    monkeypatch.setitem(all_backends(), "aer", cpu)


def run(*modules: nn.Module, devices: tuple[Device, ...] = (CPU,), **settings: Any) -> Costs:
    layers = [(f"layer{i}", module) for i, module in enumerate(modules)]
    return profile(layers, BATCH, Topology(devices), n_microbatches=M, **{"loss": squared, **settings})


def test_forward_and_backward_times_are_measured_apart():
    layer = calibration.Layer("a", Slow(0.004, 0.010), "", torch.ones(B, D), 0, {}, None)
    workload = calibration._workload([layer], CPU)
    for _ in range(5):
        workload.round(M)
    sample = workload.sample()
    assert sample.forward_s >= 0.004  # nobody wakes up early
    assert sample.backward_s >= 0.010
    assert sample.forward_s < sample.backward_s
    assert sample.error >= 0.02
    assert run(Quick(), Quick()).layers[0].times["cpu"].source == "profiled"


def test_each_device_is_measured_and_hand_overs_too():
    costs = run(Quick(), Quick(), devices=(CPU, FAKE))
    assert all(set(layer.times) == {"cpu", "fake:0"} for layer in costs.layers)
    assert set(costs.overheads) == {"cpu", "fake:0"}
    assert set(costs.transfers) == {"cpu->fake:0", "fake:0->cpu"}
    latency, bandwidth = costs.transfers["cpu->fake:0"]
    assert 0 < latency < 0.05
    assert D * B * 4 / bandwidth < 1e-12  # nothing is copied


def test_sizes_are_those_of_one_micro_batch():
    frozen = Quick()
    frozen.map.weight.requires_grad_(False)
    costs = run(Quick(), frozen)
    first, second = costs.layers
    assert first.parameter_bytes == first.trainable_bytes == (D * D + D) * 4
    assert (second.parameter_bytes, second.trainable_bytes) == ((D * D + D) * 4, D * 4)
    assert first.output_bytes == B // M * D * 4
    assert first.flops == 2 * B // M * D * D  # the counter knows matrix products
    assert costs.n_microbatches == M


def test_saved_bytes_are_what_autograd_keeps():
    costs = run(Quick(), Quick())
    rows = B // M
    # A linear map keeps its input, tanh its output; the weight is a parameter and not counted.
    assert costs.layers[0].saved_bytes == 2 * rows * D * 4
    # The last stage that runs computes the loss, whose square keeps the difference.
    assert costs.layers[1].saved_bytes == 3 * rows * D * 4
    assert run(Quick(), Quick(), loss=None).layers[1].saved_bytes == 2 * rows * D * 4


def test_more_micro_batches_than_rows_are_refused():
    with pytest.raises(ValueError, match=f"a batch of {B} rows has no {B + 1} micro-batches"):
        profile([("a", Quick())], BATCH, Topology((CPU,)), n_microbatches=B + 1)


class Sized(nn.Module):
    def __init__(self, setting: Any) -> None:
        super().__init__()
        self._setting = setting


@pytest.mark.parametrize(
    ("one", "other"), [([1, 1], [1000, 1000]), ({"width": 1}, {"width": 2}), ({"widths": [1]}, {"widths": [2]}), (1, 2)]
)
def test_modules_of_other_settings_are_not_built_alike(one, other):
    assert signature(Sized(one)) == signature(Sized(copy.deepcopy(one)))
    assert signature(Sized(one)) != signature(Sized(other))


@pytest.mark.parametrize("text", ["{}", "[]", "[[1]]", '"figures"', '{"forward_s": "fast"}'])
def test_a_stored_profile_of_another_form_is_measured_again(tmp_path, text):
    run(Quick(), Quick(), devices=(CPU, FAKE))
    for path in (tmp_path / "profile").iterdir():
        path.write_text(text)
    costs = run(Quick(), Quick(), devices=(CPU, FAKE))
    assert all(layer.times["cpu"].forward_s >= 0.0 for layer in costs.layers)
    assert text not in [path.read_text() for path in (tmp_path / "profile").iterdir()]


class Elsewhere:
    """A runtime whose tensors are not the host's: torch's device without memory."""

    def torch_device(self, name: str) -> str:
        return "meta"


def test_a_timed_stage_finds_its_input_where_it_computes(monkeypatch):
    monkeypatch.setitem(all_backends(), "fake", Elsewhere())
    layer = calibration.Layer("a", Quick(), "", torch.ones(2, D), 0, {"mask": torch.ones(2)}, None)
    workload = calibration._workload([layer], FAKE)
    assert workload.x.device.type == workload.context["mask"].device.type == "meta"


def test_layers_built_alike_are_measured_once(monkeypatch):
    measured: list[str] = []
    original = calibration._Known.missing

    def missing(self, chain):
        layers, run = original(self, chain)
        measured.extend(layer.name for layer in layers)
        return layers, run

    monkeypatch.setattr(calibration._Known, "missing", missing)
    costs = run(Slow(0.0, 0.0), Slow(0.001, 0.001), Slow(0.001, 0.001), Slow(0.002, 0.001), Quick())
    assert costs.layers[1].times == costs.layers[2].times
    assert costs.layers[1].times != costs.layers[3].times
    assert len(measured) == 4
    assert len({"layer1", "layer2"} & set(measured)) == 1


def test_devices_are_measured_by_turns(monkeypatch):
    rounds: list[str] = []
    original = measurement.Workload.round

    def noted(self, n_slots):
        rounds.append(self.stage.device.name)
        original(self, n_slots)

    monkeypatch.setattr(measurement.Workload, "round", noted)
    monkeypatch.setattr(calibration, "slowdown", lambda workers, *_: [(1.0, 1.0)] * len(workers))
    run(Quick(), Quick(), devices=(CPU, FAKE))
    turn = ["cpu"] * (rounds.index(FAKE.name)) + [FAKE.name] * (rounds.index(FAKE.name))
    assert len(turn) >= 4  # a layer alone and the chain, on each
    assert rounds == turn * (len(rounds) // len(turn))


def test_what_devices_take_from_each_other_is_charged_to_their_stages(monkeypatch):
    monkeypatch.setattr(calibration, "slowdown", lambda workers, *_: [(1.5, 1.25)] * len(workers))
    alone = run(Slow(0.002, 0.004), Slow(0.002, 0.004), loss=None)
    both = run(Slow(0.002, 0.004), Slow(0.002, 0.004), loss=None, devices=(CPU, FAKE))
    if CPU.cores == FAKE.cores:
        pytest.skip("one core: nothing runs at the same time")
    time = both.layers[0].times["cpu"]
    assert time == alone.layers[0].times["cpu"]
    assert alone.overheads["cpu"].contended_forward is None
    assert (both.overheads["cpu"].contended_forward, both.overheads["cpu"].contended_backward) == (1.5, 1.25)


def test_a_device_that_shares_a_core_is_compared_with_the_others_and_joins_the_crew(monkeypatch):
    compared: list[list[str]] = []

    def ratios(workers, *_):
        compared.append([worker.device.name for worker in workers])
        return [(1.0 + len(compared), 1.0)] * len(workers)

    monkeypatch.setattr(calibration, "slowdown", ratios)
    if CPU.cores == FAKE.cores:
        pytest.skip("one core: nothing runs at the same time")
    aer = Device(**{**AER.to_json(), "cores": CPU.cores})
    overheads = run(Quick(), Quick(), Quantum(), devices=(CPU, FAKE, aer)).overheads
    assert compared == [["cpu", FAKE.name], ["aer", FAKE.name]]
    found = {name: (one.contended_forward, one.crew) for name, one in overheads.items()}
    assert found == {"cpu": (2.0, "cpu"), FAKE.name: (2.0, FAKE.name), "aer": (3.0, "cpu")}


def test_devices_on_the_same_cores_are_not_said_to_slow_each_other(monkeypatch):
    monkeypatch.setattr(calibration, "slowdown", lambda *_: pytest.fail("compared"))
    run(Quick(), Quick(), devices=(CPU, Device(**{**FAKE.to_json(), "cores": CPU.cores})))


class Contended(nn.Module):
    """A layer that takes twice as long while one like it is called in another thread."""

    def __init__(self, calls: dict[int, float]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: Tensor, context: Any) -> Tensor:
        self.calls[threading.get_ident()] = now = time.perf_counter()
        others = [called for thread, called in self.calls.items() if thread != threading.get_ident()]
        time.sleep(0.01 if any(now - called < 0.03 for called in others) else 0.005)
        return x * 2.0


def test_a_slowdown_is_found_where_there_is_one(monkeypatch):
    from hetero.runtime.stage import Stage
    from hetero.runtime.worker import Worker

    monkeypatch.setattr(measurement, "_TURN_S", 0.15)
    x = torch.ones(2, 2)
    workers, calls = [Worker(CPU), Worker(FAKE)], {}
    try:
        workloads = [measurement.Workload(Stage(["a"], [Contended(calls)], w.device), x, {}) for w in workers]
        ratios = measurement.slowdown(workers, workloads, 2)
    finally:
        for worker in workers:
            worker.close()
    assert all(1.4 < forward < 3.0 for forward, _ in ratios)


def test_a_stored_profile_is_used_and_renewed_on_request(monkeypatch):
    first = run(Quick(), Quick())
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "measure", lambda *_: pytest.fail("measured again"))
        assert run(Quick(), Quick()) == first
    assert run(Quick(), Quick(), refresh=True) != first


@pytest.mark.parametrize(
    "change",
    [
        {"n_microbatches": 4},
        {"loss": None},
        {"devices": (Device(**{**CPU.to_json(), "driver": "newer"}),)},
    ],
    ids=["micro-batches", "loss", "driver"],
)
def test_a_stored_profile_is_void_when_something_changes(monkeypatch, change):
    layers = [("a", Quick()), ("b", Slow(0.0, 0.0))]
    settings: dict[str, Any] = {"n_microbatches": 2, "loss": squared, "devices": (CPU,)}

    def again(settings: dict[str, Any]) -> None:
        profile(
            layers,
            BATCH,
            Topology(settings["devices"]),
            n_microbatches=settings["n_microbatches"],
            loss=settings["loss"],
        )

    again(settings)
    measured: list[int] = []
    original = calibration._Known.store
    monkeypatch.setattr(calibration._Known, "store", lambda *a: (measured.append(1), original(*a))[1])
    again(settings | change)
    assert measured


def test_a_layer_that_names_its_runtime_is_priced_there_alone():
    costs = run(Quick(), Quantum(), Quick(), devices=(CPU, AER))
    assert [set(layer.times) for layer in costs.layers] == [{"cpu"}, {"aer"}, {"cpu"}]
    assert costs.layers[1].apis == ("aer",)
    assert costs.layers[0].apis is None
    assert costs.layers[1].flops == 1234.0
    assert costs.layers[1].times["aer"].source == "profiled"  # there is such a device: measured, not believed


def test_a_simulated_device_is_priced_by_the_roofline():
    costs = run(Quick(), Quick(), devices=(CPU, SHEET))
    rows = B // M
    nbytes = (D * D + D + 2 * rows * D) * 4  # weight and bias, input and output
    time = costs.layers[0].times["h100:0"]
    # memory-bound: 288 flop take 0.3 us; half of the bound is assumed to be reached, within a factor three
    assert time.forward_s == pytest.approx(nbytes / 1e6 / 0.5 + 1e-3)
    assert time.backward_s == pytest.approx(2 * nbytes / 1e6 / 0.5 + 1e-3)
    assert time.source == "roofline, efficiency 0.5 assumed, within a factor 3: too few layers on a gpu measured"
    assert time.error == 2.0
    assert "h100:0" not in costs.overheads


def test_a_compute_bound_layer_is_priced_by_its_operations():
    device = Device(**{**SHEET.to_json(), "flops": 1e5, "bandwidth": 1e12, "launch_s": None})
    costs = run(Quick(), Quick(), devices=(CPU, device))
    assert costs.layers[0].times["h100:0"].forward_s == pytest.approx(2 * B // M * D * D / 1e5 / 0.5)


class Scaled(Quick):
    """Reads its context."""

    def forward(self, x: Tensor, context: Any) -> Tensor:
        return super().forward(x * context["scale"], context)


def test_a_layer_that_reads_its_context_is_priced_by_the_roofline():
    batch = SimpleNamespace(inputs=BATCH.inputs, targets=BATCH.targets, context={"scale": torch.ones(B, 1)})
    costs = profile([("a", Scaled())], batch, Topology((SHEET,)), n_microbatches=M)
    assert costs.layers[0].times["h100:0"].source.startswith("roofline, ")


def test_a_layers_own_statement_goes_before_the_roofline():
    qpu = Device("qpu:0", "qpu", "aer", 2**30, simulated=True)
    costs = run(Quick(), Quantum(), Quick(), devices=(CPU, qpu))
    time = costs.layers[1].times["qpu:0"]
    assert (time.forward_s, time.backward_s, time.error, time.source) == (0.5, 2.0, 0.1, "given")


def test_a_data_sheet_without_figures_is_refused():
    device = Device(**{**SHEET.to_json(), "bandwidth": None})
    with pytest.raises(DeviceError, match="bandwidth: None"):
        run(Quick(), devices=(CPU, device))


def test_the_fixed_cost_of_a_stage_follows_from_units_alone_and_together():
    def sample(*times: float) -> calibration.Sample:
        return calibration.Sample(*times, call_bytes=0, scratch_bytes=0)

    alone = [sample(3.0, 5.0, 0.1), sample(4.0, 6.0, 0.1), sample(5.0, 7.0, 0.1)]
    call = calibration._call(alone, sample(10.0, 18.0, 0.1))
    assert call == calibration._Call(StageOverhead(1.0, 0.0), (1.0, 1.0))
    assert calibration._call(alone, None) == calibration._Call(StageOverhead(), (1.0, 1.0))


@pytest.mark.parametrize("chain", [0.5, 2.0, 11.0, 12.0, 30.0])
def test_a_stage_of_all_units_is_priced_as_it_was_measured(chain):
    times = [3.0, 4.0, 5.0]
    alone = [calibration.Sample(t, 2 * t, 0.1, 0, 0) for t in times]
    call = calibration._call(alone, calibration.Sample(chain, chain, 0.1, 0, 0))
    nets = [calibration._net(sample, call) for sample in alone]
    assert call.overhead.forward_s + sum(net.forward_s for net in nets) == pytest.approx(chain)
    assert call.overhead.backward_s + sum(net.backward_s for net in nets) == pytest.approx(chain)
    assert all(net.forward_s >= 0.0 and net.backward_s >= 0.0 for net in nets)
    assert call.overhead.forward_s >= 0.0


def test_profiling_leaves_gradients_and_the_json_form_whole():
    module = Quick()
    module.map.weight.grad = torch.ones(D, D)
    costs = run(module, Quick())
    assert torch.equal(module.map.weight.grad, torch.ones(D, D))
    assert module.map.bias.grad is None
    assert Costs.from_json(costs.to_json()) == costs
