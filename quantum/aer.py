"""`heteroq.aer`: a PennyLane device over Aer that runs a whole batch as one state and plans each tape once.

    adjoint    expectation values of Pauli sentences without shots: exact, with vector-Jacobian products
    sampled    shots: Aer's probabilities, samples by PennyLane's own measurement code
    state      any other measurement without shots, read off Aer's state by PennyLane's measurement code

`AerDevice.path(tape)` names the path. Every gate is applied by Aer; what Aer has no gate for is decomposed by
PennyLane, and what can't be is an error. Templates are taken whole, plans are cached by the tape's structure.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pennylane as qml
from pennylane.devices import Device, ExecutionConfig
from pennylane.devices.preprocess import (
    decompose,
    device_resolve_dynamic_wires,
    validate_device_wires,
    validate_measurements,
)
from pennylane.devices.qubit import measure as measure_states
from pennylane.devices.qubit.sampling import measure_with_samples
from pennylane.tape import QuantumScript
from pennylane.transforms.core import CompilePipeline

from quantum import expectation
from quantum.circuit import TEMPLATES
from quantum.errors import QuantumError
from quantum.memory import check_memory
from quantum.observables import Observables
from quantum.program import GATES, Complex, Program, Real, compile_tape

_PLANS = 256  # structures that are kept


@dataclass(frozen=True)
class Plan:
    """What a tape's structure becomes.

    Attributes:
        program: its gates.
        layout: for each gate parameter (first entry, one angle a row?, shape without the batch).
        observables: of its expectation values; None where a measurement is of another kind.
    """

    program: Program
    layout: list[tuple[int, bool, tuple[int, ...]]]
    observables: Observables | None

    def arguments(self, tape: Any) -> tuple[Real, Real]:
        """The tape's angles as `(K,)` and `(B, C)`."""
        rows = tape.batch_size or 1
        shared, columns = np.zeros(self.program.n_angles), np.zeros((rows, self.program.n_columns))
        for value, (start, per_row, shape) in zip(_gate_parameters(tape), self.layout, strict=True):
            size = int(np.prod(shape, dtype=int))
            if start >= 0 and per_row:
                columns[:, start : start + size] = np.asarray(qml.math.unwrap([value])[0]).reshape(rows, size)
            elif start >= 0:
                shared[start : start + size] = np.asarray(qml.math.unwrap([value])[0]).reshape(size)
        return shared, columns


_plans: OrderedDict[Any, Plan] = OrderedDict()


def plan(tape: Any, wires: list[Any]) -> Plan:
    """The plan of a tape over a wire order, from the cache where a tape of the same structure was seen before."""
    key = _structure(tape, wires)
    found = _plans.get(key)
    if found is None:
        program, layout = compile_tape(tape, wires)
        found = Plan(program, layout, _observables(tape, wires))
        _plans[key] = found
        while len(_plans) > _PLANS:
            _plans.popitem(last=False)
    return found


def _structure(tape: Any, wires: list[Any]) -> Any:
    gates = tuple(
        (
            op.name,
            tuple(op.wires),
            tuple(np.shape(value) for value in op.data),
            op.batch_size is not None,
            str(op.hyperparameters) if op.hyperparameters else "",
            np.asarray(op.data[0]).tobytes() if op.name == "QubitUnitary" else b"",
        )
        for op in tape.operations
    )
    measured = tuple((type(m).__name__, m.obs.pauli_rep if m.obs is not None else None) for m in tape.measurements)
    return gates, tuple((kind, str(rep), rep is None) for kind, rep in measured), tuple(wires)


def _observables(tape: Any, wires: list[Any]) -> Observables | None:
    order = {wire: i for i, wire in enumerate(wires)}
    sentences = []
    for measurement in tape.measurements:
        sentence = measurement.obs.pauli_rep if _is_expectation(measurement) else None
        if sentence is None:
            return None
        words: dict[Any, float] = {}
        for word, coefficient in sentence.items():
            key = tuple((order[wire], letter) for wire, letter in word.items())
            words[key] = words.get(key, 0.0) + float(np.real(qml.math.unwrap([coefficient])[0]))
        sentences.append(words)
    return Observables(sentences, len(wires))


