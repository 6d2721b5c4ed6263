"""The operations that have hand-written kernels: functions of views that return launches.

This is the one place that says which kernels a device gets: `of(target)`. The functions below are those of CPU-type
devices (one work-item a work-group, explicit vectors). They are right on any device, but would use a small part of a
GPU, which has others of the same names and arguments: `kernels_gpu.GpuKernels`.

Common rules:

- Inputs may have any strides that collapse (else Unsupported), also 0; outputs must not overlap themselves.
- Nothing here launches on empty outputs: the caller skips them.
- How work is divided depends on shapes alone, so results are the same bits on any number of cores.
- `op` is what the launches are counted as. `scratch(nbytes, name)` gives temporary float32 memory.
- An index outside its table gives NaN, never a read out of bounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetero.opencl.errors import Unsupported
from hetero.opencl.kernels_attention import Dropout, attention, attention_backward, drop_threshold
from hetero.opencl.kernels_common import Scratch
from hetero.opencl.kernels_cpu import CpuKernels
from hetero.opencl.kernels_gemm import gemm
from hetero.opencl.kernels_gpu import GpuKernels
from hetero.opencl.kernels_index import Along, Combine, gather, scatter
from hetero.opencl.kernels_product import product
from hetero.opencl.kernels_reduce import column_sum, reduction
from hetero.opencl.kernels_rows import (
    embedding,
    embedding_backward,
    layer_norm,
    layer_norm_backward,
    log_softmax,
    log_softmax_backward,
    nll_loss,
    nll_loss_backward,
    softmax,
    softmax_backward,
)
from hetero.opencl.kernels_sort import sort

if TYPE_CHECKING:
    from hetero.opencl.steps import Target

__all__ = [
    "Along",
    "Combine",
    "Dropout",
    "Scratch",
    "Unsupported",
    "attention",
    "attention_backward",
    "column_sum",
    "drop_threshold",
    "embedding",
    "embedding_backward",
    "gather",
    "gemm",
    "layer_norm",
    "layer_norm_backward",
    "log_softmax",
    "log_softmax_backward",
    "nll_loss",
    "nll_loss_backward",
    "of",
    "product",
    "reduction",
    "scatter",
    "softmax",
    "softmax_backward",
    "sort",
]


def of(target: Target) -> CpuKernels:
    """The kernels of a device of this kind and these limits."""
    return GpuKernels(target) if target.kind == "gpu" else CpuKernels(target)
