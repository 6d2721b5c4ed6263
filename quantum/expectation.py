"""Expectation values of a program and their gradients, for batches of any size: exact, or from samples."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantum.gradient import CHUNK_BYTES, Record, backward, branches, chunk_rows, forward, states

if TYPE_CHECKING:
    from quantum.observables import Observables
    from quantum.program import Complex, Program, Real

KEEP_BYTES = 1 << 28  # states of all forward passes that wait for their backward pass, in this process
RECORD_BYTES = 1 << 28  # recorded states of one chunk; beyond it the state is swept back instead

_alive: list[weakref.ref[Kept]] = []
_alive_lock = threading.Lock()


class Kept:
    """Records of a forward pass, one a chunk; its bytes count against `KEEP_BYTES` while it lives."""

    def __init__(self, nbytes: int) -> None:
        self.records: list[Record] = []
        self.nbytes = nbytes


def kept_bytes() -> int:
    """Bytes of all states that wait for their backward pass [B]."""
    with _alive_lock:
        return _kept_bytes()


def _kept_bytes() -> int:
    # Weak references without callbacks: a Ctrl-C inside a callback or a __del__ would be swallowed.
    _alive[:] = [reference for reference in _alive if reference() is not None]
    return sum(kept.nbytes for reference in _alive if (kept := reference()) is not None)


def values(
    program: Program, observables: Observables, angles: Real, rows: Real, *, keep: bool
) -> tuple[Real, Kept | None]:
    """Expectation values `(B, m)` and, with `keep` and where memory allows, what the backward pass reads.

    Args:
        program: the circuit.
        observables: m of them.
        angles: shared angles `(K,)` [rad].
        rows: angles of each row `(B, C)` [rad].
        keep: whether a backward pass will follow.
    """
    kept = _reserve(_record_bytes(program, len(rows))) if keep else None
    result = np.empty((len(rows), observables.count))
    for part in _chunks(program, len(rows)):
        record = forward(program, angles, rows[part], record=kept is not None and _records(program, rows[part]))
        result[part] = observables.values(record.final)
        if kept is not None:
            kept.records.append(record)
    return result, kept


def vjp(
    program: Program,
    observables: Observables,
    angles: Real,
    rows: Real,
    cotangent: Real,
    kept: Kept | None,
    *,
    shared: bool,
    per_row: bool,
) -> tuple[Real, Real]:
    """Gradients of sum_bj g_bj <O_j>_b: `(K,)` and `(B, C)`, by the adjoint sweep; g is `cotangent` `(B, m)`.

    `kept` None recomputes the states. Gradients that are not wanted (`shared`, `per_row`) are zeros.
    """
    grad_angles, grad_rows = np.zeros(program.n_angles), np.zeros(rows.shape)
    for k, part in enumerate(_chunks(program, len(rows))):
        if kept is None:
            record = forward(program, angles, rows[part], record=_records(program, rows[part]))
        else:
            record = kept.records[k]
        costate = observables.costate(record.final, cotangent[part])
        more, grad_rows[part] = backward(program, angles, rows[part], record, costate, shared=shared, per_row=per_row)
        grad_angles += more
    return grad_angles, grad_rows


@dataclass(frozen=True)
class Draw:
    """Which samples: a stream of their own for every (seed, call, row), by a counter-based generator.

    Attributes:
        seed: of the run.
        call: number of the forward pass.
        shots: samples of each circuit.
    """

    seed: int
    call: int
    shots: int

    def frequencies(self, probabilities: Real, first_row: int, purpose: int) -> Real:
        """Relative frequencies of outcomes for `(..., B, 2**n)` probabilities, rows counted from `first_row`.

        The samples are drawn by numpy from Aer's probabilities (same distribution as Aer's own sampler, faster). Where
        the probabilities of a row are not finite, neither are its frequencies.
        """
        result = np.empty_like(probabilities)
        for b in range(probabilities.shape[-2]):
            counter = [0, 0, purpose, first_row + b]
            key = [self.seed % 2**64, self.call]
            rng = np.random.Generator(np.random.Philox(key=key, counter=counter))
            p = probabilities[..., b, :]
            total = p.sum(axis=-1, keepdims=True)
            is_finite = bool(np.isfinite(total).all())
            result[..., b, :] = rng.multinomial(self.shots, p / total) if is_finite else np.nan
        return result / self.shots


def sampled_values(program: Program, observables: Observables, angles: Real, rows: Real, draw: Draw) -> Real:
    """Unbiased estimates of diagonal observables `(B, m)` from `draw.shots` samples a row."""
    result = np.empty((len(rows), observables.count))
    for part in _chunks(program, len(rows)):
        final = states(program, angles, rows[part])
        probabilities = final.real**2 + final.imag**2
        result[part] = observables.of_probabilities(draw.frequencies(probabilities, part.start, purpose=0))
    return result


def sampled_vjp(
    program: Program,
    observables: Observables,
    angles: Real,
    rows: Real,
    cotangent: Real,
    draw: Draw,
    *,
    shared: bool,
    per_row: bool,
) -> tuple[Real, Real]:
    """Unbiased estimates of the gradients of `vjp`, by the parameter-shift rule with samples for every circuit."""
    grad_angles, grad_rows = np.zeros(program.n_angles), np.zeros(rows.shape)
    n_branches = 1 + 2 * (program.n_angles * shared + program.n_columns * per_row)
    for part in _chunks(program, len(rows), CHUNK_BYTES // n_branches):
        probabilities, order = branches(program, angles, rows[part], shared=shared, per_row=per_row)
        estimates = observables.of_probabilities(draw.frequencies(probabilities, part.start, purpose=1))
        slopes = np.einsum("pbm,bm->pb", 0.5 * (estimates[:, 0] - estimates[:, 1]), cotangent[part])
        for (is_row, index), slope in zip(order, slopes, strict=True):
            if is_row:
                grad_rows[part, index] += slope
            else:
                grad_angles[index] += slope.sum()
    return grad_angles, grad_rows


def final_states(program: Program, angles: Real, rows: Real) -> Complex:
    """States `(B, 2**n)` with their global phase."""
    return np.asarray(states(program, angles, rows) * program.phase(angles, rows)[:, None])


def _chunks(program: Program, count: int, limit: int = CHUNK_BYTES) -> list[slice]:
    size = chunk_rows(program, limit)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _record_bytes(program: Program, count: int) -> int:
    marks = len(program.derivatives) + len(program.encoded)
    return (marks + 1) * count * (16 << program.n_wires)


def _records(program: Program, rows: Real) -> bool:
    return _record_bytes(program, len(rows)) <= RECORD_BYTES


def _reserve(nbytes: int) -> Kept | None:
    with _alive_lock:
        if _kept_bytes() + nbytes > KEEP_BYTES:
            return None
        kept = Kept(nbytes)
        _alive.append(weakref.ref(kept))
    return kept
