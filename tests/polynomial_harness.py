"""Compiled functions that are polynomials with positive coefficients, against eager torch in float64.

All data movement, indexing and matrix products are of this kind. A sum of n products in float32 is off by at most
n eps/2 times the sum of the absolute products (kernel_harness.py), and that sum is what the function itself makes of
the absolute values of its inputs. The same holds for gradients. So one bound serves all: (terms + 4) eps f(|x|), where
`terms` is the largest number of summands and 4 the roundings of what stands around a sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hetero.opencl.program import open_device
from tests.kernel_harness import EPS
from tests.kernel_harness import check as check_within

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DEVICE = "opencl:0"
_ROUNDINGS = 4


def check(functions: Sequence[Callable[..., Any]], *inputs: torch.Tensor, terms: int, training: bool = True) -> None:
    """Compile all functions as one graph; compare results, strides and gradients, and see that launches were made.

    Args:
        functions: of all inputs; each returns a tensor or several.
        inputs: float32 ones are differentiated in training.
        terms: the most numbers that are summed into one of a result or a gradient.
        training: whether gradients are computed as well.
    """
    torch._dynamo.reset()

    def call(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [y for f in functions for y in _flat(f(*tensors))]

    compiled = torch.compile(call, backend="opencl", fullgraph=True, dynamic=False, options={"device": DEVICE})
    own = [_leaf(x, training=training) for x in inputs]
    narrow, wide = call(inputs), [_leaf(x, torch.float64, training=training) for x in inputs]
    absolute = [_leaf(x.abs(), torch.float64, training=training) if x.is_floating_point() else x for x in inputs]
    counts = open_device(DEVICE).counts
    before = counts.total()
    got = compiled(own)
    assert counts.total() > before
    exact, scale = call(wide), call(absolute)
    for i, (y, n, e, s) in enumerate(zip(got, narrow, exact, scale, strict=True)):
        assert (y.dtype, y.shape) == (n.dtype, n.shape), i
        assert _steps(y) == _steps(n), f"result {i}: strides {y.stride()}, not {n.stride()}"
        _compare(y, e, s, terms)
    if not training:
        return
    gradients = [_gradients(ys, xs) for ys, xs in ((got, own), (exact, wide), (scale, absolute))]
    for g, e, s in zip(*gradients, strict=True):
        _compare(g, e, s, terms)


def _flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _steps(x: torch.Tensor) -> list[int]:
    """Strides that mean something."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]


def _leaf(x: torch.Tensor, dtype: torch.dtype | None = None, *, training: bool) -> torch.Tensor:
    """The same values in the same layout, as a leaf."""
    if not x.is_floating_point():
        return x
    leaf = x.detach()
    if dtype is not None:
        leaf = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)
    return leaf.requires_grad_(training)


def _gradients(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For positive cotangents, the same for every type."""
    outputs, inputs = [y for y in outputs if y.requires_grad], [x for x in inputs if x.requires_grad]
    generator = torch.Generator().manual_seed(3)
    cotangents = [torch.rand(y.shape, generator=generator).to(y.dtype) for y in outputs]
    counts = open_device(DEVICE).counts
    before = counts.total()
    taken = torch.autograd.grad(outputs, inputs, cotangents)
    assert counts.total() > before or inputs[0].dtype == torch.float64
    return list(taken)


def _compare(got: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor, terms: int) -> None:
    if got.is_floating_point():
        check_within(got.detach(), exact.detach(), (terms + _ROUNDINGS) * EPS * scale.detach())
    else:
        assert torch.equal(got, exact)
