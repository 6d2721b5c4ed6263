"""Operations on rows: layer norm, softmax, the loss, embeddings. Formulas and layouts: the heads of the .cl files."""

from __future__ import annotations

from math import prod
from typing import Literal

import torch

from hetero.opencl.ir import Argument, Launch, View
from hetero.opencl.kernels_common import Matrix, Scratch, as_matrix, ceil_div, one_dimension, require_dtype, split_rows

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_EMBEDDING_GROUPS = 8
_UNIT = 16  # columns are divided in multiples of the widest vector


def layer_norm(
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
    """Layer normalization over the trailing dimensions.

    Args:
        x: (..., D) float32, D = width.
        weight: (D) or None for 1.
        bias: (D) or None for 0.
        out: like x.
        mean: one element a row, contiguous.
        rstd: one element a row, contiguous.
        width: number of elements of the normalized dimensions.
        eps: added to the variance.
        op: what the launch is counted as.

    Raises:
        Unsupported: rows or columns without a common stride, or not float32.
    """
    require_dtype(torch.float32, x, weight, bias, out, mean, rstd)
    m, o = as_matrix(x, width), as_matrix(out, width)
    groups, share = split_rows(m.rows, width)
    arguments: tuple[Argument, ...] = (
        *(x, weight or x, bias or x, out, mean, rstd, m.rows, width, share, m.row, m.column),
        *(*present(weight), *present(bias), o.row, o.column, float(eps)),
    )
    defines = plain(width, m.column, o.column, *vector_columns(weight, bias))
    return [Launch(op, "layer_norm", "layer_norm.cl", arguments, (groups,), (1,), (out, mean, rstd), defines)]


def layer_norm_backward(
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
    """Gradients of `layer_norm`; what is None is not computed.

    Args:
        grad: (..., D), gradient of the output.
        x: the input, same shape.
        mean: as `layer_norm` gave it.
        rstd: as `layer_norm` gave it.
        weight: (D) or None for 1.
        dx: like x, or None.
        dweight: (D) or None.
        dbias: (D) or None.
        width: number of elements of the normalized dimensions.
        residual: like x: added to dx; may be dx itself.
        scratch: gives memory for partial sums.
        op: what the launches are counted as.

    Raises:
        Unsupported: rows or columns without a common stride, or not float32.
    """
    require_dtype(torch.float32, grad, x, mean, rstd, weight, dx, dweight, dbias, residual)
    g, m = as_matrix(grad, width), as_matrix(x, width)
    d = as_matrix(dx, width) if dx else Matrix(0, 0, 0, 0)
    z = as_matrix(residual, width) if residual else Matrix(0, 0, 0, 0)
    groups, share = split_rows(m.rows, width)
    padded = ceil_div(width, _UNIT) * _UNIT
    has_partial = dweight is not None or dbias is not None
    partial = scratch(groups * 2 * padded * 4, "partial weight gradients") if has_partial else None
    somewhere = dx or partial
    if somewhere is None:
        return []
    arguments: tuple[Argument, ...] = (
        *(grad, x, mean, rstd, weight or x, residual or x, dx or somewhere, partial or somewhere),
        *(m.rows, width, share, padded, g.row, g.column, m.row, m.column, *present(weight)),
        *(int(residual is not None), z.row, z.column, int(dx is not None), d.row, d.column, int(has_partial)),
    )
    writes = tuple(view for view in (dx, partial) if view is not None)
    columns = [m.column for m, view in ((d, dx), (z, residual)) if view is not None]
    defines = plain(width, g.column, m.column, *columns, *vector_columns(weight))
    launches = [Launch(op, "layer_norm_backward", "layer_norm.cl", arguments, (groups,), (1,), writes, defines)]
    if partial is not None:
        first = dweight or dbias or partial
        weights = (
            partial,
            dweight or first,
            dbias or first,
            groups,
            width,
            padded,
            *present(dweight),
            *present(dbias),
        )
        writes = tuple(view for view in (dweight, dbias) if view is not None)
        grid = (ceil_div(width, _UNIT),)
        defines = plain(width, *vector_columns(dweight, dbias))
        launches.append(Launch(op, "layer_norm_weights", "layer_norm.cl", weights, grid, (1,), writes, defines))
    return launches


def softmax(x: View, out: View, *, dim: int, op: str = "_softmax") -> list[Launch]:
    """Softmax along a dimension.

    Args:
        x: float32, any shape.
        out: same shape.
        dim: the dimension.
        op: what the launch is counted as.

    Raises:
        Unsupported: the dimensions before, or after, `dim` have no common stride.
    """
    return _softmax(x, out, dim, 0, op)


def log_softmax(x: View, out: View, *, dim: int, op: str = "_log_softmax") -> list[Launch]:
    """Logarithm of the softmax along a dimension; arguments and errors as `softmax`."""
    return _softmax(x, out, dim, 1, op)


def softmax_backward(
    grad: View, output: View, dx: View, *, dim: int, op: str = "_softmax_backward_data"
) -> list[Launch]:
    """Gradient of `softmax`.

    Args:
        grad: gradient of the output.
        output: what `softmax` gave.
        dx: gradient of the input.
        dim: the dimension.
        op: what the launch is counted as.

    Raises:
        Unsupported: as `softmax`.
    """
    return _softmax_backward(grad, output, dx, dim, 0, op)


def log_softmax_backward(
    grad: View, output: View, dx: View, *, dim: int, op: str = "_log_softmax_backward_data"
) -> list[Launch]:
    """Gradient of `log_softmax`; arguments and errors as `softmax_backward`."""
    return _softmax_backward(grad, output, dx, dim, 1, op)


def _softmax(x: View, out: View, dim: int, is_log: int, op: str) -> list[Launch]:
    require_dtype(torch.float32, x, out)
    rows, width, inner = around(x, dim)
    groups, share = split_rows(rows, width)
    strides = (*outer_inner(x, dim), *outer_inner(out, dim))
    arguments = (x, out, rows, width, inner, share, is_log, *strides)
    return [Launch(op, "softmax", "softmax.cl", arguments, (groups,), (1,), (out,), plain(width, *strides[1::3]))]


def _softmax_backward(grad: View, output: View, dx: View, dim: int, is_log: int, op: str) -> list[Launch]:
    require_dtype(torch.float32, grad, output, dx)
    rows, width, inner = around(output, dim)
    groups, share = split_rows(rows, width)
    strides = (*outer_inner(grad, dim), *outer_inner(output, dim), *outer_inner(dx, dim))
    arguments = (grad, output, dx, rows, width, inner, share, is_log, *strides)
    return [
        Launch(op, "softmax_backward", "softmax.cl", arguments, (groups,), (1,), (dx,), plain(width, *strides[1::3]))
    ]


def around(view: View, dim: int) -> tuple[int, int, int]:
    """(rows, width, how many rows lie after `dim`)."""
    shape = view.shape or (1,)
    dim %= len(shape)
    inner = prod(shape[dim + 1 :])
    return prod(shape[:dim]) * inner, shape[dim], inner


def outer_inner(view: View, dim: int) -> tuple[int, int, int]:
    """Strides of the dimensions before `dim`, of `dim`, and after it."""
    shape, strides = (view.shape, view.strides) if view.shape else ((1,), (0,))
    dim %= len(shape)
    outer = one_dimension(shape[:dim], strides[:dim])[1]
    inner = one_dimension(shape[dim + 1 :], strides[dim + 1 :])[1]
    return outer, strides[dim], inner


def nll_loss(
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
    """Negative log-likelihood; a target out of range gives NaN.

    Args:
        log_probs: (R, V) or (V) float32.
        target: (R) or () int64.
        out: () or, without reduction, (R).
        total_weight: (), the number of rows that count (0 without reduction, as torch).
        ignore_index: rows with this target don't count.
        reduction: what to do with the losses of the rows.
        scratch: not needed; there so that all kernels of a forward pass are called alike.
        op: what the launch is counted as.

    Raises:
        Unsupported: another dtype.
    """
    require_dtype(torch.float32, log_probs, out, total_weight)
    require_dtype(torch.int64, target)
    m = as_matrix(log_probs, log_probs.shape[-1])
    arguments: tuple[Argument, ...] = (
        *(log_probs, target, out, total_weight, m.rows, m.columns, ignore_index, REDUCTIONS[reduction]),
        *(m.row, m.column, one_dimension(target.shape, target.strides)[1], one_dimension(out.shape, out.strides)[1]),
    )
    return [
        Launch(
            op, "nll_loss", "cross_entropy.cl", arguments, (1,), (1,), (out, total_weight), plain(m.columns, m.column)
        )
    ]


def nll_loss_backward(
    grad: View,
    target: View,
    total_weight: View,
    dx: View,
    *,
    ignore_index: int,
    reduction: Literal["none", "mean", "sum"],
    op: str = "nll_loss_backward",
) -> list[Launch]:
    """Gradient of `nll_loss`.

    Args:
        grad: () or, without reduction, (R).
        target: (R) or () int64.
        total_weight: as `nll_loss` gave it.
        dx: (R, V) or (V), gradient of the log-probabilities.
        ignore_index: as forward.
        reduction: as forward.
        op: what the launch is counted as.

    Raises:
        Unsupported: another dtype.
    """
    require_dtype(torch.float32, grad, total_weight, dx)
    require_dtype(torch.int64, target)
    m = as_matrix(dx, dx.shape[-1])
    groups, share = split_rows(m.rows, m.columns)
    arguments: tuple[Argument, ...] = (
        *(grad, target, total_weight, dx, m.rows, m.columns, share, ignore_index, REDUCTIONS[reduction]),
        *(one_dimension(grad.shape, grad.strides)[1], one_dimension(target.shape, target.strides)[1], m.row, m.column),
    )
    return [
        Launch(
            op, "nll_loss_backward", "cross_entropy.cl", arguments, (groups,), (1,), (dx,), plain(m.columns, m.column)
        )
    ]


def embedding(weight: View, indices: View, out: View, *, op: str = "embedding") -> list[Launch]:
    """Rows of a table; an index out of range gives NaN.

    Args:
        weight: (V, D) float32.
        indices: (...) int64.
        out: (..., D).
        op: what the launch is counted as.

    Raises:
        Unsupported: another dtype, or indices or rows without a common stride.
    """
    require_dtype(torch.float32, weight, out)
    require_dtype(torch.int64, indices)
    m = as_matrix(out, weight.shape[1])
    groups, share = split_rows(m.rows, m.columns)
    arguments: tuple[Argument, ...] = (
        *(weight, indices, out, m.rows, weight.shape[0], weight.shape[1], share, weight.strides[0], weight.strides[1]),
        *(one_dimension(indices.shape, indices.strides)[1], m.row, m.column),
    )
    defines = plain(m.columns, weight.strides[1], m.column)
    return [Launch(op, "embedding", "embedding.cl", arguments, (groups,), (1,), (out,), defines)]


def embedding_backward(
    grad: View,
    indices: View,
    dweight: View,
    *,
    padding_idx: int = -1,
    scratch: Scratch | None = None,
    op: str = "embedding_dense_backward",
) -> list[Launch]:
    """Gradient of an embedding's table; every element of it is written.

    Args:
        grad: (..., D) float32.
        indices: (...) int64.
        dweight: (V, D).
        padding_idx: the row that gets no gradient; -1: none.
        scratch: not needed, as in `nll_loss`.
        op: what the launch is counted as.

    Raises:
        Unsupported: another dtype, or indices or rows without a common stride.
    """
    require_dtype(torch.float32, grad, dweight)
    require_dtype(torch.int64, indices)
    m = as_matrix(grad, dweight.shape[1])
    share = ceil_div(ceil_div(m.columns, _EMBEDDING_GROUPS), _UNIT) * _UNIT
    arguments: tuple[Argument, ...] = (
        *(grad, indices, dweight, m.rows, dweight.shape[0], dweight.shape[1], share, padding_idx, m.row, m.column),
        *(one_dimension(indices.shape, indices.strides)[1], dweight.strides[0], dweight.strides[1]),
    )
    grid = (ceil_div(m.columns, share),)
    defines = plain(m.columns, m.column, dweight.strides[1])
    return [Launch(op, "embedding_backward", "embedding.cl", arguments, grid, (1,), (dweight,), defines)]


def plain(width: int, *strides: int) -> dict[str, int]:
    """PLAIN of the kernels for rows of this width whose columns have these strides."""
    is_contiguous = all(stride == 1 for stride in strides)
    return {"PLAIN": 0 if not is_contiguous else 1 if width % _UNIT else 2}


def vector_columns(*vectors: View | None) -> list[int]:
    """Strides of the vectors that are there."""
    return [one_dimension(vector.shape, vector.strides)[1] for vector in vectors if vector is not None]


def present(vector: View | None) -> tuple[int, int]:
    """(1, stride) of a vector that is there, (0, 0) otherwise."""
    return (0, 0) if vector is None else (1, one_dimension(vector.shape, vector.strides)[1])