def _is_expectation(measurement: Any) -> bool:
    return isinstance(measurement, qml.measurements.ExpectationMP) and measurement.obs is not None


def _gate_parameters(tape: Any) -> list[Any]:
    return [value for op in tape.operations for value in op.data]


def _is_angle(tape: Any, index: int) -> bool:
    """Whether a parameter belongs to a gate that has angles, and not to a matrix or an observable."""
    info = tape.par_info[index]
    return bool(info["op_idx"] < len(tape.operations) and info["op"].name != "QubitUnitary")


class _Gradients(tuple[Any, ...]):
    """Gradients of one tape. PennyLane's torch bridge calls `np.squeeze` on the tuple, whose shapes are mixed."""

    __slots__ = ()

    def squeeze(self, axis: Any = None) -> Any:
        return np.empty(len(self))


def _accepts(op: Any) -> bool:
    if op.name in GATES:
        return op.name != "QubitUnitary" or (op.batch_size is None and len(op.wires) <= 5)
    if op.name in TEMPLATES:
        return op.hyperparameters.get("rotation", qml.RX) in _ROTATIONS
    return bool(not op.data and op.has_matrix and len(op.wires) <= 4 and not _is_measurement(op))


_ROTATIONS = (qml.RX, qml.RY, qml.RZ)


def _is_measurement(op: Any) -> bool:
    return isinstance(op, qml.ops.MidMeasure | qml.ops.Conditional)


