"""Whether a circuit's states fit into memory."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]

from quantum.errors import QuantumError

_COPIES = 11  # states of one row at the same time: state and partner of the sweep, copies that sums are made of
_SHIFTED_COPIES = 3  # of each shifted circuit: its state, its probabilities, the frequencies of its samples

# Limit and use of the control group of a container: version 2, version 1.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class MemoryExceededError(QuantumError):
    """A circuit has more qubits than memory holds."""


def check_memory(n_qubits: int, *, n_shifted: int = 0) -> int:
    """Bytes that one row of a circuit needs at most, gradients included; larger batches run in parts.

    Args:
        n_qubits: width of the circuit.
        n_shifted: angles that are differentiated from samples: two shifted circuits each, all at the same time.

    Raises:
        MemoryExceededError: that is more than is free now; the message has both figures.
    """
    branches = _SHIFTED_COPIES << (2 * n_shifted).bit_length() if n_shifted else 0
    amplitude = 16 * max(_COPIES, branches)
    needed, free = amplitude << n_qubits, free_bytes()
    if needed > free:
        fits = max(free // amplitude, 1).bit_length() - 1
        raise MemoryExceededError(
            f"{n_qubits} qubits do not fit into memory",
            found=f"{free} bytes free ({free / 2**30:.1f} GiB)",
            expected=f"{needed} bytes ({needed / 2**30:.1f} GiB) for 2^{n_qubits} amplitudes and their gradients",
            remedy=f"use at most {fits} qubits here",
        )
    return needed


def free_bytes() -> int:
    """Memory that is free now, on the host and in its control group [B]."""
    free = int(psutil.virtual_memory().available)
    for limit, used in _GROUPS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
    return max(free, 0)
