"""The circuits: PennyLane functions, written once, captured as tapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pennylane as qml

from quantum.errors import QuantumError

if TYPE_CHECKING:
    from collections.abc import Callable

# Templates whose decomposition only hands entries of their parameters to gates; the device takes them whole.
TEMPLATES = frozenset(["AngleEmbedding", "StronglyEntanglingLayers", "BasicEntanglerLayers", "SimplifiedTwoDesign"])


def angle(inputs: Any, wires: range) -> None:
    """One rotation RY(x_i) on each wire i."""
    qml.AngleEmbedding(inputs, wires=wires, rotation="Y")


def strongly_entangling(weights: Any, wires: range) -> None:
    """Layers of a general rotation on each wire and a ring of CNOTs whose range grows layer by layer.

    Source: Schuld, Bocharov, Svore, Wiebe, "Circuit-centric quantum classifiers", Phys. Rev. A 101 (2020) 032308.
    """
    qml.StronglyEntanglingLayers(weights, wires=wires)


EMBEDDINGS: dict[str, Callable[[Any, range], None]] = {"angle": angle}
ANSAETZE: dict[str, Callable[[Any, range], None]] = {"strongly_entangling": strongly_entangling}


def weight_shape(ansatz: str, n_qubits: int, n_circuit_layers: int) -> tuple[int, ...]:
    """Shape of an ansatz's parameter: `(layers, qubits, 3)`."""
    lookup("ansatz", ansatz, ANSAETZE)
    return (n_circuit_layers, n_qubits, 3)


def lookup(kind: str, name: str, table: dict[str, Any]) -> Any:
    """An entry of one of the closed tables.

    Raises:
        QuantumError: the table has no such name.
    """
    if name not in table:
        raise QuantumError(f"unknown {kind} '{name}'", expected=", ".join(table))
    return table[name]


def circuit(inputs: Any, weights: Any, *, n_qubits: int, embedding: str, ansatz: str) -> list[Any]:
    """The quantum function of a layer: embedding, ansatz, <Z_i> of every wire.

    Args:
        inputs: angles `(n,)` or `(B, n)` [rad].
        weights: the ansatz's parameter [rad].
        n_qubits: n.
        embedding: a key of `EMBEDDINGS`.
        ansatz: a key of `ANSAETZE`.
    """
    wires = range(n_qubits)
    lookup("embedding", embedding, EMBEDDINGS)(inputs, wires)
    lookup("ansatz", ansatz, ANSAETZE)(weights, wires)
    return [qml.expval(qml.PauliZ(wire)) for wire in wires]


def capture(n_qubits: int, n_circuit_layers: int, *, embedding: str, ansatz: str, batch: int | None = None) -> Any:
    """The tape of `circuit` with zeros for angles; `batch` rows of inputs, or one without a batch dimension."""
    inputs = np.zeros((n_qubits,) if batch is None else (batch, n_qubits))
    weights = np.zeros(weight_shape(ansatz, n_qubits, n_circuit_layers))
    with qml.queuing.AnnotatedQueue() as queue:
        circuit(inputs, weights, n_qubits=n_qubits, embedding=embedding, ansatz=ansatz)
    return qml.tape.QuantumScript.from_queue(queue)
