"""Seeds of random numbers: one for each call of a graph that has random operations, in a buffer of 16 bytes.

A seed is two int64: the key of the counter-based generator (Philox4x32-10; Salmon, Moraes, Dror and Shaw, "Parallel
random numbers: as easy as 1, 2, 3", SC'11), and a number from which the streams of operations are counted. Streams of
one key, and elements of one stream, are different counters; so results depend on the key alone, not on how work is
divided. The key is drawn from a torch.Generator: `torch.manual_seed`, `fork_rng` and saved states of the generator
repeat runs of compiled graphs as they do others.
"""

from __future__ import annotations

import torch

from hetero.opencl.ir import Root

_BYTES = 16


class Seed:
    """Host memory of a seed.

    Attributes:
        tensor: (2,) int64.
    """

    def __init__(self) -> None:
        with torch.inference_mode(mode=False):
            self.tensor = torch.zeros(_BYTES // 8, dtype=torch.int64)
        self._key = self.tensor[:1]

    def draw(self, generator: torch.Generator | None = None) -> None:
        """Draw a new key of 64 bits; None is the host's default generator."""
        self._key.random_(-(2**63), None, generator=generator)


def seed_root() -> Root:
    """The root of a graph's seed."""
    return Root("seed", _BYTES, "seed")
