"""Values and gradients of the Aer path against PennyLane's default.qubit, finite differences and its own variants."""

import numpy as np
import pennylane as qml
import pytest
import torch

import quantum
from quantum import expectation, gradient
from quantum.aer import plan
from quantum.circuit import capture

# float64 sums of 2^n terms through some tens of gates: rounding stays below 1e-12; the promise is 1e-9
TOLERANCE = 1e-11


def layer(n_qubits, n_layers, simulator="aer", **options):
    generator = torch.Generator().manual_seed(100 * n_qubits + n_layers)
    return quantum.QuantumLayer(n_qubits, n_layers, simulator=simulator, generator=generator, **options)


def signs(n):
    """Eigenvalues of Z_i in the computational basis: (2**n, n)."""
    return np.stack([np.diag(qml.matrix(qml.Z(i), wire_order=range(n))).real for i in range(n)], axis=1)


def random_inputs(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pass_through(module, inputs):
    """Values, gradient of the inputs, gradient of the weights, for a cotangent that no symmetry hides."""
    module.zero_grad()
    inputs = inputs.clone().requires_grad_()
    values = module(inputs)
    (values * random_inputs(*values.shape, seed=1)).sum().backward()
    return values.detach(), inputs.grad, module.weights.grad


def reference(n_qubits, weights, inputs):
    """The same circuit as a QNode on default.qubit, written out gate by gate, differentiated by backprop."""

    @qml.qnode(qml.device("default.qubit", wires=n_qubits), interface="torch", diff_method="backprop")
    def circuit(x, w):
        for i in range(n_qubits):
            qml.RY(x[..., i], wires=i)
        for layer_index in range(w.shape[0]):
            for i in range(n_qubits):
                qml.Rot(*w[layer_index, i], wires=i)
            if n_qubits > 1:
                reach = layer_index % (n_qubits - 1) + 1
                for i in range(n_qubits):
                    qml.CNOT(wires=[i, (i + reach) % n_qubits])
        return [qml.expval(qml.PauliZ(i)) for i in range(n_qubits)]

    inputs = inputs.clone().requires_grad_()
    weights = weights.detach().clone().requires_grad_()
    rows = inputs.reshape(-1, n_qubits)
    values = torch.stack(circuit(rows, weights), dim=-1).reshape(inputs.shape)
    (values * random_inputs(*values.shape, seed=1)).sum().backward()
    return values.detach(), inputs.grad, weights.grad


def largest_error(found, expected):
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("n_qubits", "n_layers", "shape"),
    [(1, 2, (3,)), (2, 1, (1,)), (3, 4, (2, 3)), (4, 2, (5, 7)), (5, 2, (4,)), (6, 3, (2, 1, 3)), (9, 2, (3,))],
)
@pytest.mark.parametrize("simulator", ["aer", "torch"])
def test_layer_agrees_with_default_qubit(n_qubits, n_layers, shape, simulator):
    module = layer(n_qubits, n_layers, simulator)
    inputs = random_inputs(*shape, n_qubits)
    assert largest_error(pass_through(module, inputs), reference(n_qubits, module.weights, inputs)) < TOLERANCE


def test_gradients_pass_finite_differences():
    module = layer(3, 2)

    def function(inputs, weights):
        return torch.func.functional_call(module, {"weights": weights}, inputs)

    inputs, weights = random_inputs(2, 3).requires_grad_(), module.weights.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (inputs, weights))


def test_a_batch_larger_than_a_chunk_gives_the_same(monkeypatch):
    inputs = random_inputs(11, 3)
    expected = pass_through(layer(3, 2), inputs)
    monkeypatch.setattr(expectation, "CHUNK_BYTES", 4 * 16 * 8)
    assert gradient.chunk_rows(layer(3, 2)._execution._program, 4 * 16 * 8) == 4
    monkeypatch.setattr(gradient.chunk_rows, "__defaults__", (4 * 16 * 8,))
    monkeypatch.setattr(expectation._chunks, "__defaults__", (4 * 16 * 8,))
    assert largest_error(pass_through(layer(3, 2), inputs), expected) < TOLERANCE


@pytest.mark.parametrize("bound", ["KEEP_BYTES", "RECORD_BYTES"])
def test_states_that_may_not_wait_are_computed_again(monkeypatch, bound):
    inputs = random_inputs(6, 4)
    expected = pass_through(layer(4, 3), inputs)
    monkeypatch.setattr(expectation, bound, 0)
    assert largest_error(pass_through(layer(4, 3), inputs), expected) < TOLERANCE


