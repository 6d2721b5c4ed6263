"""Failing stages, Ctrl-C, wrong placements: each is named, and nothing is left half done."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetero.backends import all_backends, cpu
from hetero.device import Device
from hetero.errors import DeviceError, HeteroError, PlacementError, StageError
from hetero.runtime import place_stages
from hetero.runtime.worker import Worker
from hetero.topology import Topology


class Unit(nn.Module):
    """A linear map that can be told to fail or to take its time."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 3)
        self.fail: BaseException | None = None
        self.sleep_s = 0.0

    def forward(self, x: Tensor, context: Any) -> Tensor:
        if self.fail is not None:
            raise self.fail
        time.sleep(self.sleep_s)
        return self.map(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Unit(), Unit()

    def layers(self) -> list[tuple[str, nn.Module]]:
        return [("first", self.first), ("second", self.second)]


def squared(y: Tensor, targets: Tensor) -> Tensor:
    return ((y - targets) ** 2).mean()


@pytest.fixture
def topology(monkeypatch):
    monkeypatch.setitem(all_backends(), "fake", cpu)
    cores = cpu.host_cores()
    return Topology(
        (
            Device("cpu", "cpu", "cpu", 2**30, cores=cores[:1], memory_pool="host"),
            Device("fake:0", "cpu", "fake", 2**30, cores=cores[-1:], memory_pool="host"),
            Device("fake:0.1", "cpu", "fake", 2**30, cores=cores[-1:], memory_pool="host"),
            Device("h100:0", "gpu", "cuda", 80 * 2**30, simulated=True),
            Device("qpu:0", "qpu", "aer", 2**30),
        )
    )


BATCH = SimpleNamespace(inputs=torch.ones(4, 3), targets=torch.zeros(4, 3), context={})
TWO_STAGES = [("cpu", 0, 0), ("fake:0", 1, 1)]


def step_alone(model: Model) -> float:
    return squared(model.second(model.first(BATCH.inputs, {}), {}), BATCH.targets).item()


@pytest.mark.parametrize("kind", [FloatingPointError, SystemExit])  # a worker that an exit ends is waited for for ever
@pytest.mark.parametrize(("layer", "stage", "device"), [("first", 0, "cpu"), ("second", 1, "fake:0")])
def test_a_failing_stage_is_named_and_the_next_step_works(topology, layer, stage, device, kind):
    model = Model()
    with place_stages(model, TWO_STAGES, topology, loss=squared, n_microbatches=4) as placed:
        getattr(model, layer).fail = kind("gone wrong")
        with pytest.raises(StageError, match=rf"stage {stage} \({layer}\) on {device} failed in the forward") as caught:
            placed.step(BATCH)
        assert f"{kind.__name__}: gone wrong" in str(caught.value)
        assert isinstance(caught.value.__cause__, kind)
        getattr(model, layer).fail = None
        model.zero_grad()
        assert placed.step(BATCH) == pytest.approx(step_alone(model), rel=1e-6)


def test_the_remedy_of_a_failure_is_passed_on(topology):
    model = Model()
    model.second.fail = HeteroError("too large", remedy="take a smaller one")
    with (
        place_stages(model, TWO_STAGES, topology, loss=squared) as placed,
        pytest.raises(StageError, match="remedy: take a smaller one"),
    ):
        placed.step(BATCH)


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise FloatingPointError("no gradient")


def test_a_failing_backward_pass_is_named(topology):
    model = Model()

    def loss(y: Tensor, targets: Tensor) -> Tensor:
        return squared(FailsBackward.apply(y), targets)

    with place_stages(model, TWO_STAGES, topology, loss=loss, n_microbatches=2) as placed:
        with pytest.raises(StageError, match=r"stage 1 \(second\) on fake:0 failed in the backward"):
            placed.step(BATCH)
        assert placed.evaluate(BATCH)[1] == 12


def interrupt_after(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_an_interrupt_gives_up_the_step_when_no_worker_computes(topology):
    model = Model()
    model.second.sleep_s = 0.2
    with place_stages(model, TWO_STAGES, topology, loss=squared, n_microbatches=4) as placed:
        timer = interrupt_after(0.1)
        start = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            placed.step(BATCH)
        assert time.perf_counter() - start < 0.7  # the micro-batch under way was finished, the other three were not
        timer.join()
        model.second.sleep_s = 0.0
        model.zero_grad()
        assert placed.step(BATCH) == pytest.approx(step_alone(model), rel=1e-6)
        gradient = model.first.map.weight.grad.clone()
        model.zero_grad()
        squared(model.second(model.first(BATCH.inputs, {}), {}), BATCH.targets).backward()
        torch.testing.assert_close(gradient, model.first.map.weight.grad)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("heteroq-")]


def test_closing_ends_the_threads_and_may_be_repeated(topology):
    placed = place_stages(Model(), TWO_STAGES, topology, loss=squared)
    assert sorted(threads()) == ["heteroq-cpu", "heteroq-fake:0"]
    placed.close()
    placed.close()
    assert threads() == []
    with pytest.raises(RuntimeError, match="closed"):
        placed.step(BATCH)


def test_a_forgotten_placed_model_ends_its_threads(topology):
    model = Model()
    placed = place_stages(model, TWO_STAGES, topology, loss=squared)
    placed.step(BATCH)
    del placed
    gc.collect()
    assert threads() == []


def test_a_process_that_does_not_close_ends(tmp_path):
    program = """
import torch
from torch import nn
from hetero.device import Device
from hetero.runtime import place_stages
from hetero.runtime.worker import Worker
from hetero.topology import Topology
from hetero.backends.cpu import host_cores
class Model(nn.Module):
    def __init__(self): super().__init__(); self.map = nn.Linear(2, 2)
    def layers(self): return [("map", self)]
    def forward(self, x, context): return self.map(x)
topology = Topology((Device("cpu", "cpu", "cpu", 2**30, cores=host_cores()[:1]),))
placed = place_stages(Model(), [("cpu", 0, 0)], topology)
print("ready")
"""
    environment = os.environ | {"HETEROQ_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")


def test_the_number_of_torch_threads_of_others_is_left_alone():
    seen: list[int] = []

    def caller() -> None:  # a thread that has set its number and not asked for it yet, as a program's first one
        torch.set_num_threads(3)
        worker = Worker(Device("cpu", "cpu", "cpu", 2**30, cores=cpu.host_cores()[:1]))
        seen.append(torch.get_num_threads())
        late = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        late.start()
        late.join()
        seen.append(worker.call(torch.get_num_threads))
        worker.close()

    before = torch.get_num_threads()
    thread = threading.Thread(target=caller)
    thread.start()
    thread.join()
    assert seen == [3, 3, 1]
    assert torch.get_num_threads() == before
    torch.set_num_threads(before)


def test_a_worker_computes_on_its_devices_cores_with_as_many_threads():
    cores = cpu.host_cores()[-1:]
    worker = Worker(Device("cpu", "cpu", "cpu", 2**30, cores=cores))
    try:
        assert worker.call(lambda: os.sched_getaffinity(0)) == set(cores)
        assert worker.call(torch.get_num_threads) == 1
        assert len(os.sched_getaffinity(0)) == len(cpu.host_cores())
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([("cpu", 0, 0)], "don't cover all layers"),
        ([("cpu", 0, 0), ("fake:0", 0, 1)], "one after the other"),
        ([("cpu", 1, 1)], "one after the other"),
        ([("cpu", 0, 0), ("h100:0", 1, 1)], "simulated device"),
        ([("fake:0", 0, 0), ("fake:0.1", 1, 1)], "the same hardware"),
        ([("cpu", 0, 0), ("qpu:0", 1, 1)], "'second' can't run on 'qpu:0'"),
    ],
)
def test_a_placement_that_makes_no_sense_is_refused(topology, stages, message):
    with pytest.raises(PlacementError, match=message):
        place_stages(Model(), stages, topology)
    assert threads() == []


def test_an_unknown_device_is_refused_with_what_exists(topology):
    with pytest.raises(DeviceError, match=r"'cuda:7' does not exist\n  found: cpu.*\n  remedy: .*heteroq devices"):
        place_stages(Model(), [("cuda:7", 0, 1)], topology)


def test_a_layer_that_names_its_runtimes_is_kept_there(topology):
    model = Model()
    model.second.device_apis = frozenset({"aer"})
    with pytest.raises(PlacementError, match="expected: a device of aer"):
        place_stages(model, TWO_STAGES, topology)


def test_a_parameter_shared_by_two_stages_is_refused(topology):
    model = Model()
    model.second.map.weight = model.first.map.weight
    with pytest.raises(PlacementError, match="shares a parameter"):
        place_stages(model, TWO_STAGES, topology)
    place_stages(model, [("cpu", 0, 1)], topology).close()
