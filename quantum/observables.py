"""Sums of Pauli words applied to states: values, and O psi for the adjoint sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from quantum.program import Complex, Real


class Observables:
    """m observables on n wires, each a real combination of Pauli words.

    A word P acts as (P psi)[y] = c(y) psi[y xor x] with a mask x (its X and Y wires) and a phase c(y). Words of equal
    mask share one column matrix C_x `(2**n, m)`; mask 0 is the diagonal part, all that <Z_i> needs.

    Args:
        sentences: m mappings from words to coefficients; a word maps wire indices 0..n-1 to "X", "Y", "Z".
        n_wires: n.
    """

    def __init__(self, sentences: list[dict[Any, float]], n_wires: int) -> None:
        self.count = len(sentences)
        self._index = np.arange(1 << n_wires)
        self._columns: dict[int, Complex] = {}
        for j, sentence in enumerate(sentences):
            for word, coefficient in sentence.items():
                mask, phase = self._word(dict(word), n_wires)
                columns = self._columns.setdefault(mask, np.zeros((1 << n_wires, self.count), dtype=np.complex128))
                columns[:, j] += coefficient * phase
        diagonal = self._columns.pop(0, None)
        self._diagonal: Real = np.zeros((1 << n_wires, self.count)) if diagonal is None else diagonal.real.copy()
        # amplitudes are read as pairs of floats: |psi|^2 @ D = [re, im]^2 @ (D with every line twice)
        self._twice = np.repeat(self._diagonal, 2, axis=0)

    def _word(self, word: dict[int, str], n_wires: int) -> tuple[int, Complex]:
        mask, phase = 0, np.ones(1 << n_wires, dtype=np.complex128)
        for wire, letter in word.items():
            bit = 1 << (n_wires - 1 - wire)
            if letter in "XY":
                mask |= bit
            if letter in "YZ":
                phase = phase * np.where(self._index & bit, -1.0, 1.0) * (-1j if letter == "Y" else 1.0)
        return mask, phase

    @property
    def is_diagonal(self) -> bool:
        """Whether all of them can be read off the same measurement in the computational basis."""
        return not self._columns

    @property
    def diagonal(self) -> Real:
        """Eigenvalues of the diagonal part `(2**n, m)`."""
        return self._diagonal

    def values(self, states: Complex) -> Real:
        """Re <psi| O_j |psi> for states `(B, 2**n)`: `(B, m)`."""
        result = np.square(np.ascontiguousarray(states).view(np.float64)) @ self._twice
        for mask, columns in self._columns.items():
            result += ((states.conj() * states[:, self._index ^ mask]) @ columns).real
        return np.asarray(result)

    def costate(self, states: Complex, cotangent: Real) -> Complex:
        """sum_j g_j O_j psi for `cotangent` g `(B, m)`: `(B, 2**n)`."""
        result = (cotangent @ self._diagonal.T) * states
        for mask, columns in self._columns.items():
            result += (cotangent @ columns.T) * states[:, self._index ^ mask]
        return np.asarray(result)
