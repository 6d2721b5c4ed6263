"""Operations on rows on GPU-type devices. Formulas and layouts: the heads of the .cl files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from hetero.opencl.kernels_common import Matrix, as_matrix, ceil_div, one_dimension, require_dtype
from hetero.opencl.kernels_gpu_common import GpuLaunches, Group
from hetero.opencl.kernels_rows import REDUCTIONS, around, outer_inner, present

if TYPE_CHECKING:
    from hetero.opencl.ir import Argument, Launch, View
    from hetero.opencl.kernels_common import Scratch

_CHUNK_ROWS, _MAX_CHUNKS = 64, 64  # of the sums over rows: enough groups for a GPU from the shape alone
_TABLE_GROUPS = 1024  # that the gradient of an embedding divides the table among


class GpuNorms(GpuLaunches):
    """Layer norm."""

    def layer_norm(
        self,
        x: View,
        weight: View | None,
        bias: View | None,
        out: View,
        mean: View,
        rstd: View,
        *,
        width: int,
        eps: float,
        op: str = "native_layer_norm",
    ) -> list[Launch]:
        """As `kernels_rows.layer_norm`, of which these are the arguments and errors."""
        require_dtype(torch.float32, x, weight, bias, out, mean, rstd)
        m, o = as_matrix(x, width), as_matrix(out, width)
        group = self.row_group(width, m.rows)
        arguments: tuple[Argument, ...] = (
            *(x, weight or x, bias or x, out, mean, rstd, m.rows, width, m.row, m.column),
            *(*present(weight), *present(bias), o.row, o.column, float(eps)),
        )
        groups = ceil_div(m.rows, group[1]), 1
        return [self.launch(op, "layer_norm", "gpu_layer_norm.cl", arguments, groups, group, (out, mean, rstd))]

    def layer_norm_backward(
        self,
        grad: View,
        x: View,
        mean: View,
        rstd: View,
        weight: View | None,
        dx: View | None,
        dweight: View | None,
        dbias: View | None,
        *,
        width: int,
        residual: View | None = None,
        scratch: Scratch,
        op: str = "native_layer_norm_backward",
    ) -> list[Launch]:
        """As `kernels_rows.layer_norm_backward`, of which these are the arguments and errors."""
        require_dtype(torch.float32, grad, x, mean, rstd, weight, dx, dweight, dbias, residual)
        g, m = as_matrix(grad, width), as_matrix(x, width)
        launches: list[Launch] = []
        if dx is not None:
            d = as_matrix(dx, width)
            z = as_matrix(residual, width) if residual else Matrix(0, 0, 0, 0)
            group = self.row_group(width, m.rows)
            arguments: tuple[Argument, ...] = (
                *(grad, x, mean, rstd, weight or x, residual or x, dx, m.rows, width, g.row, g.column, m.row, m.column),
                *(*present(weight), int(residual is not None), z.row, z.column, d.row, d.column),
            )
            groups = ceil_div(m.rows, group[1]), 1
            launches.append(
                self.launch(op, "layer_norm_backward", "gpu_layer_norm.cl", arguments, groups, group, (dx,))
            )
        if dweight is not None or dbias is not None:
            launches += self._weights(grad, x, mean, rstd, dweight, dbias, g, m, width, scratch, op)
        return launches

    def _weights(
        self,
        grad: View,
        x: View,
        mean: View,
        rstd: View,
        dweight: View | None,
        dbias: View | None,
        g: Matrix,
        m: Matrix,
        width: int,
        scratch: Scratch,
        op: str,
    ) -> list[Launch]:
        """Sums over chunks of rows, then over the chunks."""
        chunk_rows = max(_CHUNK_ROWS, ceil_div(m.rows, _MAX_CHUNKS))
        chunks = ceil_div(m.rows, chunk_rows)
        partial = scratch(chunks * 2 * width * 4, "partial weight gradients")
        group = self.column_group(width, chunk_rows)
        sums = (grad, x, mean, rstd, partial, m.rows, width, chunk_rows, g.row, g.column, m.row, m.column)
        first = dweight or dbias or partial
        weights = (partial, dweight or first, dbias or first, chunks, width, *present(dweight), *present(dbias))
        writes = tuple(view for view in (dweight, dbias) if view is not None)
        line = self.row_group(width, 1)
        source = "gpu_layer_norm.cl"
        return [
            self.launch(
                *(op, "layer_norm_partial", source, sums, (ceil_div(width, group[0]), chunks), group, (partial,))
            ),
            self.launch(op, "layer_norm_weights", source, weights, (ceil_div(width, line[0]), 1), line, writes),
        ]


class GpuSoftmax(GpuLaunches):
    """Softmax and its logarithm; the arguments and errors are those of `kernels_rows`."""

    def softmax(self, x: View, out: View, *, dim: int, op: str = "_softmax") -> list[Launch]:
        """As `kernels_rows.softmax`."""
        return self._softmax(x, out, dim, 0, op)

    def log_softmax(self, x: View, out: View, *, dim: int, op: str = "_log_softmax") -> list[Launch]:
        """As `kernels_rows.log_softmax`."""
        return self._softmax(x, out, dim, 1, op)

    def softmax_backward(
        self, grad: View, output: View, dx: View, *, dim: int, op: str = "_softmax_backward_data"
    ) -> list[Launch]:
        """As `kernels_rows.softmax_backward`."""
        return self._softmax_backward(grad, output, dx, dim, 0, op)

    def log_softmax_backward(
        self, grad: View, output: View, dx: View, *, dim: int, op: str = "_log_softmax_backward_data"
    ) -> list[Launch]:
        """As `kernels_rows.log_softmax_backward`."""
        return self._softmax_backward(grad, output, dx, dim, 1, op)

    def _softmax(self, x: View, out: View, dim: int, is_log: int, op: str) -> list[Launch]:
        require_dtype(torch.float32, x, out)
        rows, width, inner = around(x, dim)
        group = self._row_group(rows, width, inner)
        arguments: tuple[Argument, ...] = (
            x,
            out,
            rows,
            width,
            inner,
            is_log,
            *outer_inner(x, dim),
            *outer_inner(out, dim),
        )
        groups = ceil_div(rows, group[1]), 1
        return [self.launch(op, "softmax", "gpu_softmax.cl", arguments, groups, group, (out,))]

    def _softmax_backward(self, grad: View, output: View, dx: View, dim: int, is_log: int, op: str) -> list[Launch]:
        require_dtype(torch.float32, grad, output, dx)
        rows, width, inner = around(output, dim)
        group = self._row_group(rows, width, inner)
        strides = (*outer_inner(grad, dim), *outer_inner(output, dim), *outer_inner(dx, dim))
        arguments: tuple[Argument, ...] = (grad, output, dx, rows, width, inner, is_log, *strides)
        groups = ceil_div(rows, group[1]), 1
        return [self.launch(op, "softmax_backward", "gpu_softmax.cl", arguments, groups, group, (dx,))]

    def _row_group(self, rows: int, width: int, inner: int) -> Group:
        """Rows that lie side by side are read side by side, if there are enough of them."""
        if inner > 1 and rows >= self.group_items:
            return 1, self.group_items
        return self.row_group(width, rows)


class GpuLoss(GpuLaunches):
    """Negative log-likelihood."""

    def nll_loss(
        self,
        log_probs: View,
        target: View,
        out: View,
        total_weight: View,
        *,
        ignore_index: int,
        reduction: Literal["none", "mean", "sum"],
        scratch: Scratch | None = None,
        op: str = "nll_loss_forward",
    ) -> list[Launch]:
        """As `kernels_rows.nll_loss`, of which these are the arguments and errors."""
        require_dtype(torch.float32, log_probs, out, total_weight)
        require_dtype(torch.int64, target)
        m = as_matrix(log_probs, log_probs.shape[-1])
        arguments: tuple[Argument, ...] = (
            *(log_probs, target, out, total_weight, m.rows, m.columns, ignore_index, REDUCTIONS[reduction]),
            *(m.row, m.column, *_line(target), *_line(out)),
        )
        group = self.row_group(m.rows, 1)
        writes = (out, total_weight)
        return [self.launch(op, "nll_loss", "gpu_cross_entropy.cl", arguments, (1, 1), group, writes)]

    def nll_loss_backward(
        self,
        grad: View,
        target: View,
        total_weight: View,
        dx: View,
        *,
        ignore_index: int,
        reduction: Literal["none", "mean", "sum"],
        op: str = "nll_loss_backward",
    ) -> list[Launch]:
        """As `kernels_rows.nll_loss_backward`, of which these are the arguments and errors."""
        require_dtype(torch.float32, grad, total_weight, dx)
        require_dtype(torch.int64, target)
        m = as_matrix(dx, dx.shape[-1])
        arguments: tuple[Argument, ...] = (
            *(grad, target, total_weight, dx, m.rows, m.columns, ignore_index, REDUCTIONS[reduction]),
            *(*_line(grad), *_line(target), m.row, m.column),
        )
        group = self.row_group(m.columns, 1)
        groups = m.rows, ceil_div(m.columns, group[0])
        return [self.launch(op, "nll_loss_backward", "gpu_cross_entropy.cl", arguments, groups, group, (dx,))]


class GpuEmbedding(GpuLaunches):
    """Embedding."""

    def embedding(self, weight: View, indices: View, out: View, *, op: str = "embedding") -> list[Launch]:
        """As `kernels_rows.embedding`, of which these are the arguments and errors."""
        require_dtype(torch.float32, weight, out)
        require_dtype(torch.int64, indices)
        m = as_matrix(out, weight.shape[1])
        arguments: tuple[Argument, ...] = (
            *(weight, indices, out, m.rows),
            *(*weight.shape, *weight.strides, *_line(indices), m.row, m.column),
        )
        group = self.row_group(m.columns, 1)
        groups = m.rows, ceil_div(m.columns, group[0])
        return [self.launch(op, "embedding", "gpu_embedding.cl", arguments, groups, group, (out,))]

    def embedding_backward(
        self,
        grad: View,
        indices: View,
        dweight: View,
        *,
        padding_idx: int = -1,
        scratch: Scratch | None = None,
        op: str = "embedding_dense_backward",
    ) -> list[Launch]:
        """As `kernels_rows.embedding_backward`, of which these are the arguments and errors."""
        require_dtype(torch.float32, grad, dweight)
        require_dtype(torch.int64, indices)
        m, rows = as_matrix(grad, dweight.shape[1]), dweight.shape[0]
        share = ceil_div(rows, _TABLE_GROUPS)
        arguments: tuple[Argument, ...] = (
            *(grad, indices, dweight, m.rows),
            *(*dweight.shape, share, padding_idx, m.row, m.column, *_line(indices), *dweight.strides),
        )
        group = self.row_group(m.columns, 1)
        groups = ceil_div(m.columns, group[0]), ceil_div(rows, share)
        return [self.launch(op, "embedding_backward", "gpu_embedding.cl", arguments, groups, group, (dweight,))]


def _line(view: View) -> tuple[int]:
    """The one stride of a vector of any shape."""
    return (one_dimension(view.shape, view.strides)[1],)
