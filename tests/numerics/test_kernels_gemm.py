"""The matrix product against float64, over shapes around the tiles, strides, batches and epilogues."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero.opencl import kernels
from hetero.opencl.errors import Unsupported
from tests.kernel_harness import EPS, LAYOUTS, OUTPUT_LAYOUTS, Bench, check, dot_tolerance, empty, layout

SIZES = [1, 2, 6, 7, 12, 13, 16, 17, 31, 32, 33, 37, 64, 96, 97, 101, 128, 129]


def _run(bench, a, b, out, *, bias=None, residual=None, local=0, units=1):
    local = local or bench.device.capabilities.local_memory_bytes
    views = {"bias": bench.view(bias) if bias is not None else None}
    views["residual"] = bench.view(residual) if residual is not None else None
    options = {"local_memory_bytes": local, "scratch": bench.scratch, "compute_units": units}
    launches = kernels.gemm(bench.view(a), bench.view(b), bench.view(out), **options, **views)
    bench.run(launches)
    return launches


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=25)
@given(
    lanes=st.sampled_from([8, 16]),
    M=st.sampled_from(SIZES),
    N=st.sampled_from(SIZES),
    K=st.sampled_from([*SIZES, 383, 384, 385, 800]),
    kinds=st.tuples(*map(st.sampled_from, (LAYOUTS, LAYOUTS, OUTPUT_LAYOUTS))),
    has_bias=st.booleans(),
    has_residual=st.booleans(),
)
def test_product_of_any_shape_and_layout_equals_float64(lanes, M, N, K, kinds, has_bias, has_residual):
    bench = Bench(lanes=lanes)
    a, b = layout(_random(M, K), kinds[0]), layout(_random(K, N, seed=1), kinds[1])
    out = empty(M, N, kind=kinds[2])
    bias = _random(N, seed=2) if has_bias else None
    residual = layout(_random(M, N, seed=3), kinds[0]) if has_residual else None
    _run(bench, a, b, out, bias=bias, residual=residual)
    added = (0 if bias is None else bias.double()) + (0 if residual is None else residual.double())
    size = (0 if bias is None else bias.abs()) + (0 if residual is None else residual.abs())
    tolerance = dot_tolerance(a, b) + (K + 3) * EPS * size
    check(out, a.double() @ b.double() + added, tolerance)


@pytest.mark.parametrize("N", [32, 33])
def test_b_may_be_one_row_repeated_as_the_gradient_of_a_sum_is(N):
    a, b, out = _random(8, 16), layout(_random(16, N, seed=1), "expanded"), empty(8, N)
    _run(Bench(), a, b, out)
    check(out, a.double() @ b.double(), dot_tolerance(a, b))


@pytest.mark.parametrize("local", [48 << 10, 8 << 10])
@pytest.mark.parametrize("kinds", [("plain", "transposed"), ("transposed", "plain")])
@pytest.mark.parametrize("lanes", [8, 16])
def test_blocks_fit_the_local_memory(local, kinds, lanes):
    a, b, out = layout(_random(85, 300), kinds[0]), layout(_random(300, 40, seed=1), kinds[1]), empty(85, 40)
    _run(Bench(lanes=lanes), a, b, out, local=local)
    check(out, a.double() @ b.double(), dot_tolerance(a, b))


@pytest.mark.parametrize(("N", "K"), [(33, 100), (96, 383), (130, 401)])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("lanes", [8, 16])
def test_many_rows_are_multiplied_by_panels_that_a_launch_of_their_own_packs(N, K, kind, lanes):
    a, b, out = _random(801, K), layout(_random(K, N, seed=1), kind), empty(801, N)
    bias, residual = _random(N, seed=2), _random(801, N, seed=3)
    launches = _run(Bench(lanes=lanes), a, b, out, bias=bias, residual=residual)
    assert [launch.kernel for launch in launches] == ["gemm_pack_b", "gemm"]
    tolerance = dot_tolerance(a, b) + (K + 3) * EPS * (bias.abs() + residual.abs())
    check(out, a.double() @ b.double() + bias.double() + residual.double(), tolerance)


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_with_many_rows_packs_each_matrix_of_b_once(shared):
    a = _random(2, 800, 40)
    b = _random(40, 35, seed=1).expand(2, 40, 35) if shared else _random(2, 40, 35, seed=1)
    out = empty(2, 800, 35)
    packing, _ = _run(Bench(), a, b, out)
    assert packing.global_size == (2, 1 if shared else 2)
    check(out, a.double() @ b.double(), dot_tolerance(a, b))


@pytest.mark.parametrize(("M", "N", "K"), [(400, 33, 193), (97, 200, 400), (385, 64, 192)])
@pytest.mark.parametrize("kind", ["transposed", "gaps"])
@pytest.mark.parametrize("units", [1, 3, 64])
def test_a_whose_rows_are_not_contiguous_is_split_as_the_device_needs_with_the_same_bits(M, N, K, kind, units):
    a, b = layout(_random(M, K), kind), _random(K, N, seed=1)
    whole, split = empty(M, N), empty(M, N)
    _run(Bench(), a, b, whole)
    launches = _run(Bench(), a, b, split, units=units)
    n_groups = launches[-1].global_size[0] * launches[-1].global_size[1]
    assert n_groups >= min(units, 2 * M * N * K >> 20, 4)
    check(split, a.double() @ b.double(), dot_tolerance(a, b))
    assert torch.equal(whole, split)


def test_too_little_local_memory_is_refused_with_both_sizes():
    x = torch.zeros(2, 2)
    with pytest.raises(Unsupported, match=r"2048 bytes of local memory, the device has 2000"):
        _run(Bench(), x, x, empty(2, 2), local=2000)


def test_output_in_a_slice_leaves_its_neighbours_alone():
    bench = Bench()
    wide = torch.full((20, 99), 7.0)
    _run(bench, _random(20, 11), _random(11, 33), wide[:, 33:66])
    assert bool((wide[:, :33] == 7).all())
    assert bool((wide[:, 66:] == 7).all())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (7, 33, 5), (65, 32, 400)])
def test_batched_product_equals_float64(M, N, K, shared):
    bench = Bench()
    a = _random(3, M, K)
    b = _random(K, N, seed=1).expand(3, K, N) if shared else layout(_random(3, K, N, seed=1), "transposed")
    residual, out = _random(3, M, N, seed=2), empty(3, M, N)
    _run(bench, a, b, out, residual=residual)
    check(out, a.double() @ b.double() + residual, dot_tolerance(a, b) + 1e-6 * residual.abs())


@pytest.mark.parametrize("K", [5, 385, 800])
def test_residual_may_be_the_output_itself(K):
    bench = Bench()
    a, b, out = _random(20, K), _random(K, 40, seed=1), _random(20, 40, seed=2)
    before = out.clone()
    _run(bench, a, b, out, residual=out)
    check(out, before + a.double() @ b.double(), dot_tolerance(a, b) + 1e-6 * before.abs())


@pytest.mark.parametrize("kind", ["plain", "transposed"])
def test_an_empty_sum_gives_the_bias(kind):
    bench = Bench()
    bias, out = _random(40), empty(30, 40, kind=kind)
    _run(bench, torch.empty(30, 0), torch.empty(0, 40), out, bias=bias)
    assert torch.equal(out, bias.expand(30, 40))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinities_reach_exactly_the_elements_that_torch_gives(value):
    bench = Bench()
    a, b, out = _random(17, 20), _random(20, 35, seed=1), empty(17, 35)
    a[3, 4] = value
    _run(bench, a, b, out)
    check(out, a.double() @ b.double(), 1e-4)


@pytest.mark.parametrize(("M", "N", "K"), [(300, 70, 500), (64, 256, 1024), (1024, 64, 64)])
@pytest.mark.parametrize("kind", ["plain", "transposed"])
def test_the_same_bits_on_one_core_and_on_all(M, N, K, kind):
    results = []
    for name in ("opencl:0", "opencl:0.1"):
        bench, out = Bench(name), empty(M, N)
        units = bench.device.capabilities.compute_units
        _run(bench, layout(_random(M, K), kind), _random(N, K, seed=1).t(), out, units=units)
        results.append(out)
    assert torch.equal(*results)


def test_float64_is_refused_with_a_reason():
    bench = Bench()
    x = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(Unsupported, match="float64"):
        _run(bench, x, x, x)
