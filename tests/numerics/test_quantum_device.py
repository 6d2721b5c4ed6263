"""The PennyLane device `heteroq.aer` in other people's QNodes, against default.qubit."""

import pickle

import numpy as np
import pennylane as qml
import pytest
import torch

import quantum
from quantum.aer import AerDevice, plan

TOLERANCE = 1e-11


def device(wires=4, **options):
    return qml.device("heteroq.aer", wires=wires, **options)


def many_gates(a, b):
    qml.Hadamard(0)
    qml.RX(a, 0)
    qml.CRY(b, wires=[0, 1])
    qml.IsingXX(a * b, wires=[1, 2])
    qml.U3(a, b, a + b, wires=2)
    qml.Toffoli([0, 1, 2])
    qml.SWAP([1, 3])
    qml.CY([3, 0])
    qml.adjoint(qml.S)(3)
    qml.PhaseShift(b, 3)
    qml.CH([2, 0])
    qml.RY(a, 2)
    qml.QFT([0, 1, 2])
    qml.MultiControlledX([0, 1, 2, 3])
    qml.DoubleExcitation(b, [0, 1, 2, 3])


def expectations(a, b):
    many_gates(a, b)
    return (
        qml.expval(qml.X(0) @ qml.Y(1)),
        qml.expval(0.3 * qml.Z(2) - 1.2 * qml.X(3) @ qml.Z(0)),
        qml.expval(qml.Hamiltonian([0.5, 2.0], [qml.Y(2), qml.I(0)])),
    )


