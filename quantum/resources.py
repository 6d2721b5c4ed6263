"""What a quantum processor would have to do for a run: circuits, gates, depth, shots, seconds and dollars.

Simulated runs differentiate by sweeps that no hardware has. Here every training row counts as hardware would run it:
one circuit for its value, and two for each of the P angles that need a gradient (parameter-shift rule).
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from quantum.circuit import capture
from quantum.errors import QuantumError

if TYPE_CHECKING:
    from quantum.layer import QuantumLayer

GATE_SET = ("RX", "RY", "RZ", "CNOT")
ASSUMED_SHOTS = 1024  # of a circuit whose exact expectation value was simulated; hardware has no exact ones


@dataclass
class Executed:
    """Running totals of a layer. Not locked: the layer's execution does that.

    Attributes:
        shots: of each circuit; None: simulated exactly.
        rows_forward: rows that went through.
        rows_backward: rows whose gradients were computed.
        circuits: what hardware would have run.
    """

    shots: int | None
    rows_forward: int = 0
    rows_backward: int = 0
    circuits: int = 0

    def add_forward(self, rows: int) -> None:
        """A forward pass of `rows` rows."""
        self.rows_forward += rows
        self.circuits += rows

    def add_backward(self, rows: int, angles: int) -> None:
        """A backward pass of `rows` rows with respect to `angles` angles of each."""
        self.rows_backward += rows
        self.circuits += 2 * angles * rows


def circuit_counts(layer: QuantumLayer) -> dict[str, int]:
    """gates_1q, gates_2q and depth of one circuit of the layer, decomposed to `GATE_SET`, all-to-all connected."""
    return dict(_counts(layer.n_qubits, layer.n_circuit_layers, layer.embedding, layer.ansatz))


@cache
def _counts(n_qubits: int, n_circuit_layers: int, embedding: str, ansatz: str) -> tuple[tuple[str, int], ...]:
    import pennylane as qml

    tape = capture(n_qubits, n_circuit_layers, embedding=embedding, ansatz=ansatz)
    (decomposed,), _ = qml.transforms.decompose(tape, gate_set=set(GATE_SET))
    ends = [0] * n_qubits
    sizes = [0, 0]
    for op in decomposed.operations:
        sizes[len(op.wires) - 1] += 1
        end = 1 + max(ends[wire] for wire in op.wires)
        for wire in op.wires:
            ends[wire] = end
    return (("gates_1q", sizes[0]), ("gates_2q", sizes[1]), ("depth", max(ends)))


def count(layer: QuantumLayer, rows: int, backward: bool) -> dict[str, int]:
    """What hardware would run for `rows` rows, with gradients or without.

    Returns:
        circuits; gates_1q and gates_2q of all circuits together; depth of one; shots of all circuits together. Weights
        that are frozen have no shifted circuits; inputs are taken to need gradients.
    """
    angles = layer.n_qubits + (layer.weights.numel() if layer.weights.requires_grad else 0)
    return _scale(layer, rows * (1 + 2 * angles * backward))


def totals(layer: QuantumLayer) -> dict[str, int]:
    """`count` of everything that the layer has executed so far."""
    return _scale(layer, layer.executed.circuits)


def _scale(layer: QuantumLayer, circuits: int) -> dict[str, int]:
    one = circuit_counts(layer)
    return {
        "circuits": circuits,
        "gates_1q": one["gates_1q"] * circuits,
        "gates_2q": one["gates_2q"] * circuits,
        "depth": one["depth"],
        "shots": (layer.shots or ASSUMED_SHOTS) * circuits,
    }


def qpu_cost(counts: dict[str, int], provider: str = "braket_iqm_garnet") -> dict[str, Any]:
    """Time and price of `counts` on a quantum processor: estimates from dated figures, not offers.

    Args:
        counts: of `count` or `totals`.
        provider: a key of `prices.yaml`: whose prices to take.

    Returns:
        seconds: for every shot its gates, one after the other along the depth, the readout and the repetition delay;
            neither queue nor compilation. Times are those of one processor (`timing`), whoever the provider is.
        usd, provider, date, source of the price, timing, estimate True.

    Raises:
        QuantumError: no prices of such a provider.
    """
    table = _prices()
    if provider not in table["providers"]:
        raise QuantumError(f"no prices of '{provider}'", expected=", ".join(table["providers"]))
    price, timing = table["providers"][provider], table["timing"]
    shot_s = counts["depth"] * timing["gate_s"] + timing["readout_s"] + timing["repetition_s"]
    return {
        "seconds": counts["shots"] * shot_s,
        "usd": counts["circuits"] * price["usd_per_task"] + counts["shots"] * price["usd_per_shot"],
        "provider": provider,
        "date": str(table["date"]),
        "source": price["source"],
        "timing": f"{timing['processor']}: {timing['source']}",
        "estimate": True,
    }


@cache
def _prices() -> dict[str, Any]:
    import yaml

    text = importlib.resources.files("quantum").joinpath("prices.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table
