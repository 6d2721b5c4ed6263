"""Whether a circuit's states fit into memory."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]

from quantum.errors import QuantumError

_COPIES = 11  # states of one row at the same time: state and partner of the sweep, copies that sums are made of
_SHIFTED_COPIES = 3  # of each shifted circuit: its state, its probabilities, the frequencies of its samples

# Limit, use and statistics of the control group of a container, and the statistics' names of what can be taken back,
# the cache of files: version 2, version 1.
_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "active_file", "inactive_file"),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_active_file",
        "total_inactive_file",
    ),
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
    for folder, limit, used, *cached in _GROUPS:
        try:
            taken = int(Path(folder, used).read_text())
            statistics = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            taken -= sum(int(statistics[name]) for name in cached)
            free = min(free, int(Path(folder, limit).read_text()) - taken)
        except (OSError, ValueError, KeyError):  # no such group, or no limit ("max")
            continue
    return max(free, 0)
