"""Statevector simulation in plain torch: the oracle that the Aer path is checked against, and a simulator by itself.

It takes the gates of a PennyLane tape one by one, as PennyLane decomposes it; autograd does the rest. It shares no code
with the planner of tapes or the sweeps. Amplitudes are `(B, 2**n)` complex128, wire 0 being the most significant bit.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

_ROTATIONS = {"RX": ("RX",), "RY": ("RY",), "RZ": ("RZ",), "Rot": ("RZ", "RY", "RZ")}
_CONTROLLED = ("CNOT", "CZ")


def z_expectations(tape: Any, n_wires: int) -> torch.Tensor:
    """<Z_i> of every wire of a tape of torch angles: `(B, n)` float64, B = 1 for a tape without a batch.

    Args:
        tape: gates RX, RY, RZ, Rot, CNOT, CZ, or templates that decompose into them.
        n_wires: n; wires are 0..n-1.

    Raises:
        NotImplementedError: any other gate.
    """
    parameters = tape.get_parameters(trainable_only=False)
    device = next((value.device for value in parameters if isinstance(value, torch.Tensor)), None)
    psi = torch.zeros((tape.batch_size or 1, 1 << n_wires), dtype=torch.complex128, device=device)
    psi[:, 0] = 1.0
    for op in _leaves(tape.operations):
        if op.name in _ROTATIONS:
            psi = _turn(psi, functools.reduce(_after, map(_rotation, _ROTATIONS[op.name], op.data)), op.wires[0])
        elif op.name in _CONTROLLED:
            psi = _controlled(psi, n_wires, *op.wires, flip=op.name == "CNOT")
        else:
            raise NotImplementedError(f"the torch statevector has no gate {op.name}")
    probabilities = psi.real**2 + psi.imag**2
    halves = [probabilities.reshape(len(psi), 1 << wire, 2, -1).sum(dim=(1, 3)) for wire in range(n_wires)]
    return torch.stack([half[:, 0] - half[:, 1] for half in halves], dim=-1)


def _leaves(operations: Any) -> Any:
    for op in operations:
        if op.name in _ROTATIONS or op.name in _CONTROLLED or not op.has_decomposition:
            yield op
        else:
            yield from _leaves(op.decomposition())


def _after(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return second @ first


def _rotation(name: str, angle: torch.Tensor) -> torch.Tensor:
    """exp(-i angle P / 2) for an angle `()` or `(B,)`: `(1 or B, 2, 2)`."""
    half = 0.5 * angle.reshape(-1, 1, 1)
    identity, generator = _matrices(name, half.device)
    return torch.cos(half) * identity + torch.sin(half) * generator


@functools.cache
def _matrices(name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    pauli = {"RX": [[0, 1], [1, 0]], "RY": [[0, -1j], [1j, 0]], "RZ": [[1, 0], [0, -1]]}[name]
    return (
        torch.eye(2, dtype=torch.complex128, device=device),
        -1j * torch.tensor(pauli, dtype=torch.complex128, device=device),
    )


def _turn(psi: torch.Tensor, matrix: torch.Tensor, wire: int) -> torch.Tensor:
    # four products of whole halves: a batched 2x2 matmul would be one tiny call for each pair of amplitudes
    halves = psi.reshape(len(psi), 1 << wire, 2, -1)
    zero, one = halves[:, :, 0], halves[:, :, 1]
    a, b, c, d = (matrix[:, i, j, None, None] for i in (0, 1) for j in (0, 1))
    return torch.stack([a * zero + b * one, c * zero + d * one], dim=2).reshape(psi.shape)


def _controlled(psi: torch.Tensor, n_wires: int, control: int, target: int, *, flip: bool) -> torch.Tensor:
    index, sign = _permutation(n_wires, control, target, psi.device)
    return psi[:, index] if flip else psi * sign


@functools.cache
def _permutation(n: int, control: int, target: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a CNOT takes each amplitude from `(2**n,)`, and the signs that a CZ gives."""
    index = torch.arange(1 << n, device=device)
    on, bit = index >> (n - 1 - control) & 1, 1 << (n - 1 - target)
    return index ^ (on * bit), 1.0 - 2.0 * (on * (index >> (n - 1 - target) & 1))
