"""The layer's shapes, dtypes, errors, copies and totals."""

import copy
import pickle
import tracemalloc

import pytest
import torch

import quantum
from quantum import expectation, memory, resources
from quantum.memory import check_memory


def layer(**options):
    return quantum.QuantumLayer(3, 2, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 5, 3), (0, 3), (2, 0, 3), (2, 1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_leading_shape_and_dtype_comes_back(shape, dtype):
    inputs = torch.ones(shape, dtype=dtype, requires_grad=True)
    values = layer()(inputs)
    values.sum().backward()
    assert values.shape == shape
    assert values.dtype == dtype
    assert inputs.grad.shape == shape
    assert inputs.grad.dtype == dtype


def test_single_precision_differs_from_double_by_its_rounding_only():
    inputs = torch.randn(4, 3, dtype=torch.float64)
    error = (layer()(inputs.float()).double() - layer()(inputs.float().double())).detach()
    assert float(error.abs().max()) <= 2**-24


@pytest.mark.parametrize("simulator", ["torch", "default.qubit"])
def test_an_empty_batch_passes_every_simulator(simulator):
    inputs = torch.ones((0, 3), requires_grad=True)
    values = layer(simulator=simulator)(inputs)
    values.sum().backward()
    assert values.shape == (0, 3)


def test_initial_weights_come_from_the_generator():
    assert torch.equal(layer().weights, layer().weights)
    assert float(layer().weights.detach().min()) >= 0.0
    assert float(layer().weights.detach().max()) < 6.2832


def test_copies_and_pickles_compute_the_same():
    module, inputs = layer(), torch.randn(4, 3)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(inputs), module(inputs))
    other = quantum.QuantumLayer(3, 2)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(inputs), module(inputs))


def test_a_copy_has_weights_of_its_own():
    module, inputs = layer(), torch.randn(4, 3)
    other, before = copy.deepcopy(module), module(inputs)
    with torch.no_grad():
        other.weights += 1.0
    other(inputs)
    assert torch.equal(module(inputs), before)


def test_the_state_dict_holds_the_call_number_only_where_samples_depend_on_it():
    assert set(layer().state_dict()) == {"weights"}
    assert set(layer(shots=8).state_dict()) == {"weights", "calls"}


