"""Random circuits through the tape compiler: equal to PennyLane's matrices, and all gradient paths alike."""

import numpy as np
import pennylane as qml
from hypothesis import given, settings
from hypothesis import strategies as st

from quantum import expectation, gradient
from quantum.aer import plan

N = 4
ROTATIONS = (qml.RX, qml.RY, qml.RZ)
FIXED = (qml.Hadamard, qml.X, qml.Y, qml.Z, qml.S, qml.T, qml.SX)
PAIRS = (qml.CNOT, qml.CZ, qml.CY, qml.SWAP, qml.ISWAP, qml.CH)
ROWS = 3

gates = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(ROTATIONS), st.integers(0, N - 1), st.booleans()),
        st.tuples(st.sampled_from(FIXED), st.integers(0, N - 1)),
        st.tuples(st.sampled_from(PAIRS), st.permutations(range(N))),
        st.tuples(st.just(qml.Toffoli), st.permutations(range(N))),
    ),
    max_size=24,
)


def build(description, seed):
    """A tape whose rotations have shared angles or one a row, and the same circuit for each single row."""
    rng = np.random.default_rng(seed)
    operations, single = [], [[] for _ in range(ROWS)]
    for kind, where, *per_row in description:
        if per_row:
            angle = rng.uniform(-4, 4, size=ROWS) if per_row[0] else rng.uniform(-4, 4)
            operations.append(kind(angle, where))
            for k in range(ROWS):
                single[k].append(kind(angle[k] if per_row[0] else angle, where))
            continue
        wires = where if isinstance(where, int) else where[: kind.num_wires]
        operations.append(kind(wires))
        for k in range(ROWS):
            single[k].append(kind(wires))
    measurements = [qml.expval(qml.Z(i)) for i in range(N)] + [qml.expval(qml.X(0) @ qml.Y(2) + 0.5 * qml.Z(1))]
    return qml.tape.QuantumScript(operations, measurements), single


@settings(deadline=None, max_examples=25)
@given(gates, st.integers(0, 1000))
def test_states_equal_those_of_pennylanes_matrices(description, seed):
    tape, single = build(description, seed)
    planned = plan(tape, list(range(N)))
    states = expectation.final_states(planned.program, *planned.arguments(tape))
    assert np.allclose(np.linalg.norm(states, axis=1), 1.0, atol=1e-12)
    for k, state in enumerate(np.broadcast_to(states, (ROWS, 2**N))):
        expected = np.eye(2**N)[0].astype(complex)
        for op in single[k]:
            expected = qml.matrix(op, wire_order=range(N)) @ expected
        np.testing.assert_allclose(state, expected, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(gates, st.integers(0, 1000))
def test_adjoint_swept_back_and_branching_gradients_are_the_same(description, seed):
    tape, _ = build(description, seed)
    planned = plan(tape, list(range(N)))
    program, (angles, rows) = planned.program, planned.arguments(tape)
    cotangent = np.random.default_rng(seed).normal(size=(len(rows), N + 1))
    found = []
    for record in (True, False):
        states = gradient.forward(program, angles, rows, record=record)
        costate = planned.observables.costate(states.final, cotangent)
        found.append(gradient.backward(program, angles, rows, states, costate, shared=True, per_row=True))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-11)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-11)
    probabilities, order = gradient.branches(program, angles, rows, shared=True, per_row=True)
    z = np.stack([np.diag(qml.matrix(qml.Z(i), wire_order=range(N))).real for i in range(N)])
    diagonal = cotangent[:, :N] @ z
    costate = diagonal * states.final
    expected = gradient.backward(program, angles, rows, states, costate, shared=True, per_row=True)
    for (is_row, index), p in zip(order, probabilities, strict=True):
        slope = 0.5 * ((p[0] - p[1]) * diagonal).sum(axis=-1)
        if is_row:
            np.testing.assert_allclose(slope, expected[1][:, index], atol=1e-11)
        else:
            np.testing.assert_allclose(slope.sum(), expected[0][index], atol=1e-11)