@pytest.mark.parametrize("shape", [(), (1,), (5,)])
def test_values_and_gradients_of_a_general_circuit_agree(shape):
    results = []
    for simulator in (qml.device("default.qubit", wires=4), device()):
        a, b = (torch.full(shape, value, dtype=torch.float64, requires_grad=True) for value in (0.3, 0.7))
        values = torch.stack(qml.QNode(expectations, simulator, interface="torch")(a, b))
        values.square().sum().backward()
        results.append((values.detach(), a.grad, b.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_angles_in_one_row_and_shared_ones_may_mix_in_any_order():
    def circuit(x, w):
        qml.AngleEmbedding(x, wires=range(3), rotation="X")
        qml.BasicEntanglerLayers(w, wires=range(3))
        qml.AngleEmbedding(x * 2.0, wires=range(3), rotation="Y")
        qml.RZ(w[0, 0], 1)
        qml.RZ(x[:, 0], 1)
        qml.RX(w[0, 1], 1)
        return [qml.expval(qml.Z(i)) for i in range(3)]

    results = []
    for simulator in (qml.device("default.qubit", wires=3), device(3)):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(5, 3, dtype=torch.float64, generator=generator).requires_grad_()
        w = torch.randn(2, 3, dtype=torch.float64, generator=generator).requires_grad_()
        values = torch.stack(qml.QNode(circuit, simulator, interface="torch")(x, w), dim=-1)
        (values * torch.arange(15.0, dtype=torch.float64).reshape(5, 3)).sum().backward()
        results.append((values.detach(), x.grad, w.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def other_measurements(a, b):
    many_gates(a, b)
    qml.QubitUnitary(np.array([[0, 1j], [1j, 0]]), 2)
    qml.GlobalPhase(0.3)
    return (
        qml.state(),
        qml.probs([0, 2]),
        qml.var(qml.X(1)),
        qml.expval(qml.Projector([1], 0)),
        qml.expval(qml.Hermitian(np.array([[1, 0.5], [0.5, 2]]), 1)),
        qml.purity([0]),
    )


def test_other_measurements_agree_the_phase_of_the_state_included():
    expected, found = (
        qml.QNode(other_measurements, simulator)(0.3, 0.7)
        for simulator in (qml.device("default.qubit", wires=4), device())
    )
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=TOLERANCE)


def test_torch_layer_of_pennylane_trains_with_batched_inputs():
    def circuit(inputs, weights):
        qml.AngleEmbedding(inputs, wires=range(3), rotation="Y")
        qml.StronglyEntanglingLayers(weights, wires=range(3))
        return [qml.expval(qml.Z(i)) for i in range(3)]

    node = qml.QNode(circuit, device(3), interface="torch")
    stock = qml.qnn.TorchLayer(node, {"weights": (2, 3, 3)}).double()
    own = quantum.QuantumLayer(3, 2)
    with torch.no_grad():
        own.weights.copy_(stock.weights)
    inputs = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for layer in (stock, own):
        x = inputs.clone().requires_grad_()
        layer(x).square().sum().backward()
        gradients.append((x.grad, layer.weights.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=TOLERANCE)


def test_jacobian_through_autograd_agrees():
    def circuit(a):
        qml.RX(a, 0)
        qml.CNOT([0, 1])
        return qml.expval(qml.Z(0)), qml.expval(qml.Z(1) @ qml.X(0))

    node = qml.QNode(circuit, device(2))
    jacobian = qml.jacobian(lambda a: qml.numpy.stack(node(a)))(qml.numpy.array(0.4, requires_grad=True))
    np.testing.assert_allclose(jacobian, [-np.sin(0.4), 0.0], atol=TOLERANCE)


def test_wire_labels_may_be_anything():
    @qml.qnode(device(["left", 7]))
    def circuit():
        qml.X("left")
        qml.CNOT(["left", 7])
        return qml.expval(qml.Z("left")), qml.probs([7])

    value, probabilities = circuit()
    assert float(value) == pytest.approx(-1.0)
    np.testing.assert_allclose(probabilities, [0, 1], atol=TOLERANCE)


def test_a_measurement_in_the_middle_is_deferred():
    @qml.qnode(device(2))
    def circuit(a):
        qml.RX(a, 0)
        outcome = qml.measure(0)
        qml.cond(outcome, qml.X)(1)
        return qml.expval(qml.Z(1))

    # the deferred measurement needs a wire of its own
    circuit = qml.QNode(circuit.func, device(3))
    assert float(circuit(0.4)) == pytest.approx(np.cos(0.4), abs=TOLERANCE)


def test_shots_follow_the_state():
    @qml.qnode(device(2, seed=11))
    def circuit(a):
        qml.RX(a, 0)
        qml.CNOT([0, 1])
        return qml.expval(qml.Z(0)), qml.probs(wires=[1]), qml.counts()

    shots = 20_000
    value, probabilities, counts = qml.set_shots(circuit, shots)(0.4)
    # five standard deviations: a false alarm in 1.7 million runs, and the seed is fixed
    assert abs(float(value) - np.cos(0.4)) < 5 * np.sin(0.4) / np.sqrt(shots)
    assert abs(float(probabilities[1]) - np.sin(0.2) ** 2) < 5 * np.sqrt(np.sin(0.2) ** 2 / shots)
    assert sum(counts.values()) == shots
    assert set(counts) <= {"00", "11"}


def test_two_executions_with_one_seed_draw_different_samples_and_repeat_together():
    def values():
        node = qml.set_shots(qml.QNode(lambda: (qml.Hadamard(0), qml.expval(qml.Z(0)))[1], device(1, seed=5)), 1000)
        return [float(node()) for _ in range(4)]

    first = values()
    assert first == values()
    assert len(set(first)) > 1


def test_paths_are_named():
    tape = qml.tape.QuantumScript([qml.RX(0.1, 0)], [qml.expval(qml.Z(0))])
    assert device(1).path(tape) == "adjoint"
    assert device(1).path(tape.copy(measurements=[qml.probs()])) == "state"
    assert device(1).path(tape.copy(shots=10)) == "sampled"


def test_tapes_of_one_structure_share_a_plan_and_others_do_not():
    def tape(angle, wire=0):
        return qml.tape.QuantumScript([qml.RX(angle, wire), qml.CNOT([0, 1])], [qml.expval(qml.Z(0))])

    assert plan(tape(0.1), [0, 1]) is plan(tape(0.2), [0, 1])
    assert plan(tape(0.1), [0, 1]) is not plan(tape(0.1, wire=1), [0, 1])
    other = qml.tape.QuantumScript([qml.RX(0.1, 0), qml.CNOT([0, 1])], [qml.expval(2.0 * qml.Z(0))])
    assert plan(tape(0.1), [0, 1]) is not plan(other, [0, 1])


def test_a_noise_model_on_the_statevector_is_refused():
    with pytest.raises(quantum.QuantumError, match="noise"):
        device(1, noise=object())


@pytest.mark.parametrize("shots", [0, -3])
def test_shots_must_be_positive(shots):
    with pytest.raises(quantum.QuantumError, match="shots"):
        AerDevice(wires=1, shots=shots)


def test_wires_beyond_memory_are_refused():
    with pytest.raises(quantum.QuantumError, match="bytes free"):
        device(60)


def test_derivatives_that_the_sweep_cannot_give_are_refused():
    @qml.qnode(device(1), diff_method="adjoint")
    def circuit(a):
        qml.RX(a, 0)
        return qml.probs()

    with pytest.raises(qml.exceptions.QuantumFunctionError, match="adjoint"):
        circuit(qml.numpy.array(0.1, requires_grad=True))


def test_a_device_pickles():
    simulator = pickle.loads(pickle.dumps(device(2)))
    node = qml.QNode(lambda: (qml.X(0), qml.expval(qml.Z(0)))[1], simulator)
    assert float(node()) == pytest.approx(-1.0)


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_circuits_with_equal_angles_on_one_device_keep_their_own_states(weight):
    def rx_ry(x):
        qml.RX(x[0], 0)
        qml.RY(x[1], 0)
        return qml.expval(qml.Z(0))

    def ry_rx(x):
        qml.RY(x[0], 0)
        qml.RX(x[1], 0)
        return qml.expval(qml.Z(0))

    results = []
    for simulator in (qml.device("default.qubit", wires=2), device(2)):
        x = torch.tensor([0.4, 0.9], dtype=torch.float64, requires_grad=True)
        nodes = [qml.QNode(f, simulator, interface="torch") for f in (rx_ry, ry_rx)]
        (nodes[0](x) + weight * nodes[1](x)).backward()
        results.append(x.grad)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=TOLERANCE)


def test_tapes_of_one_call_keep_their_own_states():
    results = []
    for simulator in (qml.device("default.qubit", wires=1), device(1)):
        x = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        measurement = [qml.expval(qml.Z(0))]
        tapes = [
            qml.tape.QuantumScript([qml.RX(x, 0), qml.RY(x, 0)], measurement),
            qml.tape.QuantumScript([qml.RY(x, 0), qml.H(0), qml.RX(x, 0)], measurement),
        ]
        values = qml.execute(tapes, simulator, diff_method="best", interface="torch")
        (values[0] + 3.0 * values[1]).backward()
        results.append(x.grad)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=TOLERANCE)


def prepared_basis(a):
    qml.BasisState([1, 0], wires=[0, 1])
    qml.RX(a, 0)


def embedded_amplitudes(a):
    qml.AmplitudeEmbedding([0.5, 0.5, 0.1, 0.7], wires=[0, 1], normalize=True)
    qml.RX(a, 0)


def product_of_gates(a):
    qml.RX(a, 0)
    qml.prod(qml.X(0), qml.Y(1))


def layers_of_phases(a):
    qml.H(0)
    qml.H(1)
    qml.BasicEntanglerLayers(a * torch.ones(2, 2, dtype=torch.float64), wires=[0, 1], rotation=qml.PhaseShift)
    qml.H(0)


@pytest.mark.parametrize("gates", [prepared_basis, embedded_amplitudes, product_of_gates, layers_of_phases])
def test_ordinary_gates_of_other_people_pass(gates):
    def circuit(a):
        gates(a)
        return qml.expval(qml.Z(0)), qml.expval(qml.X(0) @ qml.Z(1))

    results = []
    for simulator in (qml.device("default.qubit", wires=2), device(2)):
        a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        values = torch.stack(qml.QNode(circuit, simulator, interface="torch")(a))
        values.square().sum().backward()
        results.append((values.detach(), a.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_coefficients_of_an_observable_can_be_trained():
    def circuit(a, c):
        qml.RX(a, 0)
        return qml.expval(c * qml.Z(0) + 0.3 * qml.Y(0))

    results = []
    for simulator in (qml.device("default.qubit", wires=1), device(1)):
        a, c = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 1.3))
        qml.QNode(circuit, simulator, interface="torch")(a, c).backward()
        results.append((a.grad, c.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
