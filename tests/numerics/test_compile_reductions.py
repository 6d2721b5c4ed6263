"""Generated reductions and scans against torch: any dimensions, types, layouts, special values, fusion."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils import _pytree as pytree

from hetero.opencl.program import open_device, open_variant
from tests.kernel_harness import EPS, sum_tolerance

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "opencl:0"


def compiled(function: Callable[..., Any], device: str = DEVICE) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="opencl", fullgraph=True, dynamic=False, options={"device": device})


def launches(function: Callable[..., Any], *inputs: torch.Tensor) -> int:
    run, counts = compiled(function), open_device(DEVICE).counts
    run(*inputs)
    before = counts.total()
    run(*inputs)
    return counts.total() - before


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaves(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def check_equal(function: Callable[..., Any], *inputs: torch.Tensor) -> None:
    """Exactly what eager torch gives, NaN included."""
    got, expected = leaves(compiled(function)(*inputs)), leaves(function(*inputs))
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(g, e, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"result {i}: {m}")


# --- values -----------------------------------------------------------------------------------------------------------

Reduce = "Callable[[torch.Tensor, Any, bool], Any]"
EXACT: list[Reduce] = [
    lambda x, dim, keep: x.amax(dim, keep),
    lambda x, dim, keep: (x > 0).any(dim, keep),
    lambda x, dim, keep: (x > 0).sum(dim, keep),
    lambda x, dim, keep: (x + 1).amin(dim, keep),
    lambda x, dim, keep: (x > -2).all(dim, keep),
]
ONE_DIMENSION: list[Reduce] = [
    lambda x, dim, keep: x.max(dim, keep),
    lambda x, dim, keep: x.argmin(dim, keep),
    lambda x, dim, keep: x.cummax(dim),
    lambda x, dim, keep: (x * 4).to(torch.int32).cumsum(dim),
    lambda x, dim, keep: (x * 2).argmax(dim, keep),
]
ROUNDED: list[Reduce] = [
    lambda x, dim, keep: (x * 2 + 1).mean(dim, keepdim=keep),
    lambda x, dim, keep: torch.var_mean(x, dim, correction=0, keepdim=keep),
    lambda x, dim, keep: x.sum(dim, keepdim=keep),
    lambda x, dim, keep: torch.std_mean(x, dim, keepdim=keep),
    lambda x, dim, keep: torch.linalg.vector_norm(x, 2, dim, keepdim=keep),
]
SHAPES = [(7,), (33, 65), (3, 1, 5), (2, 3, 4, 5)]


def in_turn(x: torch.Tensor, functions: list[Reduce], dims: list[Any], *, each: int) -> list[Any]:
    """Some of the functions over each choice of dimensions, in turn: every program costs a quarter of a second."""
    chosen = [(functions[(k + 2 * i) % len(functions)], dim, k) for k, dim in enumerate(dims) for i in range(each)]
    return [function(x, dim, k % 2 == 0) for function, dim, k in chosen]


def dimensions(rank: int) -> list[Any]:
    """All, each, and some pairs."""
    return [tuple(range(rank)), *range(rank), *((d, rank - 1) for d in range(rank - 1))]


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_reductions_are_those_of_eager(shape: tuple[int, ...]) -> None:
    def function(x: torch.Tensor) -> list[Any]:
        results = in_turn(x, EXACT, dimensions(x.dim()), each=1)
        return [*results, *in_turn(x, ONE_DIMENSION, list(range(x.dim())), each=2)]

    check_equal(function, random(*shape).round(decimals=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_rounded_reductions_are_near_float64(shape: tuple[int, ...]) -> None:
    def function(x: torch.Tensor) -> list[Any]:
        return in_turn(x, ROUNDED, dimensions(x.dim()), each=1)

    x = random(*shape) + 0.5
    got, exact = leaves(compiled(function)(x)), leaves(function(x.double()))
    # No sum of absolute values, nor of squares, of the elements of one result exceeds that of all.
    scale = 4 * max(float((x.double() ** 2).sum()), float(x.double().abs().sum()), 1.0)
    bound = sum_tolerance(8, scale)
    for i, (g, e) in enumerate(zip(got, exact, strict=True)):
        assert torch.equal(g.isnan(), e.isnan()), i
        assert bool(((g.double() - e).abs() <= bound)[~e.isnan()].all()), i


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.float64])
def test_types_are_those_of_eager(dtype: torch.dtype) -> None:
    x = (random(6, 35) * 3).to(dtype)

    def function(x: torch.Tensor) -> list[Any]:
        results: list[Any] = [x.sum(1), x.prod(0), x.amax(1), x.any(1), x.cumsum(1), torch.count_nonzero(x, 0)]
        return results if dtype == torch.bool else [*results, x.argmax(1), x.min(0)]

    got, expected = leaves(compiled(function)(x)), leaves(function(x))
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        rtol = 35 * torch.finfo(torch.float64).eps if e.dtype.is_floating_point else 0
        torch.testing.assert_close(g, e, rtol=rtol, atol=10 * rtol, msg=lambda m, i=i: f"result {i}: {m}")


def test_sums_of_integers_wrap_and_are_int64() -> None:
    check_equal(lambda x: (x.sum(), x.prod(1)), torch.tensor([[2**62, 2**62], [2**62, 5]]))
    check_equal(lambda x: x.sum(0), torch.full((5, 3), 2**30, dtype=torch.int32))


@pytest.mark.parametrize("n", [70001, 4096 * 16])
def test_a_long_dimension_is_reduced_in_parts(n: int) -> None:
    x = random(n)

    def function(x: torch.Tensor) -> list[Any]:
        y = x * 1.5
        return [y.argmax(), y.min(), torch.var_mean(y), y.sum(), (y > 4).any(), (y * y).mean(), (y > 0).sum()]

    got, exact = leaves(compiled(function)(x)), leaves(function(x.double()))
    assert int(got[0]) == int(exact[0])
    for g, e in zip(got[1:], exact[1:], strict=True):
        tolerance = sum_tolerance(64, float((x.double().abs() * 1.5).mean()) * (n if e is exact[4] else 1))
        assert abs(float(g) - float(e)) <= tolerance, (g, e)


def test_parts_of_few_rows_and_of_few_columns_are_merged() -> None:
    x = random(3, 20000)

    def function(x: torch.Tensor) -> list[Any]:
        y = x + 1
        return [
            f(y, d) for y, d in ((y, 1), (y.t(), 0), (y.t().contiguous() - 1, 0)) for f in (torch.var, torch.argmin)
        ]

    for g, e in zip(leaves(compiled(function)(x)), leaves(function(x.double())), strict=True):
        if e.dtype == torch.int64:
            assert torch.equal(g, e)
        else:
            torch.testing.assert_close(g.double(), e, rtol=64 * EPS, atol=0)


def test_the_variance_of_large_numbers_does_not_cancel() -> None:
    x = random(64, 300) + 1e4  # of E[x^2] - E[x]^2 no digit would be left: eps * 1e8 > 1
    function = compiled(lambda x: (x.var(1), x.var(0), (x + 0).var(), torch.nn.functional.layer_norm(x, (300,))))
    exact = [x.double().var(1), x.double().var(0), x.double().var()]
    for g, e in zip(function(x)[:3], exact, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e4 * EPS * 4, atol=0)  # an input is off by eps * 1e4 of its 1


def test_equal_elements_give_the_first_index() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0], [-math.inf] * 5])
    check_equal(lambda x: (x.max(1), x.min(1), x.argmax(0), x.cummax(1)), x)
    check_equal(lambda x: (x.argmax(), x.min(0)), torch.zeros(40000, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dim", [0, 1])
def test_nan_and_infinities_are_those_of_eager(value: float, dim: int) -> None:
    x = random(40, 70)
    x[3, 5], x[20, 69], x[20, 5] = value, value, math.nan

    def function(x: torch.Tensor) -> list[Any]:
        exact = [x.amax(dim), (x * 1).amin(dim), x.max(dim), x.argmin(dim), x.any(dim), x.cummax(dim)]
        spread = [x.var(dim), x.sum(dim), (x * 1).mean(dim)]
        return [*exact, *(torch.stack((y.isnan(), y.isinf())) for y in spread)]

    check_equal(function, x)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0, 2)])
def test_reductions_of_nothing_are_those_of_eager(shape: tuple[int, ...]) -> None:
    def function(x: torch.Tensor) -> list[Any]:
        results: list[Any] = [x.sum(), x.prod(), x.mean(), x.any(), x.all(), x.var(), x.cumsum(0), torch.var_mean(x)]
        results += [x.sum(d) for d in range(x.dim())] + [(x > 0).all(d) for d in range(x.dim())]
        return [*results, x.amax(-1) if x.shape[-1] else x, torch.linalg.vector_norm(x)]

    check_equal(function, torch.zeros(shape))


def test_a_scalar_is_its_own_reduction() -> None:
    def function(x: torch.Tensor) -> list[Any]:
        return [
            x.sum(),
            x.sum(-1),
            x.prod(0),
            x.amax(),
            x.argmax(),
            x.max(0),
            x.cumsum(0),
            x.var(correction=0),
            x.any(),
        ]

    check_equal(function, torch.tensor(3.0))


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_layouts_do_not_matter() -> None:
    wide = random(6, 8, 21).round(decimals=1)
    views = [
        lambda x: x[1:, ::2, ::3],
        lambda x: x.permute(2, 0, 1),
        lambda x: x[:, :1].expand(6, 5, 21),
        lambda x: (x * 2).reshape(12, 4, 21).transpose(0, 1),
        lambda x: (x - 1).permute(1, 2, 0).reshape(8, 126),
    ]

    def function(x: torch.Tensor) -> list[Any]:
        chosen = [view(x) for view in views]
        results: list[Any] = []
        for dim in (0, 1):
            results += [(y.min(dim), y.cummax(dim)[0]) for y in chosen]
        return [*results, *(y.argmax() for y in chosen)]

    check_equal(function, wide)


# --- fusion -----------------------------------------------------------------------------------------------------------


def test_a_chain_and_the_reduction_that_ends_it_are_one_launch() -> None:
    x, y = random(24, 50), random(50)
    assert launches(lambda x, y: (x.exp() * y + 1).sum(1), x, y) == 1
    assert launches(lambda x, y: ((x - y) ** 2).mean(), x, y) == 1
    assert launches(lambda x, y: torch.var_mean(torch.tanh(x) - y, 0), x, y) == 1
    assert launches(lambda x, y: (x * y).t().argmax(0), x, y) == 1


def test_what_others_read_too_is_stored_on_the_way() -> None:
    x = random(24, 50)

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.exp(x)
        return y, y.sum(1)

    assert launches(function, x) == 1
    for g, e in zip(compiled(function)(x), function(x.double()), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=8 * EPS, atol=0)


def test_a_fused_sum_is_the_same_bits_on_one_core_and_on_all() -> None:
    x = random(700, 300)

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        y = x * 1.01
        return [y.sum(), y.sum(0), (y + 1).mean(1), (y - 1).var()]

    ours, others = (leaves(compiled(function, device)(x)) for device in (DEVICE, "opencl:0.1"))
    assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


def test_the_kernels_for_gpus_give_the_same() -> None:
    device = open_variant(DEVICE, "opencl:reductions-as-on-a-gpu", kind="gpu")
    x = random(3, 50, 7)

    def function(x: torch.Tensor) -> list[Any]:
        y = x + 1
        return [torch.var_mean(y, 1), y.argmax(), y.max(2), y.cumsum(1), (y * x).sum((0, 2)), y.prod(0)]

    got, exact = leaves(compiled(function, device.name)(x)), leaves(function(x.double()))
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g.to(e.dtype), e, rtol=64 * EPS, atol=64 * EPS)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradients_are_near_float64() -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        folds = [x.mean((0, 2)), x.amax(2), x.var(1), x.prod(2), x.max(1)[0], x.cumsum(1)]
        return [*folds, torch.logsumexp(x, 2), torch.linalg.vector_norm(x, dim=1)]

    x = random(3, 7, 5).requires_grad_()
    wide = x.detach().double().requires_grad_()
    got, exact = compiled(function)(x), function(wide)
    seeds = [random(*y.shape, seed=1) for y in exact]
    (ours,) = torch.autograd.grad(got, x, seeds)
    (theirs,) = torch.autograd.grad(exact, wide, [seed.double() for seed in seeds])
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=float(sum_tolerance(64, theirs.abs().max())))
