"""A PennyLane tape, compiled once: what to do with which angle, as a short list of blocks.

    Turn        single-qubit gates that all rows share; one 2x2 matrix a wire, two wires an Aer call
    Encode      rotations with an angle of their own in every row, one (R, 2) diagonal a wire
    Entangle    fixed gates on several qubits, applied by name; matrices for those that Aer has no name for

RX and RY with an angle a row are RZ between two fixed Clifford gates, which join the neighbouring turns. Gates on
disjoint wires commute, so every gate moves to the earliest block of its kind that it can reach.

Angles come from two places: `angles` (K,), shared by all rows, and `rows` (B, C), one column an angle. `Program.bind`
turns `angles` into matrices and keeps the last result, for the micro-batches of a step have equal weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from quantum.errors import QuantumError

Complex = npt.NDArray[np.complex128]
Real = npt.NDArray[np.float64]
Index = npt.NDArray[np.intp]

_I = np.eye(2, dtype=np.complex128)
PAULI: dict[str, Complex] = {
    "X": np.array([[0, 1], [1, 0]], dtype=np.complex128),
    "Y": np.array([[0, -1j], [1j, 0]]),
    "Z": np.diag([1.0 + 0j, -1.0]),
}
_AXES = {"RX": "X", "RY": "Y", "RZ": "Z"}
_H = np.array([[1, 1], [1, -1]], dtype=np.complex128) / np.sqrt(2.0)
# axis P = C Z C^dagger, hence exp(-i a P / 2) = C RZ(a) C^dagger
_TO_AXIS = {"X": _H, "Y": np.array([[1, -1j], [1j, -1]]) / np.sqrt(2.0)}
_NAMED = {"CNOT": "cx", "CY": "cy", "CZ": "cz", "SWAP": "mcswap", "Toffoli": "mcx"}
GATES = frozenset([*_AXES, "Rot", "GlobalPhase", "QubitUnitary", "Identity", *_NAMED])


@dataclass(frozen=True)
class Angle:
    """Where an angle comes from: entry `index` of `angles`, or column `index` of `rows`."""

    index: int
    per_row: bool


@dataclass(frozen=True)
class Gate:
    """A leaf of a decomposed tape: a rotation about an axis, or a fixed matrix on some wires."""

    wires: tuple[int, ...]
    axis: str = ""
    angle: Angle | None = None
    matrix: Complex | None = None
    name: str = ""


@dataclass
class Turn:
    """Shared single-qubit gates: wire -> its factors, first applied first."""

    factors: dict[int, list[Gate]] = field(default_factory=dict)
    columns: dict[int, int] = field(default_factory=dict)  # wire -> column of the bound matrices

    @property
    def wires(self) -> set[int]:
        """Wires that the block acts on."""
        return set(self.factors)


@dataclass
class Encode:
    """Rotations about Z by the row's own angle: (wire, column of `rows`), one entry a gate."""

    entries: list[tuple[int, int]] = field(default_factory=list)

    @property
    def wires(self) -> set[int]:
        """Wires that the block acts on."""
        return {wire for wire, _ in self.entries}


@dataclass
class Entangle:
    """Fixed gates on several wires, in order."""

    gates: list[Gate] = field(default_factory=list)

    @property
    def wires(self) -> set[int]:
        """Wires that the block acts on."""
        return {wire for gate in self.gates for wire in gate.wires}


Block = Turn | Encode | Entangle
_Kind = TypeVar("_Kind", Turn, Encode, Entangle)


@dataclass(frozen=True)
class Bound:
    """A program's matrices for given angles.

    Attributes:
        turns: block -> [(wires, matrix)], what is applied, one or two wires an entry.
        inverses: likewise, for the way back.
        rotations: the factors' own matrices (columns, slots, 2, 2), of which `generators` is made.
    """

    key: bytes
    turns: dict[int, list[tuple[tuple[int, ...], Complex]]]
    inverses: dict[int, list[tuple[tuple[int, ...], Complex]]]
    rotations: Complex
    program: Program

    @cached_property
    def generators(self) -> dict[int, tuple[Index, Index, Complex]]:
        """Block -> (wires (p,), indices into `angles` (p,), K (p, 2, 2)).

        The derivative of a turn U = F_m .. F_1 with respect to the angle of F_j is K U with
        K = A (-i/2 P) A^dagger and A = F_m .. F_(j+1).
        """
        program = self.program
        after = np.empty_like(self.rotations)
        after[:, -1] = _I
        for slot in range(self.rotations.shape[1] - 1, 0, -1):
            after[:, slot - 1] = after[:, slot] @ self.rotations[:, slot]
        result = {}
        for index, (columns, slots, wires, angles, halves) in program.derivatives.items():
            a = after[columns, slots]
            result[index] = (wires, angles, a @ halves @ a.conj().swapaxes(-1, -2))
        return result