def test_kept_states_are_counted_and_given_back():
    module, inputs = layer(4, 2), random_inputs(8, 4).requires_grad_()
    values = [module(inputs) for _ in range(3)]
    assert expectation.kept_bytes() > 0
    del values
    assert expectation.kept_bytes() == 0


def test_four_forwards_before_the_first_backward_keep_their_gradients():
    module = layer(4, 2)
    parts = [random_inputs(5, 4, seed=k) for k in range(4)]
    expected = [pass_through(module, part) for part in parts]
    module.zero_grad()
    leaves = [part.clone().requires_grad_() for part in parts]
    values = [module(leaf) for leaf in leaves]
    for value in values:
        (value * random_inputs(*value.shape, seed=1)).sum().backward()
    for leaf, (_, grad_inputs, _) in zip(leaves, expected, strict=True):
        assert float((leaf.grad - grad_inputs).abs().max()) < TOLERANCE
    assert float((module.weights.grad - sum(e[2] for e in expected)).abs().max()) < TOLERANCE


def test_weights_changed_behind_autograd_are_seen():
    module, inputs = layer(3, 2), random_inputs(4, 3)
    module(inputs)
    module.weights.data.numpy()[...] += 0.5  # neither the version counter nor the object changes
    assert largest_error(pass_through(module, inputs), reference(3, module.weights, inputs)) < TOLERANCE


def test_frozen_weights_get_no_gradient_and_inputs_still_do():
    module, inputs = layer(3, 2), random_inputs(4, 3)
    expected = pass_through(module, inputs)[1]
    module.weights.requires_grad_(False)
    assert float((pass_through(module, inputs)[1] - expected).abs().max()) < TOLERANCE
    assert module.executed.circuits == 4 * (1 + 2 * 21) + 4 * (1 + 2 * 3)


def test_inputs_without_gradient_leave_that_of_the_weights():
    module, inputs = layer(3, 2), random_inputs(4, 3)
    expected = pass_through(module, inputs)[2]
    module.zero_grad()
    (module(inputs) * random_inputs(4, 3, seed=1)).sum().backward()
    assert float((module.weights.grad - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize(("n_qubits", "n_layers", "rows"), [(1, 1, 1), (3, 2, 5), (4, 2, 3)])
def test_branching_parameter_shift_equals_the_adjoint_sweep(n_qubits, n_layers, rows):
    program = plan(
        capture(n_qubits, n_layers, embedding="angle", ansatz="strongly_entangling", batch=2), list(range(n_qubits))
    ).program
    rng = np.random.default_rng(0)
    angles, columns, g = (
        rng.normal(size=program.n_angles),
        rng.normal(size=(rows, n_qubits)),
        rng.normal(size=(rows, n_qubits)),
    )
    record = gradient.forward(program, angles, columns, record=True)
    expected = gradient.backward(
        program, angles, columns, record, (g @ signs(n_qubits).T) * record.final, shared=True, per_row=True
    )
    probabilities, order = gradient.branches(program, angles, columns, shared=True, per_row=True)
    values = probabilities @ signs(n_qubits)
    slopes = 0.5 * (values[:, 0] - values[:, 1])
    found = np.zeros(program.n_angles), np.zeros((rows, n_qubits))
    for (is_row, index), slope in zip(order, slopes, strict=True):
        if is_row:
            found[1][:, index] = (slope * g).sum(axis=1)
        else:
            found[0][index] = (slope * g).sum()
    assert len(order) == program.n_angles + n_qubits
    assert max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)) < TOLERANCE


def test_lightning_agrees_within_its_single_precision():
    inputs = random_inputs(3, 3)
    found = pass_through(layer(3, 1, "lightning.qubit"), inputs)
    # trap: lightning hands its results to torch as float32, eps 6e-8, through a few sums
    assert largest_error(found, pass_through(layer(3, 1), inputs)) < 1e-5


def test_default_qubit_agrees():
    inputs = random_inputs(2, 3)
    assert largest_error(pass_through(layer(3, 2, "default.qubit"), inputs), pass_through(layer(3, 2), inputs)) < 1e-11


def test_stock_aer_agrees():
    inputs = random_inputs(2, 1)  # one qubit: stock Aer takes 0.1 s a circuit, and a row has nine
    assert largest_error(pass_through(layer(1, 1, "qiskit.aer"), inputs), pass_through(layer(1, 1), inputs)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("n_qubits", [10, 12])
def test_wide_layers_agree_with_default_qubit(n_qubits):
    module, inputs = layer(n_qubits, 3), random_inputs(16, n_qubits)
    assert largest_error(pass_through(module, inputs), reference(n_qubits, module.weights, inputs)) < 1e-10
