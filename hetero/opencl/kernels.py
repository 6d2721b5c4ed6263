"""The operations that have hand-written kernels: functions of views that return launches.

This is the one place that says which kernels a device gets: the ones below are for CPU-type devices (one work-item a
work-group, explicit vectors). They are right on any device, but on a GPU they would use a small part of it.

Common rules:

- Inputs may have any strides that collapse (else Unsupported), also 0; outputs must not overlap themselves.
- Nothing here launches on empty outputs: the caller skips them.
- How work is divided depends on shapes alone, so results are the same bits on any number of cores.
- `op` is what the launches are counted as. `scratch(nbytes, name)` gives temporary float32 memory.
- An index outside its table gives NaN, never a read out of bounds.
"""

from hetero.opencl.errors import Unsupported
from hetero.opencl.kernels_attention import attention, attention_backward
from hetero.opencl.kernels_common import Scratch
from hetero.opencl.kernels_gemm import gemm
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

__all__ = [
    "Scratch",
    "Unsupported",
    "attention",
    "attention_backward",
    "column_sum",
    "embedding",
    "embedding_backward",
    "gemm",
    "layer_norm",
    "layer_norm_backward",
    "log_softmax",
    "log_softmax_backward",
    "nll_loss",
    "nll_loss_backward",
    "reduction",
    "softmax",
    "softmax_backward",
]
