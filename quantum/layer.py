"""The quantum layer: `(..., n)` angles to `(..., n)` expectation values, as one differentiable step."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import nn

from quantum import circuit, resources
from quantum.errors import QuantumError
from quantum.execution import SIMULATORS, Execution
from quantum.memory import check_memory


class QuantumLayer(nn.Module):
    """Angle embedding, a trainable ansatz and <Z_i> on every wire of a simulated circuit.

    Inputs `(..., n_qubits)` in radians, of any leading shape, also an empty one or with zero rows; outputs of the same
    shape, dtype and device, within [-1, 1]. Everything inside is float64 on the host.

    With simulator "aer" Aer applies the gates (`quantum.operation_counts()`), the whole batch as one state. The
    embedding turns |0>; its product state is what Aer starts from. Gradients are exact (adjoint sweep); with `shots`
    they are unbiased parameter-shift estimates, each circuit with samples of its own, drawn by numpy from Aer's
    probabilities. Samples depend on (seed, number of the call, row) only; give two layers two seeds.

    Args:
        n_qubits: width n.
        n_circuit_layers: layers of the ansatz.
        simulator: "aer", "torch" (statevector), or a stock PennyLane device: "qiskit.aer", "lightning.qubit",
            "default.qubit".
        shots: samples of each circuit, with simulator "aer" only; None: exact expectation values.
        embedding: key of `quantum.circuit.EMBEDDINGS`.
        ansatz: key of `quantum.circuit.ANSAETZE`.
        seed: of the samples.
        generator: of the initial weights, uniform in [0, 2 pi).

    Attributes:
        weights: `(n_circuit_layers, n_qubits, 3)` float64 parameter [rad].
        executed: running totals of the circuits that a quantum processor would have had to run.
        device_apis: where a planner may place the layer.

    Raises:
        QuantumError: unknown names, `shots` below 1 or elsewhere than on "aer", sizes below 1, more qubits than memory.
    """

    calls: torch.Tensor

    def __init__(
        self,
        n_qubits: int,
        n_circuit_layers: int,
        *,
        simulator: str = "aer",
        shots: int | None = None,
        embedding: str = "angle",
        ansatz: str = "strongly_entangling",
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check(n_qubits, n_circuit_layers, simulator, shots)
        circuit.lookup("embedding", embedding, circuit.EMBEDDINGS)
        shape = circuit.weight_shape(ansatz, n_qubits, n_circuit_layers)
        check_circuit(n_qubits, n_circuit_layers, ansatz=ansatz, shots=shots)
        self.n_qubits, self.n_circuit_layers, self.simulator, self.shots = n_qubits, n_circuit_layers, simulator, shots
        self.embedding, self.ansatz, self.seed = embedding, ansatz, seed
        self.weights = nn.Parameter(2 * math.pi * torch.rand(shape, dtype=torch.float64, generator=generator))
        # The number of the next call chooses its samples, so it belongs to the state that a resumed run needs.
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=shots is not None)
        self.device_apis = frozenset({"aer" if simulator in ("aer", "qiskit.aer") else "cpu"})
        self.executed = resources.Executed(shots=shots)
        self._execution = Execution(self)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Expectation values `(..., n)` of inputs `(..., n)` [rad].

        Raises:
            QuantumError: the last dimension isn't `n_qubits`, or the inputs are not floating-point.
        """
        if inputs.dim() == 0 or inputs.shape[-1] != self.n_qubits or not inputs.is_floating_point():
            raise QuantumError(
                "inputs do not fit the circuit",
                found=f"shape {tuple(inputs.shape)}, {inputs.dtype}",
                expected=f"(..., {self.n_qubits}) of a floating-point dtype",
            )
        rows = inputs.reshape(-1, self.n_qubits).to(device="cpu", dtype=torch.float64)
        weights = self.weights.to(device="cpu", dtype=torch.float64)
        values = self._execution(rows, weights)
        return values.to(device=inputs.device, dtype=inputs.dtype).reshape(inputs.shape)

    def next_call(self) -> int:
        """The number of this call, counted from zero; each call takes one. Zero where nothing is sampled."""
        if self.shots is None:
            return 0
        number = int(self.calls)
        self.calls += 1
        return number

    def layer_cost(self, api: str, shape: tuple[int, ...]) -> dict[str, float]:
        """What a forward and a backward pass of an input of `shape` cost on a runtime, measured here.

        Returns:
            flops, bytes (of a forward pass), seconds_forward, seconds_backward (medians), error (relative half width
            of their spread), usd (of the same circuits on a quantum processor: an estimate).

        Raises:
            QuantumError: the layer can't run on `api`.
        """
        if api not in self.device_apis:
            raise QuantumError(f"a quantum layer does not run on '{api}'", expected=", ".join(sorted(self.device_apis)))
        rows = math.prod(shape[:-1])
        gates = resources.circuit_counts(self)
        amplitudes = rows * 2**self.n_qubits
        n_gates = gates["gates_1q"] + gates["gates_2q"]
        forward, backward, error = self._time(shape)
        usd = resources.qpu_cost(resources.count(self, rows, backward=True))
        return {
            "flops": 14.0 * amplitudes * gates["gates_1q"],  # a row of a 2x2 product: 2 complex mults and an add
            "bytes": 32.0 * amplitudes * n_gates,  # read and write complex128
            "seconds_forward": forward,
            "seconds_backward": backward,
            "error": error,
            "usd": usd["usd"],
        }

    def _time(self, shape: tuple[int, ...], repetitions: int = 7) -> tuple[float, float, float]:
        probe = QuantumLayer(
            self.n_qubits,
            self.n_circuit_layers,
            simulator=self.simulator,
            shots=self.shots,
            generator=torch.Generator(),
        )
        inputs = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        times: list[tuple[float, float]] = []
        for _ in range(repetitions + 1):
            start = time.perf_counter()
            values = probe(inputs)
            middle = time.perf_counter()
            values.sum().backward()
            times.append((middle - start, time.perf_counter() - middle))
        forward, backward = (sorted(t[k] for t in times[1:]) for k in (0, 1))
        spread = max((q[-2] - q[1]) / (2 * statistics.median(q)) for q in (forward, backward))
        return statistics.median(forward), statistics.median(backward), spread

    def extra_repr(self) -> str:
        """What `print` shows."""
        shots = "exact" if self.shots is None else f"{self.shots} shots"
        return (
            f"n_qubits={self.n_qubits}, n_circuit_layers={self.n_circuit_layers}, {self.embedding}, {self.ansatz}, "
            f"simulator={self.simulator!r}, {shots}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_execution"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._execution = Execution(self)


def check_circuit(n_qubits: int, n_circuit_layers: int, *, ansatz: str, shots: int | None) -> None:
    """Refuse a circuit before a layer is built of it, if its states and gradients don't fit into memory.

    Raises:
        MemoryExceededError: needed and free bytes.
    """
    n_angles = n_qubits + math.prod(circuit.weight_shape(ansatz, n_qubits, n_circuit_layers))
    check_memory(n_qubits, n_shifted=0 if shots is None else n_angles)


def _check(n_qubits: int, n_circuit_layers: int, simulator: str, shots: int | None) -> None:
    circuit.lookup("simulator", simulator, dict.fromkeys(SIMULATORS))
    if n_qubits < 1 or n_circuit_layers < 1:
        raise QuantumError(
            "a circuit needs qubits and layers",
            found=f"n_qubits={n_qubits}, n_circuit_layers={n_circuit_layers}",
            expected="integers of at least 1",
        )
    if shots is not None and shots < 1:
        raise QuantumError(
            "shots must be positive",
            found=f"shots={shots}",
            expected="an integer of at least 1, or None for exact values",
        )
    if shots is not None and simulator != "aer":
        raise QuantumError(
            f"simulator '{simulator}' has no samples that follow from a seed",
            found=f"shots={shots}",
            remedy="use simulator='aer', or shots=None",
        )
