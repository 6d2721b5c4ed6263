"""Running a program in Aer: states, adjoint gradients, and exact parameter-shift for samples.

Adjoint sweep. With psi_k the state after block k and lambda_k what is left of O psi going back,
    d <O> / d angle = 2 Re <lambda_k| K |psi_k>,    K as in `Bound.generators`.
The forward pass records psi_k wherever a derivative is read off, so that only lambda travels back; where that would
fill too much memory, psi travels along, as the upper half of the same Aer state. One sweep serves all observables.

Branching. The circuits of the parameter-shift rule share everything before the shifted gate, and every gate after it.
So each shifted circuit branches off as a copy of the rows where its gate stands, and later gates act on all branches.

Source: adjoint method: Jones and Gacon, arXiv:2009.02823; parameter-shift: Schuld et al., Phys. Rev. A 99 (2019)
032331.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantum.linear import product, z_sums
from quantum.program import PAULI, Block, Bound, Complex, Encode, Program, Real, Turn
from quantum.state import AerRows

CHUNK_BYTES = 1 << 25  # amplitudes of one Aer state; larger batches run one part after the other
_CROSS_WIRES = 4  # wires of one cross matrix


@dataclass(frozen=True)
class Record:
    """States `(B, 2**n)`: the final one, and those behind the blocks where derivatives are read off."""

    final: Complex
    behind: dict[int, Complex] | None

    @property
    def nbytes(self) -> int:
        """Size of all of them [B]."""
        return self.final.nbytes + sum(state.nbytes for state in (self.behind or {}).values())


def chunk_rows(program: Program, limit: int = CHUNK_BYTES) -> int:
    """Rows that one Aer state of at most `limit` bytes holds, a power of two, at least one."""
    rows = limit // (16 << program.n_wires)
    return 1 << (rows.bit_length() - 1) if rows > 1 else 1


def states(program: Program, angles: Real, rows: Real) -> Complex:
    """Final states `(B, 2**n)` for shared `angles` (K,) and `rows` (B, C), B of any size."""
    size = chunk_rows(program)
    if len(rows) <= size:
        return forward(program, angles, rows, record=False).final
    parts = [forward(program, angles, rows[i : i + size], record=False).final for i in range(0, len(rows), size)]
    return np.concatenate(parts)


def forward(program: Program, angles: Real, rows: Real, *, record: bool) -> Record:
    """One pass of at most `chunk_rows` rows; `record` keeps what `backward` reads."""
    bound = program.bind(angles)
    B = len(rows)
    buffer = _padded(B, program.n_wires)
    first = program.prepared
    if first:
        buffer[:B] = program.start(rows)
    else:
        buffer[:B, 0] = 1.0
    behind: dict[int, Complex] = {}
    if record and first:
        behind[first - 1] = buffer[:B].copy()
    with AerRows(buffer) as aer:
        for index in range(first, len(program.blocks)):
            _apply(aer, program.blocks[index], bound, index, rows)
            if record and (index in program.derivatives or index in program.encoded):
                aer.flush()
                behind[index] = buffer[:B].copy()
    return Record(buffer[:B], behind if record else None)


def backward(
    program: Program, angles: Real, rows: Real, record: Record, costate: Complex, *, shared: bool, per_row: bool
) -> tuple[Real, Real]:
    """Gradients of sum_b <psi_b| O_b |psi_b>, given O psi.

    Args:
        program: the circuit.
        angles: `(K,)`.
        rows: `(B, C)`.
        record: of the forward pass of the same rows; without `behind` the state is swept back as well.
        costate: O psi `(B, 2**n)`.
        shared: whether gradients of `angles` are wanted.
        per_row: whether gradients of `rows` are wanted.

    Returns:
        Gradients `(K,)`, summed over the rows, and `(B, C)`; zeros where not wanted.
    """
    bound = program.bind(angles)
    B = len(rows)
    grad_angles, grad_rows = np.zeros(program.n_angles), np.zeros(rows.shape)
    wanted = (set(program.derivatives) if shared else set()) | (set(program.encoded) if per_row else set())
    if not wanted or B == 0:
        return grad_angles, grad_rows
    offset = B if record.behind is None else 0
    buffer = _padded(offset + B, program.n_wires)
    buffer[:offset], buffer[offset : offset + B] = record.final[:offset], costate
    lambdas = buffer[offset : offset + B]
    both = np.concatenate([rows, rows]) if offset else rows
    first = min(wanted)
    with AerRows(buffer) as aer:
        for index in range(len(program.blocks) - 1, first - 1, -1):
            block = program.blocks[index]
            if index in wanted:
                aer.flush()
                psi = buffer[:B] if record.behind is None else record.behind[index]
                if isinstance(block, Encode):
                    _read_rows(block, lambdas, psi, grad_rows, program.n_wires)
                else:
                    wires, sources, K = bound.generators[index]
                    T = _cross(lambdas, psi, wires, program.n_wires)
                    slopes = 2.0 * (K * T).sum(axis=(1, 2)).real
                    grad_angles += np.bincount(sources, weights=slopes, minlength=program.n_angles)
            if index > first:
                _unapply(aer, block, bound, index, both)
    return grad_angles, grad_rows


def branches(
    program: Program, angles: Real, rows: Real, *, shared: bool, per_row: bool
) -> tuple[Real, list[tuple[bool, int]]]:
    """Probabilities of the shifted circuits of the parameter-shift rule, the unshifted one excluded.

    Returns:
        `(P, 2, B, 2**n)` for the shifts +pi/2 and -pi/2 of P angles, and which angle each of the P is: (False, index
        into `angles`) or (True, column of `rows`). The derivative of an expectation value is half the difference.
    """
    bound = program.bind(angles)
    n_shifted = program.n_angles * shared + program.n_columns * per_row
    B, width = len(rows), _power(len(rows))
    buffer = np.zeros((_power(1 + 2 * n_shifted), width, 1 << program.n_wires), dtype=np.complex128)
    buffer[0, :B, 0] = 1.0
    order: list[tuple[bool, int]] = []
    for index, block in enumerate(program.blocks):
        used = 1 + 2 * len(order)
        tiled = np.zeros((_power(used), width, rows.shape[1]))
        tiled[:, :B] = rows
        with AerRows(buffer[: _power(used)].reshape(-1, buffer.shape[2])) as aer:
            _apply(aer, block, bound, index, tiled.reshape(_power(used) * width, rows.shape[1]))
        for angle, wire, K in _shifts(program, bound, index, shared=shared, per_row=per_row):
            for sign in (1.0, -1.0):
                # A R(+-pi/2) A^dagger = cos(pi/4) +- 2 sin(pi/4) K
                branch = buffer[1 + 2 * len(order) + (sign < 0)]
                branch[...] = buffer[0]
                with AerRows(branch) as aer:
                    aer.unitary((wire,), np.sqrt(0.5) * (np.eye(2) + sign * 2.0 * K))
            order.append(angle)
    shifted = buffer[1 : 1 + 2 * len(order), :B].reshape(len(order), 2, B, buffer.shape[2])
    return shifted.real**2 + shifted.imag**2, order


def _shifts(
    program: Program, bound: Bound, index: int, *, shared: bool, per_row: bool
) -> list[tuple[tuple[bool, int], int, Complex]]:
    block = program.blocks[index]
    if isinstance(block, Encode) and per_row:
        return [((True, column), wire, -0.5j * PAULI["Z"]) for wire, column in block.entries]
    if shared and index in program.derivatives:
        wires, sources, K = bound.generators[index]
        return [((False, int(s)), int(w), k) for w, s, k in zip(wires, sources, K, strict=True)]
    return []


def _apply(aer: AerRows, block: Block, bound: Bound, index: int, rows: Real) -> None:
    if isinstance(block, Turn):
        for wires, matrix in bound.turns[index]:
            aer.unitary(wires, matrix)
    elif isinstance(block, Encode):
        _encode(aer, block, bound.program, rows, inverse=False)
    else:
        for gate in block.gates:
            if gate.matrix is None:
                aer.gate(gate.name, gate.wires)
            else:
                aer.unitary(gate.wires, gate.matrix)


def _unapply(aer: AerRows, block: Block, bound: Bound, index: int, rows: Real) -> None:
    if isinstance(block, Turn):
        for wires, matrix in bound.inverses[index]:
            aer.unitary(wires, matrix)
    elif isinstance(block, Encode):
        _encode(aer, block, bound.program, rows, inverse=True)
    else:
        for gate in reversed(block.gates):
            if gate.matrix is None:  # the named gates are their own inverses
                aer.gate(gate.name, gate.wires)
            else:
                aer.unitary(gate.wires, np.ascontiguousarray(gate.matrix.conj().T))


def _encode(aer: AerRows, block: Encode, program: Program, rows: Real, *, inverse: bool) -> None:
    diagonals = program.wire_phases(block, -rows if inverse else rows)
    padded = np.ones((1 << aer.n_row_qubits, program.n_wires, 2), dtype=np.complex128)
    padded[: len(rows)] = diagonals
    for wire in sorted(block.wires):
        aer.row_phases(wire, padded[:, wire])


def _read_rows(block: Encode, lambdas: Complex, psi: Complex, grad_rows: Real, n_wires: int) -> None:
    """Adds 2 Re <lambda|(-i/2) Z_w|psi> = Im <lambda|Z_w|psi>, which is the same before and behind the block."""
    overlap = lambdas.real * psi.imag
    overlap -= lambdas.imag * psi.real
    per_wire = z_sums(overlap, n_wires)
    for wire, column in block.entries:
        grad_rows[:, column] += per_wire[:, wire]


def _cross(lambdas: Complex, psi: Complex, wires: npt.NDArray[np.intp], n: int) -> Complex:
    """T[p, a, b] `(p, 2, 2)`: sum over rows and other wires of conj(lambda_a) psi_b; a, b are bits of `wires[p]`."""
    per_wire = np.zeros((n, 2, 2), dtype=np.complex128)
    needed = set(wires.tolist())
    for start in range(0, n, _CROSS_WIRES):
        k = min(_CROSS_WIRES, n - start)
        if needed.isdisjoint(range(start, start + k)):
            continue
        shape = (len(psi) << start, 1 << k, 1 << (n - start - k))
        left, right = (state.reshape(shape).swapaxes(0, 1).reshape(1 << k, -1) for state in (lambdas, psi))
        matrix = product(left, right.T, conjugate=True).reshape(-1, 1)
        per_wire[start : start + k] = product(_marginals(k), matrix).reshape(k, 2, 2)
    return per_wire[wires]


@functools.cache
def _marginals(k: int) -> Complex:
    """Matrix that takes a `(2**k, 2**k)` cross matrix to the `(k, 2, 2)` ones of its wires, others summed out."""
    result = np.zeros((k, 2, 2, 1 << k, 1 << k), dtype=np.complex128)
    for wire in range(k):
        bit = 1 << (k - 1 - wire)
        for rest in range(1 << k):
            if not rest & bit:
                for a in (0, 1):
                    for b in (0, 1):
                        result[wire, a, b, rest | bit * a, rest | bit * b] = 1.0
    return result.reshape(4 * k, -1)


def _power(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << max(count - 1, 0).bit_length()


def _padded(count: int, n_wires: int) -> Complex:
    return np.zeros((_power(count), 1 << n_wires), dtype=np.complex128)