class AerDevice(Device):  # type: ignore[misc]  # PennyLane ships no types
    """PennyLane device `heteroq.aer`.

    Args:
        wires: number of wires, or their labels.
        shots: samples of each execution; None: exact.
        seed: of the samples, an int; every execution draws from a stream of its own.
        noise: not accepted: this device's states are pure.

    Raises:
        QuantumError: `shots` is not positive, a noise model is given, or the wires do not fit into memory.
    """

    name = "heteroq.aer"

    def __init__(
        self, wires: Any = None, shots: int | None = None, *, seed: int | None = None, noise: Any = None
    ) -> None:
        if noise is not None:
            raise QuantumError(
                "a statevector has no noise: a single random trajectory would be taken for the expectation value",
                found=f"noise={type(noise).__name__}, shots={shots}",
                remedy="leave noise out, or use qml.device('qiskit.aer', method='density_matrix', ...)",
            )
        if isinstance(shots, int) and shots <= 0:
            raise QuantumError(
                "shots must be positive", found=f"shots={shots}", expected="an int >= 1, or None for exact"
            )
        super().__init__(wires=wires, shots=shots)
        if self.wires is not None:
            check_memory(len(self.wires))
        self._rng = np.random.default_rng(seed)
        self._waiting = threading.local()

    def path(self, tape: Any) -> str:
        """The way a (preprocessed) tape is run: `adjoint`, `sampled` or `state`."""
        if tape.shots:
            return "sampled"
        return "adjoint" if plan(tape, self._order(tape)).observables is not None else "state"

    def preprocess_transforms(self, execution_config: Any = None) -> Any:
        """Mid-circuit measurements deferred, gates decomposed to what Aer has, wires and measurements checked."""
        pipeline = CompilePipeline()
        pipeline.add_transform(qml.defer_measurements, allow_postselect=False)
        pipeline.add_transform(
            decompose,
            stopping_condition=_accepts,
            skip_initial_state_prep=False,
            name=self.name,
            device_wires=self.wires,
        )
        pipeline.add_transform(device_resolve_dynamic_wires, wires=self.wires, allow_resets=False)
        pipeline.add_transform(validate_device_wires, self.wires, name=self.name)
        pipeline.add_transform(validate_measurements, name=self.name)
        return pipeline

    def setup_execution_config(self, config: Any = None, circuit: Any = None) -> Any:
        """Takes the adjoint sweep where a device derivative is asked for, or the best one where it is possible."""
        config = config or ExecutionConfig()
        mcm = replace(config.mcm_config, mcm_method=config.mcm_config.mcm_method or "deferred")
        if mcm.mcm_method != "deferred":
            raise QuantumError(
                "mid-circuit measurements are deferred on this device", found=f"mcm_method='{mcm.mcm_method}'"
            )
        config = replace(config, mcm_config=mcm)
        method = config.gradient_method
        if method in ("adjoint", "device") or (method == "best" and self.supports_derivatives(config, circuit)):
            return replace(
                config,
                gradient_method="adjoint",
                use_device_gradient=True,
                use_device_jacobian_product=True,
                grad_on_execution=False,
            )
        return config

    def supports_derivatives(self, execution_config: Any = None, circuit: Any = None) -> bool:
        """Whether the adjoint sweep does it: no shots, angles of gates, expectation values of Pauli sentences."""
        if execution_config is not None and execution_config.gradient_method not in ("adjoint", "device", "best"):
            return False
        return circuit is None or (
            not circuit.shots
            and all(_is_expectation(m) and m.obs.pauli_rep is not None for m in circuit.measurements)
            and all(_is_angle(circuit, index) for index in circuit.trainable_params)
        )

    def supports_vjp(self, execution_config: Any = None, circuit: Any = None) -> bool:
        """As `supports_derivatives`."""
        return self.supports_derivatives(execution_config, circuit)

    def execute(self, circuits: Any, execution_config: Any = None) -> Any:
        """Results of one tape or of a batch of tapes."""
        keep = execution_config is not None and bool(execution_config.use_device_gradient)
        self._waiting.forwards = []
        if isinstance(circuits, QuantumScript):
            return self._execute(circuits, keep=keep)
        return tuple(self._execute(tape, keep=keep) for tape in circuits)

    def _execute(self, tape: Any, *, keep: bool) -> Any:
        wires = self._order(tape)
        check_memory(len(wires))
        path = self.path(tape)
        planned = plan(tape, wires)
        shared, rows = planned.arguments(tape)
        if path == "adjoint":
            assert planned.observables is not None
            values, kept = expectation.values(planned.program, planned.observables, shared, rows, keep=keep)
            if kept is not None:
                self._waiting.forwards.append((planned.program, shared, rows, kept))
            results: list[Any] = [values[:, j] if tape.batch_size else values[0, j] for j in range(values.shape[1])]
        else:
            amplitudes = expectation.final_states(planned.program, shared, rows)
            shape = (2,) * len(wires)
            state = amplitudes.reshape((len(rows), *shape) if tape.batch_size else shape)
            mapped = qml.map_wires(tape, {wire: i for i, wire in enumerate(wires)})[0][0]
            results = self._measure(mapped, state, is_batched=bool(tape.batch_size), sampled=path == "sampled")
            if path == "sampled":
                return results[0] if len(results) == 1 and not tape.shots.has_partitioned_shots else tuple(results)
        return results[0] if len(results) == 1 else tuple(results)

    def _measure(self, tape: Any, state: Complex, *, is_batched: bool, sampled: bool) -> Any:
        if not sampled:
            return [measure_states(m, state, is_state_batched=is_batched) for m in tape.measurements]
        results = measure_with_samples(
            tape.measurements, state, shots=tape.shots, is_state_batched=is_batched, rng=self._rng
        )
        if tape.shots.has_partitioned_shots:
            return [r[0] if len(tape.measurements) == 1 else tuple(r) for r in results]
        return results

    def compute_vjp(self, circuits: Any, cotangents: Any, execution_config: Any = None) -> Any:
        """Vector-Jacobian products of one tape or of a batch of tapes, one array a trainable parameter."""
        if isinstance(circuits, QuantumScript):
            return self._vjp(circuits, cotangents)
        return tuple(self._vjp(tape, c) for tape, c in zip(circuits, cotangents, strict=True))

    def _vjp(self, tape: Any, cotangent: Any) -> Any:
        planned = plan(tape, self._order(tape))
        shared, rows = planned.arguments(tape)
        parts = cotangent if isinstance(cotangent, tuple | list) else [cotangent]
        g = np.stack([np.broadcast_to(np.asarray(c, dtype=np.float64), (len(rows),)) for c in parts], axis=-1)
        return self._gradients(tape, planned, shared, rows, g)

    def _gradients(self, tape: Any, planned: Plan, shared: Real, rows: Real, g: Real) -> Any:
        if planned.observables is None:
            raise QuantumError("no adjoint gradient for this tape", expected="expectation values of Pauli sentences")
        trainable = [planned.layout[i] for i in tape.trainable_params if i < len(planned.layout)]
        if len(trainable) < len(tape.trainable_params) or any(start < 0 for start, _, _ in trainable):
            raise QuantumError(
                "the adjoint sweep differentiates rotation angles only", remedy="diff_method='parameter-shift'"
            )
        grad_shared, grad_rows = expectation.vjp(
            planned.program,
            planned.observables,
            shared,
            rows,
            g,
            self._take_forward(planned.program, shared, rows),
            shared=any(not per_row for _, per_row, _ in trainable),
            per_row=any(per_row for _, per_row, _ in trainable),
        )
        result = []
        for start, per_row, shape in trainable:
            columns = slice(start, start + int(np.prod(shape, dtype=int)))
            part = grad_rows[:, columns].reshape(-1, *shape) if per_row else grad_shared[columns].reshape(shape)
            result.append(part)
        return _Gradients(result)

    def compute_derivatives(self, circuits: Any, execution_config: Any = None) -> Any:
        """Jacobians of one tape or of a batch of tapes without a batch dimension, one sweep an observable."""
        if isinstance(circuits, QuantumScript):
            return self._jacobian(circuits)
        return tuple(self._jacobian(tape) for tape in circuits)

    def _jacobian(self, tape: Any) -> Any:
        if tape.batch_size is not None:
            raise QuantumError("a Jacobian of a broadcast tape is not defined", remedy="use device_vjp=True")
        planned = plan(tape, self._order(tape))
        shared, rows = planned.arguments(tape)
        m = len(tape.measurements)
        lines = [tuple(self._gradients(tape, planned, shared, rows, np.eye(m)[j : j + 1])) for j in range(m)]
        lines = [line if len(line) != 1 else line[0] for line in lines]
        return lines[0] if m == 1 else tuple(lines)

    def execute_and_compute_derivatives(self, circuits: Any, execution_config: Any = None) -> Any:
        """`execute` and `compute_derivatives`."""
        return self.execute(circuits, execution_config), self.compute_derivatives(circuits, execution_config)

    def execute_and_compute_vjp(self, circuits: Any, cotangents: Any, execution_config: Any = None) -> Any:
        """`execute` and `compute_vjp`."""
        return self.execute(circuits, execution_config), self.compute_vjp(circuits, cotangents, execution_config)

    def _order(self, tape: Any) -> list[Any]:
        return list(self.wires if self.wires is not None else tape.wires)

    def _take_forward(self, program: Program, shared: Real, rows: Real) -> expectation.Kept | None:
        """The states that this thread's last `execute` kept for this circuit at exactly these angles."""
        for circuit, angles, columns, kept in getattr(self._waiting, "forwards", []):
            if circuit is program and np.array_equal(angles, shared) and np.array_equal(columns, rows):
                return cast("expectation.Kept", kept)
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_waiting"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._waiting = threading.local()
