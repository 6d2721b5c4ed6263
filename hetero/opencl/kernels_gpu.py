"""The kernels of a GPU-type device."""

from __future__ import annotations

from hetero.opencl.kernels_gpu_attention import GpuAttention
from hetero.opencl.kernels_gpu_gemm import GpuProducts
from hetero.opencl.kernels_gpu_reduce import GpuReductions
from hetero.opencl.kernels_gpu_rows import GpuEmbedding, GpuLoss, GpuNorms, GpuSoftmax
from hetero.opencl.kernels_index import GpuIndexing


class GpuKernels(GpuProducts, GpuAttention, GpuNorms, GpuSoftmax, GpuLoss, GpuEmbedding, GpuReductions, GpuIndexing):
    """Work-groups of many work-items with tiles in local memory; what has no such form is the CPU's, and right."""