class Program:
    """Blocks of a circuit on `n_wires` wires, with `n_angles` shared angles and `n_columns` angles a row."""

    def __init__(self, gates: list[Gate], n_wires: int, n_angles: int, n_columns: int) -> None:
        self.n_wires, self.n_angles, self.n_columns = n_wires, n_angles, n_columns
        self.gates = [gate for gate in gates if gate.name != "phase"]
        self.phases = [gate.angle for gate in gates if gate.name == "phase"]
        self.blocks = _schedule(self.gates)
        self._lay_out()
        self._bound: Bound | None = None

    def _lay_out(self) -> None:
        columns = [
            (i, wire) for i, block in enumerate(self.blocks) if isinstance(block, Turn) for wire in block.factors
        ]
        slots = max([1, *(len(b.factors[w]) for b in self.blocks if isinstance(b, Turn) for w in b.factors)])
        self._fixed = np.broadcast_to(_I, (len(columns), slots, 2, 2)).copy()
        where, axes, sources = [], [], []
        per_block: dict[int, list[tuple[int, int, int, int, Complex]]] = {}
        for column, (index, wire) in enumerate(columns):
            block = self.blocks[index]
            assert isinstance(block, Turn)
            block.columns[wire] = column
            for slot, gate in enumerate(block.factors[wire]):
                if isinstance(gate.angle, Angle):
                    where.append((column, slot))
                    axes.append(PAULI[gate.axis])
                    sources.append(gate.angle.index)
                    row = (column, slot, wire, gate.angle.index, -0.5j * PAULI[gate.axis])
                    per_block.setdefault(index, []).append(row)
                else:
                    self._fixed[column, slot] = gate.matrix
        self._where = tuple(np.array(where, dtype=np.intp).reshape(-1, 2).T)
        self._axes = np.array(axes, dtype=np.complex128).reshape(-1, 2, 2)
        self._sources = np.array(sources, dtype=np.intp)
        self.derivatives: dict[int, tuple[Index, Index, Index, Index, Complex]] = {
            index: (*_integers(rows), np.stack([row[4] for row in rows])) for index, rows in per_block.items()
        }
        self._lay_out_pairs()

    def _lay_out_pairs(self) -> None:
        self._pairs: list[tuple[int, tuple[int, int], int, int]] = []
        self._singles: list[tuple[int, int, int]] = []
        for index, block in enumerate(self.blocks):
            if isinstance(block, Turn):
                wires = sorted(block.columns)
                for a, b in zip(wires[0::2], wires[1::2], strict=False):
                    self._pairs.append((index, (a, b), block.columns[a], block.columns[b]))
                if len(wires) % 2:
                    self._singles.append((index, wires[-1], block.columns[wires[-1]]))
        self._first = np.array([pair[2] for pair in self._pairs], dtype=np.intp)
        self._second = np.array([pair[3] for pair in self._pairs], dtype=np.intp)

    @cached_property
    def encoded(self) -> tuple[int, ...]:
        """Indices of the encode blocks."""
        return tuple(i for i, block in enumerate(self.blocks) if isinstance(block, Encode))

    @cached_property
    def prepared(self) -> int:
        """How many leading blocks make a product state of |0>: [fixed turn,] encode; 0 where there is none."""
        for index, block in enumerate(self.blocks[:2]):
            if isinstance(block, Encode):
                return index + 1
            if not isinstance(block, Turn) or index in self.derivatives:
                break
        return 0

    def bind(self, angles: Real) -> Bound:
        """The program's matrices for `angles` (K,); the last result is kept, compared by value."""
        key, bound = angles.tobytes(), self._bound
        if bound is not None and bound.key == key:
            return bound
        half = 0.5 * angles[self._sources][:, None, None]
        rotations = self._fixed.copy()
        rotations[self._where] = np.cos(half) * _I - 1j * np.sin(half) * self._axes
        product = rotations[:, 0]
        for slot in range(1, rotations.shape[1]):
            product = rotations[:, slot] @ product
        a, b = product[self._first], product[self._second]
        pairs = (a[:, :, None, :, None] * b[:, None, :, None, :]).reshape(-1, 4, 4)
        turns: dict[int, list[tuple[tuple[int, ...], Complex]]] = {i: [] for i in range(len(self.blocks))}
        inverses: dict[int, list[tuple[tuple[int, ...], Complex]]] = {i: [] for i in range(len(self.blocks))}
        back = np.ascontiguousarray(pairs.conj().swapaxes(-1, -2))
        for k, (index, wires, _, _) in enumerate(self._pairs):
            turns[index].append((wires, pairs[k]))
            inverses[index].append((wires, back[k]))
        for index, wire, column in self._singles:
            turns[index].append(((wire,), np.ascontiguousarray(product[column])))
            inverses[index].append(((wire,), np.ascontiguousarray(product[column].conj().T)))
        bound = Bound(key, turns, inverses, rotations, self)
        self._bound = bound
        return bound

    def phase(self, angles: Real, rows: Real) -> Complex:
        """Global phase factor (B,) that `GlobalPhase` gates give the state."""
        total = np.zeros(len(rows))
        for angle in self.phases:
            if angle is not None:
                total = total + (rows[:, angle.index] if angle.per_row else angles[angle.index])
        return np.asarray(np.exp(-1j * total))

    def start(self, rows: Real) -> Complex:
        """Product states `(B, 2**n)` that the prepared blocks make of |0>."""
        encode = self.blocks[self.prepared - 1]
        assert isinstance(encode, Encode)
        amplitudes = np.zeros((self.n_wires, 2), dtype=np.complex128)
        amplitudes[:, 0] = 1.0
        if self.prepared == 2:
            turn = self.blocks[0]
            assert isinstance(turn, Turn)
            for wire, gates in turn.factors.items():
                for gate in gates:
                    assert gate.matrix is not None
                    amplitudes[wire] = gate.matrix @ amplitudes[wire]
        factors = np.broadcast_to(amplitudes, (len(rows), self.n_wires, 2)) * self.wire_phases(encode, rows)
        return _outer([factors[:, wire] for wire in range(self.n_wires)])

    def wire_phases(self, block: Encode, rows: Real) -> Complex:
        """Diagonals `(B, n, 2)` of an encode block: exp(-i a/2), exp(+i a/2) for the sum a of a wire's angles."""
        total = np.zeros((len(rows), self.n_wires))
        for wire, column in block.entries:
            total[:, wire] += rows[:, column]
        phases = np.empty((*total.shape, 2), dtype=np.complex128)
        np.cos(0.5 * total, out=phases[..., 1].real)
        np.sin(0.5 * total, out=phases[..., 1].imag)
        np.conjugate(phases[..., 1], out=phases[..., 0])
        return phases


