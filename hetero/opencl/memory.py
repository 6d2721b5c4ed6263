"""Where the roots of a plan lie: first and last use of each, and offsets in the arena (scratch) and the slab (saved).

Scratch roots live within one call: two of them share memory when no launch needs both. Saved roots live until the
backward pass, so they share nothing. Inputs, constants and outputs have memory of their own and get no offset. Where a
call's data is copied to the device and back, all but constants lie in the arena, as scratch does (copied.py).

Devices limit the size of one buffer, PoCL from PyPI to 2 GiB. So arena and slab are cut into pieces of at most that
size, each a buffer of its own, and no root lies across a cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hetero.opencl.errors import OutOfDeviceMemory

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from hetero.opencl.ir import Root
    from hetero.opencl.platforms import Capabilities

_ONE_PIECE = 1 << 62
_NAMED = 5  # buffers that an error names
SMALLER = "a smaller batch or micro-batch, or a placement with less on this device"


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes [B] known before the first launch.

    Attributes:
        arena_bytes: shared by all calls on the device's queue, one after the other.
        slab_bytes: of each call in flight, on the host.
        output_bytes: of the outputs of one call, on the host; kept for later calls as often as callers held it at the
            same time.
        constant_bytes: of the graph's own tensors.
        piece_bytes: arena and slab are cut at multiples of it.
    """

    arena_bytes: int
    slab_bytes: int
    output_bytes: int
    constant_bytes: int = 0
    piece_bytes: int = _ONE_PIECE

    @property
    def memory_bytes(self) -> int:
        """What the first call in flight needs."""
        return self.arena_bytes + self.slab_bytes + self.output_bytes + self.constant_bytes


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
    spans: Mapping[Root, tuple[int, int]],
    *,
    alignment: int,
    in_arena: Sequence[str] = ("scratch",),
    piece_bytes: int = _ONE_PIECE,
) -> MemoryPlan:
    """Set the offset of every root in the arena or the slab.

    Largest first, each at the lowest offset where it overlaps no root that is alive at the same time.

    Args:
        spans: see `lifetimes`.
        alignment: what every offset is a multiple of [B].
        in_arena: kinds of roots that lie in the arena; saved ones that don't lie in the slab.
        piece_bytes: no root lies across a multiple of it [B]; itself a multiple of the alignment. A root that is larger
            lies across several: `require_fit` refuses the plan.

    Source: "greedy by size for offset calculation" of Pisarchyk and Lee, "Efficient Memory Management for Deep Neural
    Net Inference", arXiv:2001.03288, algorithm 3.
    """
    placed: list[tuple[int, int, Root]] = []  # offset, end, root; sorted by offset
    arena = 0
    for root in sorted((r for r in spans if r.kind in in_arena), key=lambda r: -r.nbytes):
        size, (first, last) = aligned(root.nbytes, alignment), spans[root]
        offset = 0
        for start, end, other in placed:
            other_first, other_last = spans[other]
            if other_last < first or last < other_first:
                continue
            if start - offset >= size:
                break
            offset = within_piece(max(offset, end), size, piece_bytes)
        root.offset = offset
        placed.append((offset, offset + size, root))
        placed.sort(key=lambda entry: entry[0])
        arena = max(arena, offset + size)
    slab = 0
    for root in spans:
        if root.kind == "saved":
            size = aligned(root.nbytes, alignment)
            slab = within_piece(slab, size, piece_bytes)
            if root.kind not in in_arena:
                root.offset = slab
            slab += size
    output = sum(root.nbytes for root in spans if root.kind == "output")
    return MemoryPlan(arena, slab, output, sum(r.nbytes for r in spans if r.kind == "constant"), piece_bytes)


def within_piece(offset: int, size: int, piece_bytes: int) -> int:
    """The offset, or the next cut where something of this size would lie across one."""
    return offset if offset % piece_bytes + size <= piece_bytes else -(-offset // piece_bytes) * piece_bytes


def pieces(nbytes: int, piece_bytes: int) -> list[tuple[int, int]]:
    """(offset, size) of the pieces of so much memory [B]."""
    return [(start, min(piece_bytes, nbytes - start)) for start in range(0, nbytes, piece_bytes)]


def piece_bytes_of(capabilities: Capabilities, alignment: int) -> int:
    """The largest piece that a device allows [B]."""
    return max(capabilities.max_allocation_bytes // alignment, 1) * alignment


def require_fit(plan: MemoryPlan, roots: Collection[Root], needed_bytes: int, name: str, limits: Capabilities) -> None:
    """Refuse, before anything is launched, what the device has no room for.

    Args:
        plan: of the roots.
        roots: all that the plan's steps use.
        needed_bytes: what of the plan lies on the device [B].
        name: of the device.
        limits: of the device.

    Raises:
        OutOfDeviceMemory: all together, or one buffer alone; the message names the largest.
    """
    largest = max(roots, key=lambda root: root.nbytes, default=None)
    if largest is not None and largest.nbytes > min(limits.max_allocation_bytes, plan.piece_bytes):
        raise OutOfDeviceMemory(
            f"{name} can't hold a buffer of {largest.nbytes} bytes: {largest.name or largest.kind}",
            found=f"at most {limits.max_allocation_bytes} bytes in one piece, {limits.memory_bytes} bytes in all",
            remedy=SMALLER,
        )
    if needed_bytes > limits.memory_bytes:
        raise OutOfDeviceMemory(
            f"a compiled graph needs {needed_bytes} bytes on {name}, which has {limits.memory_bytes}",
            found=largest_buffers(roots),
            remedy=SMALLER,
        )


def largest_buffers(roots: Iterable[Root]) -> str:
    """The largest ones with their sizes, as words of an error."""
    largest = sorted(roots, key=lambda root: -root.nbytes)[:_NAMED]
    buffers = "; ".join(f"{root.nbytes} bytes: {root.name or root.kind}" for root in largest)
    return f"the largest buffers, some of which share memory: {buffers}"


def aligned(nbytes: int, alignment: int) -> int:
    """The next multiple of the alignment, at least one [B]."""
    return -(-max(nbytes, 1) // alignment) * alignment
