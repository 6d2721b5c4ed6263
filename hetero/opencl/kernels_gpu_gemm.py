"""Matrix products on GPU-type devices: tiles, and in how many parts a long sum is divided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hetero.opencl.errors import Unsupported
from hetero.opencl.kernels_common import ceil_div, require_dtype
from hetero.opencl.kernels_gpu_common import GpuLaunches, Group

if TYPE_CHECKING:
    from hetero.opencl.ir import Argument, Epilogue, Launch, View
    from hetero.opencl.kernels_common import Scratch

_SOURCE = "gpu_gemm.cl"
_WANTED_GROUPS = 128  # about what fills a GPU; from the shapes alone, so that sums have one order on all devices
_LEAST_ITEMS = 64  # the hardware runs 32 or 64 at a time: smaller groups only where the device has no larger ones
_LEAST_SPLIT = 256  # of K: a shorter part isn't worth its second launch


@dataclass(frozen=True)
class _Tile:
    """What a work-group computes, named as in gpu_gemm.cl: rows, columns, depth; and its work-items."""

    TILE_M: int
    TILE_N: int
    TILE_K: int
    group: Group

    @property
    def items(self) -> int:
        """Work-items of the group."""
        return self.group[0] * self.group[1]

    @property
    def nbytes(self) -> int:
        """Local memory [B]."""
        return 4 * self.TILE_K * (self.TILE_M + self.TILE_N + 2)

    def count(self, M: int, N: int) -> int:
        """Tiles of a matrix."""
        return ceil_div(M, self.TILE_M) * ceil_div(N, self.TILE_N)


# The best one first. The first has 8 x 8 elements a work-item, half the local memory's traffic of the second.
_TILES = (
    _Tile(128, 128, 16, (16, 16)),
    _Tile(64, 64, 16, (16, 16)),
    _Tile(32, 32, 16, (8, 8)),
    _Tile(16, 16, 16, (4, 4)),
    _Tile(8, 8, 8, (2, 2)),
    _Tile(4, 4, 4, (1, 1)),
)


class GpuProducts(GpuLaunches):
    """Matrix products."""

    @property
    def gemm_dtypes(self) -> frozenset[torch.dtype]:
        """What `gemm` takes: float16 as well where the device has it, summed in float32."""
        return frozenset({torch.float32, torch.float16} if self.target.fp16 else {torch.float32})

    @property
    def gemm_takes_epilogue(self) -> bool:
        """Whether `gemm` has an argument `epilogue`."""
        return False

    def gemm(
        self,
        a: View,
        b: View,
        out: View,
        *,
        bias: View | None = None,
        residual: View | None = None,
        epilogue: Epilogue | None = None,
        local_memory_bytes: int,
        scratch: Scratch,
        op: str = "mm",
    ) -> list[Launch]:
        """As `kernels_gemm.gemm`, of which these are the arguments and errors; see `gemm_dtypes`."""
        if epilogue is not None:
            raise Unsupported("a matrix product with an epilogue")  # nobody asks: `gemm_takes_epilogue`
        require_dtype(out.dtype if out.dtype in self.gemm_dtypes else torch.float32, a, b, out, bias, residual)
        (M, K), N = a.shape[-2:], b.shape[-1]
        n_batch = out.shape[0] if len(out.shape) == 3 else 1
        if K == 0:  # an empty buffer is no argument, and out's is never read as a or b
            a = b = out
        tile = self._tile((M, N, K), n_batch, local_memory_bytes)
        splits, share = _splits(tile.count(M, N) * n_batch, K, tile.TILE_K)
        if splits == 1:
            return [self._product(a, b, out, (M, N, K), tile, 1, K, bias, residual, op)]
        partial = scratch(splits * n_batch * M * N * 4, "partial products")
        return [
            self._product(a, b, partial, (M, N, K), tile, splits, share, None, None, op, n_batch),
            self._combine(partial, out, splits, n_batch, bias, residual, op),
        ]

    def _tile(self, sizes: tuple[int, int, int], n_batch: int, local_memory_bytes: int) -> _Tile:
        """The largest tile that the device takes and that leaves it enough groups, or else the smallest useful one."""
        M, N, K = sizes
        legal = [tile for tile in _TILES if tile.items <= self.group_items and tile.nbytes <= local_memory_bytes]
        if not legal:
            least = _TILES[-1].nbytes
            raise Unsupported(f"it needs {least} bytes of local memory, the device has {local_memory_bytes}")
        useful = [tile for tile in legal if tile.items >= _LEAST_ITEMS] or legal[:1]
        for tile in useful:
            if tile.count(M, N) * n_batch * max(1, K // _LEAST_SPLIT) >= _WANTED_GROUPS:
                return tile
        return useful[-1]

    def _product(
        self,
        a: View,
        b: View,
        out: View,
        sizes: tuple[int, int, int],
        tile: _Tile,
        splits: int,
        share: int,
        bias: View | None,
        residual: View | None,
        op: str,
        n_batch: int = 0,
    ) -> Launch:
        M, N, _ = sizes
        n_batch = n_batch or (out.shape[0] if len(out.shape) == 3 else 1)
        place = (0, *_strides(out)) if splits == 1 else (n_batch * M * N, M * N, N, 1)
        arguments: tuple[Argument, ...] = (
            *(a, b, bias or a, residual or a, out, *sizes, splits, share),
            *(*_strides(a), *_strides(b), *place, *_epilogue(bias, residual)),
        )
        groups = n_batch * splits * ceil_div(N, tile.TILE_N), ceil_div(M, tile.TILE_M)
        defines = {"TILE_M": tile.TILE_M, "TILE_N": tile.TILE_N, "TILE_K": tile.TILE_K, **_types(a, out)}
        return self.launch(op, "gemm", _SOURCE, arguments, groups, tile.group, (out,), defines)

    def _combine(
        self, partial: View, out: View, splits: int, n_batch: int, bias: View | None, residual: View | None, op: str
    ) -> Launch:
        M, N = out.shape[-2:]
        arguments: tuple[Argument, ...] = (
            *(partial, bias or partial, residual or partial, out, M, N, splits, n_batch * M * N),
            *(*_strides(out), *_epilogue(bias, residual)),
        )
        group = self.column_group(N, M)
        groups = n_batch * ceil_div(N, group[0]), ceil_div(M, group[1])
        return self.launch(op, "gemm_combine", _SOURCE, arguments, groups, group, (out,), _types(out, out))


def _splits(tiles: int, K: int, unit: int) -> tuple[int, int]:
    """(parts, size of a part) of K: more than one where there are few tiles for a long sum."""
    wanted = min(ceil_div(_WANTED_GROUPS, tiles), K // _LEAST_SPLIT)
    if wanted <= 1:
        return 1, K
    share = ceil_div(ceil_div(K, wanted), unit) * unit
    return ceil_div(K, share), share


def _types(operand: View, out: View) -> dict[str, int | str]:
    """Build constants of the types in memory."""
    if torch.float16 not in (operand.dtype, out.dtype):
        return {}
    names = {torch.float32: "float", torch.float16: "half"}
    return {"USES_HALF": 1, "REAL": names[operand.dtype], "OUT_REAL": names[out.dtype]}


def _strides(view: View) -> tuple[int, int, int]:
    """Strides of batch, row and column; of dimensions that aren't there or have one element: 0."""
    strides = [0 if size == 1 else stride for size, stride in zip(view.shape, view.strides, strict=True)]
    batch, row, column = (0, *strides)[-3:]
    return batch, row, column


def _epilogue(bias: View | None, residual: View | None) -> tuple[int, ...]:
    """Whether there is a bias, its stride, whether there is a residual, its strides."""
    return (
        *((1, bias.strides[-1]) if bias else (0, 0)),
        *((1, *_strides(residual)) if residual else (0, 0, 0, 0)),
    )
