"""Layers that run again in their backward pass: the same gradients bit by bit, and less memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hetero.backends import all_backends, cpu
from hetero.cost import Costs, LayerCost, LayerTime
from hetero.device import Device
from hetero.errors import PlacementError
from hetero.planner import given_plan, plan
from hetero.runtime import place, place_stages
from hetero.topology import Link, Topology

WIDTH, MIB = 32, 2**20


@pytest.fixture
def topology(monkeypatch):
    """Two devices of one core each; one of a runtime that can't recompute."""
    monkeypatch.setitem(all_backends(), "fake", cpu)
    cores = cpu.host_cores()
    first = Device("cpu", "cpu", "cpu", 2**30, cores=cores[:1], memory_pool="host")
    second = Device("fake:0", "cpu", "fake", 2**30, cores=cores[-1:], memory_pool="host")
    return Topology((first, second))


class Counted(nn.Module):
    """A layer that counts its calls and draws from torch's random state."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        generator = torch.Generator().manual_seed(seed)
        self.linear.weight.data = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        self.n_calls = 0

    def forward(self, x: Tensor, context: object) -> Tensor:
        self.n_calls += 1
        return nn.functional.dropout(torch.tanh(self.linear(x)), 0.2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(Counted(seed) for seed in range(4))

    def layers(self) -> list[tuple[str, nn.Module]]:
        return [(f"l{i}", unit) for i, unit in enumerate(self.units)]


def a_batch() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(3)
    inputs, targets = torch.randn(8, WIDTH, generator=generator), torch.randint(WIDTH, (8,), generator=generator)
    return SimpleNamespace(inputs=inputs, targets=targets, context={})


def gradients(recomputed: tuple[str, ...], topology: Topology) -> tuple[list[Tensor], list[int], float]:
    model = Model()
    torch.manual_seed(5)
    with place_stages(model, [("cpu", 0, 3)], topology, n_microbatches=2, recomputed=recomputed) as placed:
        loss = placed.step(a_batch())
    return [p.grad for p in model.parameters()], [unit.n_calls for unit in model.units], loss


def test_recomputed_layers_give_the_same_gradients_and_run_twice(topology):
    expected, calls, loss = gradients((), topology)
    assert calls == [2, 2, 2, 2]
    again, calls, loss_again = gradients(("l1", "l3"), topology)
    assert calls == [2, 4, 2, 4]
    assert loss == loss_again
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def saved(recomputed: tuple[str, ...], topology: Topology) -> int:
    """Bytes that autograd keeps after the forward pass of one micro-batch, parameters left out."""
    model, batch = Model(), a_batch()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with place_stages(model, [("cpu", 0, 3)], topology, recomputed=recomputed) as placed:
        context = {"targets": batch.targets}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            placed.stages[0].forward(0, batch.inputs, context)
            return sum(kept.values())


def test_a_recomputed_layer_keeps_its_input_only(topology):
    layer_bytes = 4 * 8 * WIDTH
    everything, nothing = saved((), topology), saved(("l0", "l1", "l2", "l3"), topology)
    assert everything >= 4 * 3 * layer_bytes  # output of tanh, dropout's mask, input of each layer
    assert nothing <= 4 * layer_bytes + 2 * 8 * 8  # the inputs, and the targets of the loss


def test_a_plan_that_recomputes_is_placed_as_it_says(topology):
    times = {"cpu": LayerTime(1.0, 2.0, 0.1, "given")}
    layers = tuple(LayerCost(f"l{i}", None, 0, 0, MIB, 5 * MIB, 1.0, times) for i in range(4))
    costs = Costs(layers, 2)
    made = plan(costs, topology.only(["cpu"]), recompute="allowed", max_memory={"cpu": 35 * MIB})
    # Stored, four layers fill 40 MiB. The first one has no input to keep: 30 MiB, and room for 5 MiB while it runs.
    assert made.recomputed == ("l0",)
    assert made.stages[0].memory_bytes == 35 * MIB
    model = Model()
    with place(model, made, topology=topology) as placed:
        placed.step(a_batch())
    assert [unit.n_calls for unit in model.units] == [4 if f"l{i}" in made.recomputed else 2 for i in range(4)]


def test_a_runtime_that_cannot_recompute_is_refused_and_never_planned_for(topology):
    with pytest.raises(PlacementError, match=r"'l1' can't be recomputed on 'fake:0'"):
        place_stages(Model(), [("cpu", 0, 0), ("fake:0", 1, 3)], topology, recomputed=("l1",))
    with pytest.raises(PlacementError, match="recomputed layer 'head' does not exist"):
        place_stages(Model(), [("cpu", 0, 3)], topology, recomputed=("head",))
    times = {name: LayerTime(1.0, 2.0, 0.1, "given") for name in topology.names}
    layers = tuple(LayerCost(f"l{i}", None, 0, 0, MIB, 5 * MIB, 1.0, times) for i in range(4))
    joined = Topology(topology.devices, (Link("*", "*", 0.0, 1e9),))
    with pytest.raises(PlacementError, match=r"'l1' can't be recomputed on 'fake:0'"):
        given_plan([("cpu", 0, 0), ("fake:0", 1, 3)], Costs(layers, 2), joined, recomputed=["l1"])
    made = plan(Costs(layers, 2), joined, recompute="allowed", max_memory={"cpu": 15 * MIB, "fake:0": 20 * MIB})
    assert made.recomputed
    assert all(stage.device == "cpu" for stage in made.stages if stage.recomputed)
