"""The simulators that PennyLane and its plugins bring, under their own names, so that anyone can check the Aer path.

Without shots only: their samples can't be made to follow from (seed, number of the call, row).
"""

from __future__ import annotations

from typing import Any

import pennylane as qml
import torch

from quantum.circuit import circuit

STOCK = {"qiskit.aer": "parameter-shift", "lightning.qubit": "adjoint", "default.qubit": "backprop"}


def stock_qnode(simulator: str, *, n_qubits: int, embedding: str, ansatz: str) -> Any:
    """A QNode `(inputs (B, n), weights) -> n tensors (B,)` on a stock device, differentiated the best way it has.

    PennyLane's parameter-shift refuses batches whose inputs need gradients; there the batch is expanded row by row.
    """
    # any other method of qiskit.aer turns "no shots" into 1024 of them
    options = {"method": "statevector"} if simulator == "qiskit.aer" else {}
    device = qml.device(simulator, wires=n_qubits, **options)

    def function(inputs: Any, weights: Any) -> Any:
        return circuit(inputs, weights, n_qubits=n_qubits, embedding=embedding, ansatz=ansatz)

    node = qml.QNode(function, device, interface="torch", diff_method=STOCK[simulator])
    return qml.transforms.broadcast_expand(node) if STOCK[simulator] == "parameter-shift" else node


def run_stock(node: Any, inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Values `(B, n)` float64 of a QNode of `stock_qnode`."""
    result = node(inputs, weights)
    return torch.stack([value.to(torch.float64).reshape(len(inputs)) for value in result], dim=-1)