@pytest.mark.parametrize("shots", [None, 16])
def test_torch_compile_takes_the_layer_whole(shots):
    inputs = torch.randn(4, 3, dtype=torch.float64)
    results = []
    for module in (layer(shots=shots), torch.compile(layer(shots=shots), fullgraph=True, backend="aot_eager")):
        x = inputs.clone().requires_grad_()
        values = module(x)
        values.square().sum().backward()
        results.append((values.detach(), x.grad, module.weights.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-13)


def test_every_gate_between_preparation_and_measurement_is_counted_at_aer():
    module = layer()
    before = quantum.operation_counts()
    with torch.no_grad():
        module(torch.randn(5, 3))
    after = quantum.operation_counts()
    executed = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    # two rings of three CNOTs; a layer of rotations on three wires is a two-qubit and a one-qubit matrix
    assert executed == {"prepare": 1, "cx": 6, "unitary": 4}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"simulator": "aerr"}, "lightning.qubit"),
        ({"shots": 0}, "shots=0"),
        ({"shots": -5}, "shots=-5"),
        ({"embedding": "amplitudes"}, "angle"),
        ({"ansatz": "strong"}, "strongly_entangling"),
        ({"simulator": "torch", "shots": 10}, "simulator='aer'"),
        ({"simulator": "default.qubit", "shots": 10}, "simulator='aer'"),
        ({"simulator": "qiskit.aer", "shots": 10}, "simulator='aer'"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_possible(options, part):
    with pytest.raises(quantum.QuantumError, match=part):
        layer(**options)


@pytest.mark.parametrize(("n_qubits", "n_layers"), [(0, 1), (3, 0), (-1, 2)])
def test_empty_circuits_are_refused(n_qubits, n_layers):
    with pytest.raises(quantum.QuantumError, match="at least 1"):
        quantum.QuantumLayer(n_qubits, n_layers)


@pytest.mark.parametrize("inputs", [torch.ones(4), torch.ones(2, 2), torch.ones(()), torch.ones(3, dtype=torch.int64)])
def test_inputs_that_do_not_fit_are_refused(inputs):
    with pytest.raises(quantum.QuantumError, match=r"\(\.\.\., 3\)"):
        layer()(inputs)


def test_more_qubits_than_memory_name_bytes_needed_and_free():
    with pytest.raises(quantum.QuantumError, match=r"(?s)60 qubits.*bytes free.*bytes.*at most \d+ qubits"):
        quantum.QuantumLayer(60, 1)
    with pytest.raises(quantum.QuantumError, match="30 qubits"):
        quantum.QuantumLayer(30, 8, shots=10)


def test_a_control_groups_limit_bounds_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_GROUPS", ((str(tmp_path), "max", "current", "active_file", "inactive_file"),))
    (tmp_path / "current").write_text("5000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000\nactive_file 1500000\ninactive_file 2500000\n")
    (tmp_path / "max").write_text("max\n")
    without = memory.free_bytes()
    (tmp_path / "max").write_text("3000000\n")
    assert memory.free_bytes() == 2_000_000 < without  # the cache of files can be taken back
    with pytest.raises(quantum.QuantumError, match="at most 13 qubits"):  # 2 MB / 11 states of 16 B
        quantum.QuantumLayer(14, 1)


@pytest.mark.parametrize(("n_qubits", "shots"), [(15, None), (16, None), (12, 3), (13, 3)])
def test_no_more_memory_is_used_than_was_asked_for(n_qubits, shots, monkeypatch):
    # what waits for a backward pass has a limit of its own
    monkeypatch.setattr(expectation, "KEEP_BYTES", 0)
    monkeypatch.setattr(expectation, "RECORD_BYTES", 0)
    module = quantum.QuantumLayer(n_qubits, 1, shots=shots)
    tracemalloc.start()
    try:
        module(torch.zeros(1, n_qubits, dtype=torch.float64, requires_grad=True)).sum().backward()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    peak += 2 * (16 << n_qubits)  # copies of two states by torch, which tracemalloc doesn't see
    allowed = check_memory(n_qubits, n_shifted=0 if shots is None else 4 * n_qubits)
    assert 0.3 * allowed < peak < allowed + 200_000  # Python's own objects


def test_executed_circuits_are_those_of_the_parameter_shift_rule():
    module = layer()
    inputs = torch.randn(2, 5, 3, requires_grad=True)
    module(inputs).sum().backward()
    with torch.no_grad():
        module(inputs)
    n_angles = 3 + 18
    assert module.executed.circuits == 10 * (1 + 2 * n_angles) + 10
    assert quantum.totals(module)["circuits"] == module.executed.circuits
    assert quantum.count(module, 10, backward=True)["circuits"] == 10 * (1 + 2 * n_angles)
    assert quantum.count(module, 10, backward=False)["circuits"] == 10


@pytest.mark.parametrize("simulator", ["torch", "default.qubit"])
def test_other_simulators_count_the_same_circuits(simulator):
    totals = []
    for name in ("aer", simulator):
        module = layer(simulator=name)
        module(torch.randn(2, 3, requires_grad=True)).sum().backward()
        totals.append(module.executed)
    assert totals[0] == totals[1]


def test_gates_and_depth_are_those_of_the_decomposed_circuit():
    # each wire: RY, then two layers of RZ RY RZ; two rings of three CNOTs, a depth of three each
    assert resources.circuit_counts(layer()) == {"gates_1q": 3 * 7, "gates_2q": 6, "depth": 1 + 2 * (3 + 3)}


def test_shots_of_exact_layers_are_assumed_and_those_of_sampled_ones_their_own():
    assert quantum.count(layer(), 2, backward=False)["shots"] == 2 * resources.ASSUMED_SHOTS
    assert quantum.count(layer(shots=7), 2, backward=False)["shots"] == 14


def test_cost_on_hardware_is_an_estimate_with_date_and_source():
    cost = quantum.qpu_cost({"circuits": 10, "gates_1q": 0, "gates_2q": 0, "depth": 10, "shots": 1000})
    assert cost["estimate"] is True
    assert cost["usd"] == pytest.approx(10 * 0.30 + 1000 * 0.00145)
    assert cost["seconds"] == pytest.approx(1000 * (10 * 84e-9 + 1.56e-6 + 250e-6))
    assert cost["date"]
    assert cost["source"]
    with pytest.raises(quantum.QuantumError, match="braket"):
        quantum.qpu_cost({}, "nobody")


@pytest.mark.parametrize(("simulator", "api"), [("aer", "aer"), ("qiskit.aer", "aer"), ("torch", "cpu")])
def test_a_layer_runs_where_its_simulator_does(simulator, api):
    assert layer(simulator=simulator).device_apis == {api}


def test_without_gradients_no_state_waits_for_a_backward_pass(monkeypatch):
    kept = []
    real = expectation.values
    monkeypatch.setattr(expectation, "values", lambda *a, keep: kept.append(keep) or real(*a, keep=keep))
    module = layer()
    with torch.no_grad():
        module(torch.zeros(2, 3))
    module(torch.zeros(2, 3))
    assert kept == [False, True]


def test_layer_cost_is_measured_here_and_refused_elsewhere():
    cost = layer().layer_cost("aer", (2, 4, 3))
    assert set(cost) == {"flops", "bytes", "seconds_forward", "seconds_backward", "error", "usd"}
    assert all(value > 0 for value in cost.values())
    with pytest.raises(quantum.QuantumError, match="aer"):
        layer().layer_cost("opencl", (2, 4, 3))
