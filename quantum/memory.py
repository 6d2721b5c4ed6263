"""Whether a circuit's states fit into memory."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]

from quantum.errors import QuantumError

_COPIES = 4  # the state, its partner in the backward pass, what numpy needs beside them


class MemoryExceededError(QuantumError):
    """A circuit has more qubits than memory holds."""


def check_memory(n_qubits: int, rows: int = 1) -> int:
    """Bytes that `rows` states of `n_qubits` qubits need, gradients included.

    Raises:
        MemoryExceededError: that is more than is free now; the message has both figures.
    """
    needed = _COPIES * 16 * rows << n_qubits
    free = int(psutil.virtual_memory().available)
    if needed > free:
        fits = max(free // (_COPIES * 16 * rows), 1).bit_length() - 1
        raise MemoryExceededError(
            f"{n_qubits} qubits do not fit into memory",
            found=f"{free} bytes free ({free / 2**30:.1f} GiB)",
            expected=f"{needed} bytes ({needed / 2**30:.1f} GiB) for {rows} state(s) of 2^{n_qubits} amplitudes",
            remedy=f"use at most {fits} qubits here",
        )
    return needed
