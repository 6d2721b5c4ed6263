"""Where the roots of a plan lie: first and last use of each, and offsets in the arena (scratch) and the slab (saved).

Scratch roots live within one call: two of them share memory when no launch needs both. Saved roots live until the
backward pass, so they share nothing. Inputs, constants and outputs have memory of their own and get no offset. Where a
call's data is copied to the device and back, all but constants lie in the arena, as scratch does (copied.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hetero.opencl.ir import Root


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes [B] known before the first launch.

    Attributes:
        arena_bytes: shared by all calls on the device's queue, one after the other.
        slab_bytes: of each call in flight, on the host.
        output_bytes: of the outputs of one call, on the host; kept for later calls as often as callers held it at the
            same time.
    """

    arena_bytes: int
    slab_bytes: int
    output_bytes: int

    @property
    def memory_bytes(self) -> int:
        """What the first call in flight needs."""
        return self.arena_bytes + self.slab_bytes + self.output_bytes


def lifetimes(uses: Sequence[Iterable[Root]]) -> dict[Root, tuple[int, int]]:
    """First and last use of every root.

    Args:
        uses: the roots that each step of a plan reads or writes, in order.

    Returns:
        root -> (index of the first step, index of the last step), both inclusive.
    """
    spans: dict[Root, tuple[int, int]] = {}
    for step, roots in enumerate(uses):
        for root in roots:
            first, _ = spans.get(root, (step, step))
            spans[root] = (first, step)
    return spans


def assign(
    spans: Mapping[Root, tuple[int, int]], *, alignment: int, in_arena: Sequence[str] = ("scratch",)
) -> MemoryPlan:
    """Set the offset of every root in the arena or the slab.

    Largest first, each at the lowest offset where it overlaps no root that is alive at the same time.

    Args:
        spans: see `lifetimes`.
        alignment: what every offset is a multiple of [B].
        in_arena: kinds of roots that lie in the arena; saved ones that don't lie in the slab.

    Source: "greedy by size for offset calculation" of Pisarchyk and Lee, "Efficient Memory Management for Deep Neural
    Net Inference", arXiv:2001.03288, algorithm 3.
    """
    placed: list[tuple[int, int, Root]] = []  # offset, end, root; sorted by offset
    arena = 0
    for root in sorted((r for r in spans if r.kind in in_arena), key=lambda r: -r.nbytes):
        size, (first, last) = _aligned(root.nbytes, alignment), spans[root]
        offset = 0
        for start, end, other in placed:
            other_first, other_last = spans[other]
            if other_last < first or last < other_first:
                continue
            if start - offset >= size:
                break
            offset = max(offset, end)
        root.offset = offset
        placed.append((offset, offset + size, root))
        placed.sort(key=lambda entry: entry[0])
        arena = max(arena, offset + size)
    slab = 0
    for root in spans:
        if root.kind == "saved":
            if root.kind not in in_arena:
                root.offset = slab
            slab += _aligned(root.nbytes, alignment)
    return MemoryPlan(arena, slab, sum(root.nbytes for root in spans if root.kind == "output"))


def _aligned(nbytes: int, alignment: int) -> int:
    return -(-max(nbytes, 1) // alignment) * alignment
