"""Decompositions of indexing, padding and products into operations that have kernels, where PyTorch has none.

Each is the operation's definition in PyTorch's documentation. NotImplemented leaves an operation whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._decomp import decomposition_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

aten = torch.ops.aten


def _addbmm(x: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """The sum over matrices of a batch is one product of matrices side by side."""
    wide = batch1.transpose(0, 1).flatten(1)
    return torch.addmm(x, wide, batch2.flatten(0, 1), beta=beta, alpha=alpha)


def _addmv(x: Tensor, matrix: Tensor, vector: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return torch.addmm(x.unsqueeze(-1), matrix, vector.unsqueeze(-1), beta=beta, alpha=alpha).squeeze(-1)


def _trilinear(
    i1: Tensor,
    i2: Tensor,
    i3: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """A product of three tensors, each with dimensions put in, summed over some."""
    for d in expand1:
        i1 = i1.unsqueeze(d)
    for d in expand2:
        i2 = i2.unsqueeze(d)
    for d in expand3:
        i3 = i3.unsqueeze(d)
    result = i1 * i2 * i3
    return result.sum(list(sumdim)) if sumdim else result


def _take(x: Tensor, index: Tensor) -> Any:
    return _at(x.reshape(-1), index)


def _at(x: Tensor, index: Tensor) -> Any:
    """x[index]; written like that, a scalar index would be looked at while the graph is made."""
    return aten.index(x, [index])


def _put(x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Any:
    flat = x.reshape(-1).index_put((index.reshape(-1),), source.reshape(-1), accumulate)
    return aten.copy(torch.empty_like(x), flat.reshape(x.shape))


def _index_reduce(x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True) -> Any:
    if x.dim() == 0:
        return aten.scatter_reduce(x, 0, index.view(()), source.view(()), _name(reduce), include_self=include_self)
    shape = [1] * x.dim()
    shape[dim] = -1
    wide = index.view(shape).expand(source.shape)
    return aten.scatter_reduce(x, dim, wide, source, _name(reduce), include_self=include_self)


def _name(reduce: str) -> str:
    return reduce.replace("mul", "prod") if reduce in ("mul", "multiply") else reduce


def _scatter_mean(x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True) -> Any:
    """A mean as a sum and a number of terms; other reductions have a kernel."""
    if reduce != "mean":
        return NotImplemented
    total = aten.scatter_reduce(x, dim, index, src, "sum", include_self=include_self)
    ones = torch.ones_like(x) if include_self else torch.zeros_like(x)
    count = ones.scatter_add(dim, index, torch.ones_like(src)).clamp(min=1)
    return total / count if x.dtype.is_floating_point else torch.div(total, count, rounding_mode="floor")


def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    """The kernel is for float32 and int64."""
    if weight.dtype == torch.float32 and indices.dtype == torch.int64:
        return NotImplemented
    return weight.index_select(0, indices.reshape(-1)).view(*indices.shape, weight.shape[1])


def _embedding_gradient(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Any:
    """The kernel is for float32 and int64, without a scale: how often an index occurs."""
    is_plain = grad.dtype == torch.float32 and indices.dtype == torch.int64
    if is_plain and not scale_grad_by_freq:
        return NotImplemented
    if scale_grad_by_freq:
        count = grad.new_zeros(num_weights).index_put((indices,), grad.new_ones(indices.shape), accumulate=True)
        grad = grad / _at(count, indices).unsqueeze(-1)
    grad = torch.where((indices == padding_idx).unsqueeze(-1), 0, grad)
    return grad.new_zeros((num_weights, grad.shape[-1])).index_put((indices,), grad, accumulate=True)


def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Any:
    """The n-th element that the mask selects is the n-th of the source."""
    shape = aten.broadcast_tensors([x, mask])[0].shape
    x, mask = x.expand(shape), mask.expand(shape)
    if source.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    at = mask.reshape(-1).to(torch.int64).cumsum(0) - 1
    chosen = _at(source.reshape(-1), at.clamp(min=0)).view(x.shape)
    return torch.where(mask, chosen, x).contiguous()


def _masked_scatter_backward(grad: Tensor, mask: Tensor, sizes: Sequence[int]) -> Tensor:
    result = grad.new_zeros(sizes)
    if result.numel() == 0 or grad.numel() == 0:
        return result
    mask = mask.expand_as(grad).reshape(-1)
    at = (mask.to(torch.int64).cumsum(0) - 1).clamp(min=0)
    chosen = torch.where(mask, grad.reshape(-1), 0)
    return result.view(-1).index_put((at,), chosen, accumulate=True).view(sizes)


def _replication_pad_backward(grad: Tensor, x: Tensor, padding: Sequence[int]) -> Tensor:
    """What was copied from an element adds to its gradient; one dimension after the other, the last first."""
    for k, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        d = x.dim() - 1 - k
        size = x.shape[d]
        index = torch.arange(-before, size + after, device=grad.device).clamp(0, size - 1)
        shape = [size if e == d else n for e, n in enumerate(grad.shape)]
        grad = grad.new_zeros(shape).index_add(d, index, grad)
    return grad


def _search_sorted(
    sequence: Tensor,
    values: Tensor | float,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """Binary search in every row, by as many steps as the row's length has bits; NaN goes to the end."""
    is_right = right or side == "right"
    if not isinstance(values, torch.Tensor):
        values = torch.tensor(values, device=sequence.device)
    if sorter is not None:
        sequence = sequence.gather(-1, sorter)
    size, dtype = sequence.shape[-1], torch.int32 if out_int32 else torch.int64
    low = torch.zeros(values.shape, dtype=torch.int64, device=sequence.device)
    high = torch.full_like(low, size)
    for _ in range(size.bit_length()):
        middle = (low + high) >> 1
        at = middle.clamp(max=size - 1)
        probe = _at(sequence, at) if sequence.dim() == 1 else sequence.gather(-1, at)
        is_above = probe > values if is_right else probe >= values
        is_open = low < high
        low = torch.where(is_open & ~is_above, middle + 1, low)
        high = torch.where(is_open & is_above, middle, high)
    return low.to(dtype)


def _bucketize(values: Tensor | float, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    return _search_sorted(boundaries, values, out_int32=out_int32, right=right)


INDEXING: dict[Any, Callable[..., Any]] = {
    aten.addbmm.default: _addbmm,
    aten.addmv.default: _addmv,
    aten._trilinear.default: _trilinear,
    aten.take.default: _take,
    aten.put.default: _put,
    aten.index_reduce.default: _index_reduce,
    aten.scatter_reduce.two: _scatter_mean,
    aten.embedding.default: _embedding,
    aten.embedding_dense_backward.default: _embedding_gradient,
    aten.masked_scatter.default: _masked_scatter,
    aten.masked_scatter_backward.default: _masked_scatter_backward,
    aten.replication_pad1d_backward.default: _replication_pad_backward,
    aten.replication_pad2d_backward.default: _replication_pad_backward,
    aten.replication_pad3d_backward.default: _replication_pad_backward,
    aten.searchsorted.Tensor: _search_sorted,
    aten.searchsorted.Scalar: _search_sorted,
    aten.bucketize.Tensor: _bucketize,
    aten.bucketize.Scalar: _bucketize,
    # PyTorch's own, which it doesn't count among those into core ATen
    **{
        op: decomposition_table[op]
        for op in (
            aten.tril_indices.default,
            aten.triu_indices.default,
            aten.as_strided_copy.default,
            aten.narrow_copy.default,
            aten.unbind_copy.int,
            aten.view_copy.default,
        )
    },
}