def _integers(rows: list[tuple[int, int, int, int, Complex]]) -> tuple[Index, Index, Index, Index]:
    a, b, c, d = (np.array([row[k] for row in rows], dtype=np.intp) for k in range(4))
    return a, b, c, d


def _outer(factors: list[Complex]) -> Complex:
    """Row-wise outer product of `(B, d_i)` arrays, the first being the most significant; halves are balanced."""
    if len(factors) == 1:
        return factors[0]
    middle = len(factors) // 2
    a, b = _outer(factors[:middle]), _outer(factors[middle:])
    return (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)


def _schedule(gates: list[Gate]) -> list[Block]:
    blocks: list[Block] = []
    for gate in gates:
        if len(gate.wires) > 1:
            found = _reach(blocks, Entangle, gate.wires)
            found.gates.append(gate)
        elif isinstance(gate.angle, Angle) and gate.angle.per_row:
            _encode(blocks, gate, gate.angle)
        else:
            _reach(blocks, Turn, gate.wires).factors.setdefault(gate.wires[0], []).append(gate)
    return blocks


def _encode(blocks: list[Block], gate: Gate, angle: Angle) -> None:
    wire = gate.wires
    clifford = _TO_AXIS.get(gate.axis)
    if clifford is not None:
        before = Gate(wire, matrix=np.ascontiguousarray(clifford.conj().T))
        _reach(blocks, Turn, wire).factors.setdefault(wire[0], []).append(before)
    _reach(blocks, Encode, wire).entries.append((wire[0], angle.index))
    if clifford is not None:
        _reach(blocks, Turn, wire).factors.setdefault(wire[0], []).append(Gate(wire, matrix=clifford))


