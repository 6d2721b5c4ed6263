"""The bottleneck and the classical twin."""

import copy
import pickle

import pytest
import torch
from torch import nn

import quantum


def generator():
    return torch.Generator().manual_seed(0)


def test_bottleneck_is_projection_bounded_angles_core_projection():
    module = quantum.Bottleneck(16, 4, nn.Identity(), generator=generator())
    x = torch.randn(2, 5, 16)
    expected = module.up(torch.pi * torch.tanh(x @ module.down.weight.T + module.down.bias))
    torch.testing.assert_close(module(x, {"dropout": torch.zeros(2)}), expected)


def test_bottleneck_runs_where_its_core_can():
    circuit = quantum.Bottleneck(16, 4, quantum.QuantumLayer(4, 2), generator=generator())
    assert circuit.device_apis == frozenset({"aer"})
    alone, whole = circuit.core.layer_cost("aer", (10, 4)), circuit.layer_cost("aer", (2, 5, 16))
    assert whole["flops"] == alone["flops"] + 4 * 10 * 16 * 4
    assert whole["usd"] == alone["usd"]
    twin = quantum.Bottleneck(16, 4, quantum.TanhMLP(4, 2), generator=generator())
    assert not hasattr(twin, "device_apis")
    assert not hasattr(twin, "layer_cost")


@pytest.mark.parametrize("core", [quantum.QuantumLayer(4, 2), quantum.TanhMLP(4, 2), nn.Identity()])
def test_bottleneck_copies_and_pickles(core):
    module = quantum.Bottleneck(8, 4, core, generator=generator())
    x = torch.randn(3, 8)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))


def test_bottlenecks_of_one_seed_share_their_projections_whatever_the_core():
    first = quantum.Bottleneck(8, 4, nn.Identity(), generator=generator())
    second = quantum.Bottleneck(8, 4, quantum.TanhMLP(4, 2), generator=generator())
    assert torch.equal(first.down.weight, second.down.weight)
    assert torch.equal(first.up.bias, second.up.bias)


def test_initial_weights_leave_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    quantum.Bottleneck(8, 4, quantum.TanhMLP(4, 2, generator=generator()), generator=generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_core_of_another_width_is_refused():
    with pytest.raises(quantum.QuantumError, match="width=5"):
        quantum.Bottleneck(8, 5, quantum.QuantumLayer(4, 2))


@pytest.mark.parametrize("n_qubits", range(1, 21))
def test_twin_has_at_least_the_parameters_of_the_circuit_and_at_most_a_width_more(n_qubits):
    for n_layers in range(1, 31):
        circuit = 3 * n_qubits * n_layers
        twin = sum(p.numel() for p in quantum.TanhMLP(n_qubits, n_layers).parameters())
        assert twin == circuit + (n_qubits if n_layers % 2 else 0)


@pytest.mark.parametrize("n_layers", [1, 2])
def test_twin_can_pass_all_its_inputs_on(n_layers):
    twin = quantum.TanhMLP(4, n_layers, generator=generator())
    jacobian = torch.autograd.functional.jacobian(twin, 0.3 * torch.ones(4))
    assert int(torch.linalg.matrix_rank(jacobian)) == 4


def test_twin_size_is_that_of_the_real_layer():
    assert quantum.QuantumLayer(5, 3).weights.numel() == 3 * 5 * 3


@pytest.mark.parametrize(("n_qubits", "n_layers"), [(1, 1), (4, 1), (4, 2), (8, 3)])
def test_twin_is_bounded_and_every_parameter_gets_a_gradient(n_qubits, n_layers):
    twin = quantum.TanhMLP(n_qubits, n_layers, generator=generator())
    values = twin(10.0 * torch.randn(64, n_qubits, generator=generator()))
    values.sum().backward()
    assert float(values.detach().abs().max()) <= 1.0
    assert all(bool(p.grad.abs().sum() > 0) for p in twin.parameters())
