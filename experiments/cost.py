"""What a training run costs: wall and CPU time, energy where it can be measured, peak memory."""

from __future__ import annotations

import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")
_PROC = Path("/proc/self")
NOT_MEASURED = "not measured: this machine has no readable energy counter (RAPL)"


@dataclass(frozen=True)
class Spent:
    """Resources between two moments.

    Attributes:
        wall_s: elapsed time [s].
        cpu_s: CPU time of all threads of the process [s].
        energy_j: energy of all processor packages [J], other processes' share included; None: not measured.
        peak_rss_bytes: largest resident memory of the process [B].
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    energy_j: float | None = None
    peak_rss_bytes: int = 0

    def __add__(self, other: Spent) -> Spent:
        energies = [part.energy_j for part in (self, other) if part.wall_s > 0]
        return Spent(
            self.wall_s + other.wall_s,
            self.cpu_s + other.cpu_s,
            None if not energies or None in energies else sum(e for e in energies if e is not None),
            max(self.peak_rss_bytes, other.peak_rss_bytes),
        )

    def to_json(self) -> dict[str, float | int | None]:
        """All fields as JSON values."""
        return asdict(self)


class Meter:
    """Counts from its making on."""

    def __init__(self, powercap: Path = _POWERCAP) -> None:
        self._counters = _energy_counters(powercap)
        _reset_peak()
        self._energy = [_read(counter) for counter, _ in self._counters]
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def spent(self) -> Spent:
        """What was spent since the meter was made."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        energy = None
        if self._counters:
            pairs = zip(self._counters, self._energy, strict=True)
            # A counter wraps at its range; between two readings at most once (hours at full power).
            energy = sum((_read(counter) - start) % span for (counter, span), start in pairs) * 1e-6
        return Spent(wall, cpu, energy, _peak_rss())


def _energy_counters(root: Path) -> list[tuple[Path, int]]:
    """Files and ranges [uJ] of the packages' counters; not of their parts, which the packages include.

    Source: Linux kernel, Documentation/power/powercap/powercap.rst.
    """
    counters = []
    for zone in sorted(root.glob("intel-rapl:[0-9]*")):
        if zone.name.count(":") != 1:
            continue
        try:
            _read(zone / "energy_uj")
            counters.append((zone / "energy_uj", _read(zone / "max_energy_range_uj")))
        except (OSError, ValueError):
            continue  # readable by root only on most systems
    return counters


def _read(path: Path) -> int:
    return int(path.read_text())


def _reset_peak() -> None:
    """Let the kernel's peak of resident memory start anew (proc(5), clear_refs, value 5)."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return


def _peak_rss() -> int:
    try:
        for line in (_PROC / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