def _reach(blocks: list[Block], kind: type[_Kind], wires: tuple[int, ...]) -> _Kind:
    """The earliest block of a kind that a new gate on `wires` can join, or a new one at the end."""
    found: _Kind | None = None
    for block in reversed(blocks):
        if isinstance(block, kind):
            found = block
        if not block.wires.isdisjoint(wires):
            break
    if found is None:
        found = kind()
        blocks.append(found)
    return found


def compile_tape(tape: Any, wires: list[Any]) -> tuple[Program, list[tuple[int, bool, tuple[int, ...]]]]:
    """Compile a tape of `GATES` and `TEMPLATES` over the given wire order.

    Returns:
        The program, and for each of the tape's gate parameters (first entry, one angle a row?, its shape without the
        batch): entries are positions in `angles` or, for those with a batch, columns of `rows`.

    Raises:
        QuantumError: a gate is not of these kinds, or its parameter can't be followed.
    """
    order = {wire: i for i, wire in enumerate(wires)}
    gates: list[Gate] = []
    layout: list[tuple[int, bool, tuple[int, ...]]] = []
    n_angles = n_columns = 0
    for op in tape.operations:
        places: list[tuple[int, bool, tuple[int, ...]]] = []
        followed = op.data and op.name != "QubitUnitary"  # gates that are products have no `ndim_params` at all
        for value, ndim in zip(op.data, op.ndim_params, strict=True) if followed else ():
            shape = tuple(int(s) for s in np.shape(value))
            per_row = op.batch_size is not None and len(shape) > ndim
            inner = shape[1:] if per_row else shape
            size = int(np.prod(inner, dtype=int))
            places.append((n_columns if per_row else n_angles, per_row, inner))
            n_columns, n_angles = n_columns + size * per_row, n_angles + size * (not per_row)
        gates += _expand(op, places, order)
        layout += places if op.name != "QubitUnitary" else [(-1, False, ())]
    return Program(gates, len(wires), n_angles, n_columns), layout


def _expand(op: Any, places: list[tuple[int, bool, tuple[int, ...]]], order: dict[Any, int]) -> list[Gate]:
    from quantum.circuit import TEMPLATES

    if op.name not in TEMPLATES:
        return _leaf(op, [Angle(start, per_row) for start, per_row, _ in places], order)
    # A template slices its parameters and hands the entries to gates: follow them by giving each entry its own value.
    import pennylane as qml

    origin: dict[float, Angle] = {}
    marked = []
    for start, per_row, shape in places:
        values = np.sqrt(2.0 + len(origin) + np.arange(int(np.prod(shape, dtype=int))))
        origin.update({float(v): Angle(start + k, per_row) for k, v in enumerate(values)})
        marked.append(values.reshape(shape))
    gates: list[Gate] = []
    for leaf in qml.ops.functions.bind_new_parameters(op, marked).decomposition():
        angles = [origin.get(float(value)) for value in leaf.data]
        if None in angles:
            raise QuantumError(f"{op.name}: an angle of {leaf.name} is not an entry of the template's parameters")
        gates += _leaf(leaf, [angle for angle in angles if angle is not None], order)
    return gates


def _leaf(op: Any, angles: list[Angle], order: dict[Any, int]) -> list[Gate]:
    wires = tuple(order[wire] for wire in op.wires)
    if op.name in _AXES:
        return [Gate(wires, axis=_AXES[op.name], angle=angles[0])]
    if op.name == "Rot":
        return [Gate(wires, axis=axis, angle=angle) for axis, angle in zip("ZYZ", angles, strict=True)]
    if op.name == "GlobalPhase":
        return [Gate((), angle=angles[0], name="phase")]
    if op.name == "Identity":
        return []
    if op.name in _NAMED:
        return [Gate(wires, name=_NAMED[op.name])]
    if angles or not op.has_matrix:
        raise QuantumError(
            f"{op.name} is not a gate of this device", expected=", ".join(sorted(GATES)) + " and fixed matrices"
        )
    matrix = np.ascontiguousarray(np.asarray(op.matrix(), dtype=np.complex128))
    return [Gate(wires, matrix=matrix)]
