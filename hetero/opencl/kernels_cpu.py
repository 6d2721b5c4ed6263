"""The kernels of a CPU-type device as a table that other tables refine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hetero.opencl import (
    kernels_attention,
    kernels_gemm,
    kernels_index,
    kernels_product,
    kernels_reduce,
    kernels_rows,
    kernels_sort,
)

if TYPE_CHECKING:
    from hetero.opencl.ir import Epilogue, Launch, View
    from hetero.opencl.kernels_common import Scratch
    from hetero.opencl.steps import Target


class CpuKernels:
    """One work-item a work-group, explicit vectors: for CPU-type devices, right on any other.

    Args:
        target: of the device.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    @property
    def gemm_dtypes(self) -> frozenset[torch.dtype]:
        """What `gemm` takes."""
        return frozenset({torch.float32})

    @property
    def gemm_takes_epilogue(self) -> bool:
        """Whether `gemm` has an argument `epilogue`."""
        return True

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
        """`kernels_gemm.gemm` for the compute units of this device."""
        return kernels_gemm.gemm(
            *(a, b, out),
            bias=bias,
            residual=residual,
            epilogue=epilogue,
            local_memory_bytes=local_memory_bytes,
            compute_units=self.target.compute_units,
            scratch=scratch,
            op=op,
        )

    product = staticmethod(kernels_product.product)
    attention = staticmethod(kernels_attention.attention)
    attention_backward = staticmethod(kernels_attention.attention_backward)
    layer_norm = staticmethod(kernels_rows.layer_norm)
    layer_norm_backward = staticmethod(kernels_rows.layer_norm_backward)
    softmax = staticmethod(kernels_rows.softmax)
    softmax_backward = staticmethod(kernels_rows.softmax_backward)
    log_softmax = staticmethod(kernels_rows.log_softmax)
    log_softmax_backward = staticmethod(kernels_rows.log_softmax_backward)
    nll_loss = staticmethod(kernels_rows.nll_loss)
    nll_loss_backward = staticmethod(kernels_rows.nll_loss_backward)
    embedding = staticmethod(kernels_rows.embedding)
    embedding_backward = staticmethod(kernels_rows.embedding_backward)
    reduction = staticmethod(kernels_reduce.reduction)
    column_sum = staticmethod(kernels_reduce.column_sum)
    gather = staticmethod(kernels_index.gather)
    scatter = staticmethod(kernels_index.scatter)
    sort = staticmethod(kernels_sort.sort)
