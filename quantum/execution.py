"""How a layer's circuit runs: Aer as an autograd function and as a custom operator, and the other simulators."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from quantum import expectation
from quantum.aer import plan
from quantum.circuit import capture, circuit
from quantum.statevector import z_expectations
from quantum.stock import STOCK, run_stock, stock_qnode

if TYPE_CHECKING:
    from quantum.layer import QuantumLayer
    from quantum.program import Real

SIMULATORS = ("aer", "torch", *STOCK)

_numbers = itertools.count()
_executions: WeakValueDictionary[int, Execution] = WeakValueDictionary()


class Execution:
    """The part of a layer that is neither copied nor stored: its planned circuit, its simulators, a lock."""

    def __init__(self, layer: QuantumLayer) -> None:
        self._layer = layer
        self._lock = threading.Lock()
        self._local = threading.local()
        tape = capture(layer.n_qubits, layer.n_circuit_layers, embedding=layer.embedding, ansatz=layer.ansatz, batch=2)
        planned = plan(tape, list(range(layer.n_qubits)))
        assert planned.observables is not None
        self._program, self._observables = planned.program, planned.observables
        self.handle = next(_numbers)
        _executions[self.handle] = self

    def __call__(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Values `(B, n)` of rows `(B, n)` float64 and weights float64, differentiable in both."""
        if self._layer.simulator == "aer":
            if torch.compiler.is_compiling():
                return torch.ops.heteroq.circuit(rows, weights, self.handle)[0]  # type: ignore[no-any-return]
            keep = torch.is_grad_enabled() and (rows.requires_grad or weights.requires_grad)
            return _Circuit.apply(rows, weights, self, keep)  # type: ignore[no-any-return, no-untyped-call]
        if len(rows) == 0:
            return 0.0 * rows + 0.0 * weights.sum()
        self.take_call(len(rows))
        values = self._torch(rows, weights) if self._layer.simulator == "torch" else self._stock(rows, weights)
        if values.requires_grad:
            wanted = weights.requires_grad, rows.requires_grad
            values.register_hook(lambda _: self.count_backward(len(rows), *wanted))  # type: ignore[no-untyped-call]
        return values

    def _torch(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        import pennylane as qml

        layer = self._layer
        with qml.queuing.AnnotatedQueue() as queue:
            circuit(rows, weights, n_qubits=layer.n_qubits, embedding=layer.embedding, ansatz=layer.ansatz)
        return z_expectations(qml.tape.QuantumScript.from_queue(queue), layer.n_qubits)

    def _stock(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        node = getattr(self._local, "node", None)
        if node is None:
            layer = self._layer
            node = self._local.node = stock_qnode(
                layer.simulator,
                n_qubits=layer.n_qubits,
                embedding=layer.embedding,
                ansatz=layer.ansatz,
            )
        return run_stock(node, rows, weights)

    def take_call(self, rows: int) -> int:
        """Counts a forward pass of `rows` circuits; its number."""
        with self._lock:
            self._layer.executed.add_forward(rows)
            return self._layer.next_call()

    def count_backward(self, rows: int, shared: bool, per_row: bool) -> None:
        """Counts the shifted circuits of a backward pass."""
        angles = self._program.n_angles * shared + self._program.n_columns * per_row
        with self._lock:
            self._layer.executed.add_backward(rows, angles)

    def forward(
        self, rows: torch.Tensor, weights: torch.Tensor, *, keep: bool
    ) -> tuple[torch.Tensor, int, expectation.Kept | None]:
        """Values, the number of the call, and states for the backward pass where there was room for them."""
        call = self.take_call(len(rows))
        angles, columns = _numpy(weights).reshape(-1), _numpy(rows)
        if self._layer.shots is None:
            values, kept = expectation.values(self._program, self._observables, angles, columns, keep=keep)
        else:
            draw = expectation.Draw(self._layer.seed, call, self._layer.shots)
            values, kept = expectation.sampled_values(self._program, self._observables, angles, columns, draw), None
        return torch.from_numpy(values), call, kept

    def backward(
        self,
        rows: torch.Tensor,
        weights: torch.Tensor,
        cotangent: torch.Tensor,
        call: int,
        kept: expectation.Kept | None,
        *,
        shared: bool,
        per_row: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of `rows` and `weights`."""
        self.count_backward(len(rows), shared, per_row)
        arguments = (self._program, self._observables, _numpy(weights).reshape(-1), _numpy(rows), _numpy(cotangent))
        if self._layer.shots is None:
            grad_angles, grad_rows = expectation.vjp(*arguments, kept, shared=shared, per_row=per_row)
        else:
            draw = expectation.Draw(self._layer.seed, call, self._layer.shots)
            grad_angles, grad_rows = expectation.sampled_vjp(*arguments, draw, shared=shared, per_row=per_row)
        return torch.from_numpy(grad_rows), torch.from_numpy(grad_angles).reshape(weights.shape)


def _numpy(tensor: torch.Tensor) -> Real:
    return np.ascontiguousarray(tensor.detach().numpy())


class _Circuit(torch.autograd.Function):
    """The Aer path in eager mode: the states of the forward pass wait in the graph for the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, execution: Execution, keep: bool) -> torch.Tensor:
        values, call, kept = execution.forward(rows, weights, keep=keep)
        ctx.save_for_backward(rows, weights)
        ctx.execution, ctx.call, ctx.kept = execution, call, kept
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        rows, weights = ctx.saved_tensors
        per_row, shared = ctx.needs_input_grad[:2]
        grad_rows, grad_weights = ctx.execution.backward(
            rows, weights, cotangent, ctx.call, ctx.kept, shared=shared, per_row=per_row
        )
        return (grad_rows if per_row else None), (grad_weights if shared else None), None, None


# The Aer path under torch.compile: operators that the compiler does not look into. States are computed again.


@torch.library.custom_op(
    "heteroq::circuit", mutates_args=(), schema="(Tensor rows, Tensor weights, int handle) -> (Tensor, Tensor)"
)
def _operator(rows: torch.Tensor, weights: torch.Tensor, handle: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, call, _ = _executions[handle].forward(rows, weights, keep=False)
    return values, torch.tensor(call)


@_operator.register_fake
def _(rows: torch.Tensor, weights: torch.Tensor, handle: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(rows), torch.empty((), dtype=torch.int64)


@torch.library.custom_op(
    "heteroq::circuit_backward",
    mutates_args=(),
    schema="(Tensor rows, Tensor weights, Tensor cotangent, Tensor call, int handle, bool shared, bool per_row)"
    " -> (Tensor, Tensor)",
)
def _operator_backward(
    rows: torch.Tensor,
    weights: torch.Tensor,
    cotangent: torch.Tensor,
    call: torch.Tensor,
    handle: int,
    shared: bool,
    per_row: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    execution = _executions[handle]
    return execution.backward(rows, weights, cotangent, int(call), None, shared=shared, per_row=per_row)


@_operator_backward.register_fake
def _(
    rows: torch.Tensor,
    weights: torch.Tensor,
    cotangent: torch.Tensor,
    call: torch.Tensor,
    handle: int,
    shared: bool,
    per_row: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(rows), torch.empty_like(weights)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    rows, weights, ctx.handle = inputs
    ctx.save_for_backward(rows, weights, output[1])


def _differentiate(
    ctx: Any, cotangent: torch.Tensor, _: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    rows, weights, call = ctx.saved_tensors
    per_row, shared = ctx.needs_input_grad[:2]
    grad_rows, grad_weights = torch.ops.heteroq.circuit_backward(
        rows, weights, cotangent, call, ctx.handle, shared, per_row
    )
    return (grad_rows if per_row else None), (grad_weights if shared else None), None


_operator.register_autograd(_differentiate, setup_context=_setup_context)
