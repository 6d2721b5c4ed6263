"""Gather, scatter, sort and the plain product against torch: layouts, types, duplicates, indices out of range."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero.opencl import kernels
from hetero.opencl.ir import View
from tests.kernel_harness import EPS, OUTPUT_LAYOUTS, Bench, check, dot_tolerance, layout, sum_tolerance

SHAPES = [(1,), (7,), (33,), (1, 1), (3, 5), (16, 17), (5, 1, 4), (2, 13, 3), (65, 70)]
DTYPES = [torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]
NAN = float("nan")


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def _positions(shape: tuple[int, ...], size: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, size, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _led(view: View, shape: tuple[int, ...], dim: int) -> View:
    """A tensor as it moves with a loop in which an index tensor leads along one dimension."""
    strides = tuple(0 if d == dim else s for d, s in enumerate(view.strides))
    return View(view.root, view.offset, shape, strides, view.dtype)


@settings(deadline=None, max_examples=20)
@given(
    shape=st.sampled_from(SHAPES),
    dim=st.integers(0, 2),
    count=st.sampled_from([1, 2, 17, 300]),
    dtype=st.sampled_from(DTYPES),
    index_dtype=st.sampled_from([torch.int64, torch.int32]),
    kinds=st.tuples(*[st.sampled_from(OUTPUT_LAYOUTS)] * 3),
    is_gpu=st.booleans(),
)
def test_gather_is_that_of_torch(shape, dim, count, dtype, index_dtype, kinds, is_gpu):
    bench, d = Bench(), dim % len(shape)
    taken = (*shape[:d], count, *shape[d + 1 :])
    x = layout(_numbers(shape, dtype), kinds[0])
    index = layout(_positions(taken, shape[d], index_dtype), kinds[1])
    out = layout(torch.full(taken, 7).to(dtype), kinds[2])
    along = [kernels.Along(bench.view(index), shape[d], x.stride(d))]
    bench.run(kernels.gather(_led(bench.view(x), taken, d), along, bench.view(out), is_gpu=is_gpu))
    assert torch.equal(out, x.gather(d, index.long()))


@settings(deadline=None, max_examples=20)
@given(
    shape=st.sampled_from(SHAPES),
    dim=st.integers(0, 2),
    count=st.sampled_from([1, 2, 17, 300]),
    dtype=st.sampled_from(DTYPES),
    combine=st.sampled_from(["sum", "prod", "amax", "amin"]),
    kinds=st.tuples(*[st.sampled_from(OUTPUT_LAYOUTS)] * 3),
    is_gpu=st.booleans(),
)
def test_scatter_combines_what_meets_as_torch(shape, dim, count, dtype, combine, kinds, is_gpu):
    bench, d = Bench(), dim % len(shape)
    given_ = (*shape[:d], count, *shape[d + 1 :])
    x, index = layout(_numbers(given_, dtype), kinds[0]), layout(_positions(given_, shape[d], torch.int64), kinds[1])
    out = layout(_numbers(shape, dtype, seed=2), kinds[2])
    wide = torch.float64 if dtype.is_floating_point else dtype
    expected = out.to(wide).scatter_reduce(d, index, x.to(wide), combine)
    along = [kernels.Along(bench.view(index), shape[d], out.stride(d))]
    target = _led(bench.view(out), given_, d)
    bench.run(kernels.scatter(bench.view(x), along, target, ordered={d}, combine=combine, is_gpu=is_gpu))
    if not dtype.is_floating_point or combine in ("amax", "amin"):
        assert torch.equal(out, expected.to(dtype))
        return
    absolute = x.abs().double()
    scale = torch.zeros(shape, dtype=torch.float64).scatter_add(d, index, absolute) + 100
    # of a product every factor adds a rounding: relative to the product itself
    check(out, expected, sum_tolerance(count, scale if combine == "sum" else expected.abs()))


def test_the_last_of_several_elements_for_one_place_wins_and_sums_are_the_same_bits_on_any_cores():
    index, x = _positions((5000,), 10, torch.int64), _numbers((5000, 40), torch.float32)
    sums = []
    for name in ("opencl:0", "opencl:0.1"):
        bench = Bench(name)
        last, total = torch.zeros(10, 40), torch.zeros(10, 40)
        lead = index[:, None].expand(5000, 40)
        for out, combine in ((last, "assign"), (total, "sum")):
            along = [kernels.Along(bench.view(lead), 10, 40)]
            target = _led(bench.view(out), (5000, 40), 0)
            bench.run(kernels.scatter(bench.view(x), along, target, ordered={0}, combine=combine))
        assert torch.equal(last, torch.stack([x[index == v][-1] for v in range(10)]))
        sums.append(total)
    assert torch.equal(*sums)


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wraps", [False, True])
def test_an_index_out_of_range_is_not_followed(dtype, wraps, is_gpu):
    bench = Bench()
    limits = torch.iinfo(torch.int64)
    index = torch.tensor([3, -1, 0, -4, 4, -5, limits.min, limits.max])
    x, out = (_numbers((4,), dtype) + 1).to(dtype), torch.ones(8).to(dtype)
    missing = NAN if dtype.is_floating_point else 0 if dtype == torch.bool else torch.iinfo(dtype).min
    expected = torch.full((8,), missing).to(dtype)
    valid = [0, 1, 2, 3] if wraps else [0, 2]
    expected[valid] = x[index[valid]]
    along = [kernels.Along(bench.view(index), 4, 1)]
    bench.run(kernels.gather(_led(bench.view(x), (8,), 0), along, bench.view(out), wraps=wraps, is_gpu=is_gpu))
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    guarded = torch.full((12,), 5).to(dtype)
    target = _led(bench.view(guarded[4:8]), (8,), 0)
    launches = kernels.scatter(bench.view(out), along, target, ordered={0}, wraps=wraps, is_gpu=is_gpu)
    bench.run(launches)
    written = torch.full((12,), 5).to(dtype)
    written[4:8][index[valid]] = x[index[valid]]
    assert torch.equal(guarded, written)


@settings(deadline=None, max_examples=20)
@given(
    shape=st.sampled_from([*SHAPES, (2, 300), (1000,), (3, 8), (4, 9, 2), (64,), (129, 2)]),
    dim=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]),
    is_descending=st.booleans(),
    keep=st.sampled_from([None, 1, 2, 5, 65]),
    kinds=st.tuples(*[st.sampled_from(["plain", "offset", "gaps"])] * 2),
)
def test_sort_is_the_stable_sort_of_torch(shape, dim, dtype, is_descending, keep, kinds):
    bench, d = Bench(), dim % len(shape)
    x = _numbers(shape, dtype)
    if dtype.is_floating_point:
        x = (x * 3).round()  # with ties, and what has a place of its own in the order
        x.view(-1)[:: max(2, x.numel() // 5)] = NAN
        x.view(-1)[1 :: max(2, x.numel() // 4)] = float("-inf")
    x, keep = layout(x, kinds[0]), None if keep is None else min(keep, shape[d])
    taken = (*shape[:d], keep or shape[d], *shape[d + 1 :])
    values, indices = layout(torch.full(taken, 7).to(dtype), kinds[1]), torch.full(taken, -1)
    views = [bench.view(t) for t in (x, values, indices)]
    bench.run(kernels.sort(*views, dim=d, is_descending=is_descending, keep=keep, scratch=bench.scratch))
    expected = torch.sort(x, dim=d, stable=True, descending=is_descending)
    assert torch.equal(indices, expected.indices.narrow(d, 0, taken[d]))
    torch.testing.assert_close(values, expected.values.narrow(d, 0, taken[d]), rtol=0, atol=0, equal_nan=True)


@settings(deadline=None, max_examples=20)
@given(
    sizes=st.tuples(*[st.sampled_from([1, 2, 7, 33])] * 3),
    dtype=st.sampled_from([torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8]),
    n_batch=st.sampled_from([None, 1, 3]),
    kinds=st.tuples(*[st.sampled_from(OUTPUT_LAYOUTS)] * 3),
)
def test_products_of_other_types_are_those_of_torch(sizes, dtype, n_batch, kinds):
    (m, n, k), batch, bench = sizes, () if n_batch is None else (n_batch,), Bench()
    a = layout(_numbers((*batch, m, k), dtype), kinds[0])
    b = layout(_numbers((*batch, k, n), dtype, seed=1), kinds[1])
    out = layout(torch.full((*batch, m, n), 7).to(dtype), kinds[2])
    bench.run(kernels.product(bench.view(a), bench.view(b), bench.view(out)))
    if dtype == torch.float64:
        check(out, a @ b, dot_tolerance(a, b) * float(torch.finfo(torch.float64).eps / EPS))
    else:
        assert torch.equal(out, a @ b)
