"""Sums, means and extrema over any dimensions against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero.opencl import kernels
from hetero.opencl.errors import Unsupported
from tests.kernel_harness import Bench, check, empty, layout, sum_tolerance

SHAPES = [
    (1,),
    (17,),
    (70000,),
    (3, 5),
    (64, 65),
    (1000, 33),
    (2, 3, 4),
    (5, 64, 70),
    (3, 1, 5, 2),
    (2, 3, 4, 5),
    (40, 300, 3),
]


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _reduce(bench, kind, x, dims):
    reduced = dims or range(x.dim())
    out = empty(*(n for d, n in enumerate(x.shape) if d not in reduced))
    bench.run(kernels.reduction(kind, bench.view(x), bench.view(out), dims=dims, scratch=bench.scratch))
    return out


@settings(deadline=None, max_examples=25)
@given(
    lanes=st.sampled_from([8, 16]),
    shape=st.sampled_from(SHAPES),
    picks=st.lists(st.booleans(), min_size=4, max_size=4),
    kind=st.sampled_from(["sum", "mean", "amax", "amin"]),
    place=st.sampled_from(["plain", "offset", "slice"]),
)
def test_reduction_over_any_dimensions_equals_float64(lanes, shape, picks, kind, place):
    x = layout(_random(*shape), place)
    dims = [d for d in range(len(shape)) if picks[d]]
    try:
        out = _reduce(Bench(lanes=lanes), kind, x, dims)
    except Unsupported:
        assert place == "slice"
        return
    expected = getattr(torch, kind)(x.double(), dim=dims or list(range(len(shape))))
    absolute = x.abs().double().sum(dim=dims or list(range(len(shape))))
    count = x.numel() // max(out.numel(), 1)
    tolerance = 0.0 if kind.startswith("am") else sum_tolerance(count, absolute) / (count if kind == "mean" else 1)
    check(out, expected, tolerance)


@pytest.mark.parametrize("shape", [(300, 64), (256, 4, 100), (1, 7), (7,)])
def test_column_sum_is_the_gradient_of_a_bias(shape):
    bench = Bench()
    x, out = _random(*shape), empty(shape[-1])
    bench.run(kernels.column_sum(bench.view(x), bench.view(out), scratch=bench.scratch))
    check(out, x.double().flatten(0, -2).sum(0) if x.dim() > 1 else x, sum_tolerance(300 * 4, x.abs().double().sum()))


def test_column_sum_of_a_transposed_matrix_and_of_a_broadcast_one():
    bench = Bench()
    for x in (_random(33, 200).t(), _random(1, 50).expand(20, 50)):
        out = empty(x.shape[1])
        bench.run(kernels.column_sum(bench.view(x), bench.view(out), scratch=bench.scratch))
        check(out, x.double().sum(0), sum_tolerance(200, x.abs().double().sum(0)))


@pytest.mark.parametrize(
    ("kind", "value"), list(itertools.product(["sum", "amax", "amin"], [float("nan"), float("inf"), -float("inf")]))
)
@pytest.mark.parametrize("dims", [[0], [1]])
def test_nan_and_infinities_pass_as_in_torch(kind, value, dims):
    x = _random(40, 70)
    x[3, 5], x[20, 69] = value, value
    check(_reduce(Bench(), kind, x, dims), getattr(torch, kind)(x.double(), dim=dims), 1e-4)


@pytest.mark.parametrize("dims", [[0], [1], []])
def test_sums_are_the_same_bits_on_one_core_and_on_all(dims):
    x = _random(3000, 77)
    assert torch.equal(_reduce(Bench("opencl:0"), "sum", x, dims), _reduce(Bench("opencl:0.1"), "sum", x, dims))
