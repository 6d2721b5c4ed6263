"""What the kernels of GPU-type devices share: work-groups that a device allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetero.opencl.ir import Argument, Launch, View
from hetero.opencl.kernels_cpu import CpuKernels

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hetero.opencl.steps import Target

_GROUP_ITEMS = 256  # every GPU allows that many, and several such groups share a compute unit

Group = tuple[int, int]
"""GROUP_X and GROUP_Y of gpu_common.cl: powers of two."""


class GpuLaunches(CpuKernels):
    """The limits of a device, and launches within them.

    Attributes:
        group_items: most work-items of a group, a power of two.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.group_items = min(_GROUP_ITEMS, _power_below(target.max_work_group_size))

    def row_group(self, width: int, rows: int) -> Group:
        """A group for rows that are `width` elements wide: as many work-items a row as it can use."""
        x = min(self.group_items, _power_above(width))
        return x, min(self.group_items // x, _power_above(rows))

    def column_group(self, columns: int, rows: int) -> Group:
        """A group for columns: work-items side by side for coalesced access, the others share the rows."""
        x = min(self.group_items, 32, _power_above(columns))
        return x, min(self.group_items // x, _power_above(rows))

    def launch(
        self,
        op: str,
        kernel: str,
        source: str,
        arguments: tuple[Argument, ...],
        groups: tuple[int, int],
        group: Group,
        writes: tuple[View, ...],
        defines: Mapping[str, int | str] | None = None,
    ) -> Launch:
        """A launch of groups x group work-items."""
        size = groups[0] * group[0], groups[1] * group[1]
        constants = {"GROUP_X": group[0], "GROUP_Y": group[1], "SUBGROUPS": int(self.target.subgroups)}
        return Launch(op, kernel, source, arguments, size, group, writes, {**constants, **(defines or {})})


def _power_above(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def _power_below(n: int) -> int:
    """The largest power of two that is not above n."""
    return 1 << (max(n, 1).bit_length() - 1)
