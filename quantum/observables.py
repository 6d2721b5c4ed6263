"""Sums of Pauli words applied to states: values, and O psi for the adjoint sweep."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from quantum.linear import product, z_combination, z_sums

if TYPE_CHECKING:
    from quantum.program import Complex, Index, Real


class Observables:
    """m observables on n wires, each a real combination of Pauli words.

    Words Z_i and the identity need n + 1 numbers an observable. Any other word P acts as (P psi)[y] = c(y) psi[y xor x]
    with a mask x (its X and Y wires) and a phase c(y); words of equal mask share one column matrix C_x `(2**n, m)`.

    Args:
        sentences: m mappings from words to coefficients; a word maps wire indices 0..n-1 to "X", "Y", "Z".
        n_wires: n.
    """

    def __init__(self, sentences: list[dict[Any, float]], n_wires: int) -> None:
        self.count, self._n_wires = len(sentences), n_wires
        self._z, self._identity = np.zeros((n_wires, self.count)), np.zeros(self.count)
        self._columns: dict[int, Complex] = {}
        for j, sentence in enumerate(sentences):
            for word, coefficient in sentence.items():
                self._add(j, dict(word), coefficient)

    def _add(self, j: int, word: dict[int, str], coefficient: float) -> None:
        if not word:
            self._identity[j] += coefficient
        elif list(word.values()) == ["Z"]:
            self._z[next(iter(word)), j] += coefficient
        else:
            mask, phase = self._word(word)
            shape = (1 << self._n_wires, self.count)
            columns = self._columns.setdefault(mask, np.zeros(shape, dtype=np.complex128))
            columns[:, j] += coefficient * phase

    def _word(self, word: dict[int, str]) -> tuple[int, Complex]:
        mask, phase = 0, np.ones(1 << self._n_wires, dtype=np.complex128)
        for wire, letter in word.items():
            bit = 1 << (self._n_wires - 1 - wire)
            if letter in "XY":
                mask |= bit
            if letter in "YZ":
                phase = phase * np.where(self._index & bit, -1.0, 1.0) * (-1j if letter == "Y" else 1.0)
        return mask, phase

    @cached_property
    def _index(self) -> Index:
        return np.arange(1 << self._n_wires)

    def of_probabilities(self, probabilities: Real) -> Real:
        """Values `(..., m)` for probabilities `(..., 2**n)`, where all words are single Z or the identity."""
        assert not self._columns
        return np.asarray(product(z_sums(probabilities, self._n_wires), self._z) + self._identity)

    def values(self, states: Complex) -> Real:
        """Re <psi| O_j |psi> for states `(B, 2**n)` of norm 1: `(B, m)`."""
        probabilities = states.real**2
        probabilities += states.imag**2
        result = product(z_sums(probabilities, self._n_wires), self._z) + self._identity
        for mask, columns in self._columns.items():
            result += product(states.conj() * states[:, self._index ^ mask], columns).real
        return np.asarray(result)

    def costate(self, states: Complex, cotangent: Real) -> Complex:
        """sum_j g_j O_j psi for `cotangent` g `(B, m)`: `(B, 2**n)`."""
        diagonal = z_combination(product(cotangent, self._z.T), self._n_wires)
        diagonal += product(cotangent, self._identity[:, None])
        result = diagonal * states
        for mask, columns in self._columns.items():
            result += product(cotangent.astype(np.complex128), columns.T) * states[:, self._index ^ mask]
        return np.asarray(result)
