"""The kernels of GPU-type devices against float64. They run on any device: here on one that passes for a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero.opencl import kernels
from hetero.opencl.errors import Unsupported
from hetero.opencl.kernels_attention import Dropout
from hetero.opencl.kernels_cpu import CpuKernels
from hetero.opencl.kernels_gpu import GpuKernels
from hetero.opencl.program import list_devices
from tests.kernel_harness import (
    EPS,
    LAYOUTS,
    OUTPUT_LAYOUTS,
    WIDE,
    Bench,
    check,
    dot_tolerance,
    empty,
    layout,
    row_tolerance,
    sum_tolerance,
)

INF, NAN = float("inf"), float("nan")
LEAST_LOCAL = 32 << 10  # what OpenCL 1.2 promises of a GPU: 32 KiB of local memory


def gpu(*, items: int = 256, **capabilities: Any) -> tuple[Bench, CpuKernels]:
    """A device that passes for a GPU with so many work-items in a group, and its kernels."""
    limits = {"kind": "gpu", "max_work_group_size": items, "local_memory_bytes": LEAST_LOCAL, **capabilities}
    bench = Bench(**limits)
    return bench, kernels.of(bench.device.capabilities)


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_hot_kernels_of_a_gpu_are_its_own():
    table = kernels.of(Bench(kind="gpu").device.capabilities)
    assert isinstance(table, GpuKernels)
    assert not isinstance(kernels.of(Bench().device.capabilities), GpuKernels)
    own = {name for name in dir(CpuKernels) if getattr(GpuKernels, name) is not getattr(CpuKernels, name)}
    assert own >= {
        *("gemm", "attention", "attention_backward", "layer_norm", "layer_norm_backward", "softmax", "log_softmax"),
        *("softmax_backward", "log_softmax_backward", "nll_loss", "nll_loss_backward", "embedding"),
        *("embedding_backward", "reduction", "column_sum"),
    }


# --- matrix products --------------------------------------------------------------------------------------------------

SIZES = [1, 2, 7, 16, 31, 32, 33, 64, 65, 101]


def _gemm(a, b, out, *, bias=None, residual=None, local=LEAST_LOCAL, **limits):
    bench, own = gpu(**limits)
    views = {name: None if t is None else bench.view(t) for name, t in (("bias", bias), ("residual", residual))}
    launches = own.gemm(
        bench.view(a), bench.view(b), bench.view(out), local_memory_bytes=local, scratch=bench.scratch, **views
    )
    bench.run(launches)
    return launches


@settings(deadline=None, max_examples=30)
@given(
    M=st.sampled_from(SIZES),
    N=st.sampled_from(SIZES),
    K=st.sampled_from([*SIZES, 511, 512, 1500]),
    kinds=st.tuples(*map(st.sampled_from, (LAYOUTS, LAYOUTS, OUTPUT_LAYOUTS))),
    has_bias=st.booleans(),
    has_residual=st.booleans(),
)
def test_product_of_any_shape_and_layout_equals_float64(M, N, K, kinds, has_bias, has_residual):
    a, b, out = layout(_random(M, K), kinds[0]), layout(_random(K, N, seed=1), kinds[1]), empty(M, N, kind=kinds[2])
    bias = _random(N, seed=2) if has_bias else None
    residual = layout(_random(M, N, seed=3), kinds[0]) if has_residual else None
    _gemm(a, b, out, bias=bias, residual=residual)
    added = (0 if bias is None else bias.double()) + (0 if residual is None else residual.double())
    size = (0 if bias is None else bias.abs()) + (0 if residual is None else residual.abs())
    check(out, a.double() @ b.double() + added, dot_tolerance(a, b) + (K + 3) * EPS * size)


@pytest.mark.parametrize(
    ("M", "N", "K", "limits", "tile"),
    [
        (1500, 1410, 3, {"local_memory_bytes": 1 << 17}, 128),
        (700, 710, 17, {}, 64),
        (40, 37, 20, {}, 32),
        (40, 37, 20, {"items": 16}, 16),
        (19, 9, 20, {"items": 4}, 8),
        (9, 5, 6, {"items": 1}, 4),
    ],
)
def test_tiles_follow_the_shapes_and_the_device(M, N, K, limits, tile):
    a, b, out = _random(M, K), _random(K, N, seed=1), empty(M, N)
    (launch,) = _gemm(a, b, out, **limits)
    assert launch.defines["TILE_M"] == tile
    check(out, a.double() @ b.double(), dot_tolerance(a, b))


def test_a_long_sum_of_few_tiles_is_divided_and_added_in_one_order():
    a, b, before = _random(40, 5000), _random(5000, 70, seed=1), _random(40, 70, seed=2)
    results = []
    for _ in range(2):
        out = before.clone()
        launches = _gemm(a, b, out, residual=out, bias=_random(70, seed=3))
        assert [launch.kernel for launch in launches] == ["gemm", "gemm_combine"]
        results.append(out)
    assert torch.equal(*results)
    added = before.double() + _random(70, seed=3)
    check(results[0], a.double() @ b.double() + added, dot_tolerance(a, b) + 5 * EPS * added.abs())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (7, 33, 5), (33, 20, 1100)])
def test_batched_product_equals_float64(M, N, K, shared):
    a, residual, out = _random(3, M, K), _random(3, M, N, seed=2), empty(3, M, N)
    b = _random(K, N, seed=1).expand(3, K, N) if shared else layout(_random(3, K, N, seed=1), "transposed")
    _gemm(a, b, out, residual=residual)
    check(out, a.double() @ b.double() + residual, dot_tolerance(a, b) + 2 * EPS * residual.abs())


def test_an_empty_sum_gives_the_bias():
    bias, out = _random(40), empty(30, 40)
    _gemm(torch.empty(30, 0), torch.empty(0, 40), out, bias=bias)
    assert torch.equal(out, bias.expand(30, 40))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_infinities_reach_exactly_the_elements_that_torch_gives(value):
    a, b, out = _random(17, 20), _random(20, 35, seed=1), empty(17, 35)
    a[3, 4] = value
    _gemm(a, b, out)
    check(out, a.double() @ b.double(), dot_tolerance(a.nan_to_num(0, 0, 0), b))


def test_output_in_a_slice_leaves_its_neighbours_alone():
    wide = torch.full((20, 99), 7.0)
    _gemm(_random(20, 11), _random(11, 33), wide[:, 33:66])
    assert bool((wide[:, :33] == 7).all())
    assert bool((wide[:, 66:] == 7).all())


def test_what_no_tile_fits_or_no_kernel_takes_is_refused_with_a_reason():
    x = torch.zeros(2, 2)
    with pytest.raises(Unsupported, match=r"160 bytes of local memory, the device has 100"):
        _gemm(x, x, empty(2, 2), local=100)
    with pytest.raises(Unsupported, match="float64"):
        _gemm(x.double(), x, empty(2, 2))


def _with(feature: str, **capabilities: Any) -> tuple[Bench, CpuKernels]:
    """The first device that has a feature, passing for a GPU."""
    bench, _ = gpu()  # skips where there is no device at all
    names = [d.name for d in list_devices(subdevices=False) if getattr(d.capabilities, feature)]
    if not names:
        pytest.skip(f"no device with {feature}: pip install 'heteroq[intel-opencl]'")
    bench = Bench(names[0], kind="gpu", **capabilities)
    return bench, kernels.of(bench.device.capabilities)


@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (33, 17, 40), (20, 31, 1500)])
def test_half_precision_is_storage_only(M, N, K):
    bench, own = _with("fp16")
    a, b, bias, out = (
        t.half() for t in (_random(M, K), _random(N, K, seed=1), _random(N, seed=2), empty(M, N, kind="gaps"))
    )
    views = [bench.view(t) for t in (a, b.t(), out)]
    local = bench.device.capabilities.local_memory_bytes
    bench.run(own.gemm(*views, bias=bench.view(bias), local_memory_bytes=local, scratch=bench.scratch))
    exact = a.double() @ b.double().t() + bias.double()
    rounding = torch.finfo(torch.float16).eps / 2 * exact.abs() + 2**-25  # one, and that of the smallest numbers
    check(out, exact, 1.01 * rounding + dot_tolerance(a.float(), b.float().t()))


def test_half_precision_without_the_extension_is_refused_by_name():
    bench, own = gpu(fp16=False)
    x = torch.zeros(2, 2).half()
    with pytest.raises(Unsupported, match=r"float16"):
        own.gemm(*map(bench.view, (x, x, x)), local_memory_bytes=LEAST_LOCAL, scratch=bench.scratch)


# --- attention --------------------------------------------------------------------------------------------------------


def _attention(q, k, v, grad, *, kind="plain", mask=None, dropout=None, wants_dmask=False, limits=None, **options):
    """(out, lse, dq, dk, dv[, dmask])."""
    bench, own = gpu(**(limits or {}))
    options = {"local_memory_bytes": bench.device.capabilities.local_memory_bytes, **options}
    if mask is not None:
        options["mask"] = bench.view(mask)
    if dropout is not None:
        options["dropout"] = Dropout(dropout[0], bench.view(dropout[1]), 3)
    out, lse = empty(*q.shape[:3], v.shape[3], kind=kind), empty(*q.shape[:3])
    gradients = [empty(*t.shape, kind=kind) for t in (q, k, v)]
    if wants_dmask:
        gradients.append(empty(*mask.shape, kind=kind))
    views = [bench.view(t) for t in (q, k, v, out, lse)]
    bench.run(own.attention(*views, **options))
    if wants_dmask:
        options["dmask"] = bench.view(gradients[3])
    bench.run(own.attention_backward(bench.view(grad), *views, *map(bench.view, gradients[:3]), **options))
    return out, lse, *gradients


def _exact_attention(q, k, v, grad, *, scale, is_causal, mask=None, kept=None):
    """The same by the definition in float64; `kept`: what the weights are multiplied with."""
    q, k, v = (t.double().detach().requires_grad_() for t in (q, k, v))
    mask = None if mask is None else mask.double().detach().requires_grad_()
    shared = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(shared, 1).transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, -INF)
    blind = (scores == -INF).all(-1, keepdim=True)
    weights = torch.where(blind, 0.0, scores.masked_fill(blind, 0.0).softmax(-1))
    out = (weights if kept is None else weights * kept) @ v.repeat_interleave(shared, 1)
    wanted = (q, k, v) if mask is None else (q, k, v, mask)
    lse = torch.where(blind, 0.0, scores.logsumexp(-1, keepdim=True))[..., 0]
    return out.detach(), lse.detach(), *torch.autograd.grad(out, wanted, grad.double())


def _attention_tolerances(q, k, v, grad, scale):
    """Scores are off by eps E |q||k|; weights by as much, relatively; sums over T or S add their own roundings."""
    largest = [float(t.abs().max()) for t in (q, k, v, grad)]
    score = largest[0] * largest[1] * scale * q.shape[3]
    shared = q.shape[1] // k.shape[1]
    relative = EPS * (q.shape[3] + 8 + score) + EPS * (k.shape[2] + q.shape[2] * shared)
    slope = largest[2] * largest[3] * v.shape[3]
    rows = q.shape[2] * shared
    sums = (largest[2], score + 1, slope * largest[1] * scale, slope * largest[0] * scale * rows, largest[3] * rows)
    return [relative * s for s in (*sums, slope)]


def _check_attention(actual, q, k, v, grad, scale, **options):
    expected = _exact_attention(q, k, v, grad, scale=scale, **options)
    for a, e, tolerance in zip(actual, expected, _attention_tolerances(q, k, v, grad, scale), strict=False):
        check(a, e, tolerance)


@settings(deadline=None, max_examples=10)
@given(
    T=st.sampled_from([1, 2, 31, 32, 33, 65, 130]),
    S=st.sampled_from([1, 13, 32, 64, 97]),
    widths=st.sampled_from([(16, 16), (3, 17)]),
    heads=st.sampled_from([(1, 1), (2, 3)]),
    kinds=st.tuples(*map(st.sampled_from, (LAYOUTS, LAYOUTS, LAYOUTS, LAYOUTS, OUTPUT_LAYOUTS))),
    is_causal=st.booleans(),
)
def test_attention_and_its_gradients_equal_float64(T, S, widths, heads, kinds, is_causal):
    (E, V), scale = widths, widths[0] ** -0.5
    q, k = layout(_random(*heads, T, E), kinds[0]), layout(_random(*heads, S, E, seed=1), kinds[1])
    v, grad = layout(_random(*heads, S, V, seed=2), kinds[2]), layout(_random(*heads, T, V, seed=3), kinds[3])
    actual = _attention(q, k, v, grad, kind=kinds[4], scale=scale, is_causal=is_causal)
    _check_attention(actual, q, k, v, grad, scale, is_causal=is_causal)


@pytest.mark.parametrize("shared", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_attention_with_a_mask_dropout_and_shared_heads_equals_float64(shared):
    T, S, E, p, scale = 37, 50, 16, 0.3, 0.25
    q, grad = _random(2, 3, T, E), _random(2, 3, T, E, seed=3)
    k, v = _random(2, 3 // shared, S, E, seed=1), _random(2, 3 // shared, S, E, seed=2)
    mask = _random(2, 1, T, S, seed=4).expand(2, 3, T, S).clone()
    mask[mask < -1] = -INF
    mask[1, :, 5] = -INF  # a query that sees nothing
    seed = torch.tensor([2**40 + 7, 11])
    actual = _attention(
        q, k, v, grad, scale=scale, is_causal=False, mask=mask, dropout=(p, seed), wants_dmask=shared == 1
    )
    kept = _kept(p, seed, (2, 3, T, S))
    _check_attention(actual, q, k, v, grad, scale, is_causal=False, mask=mask, kept=kept)
    assert not actual[0][1, :, 5].any()
    assert not actual[2][1, :, 5].any()


def _kept(p, seed, shape):
    """What the CPU's kernel drops, read off its output for values that are a unit matrix and equal weights."""
    B, H, T, S = shape
    bench = Bench()
    q, k, v = torch.zeros(B, H, T, 8), torch.zeros(B, H, S, 8), torch.eye(S).expand(B, H, S, S)
    out, lse = empty(B, H, T, S), empty(B, H, T)
    dropout = Dropout(p, bench.view(seed), 3)
    local = bench.device.capabilities.local_memory_bytes
    views = [bench.view(t) for t in (q, k, v, out, lse)]
    bench.run(kernels.attention(*views, scale=1.0, is_causal=False, dropout=dropout, local_memory_bytes=local))
    kept = torch.where(out > 0, 1 / (1 - p), 0.0)
    assert 0.5 * p < 1 - (kept > 0).double().mean() < 1.5 * p
    return kept.double()


@pytest.mark.parametrize(
    ("width", "limits"),
    [
        pytest.param(80, {}, marks=pytest.mark.slow),  # 16 work-items side by side
        (17, {"local_memory_bytes": 6000}),
        pytest.param(17, {"items": 16}, marks=pytest.mark.slow),
    ],
)
def test_blocks_fit_the_device(width, limits):
    q, k, v, grad = (_random(1, 2, 70, width, seed=s) for s in range(4))
    options = {"scale": width**-0.5, "is_causal": True}
    actual = _attention(q, k, v, grad, limits=limits, **options)
    _check_attention(actual, q, k, v, grad, **options)


def test_heads_too_wide_for_the_local_memory_are_refused_with_both_sizes():
    q, options = _random(1, 1, 8, 200), {"scale": 1.0, "is_causal": True}
    with pytest.raises(Unsupported, match=r"200 wide heads needs \d+ bytes of local memory, the device has 9000"):
        _attention(q, q, q, q, limits={"local_memory_bytes": 9000}, **options)


def test_large_scores_do_not_overflow():
    q, k, v, grad = (_random(1, 1, 50, 16, seed=s) * f for s, f in enumerate((30.0, 30.0, 1.0, 1.0)))
    actual = _attention(q, k, v, grad, scale=1.0, is_causal=True)
    _check_attention(actual[:2], q, k, v, grad, 1.0, is_causal=True)


@pytest.mark.parametrize(("which", "value"), [("q", NAN), ("k", INF), ("v", NAN), ("v", INF)])
def test_a_bad_value_reaches_the_queries_that_see_it_and_no_earlier_block(which, value):
    q, k, v = (_random(1, 1, 70, 16, seed=s) for s in range(3))
    options = {"scale": 1.0, "is_causal": True}
    clean = _exact_attention(q, k, v, torch.ones(1, 1, 70, 16), **options)[0]
    {"q": q, "k": k, "v": v}[which][0, 0, 40, 3] = value
    out, *_ = _attention(q, k, v, torch.ones(1, 1, 70, 16), **options)
    tolerance = _attention_tolerances(q[..., :32, :], k[..., :32, :], v[..., :32, :], clean, 1.0)[0]
    check(out[..., :32, :], clean[..., :32, :], tolerance)  # a block is 32 queries
    expected = _exact_attention(q, k, v, torch.ones(1, 1, 70, 16), **options)[0]
    assert torch.equal(out[..., 40:, :].isfinite(), expected[..., 40:, :].isfinite())
    assert not expected[..., 40:, :].isfinite().all()


# --- rows -------------------------------------------------------------------------------------------------------------

WIDTHS = [1, 2, 7, 16, 33, 101, 384, 700]
ROWS = [1, 3, 64, 257]


@settings(deadline=None, max_examples=25)
@given(
    rows=st.sampled_from(ROWS),
    width=st.sampled_from(WIDTHS),
    kinds=st.tuples(*map(st.sampled_from, (LAYOUTS, LAYOUTS, OUTPUT_LAYOUTS))),
    has_weight=st.booleans(),
    has_bias=st.booleans(),
)
def test_layer_norm_equals_float64(rows, width, kinds, has_weight, has_bias):
    bench, own = gpu()
    x = layout(_random(rows, width) * 3 + 2, kinds[0])
    weight = layout(_random(width, seed=1), kinds[1]) if has_weight else None
    bias = _random(width, seed=2) if has_bias else None
    out, mean, rstd = empty(rows, width, kind=kinds[2]), empty(rows), empty(rows)
    views = [bench.view(t) if t is not None else None for t in (x, weight, bias, out, mean, rstd)]
    bench.run(own.layer_norm(*views, width=width, eps=1e-5))
    reference = torch.native_layer_norm(x.double(), (width,), _double(weight), _double(bias), 1e-5)
    # an error of the mean is magnified by rstd
    scale = 1 + reference[2].abs() * x.double().abs().amax(-1, keepdim=True)
    factor = 1.0 if weight is None else weight.abs()
    check(out, reference[0], row_tolerance(width, scale) * factor + WIDE * EPS * reference[0].abs())
    check(mean, reference[1].flatten(), row_tolerance(width, x.double().abs().amax(-1)))
    check(rstd, reference[2].flatten(), row_tolerance(width, (scale * reference[2]).flatten()))


@settings(deadline=None, max_examples=25)
@given(
    rows=st.sampled_from(ROWS),
    width=st.sampled_from(WIDTHS[1:]),
    kinds=st.tuples(*map(st.sampled_from, (LAYOUTS, LAYOUTS, OUTPUT_LAYOUTS))),
    has_weight=st.booleans(),
    has_residual=st.booleans(),
    mask=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_layer_norm_gradients_equal_float64(rows, width, kinds, has_weight, has_residual, mask):
    bench, own = gpu()
    x, grad = layout(_random(rows, width) + 1, kinds[0]), layout(_random(rows, width, seed=3), kinds[1])
    weight = _random(width, seed=1) if has_weight else None
    residual = layout(_random(rows, width, seed=4), kinds[0]) if has_residual else None
    _, mean, rstd = torch.native_layer_norm(x, (width,), weight, None, 1e-5)
    outputs = [empty(rows, width, kind=kinds[2]), empty(width), empty(width)]
    targets = [bench.view(t) if wanted else None for t, wanted in zip(outputs, mask, strict=True)]
    read = [bench.view(t) if t is not None else None for t in (grad, x, mean.flatten(), rstd.flatten(), weight)]
    view = bench.view(residual) if residual is not None else None
    bench.run(own.layer_norm_backward(*read, *targets, width=width, residual=view, scratch=bench.scratch))
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        *(grad.double(), x.double(), (width,), mean.double(), rstd.double()),
        *(torch.ones(width).double() if weight is None else weight.double(), torch.zeros(width).double()),
        [True, True, True],
    )
    if residual is not None:
        dx = dx + residual.double()
    xhat = (x - mean) * rstd
    size = (1 + rstd * x.abs().amax(-1, keepdim=True)) * (grad * (1 if weight is None else weight)).abs().amax() * rstd
    size = size * (1 + xhat.abs())
    tolerances = (
        row_tolerance(width, size.double()) + WIDE * EPS * dx.abs(),
        sum_tolerance(rows + 8, (1 + x.abs().amax() * rstd.amax()) * grad.abs().sum(0).double()),
        sum_tolerance(rows, grad.abs().sum(0).double()),
    )
    for actual, expected, tolerance, wanted in zip(outputs, (dx, dweight, dbias), tolerances, mask, strict=True):
        if wanted:
            check(actual, expected, tolerance)
        else:
            assert bool(actual.isnan().all())


def test_groups_that_run_side_by_side_have_local_memory_of_their_own():
    bench, own = gpu()
    grad = torch.cat([torch.ones(64, 32), torch.full((64, 32), 100.0)])  # two groups, of one chunk each
    for _ in range(30):
        dweight, dbias = empty(32), empty(32)
        read = [bench.view(t) for t in (grad, torch.zeros(128, 32), torch.full((128,), -1.0), torch.ones(128))]
        targets = (None, bench.view(dweight), bench.view(dbias))
        bench.run(own.layer_norm_backward(*read, None, *targets, width=32, scratch=bench.scratch))
        assert dweight.unique().tolist() == dbias.unique().tolist() == [64.0 + 6400.0]


@settings(deadline=None, max_examples=30)
@given(
    shape=st.sampled_from([(1, 1), (3, 7), (65, 16), (5, 101), (2, 17, 3), (40, 5, 60), (70, 384), (2, 1000)]),
    dim=st.integers(-2, 1),
    kinds=st.tuples(*[st.sampled_from(["plain", "offset", "gaps"])] * 2),
    is_log=st.booleans(),
    scale=st.sampled_from([1.0, 40.0]),
)
def test_softmax_and_its_gradient_equal_float64_along_any_dimension(shape, dim, kinds, is_log, scale):
    bench, own = gpu()
    x, grad = layout(_random(*shape) * scale, kinds[0]), layout(_random(*shape, seed=1), kinds[0])
    out, dx = empty(*shape, kind=kinds[1]), empty(*shape, kind=kinds[1])
    forward, backward = (own.log_softmax, own.log_softmax_backward) if is_log else (own.softmax, own.softmax_backward)
    bench.run(forward(bench.view(x), bench.view(out), dim=dim))
    bench.run(backward(bench.view(grad), bench.view(out), bench.view(dx), dim=dim))
    xd = x.double().requires_grad_()
    expected = (torch.log_softmax if is_log else torch.softmax)(xd, dim)
    (dx_expected,) = torch.autograd.grad(expected, xd, grad.double())
    largest = float(x.abs().max())
    # exp magnifies the rounding of its argument, which is at most twice the largest |x|
    relative = EPS * (2 * largest + 8 + shape[dim] ** 0.5)
    total = grad.abs().double().sum(dim, keepdim=True)
    check(out, expected.detach(), WIDE * EPS * (largest + 1) + relative if is_log else relative)
    check(dx, dx_expected, (relative + EPS * shape[dim]) * (total + 1))


@pytest.mark.parametrize("row", [[-INF, 1.0, 2.0], [-INF] * 3, [INF, 1.0, 2.0], [NAN, 1.0, 2.0], [-200.0, 0.0, 90.0]])
@pytest.mark.parametrize("width", [3, 40])
def test_softmax_treats_nan_and_infinities_as_torch(row, width):
    bench, own = gpu()
    x = torch.tensor([row + row[-1:] * (width - 3), [0.0] * width])
    for ours, theirs in ((own.softmax, torch.softmax), (own.log_softmax, torch.log_softmax)):
        out = empty(2, width)
        bench.run(ours(bench.view(x), bench.view(out), dim=-1))
        check(out, theirs(x.double(), -1), EPS * (2 * 200 + 8 + width**0.5))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (7, 5), (65, 300), (700, 17)])
@pytest.mark.parametrize("kind", ["plain", "gaps"])
def test_nll_loss_and_its_gradient_equal_float64(rows, vocab, reduction, kind):
    bench, own = gpu()
    log_probs = layout(torch.log_softmax(_random(rows, vocab), -1), kind)
    target = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(1))
    target[1::3] = -100
    shape = (rows,) if reduction == "none" else ()
    out, weight, dx, grad = empty(*shape), empty(), empty(rows, vocab, kind=kind), _random(*shape, seed=2)
    options = {"ignore_index": -100, "reduction": reduction}
    bench.run(own.nll_loss(*map(bench.view, (log_probs, target, out, weight)), **options))
    bench.run(own.nll_loss_backward(*map(bench.view, (grad, target, weight, dx)), **options))
    xd = log_probs.double().requires_grad_()
    expected = F.nll_loss(xd, target, **options)
    (dx_expected,) = torch.autograd.grad(expected, xd, grad.double())
    check(out, expected.detach(), sum_tolerance(8 + rows // 256, float(log_probs.abs().sum())))
    check(dx, dx_expected, 2 * EPS * float(grad.abs().max()))
    assert weight.item() == (0 if reduction == "none" else (target != -100).sum().item())


def test_mean_loss_of_nothing_is_nan_and_its_gradient_zero():
    bench, own = gpu()
    log_probs, target = torch.zeros(3, 4), torch.full((3,), -100)
    out, weight, dx, grad = empty(), empty(), empty(3, 4), torch.ones(())
    options = {"ignore_index": -100, "reduction": "mean"}
    bench.run(own.nll_loss(*map(bench.view, (log_probs, target, out, weight)), **options))
    bench.run(own.nll_loss_backward(*map(bench.view, (grad, target, weight, dx)), **options))
    assert out.isnan().item()
    assert not dx.any()


@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_a_target_or_token_out_of_range_gives_nan_there_and_only_there(wrong):
    bench, own = gpu()
    table, index = torch.log_softmax(_random(4, 4), -1), torch.tensor([0, wrong, 3])
    out, loss, weight, dx, dtable = empty(3, 4), empty(3), empty(), empty(3, 4), empty(4, 4)
    view = bench.view
    bench.run(own.embedding(view(table), view(index), view(out)))
    bench.run(own.embedding_backward(view(torch.ones(3, 4)), view(index), view(dtable)))
    options = {"ignore_index": -100, "reduction": "none"}
    bench.run(own.nll_loss(view(table[:3]), view(index), view(loss), view(weight), **options))
    bench.run(own.nll_loss_backward(*map(view, (torch.ones(3), index, weight, dx)), **options))
    for rows in (out, loss[:, None], dx):
        assert rows.isnan().all(1).tolist() == [False, True, False]
        assert not rows[[0, 2]].isnan().any()
    assert dtable.sum(1).tolist() == [4.0, 0.0, 0.0, 4.0]


@settings(deadline=None, max_examples=20)
@given(
    shape=st.sampled_from([(1,), (3, 5), (64,), (7, 131)]),
    vocab=st.sampled_from([1, 3, 100, 2500]),
    width=st.sampled_from([1, 7, 33, 300]),
    kinds=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(OUTPUT_LAYOUTS)),
    padding_idx=st.sampled_from([-1, 0, 2]),
)
def test_embedding_and_its_gradient_equal_float64(shape, vocab, width, kinds, padding_idx):
    bench, own = gpu()
    weight = layout(_random(vocab, width), kinds[0])
    index = torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(1))
    out, grad, dweight = empty(*shape, width), _random(*shape, width, seed=2), empty(vocab, width, kind=kinds[1])
    bench.run(own.embedding(bench.view(weight), bench.view(index), bench.view(out)))
    assert torch.equal(out, weight[index])
    bench.run(own.embedding_backward(*map(bench.view, (grad, index, dweight)), padding_idx=padding_idx))
    expected = torch.ops.aten.embedding_dense_backward(grad.double(), index, vocab, padding_idx, False)
    absolute = torch.ops.aten.embedding_dense_backward(grad.double().abs(), index, vocab, padding_idx, False)
    check(dweight, expected, sum_tolerance(index.numel(), absolute))


# --- reductions -------------------------------------------------------------------------------------------------------

SHAPES = [(1,), (17,), (70000,), (3, 5), (64, 65), (1000, 33), (2, 3, 4), (5, 64, 70), (3, 1, 5, 2), (40, 300, 3)]


def _reduce(kind, x, dims, **limits):
    bench, own = gpu(**limits)
    out = empty(*(n for d, n in enumerate(x.shape) if d not in (dims or range(x.dim()))))
    bench.run(own.reduction(kind, bench.view(x), bench.view(out), dims=dims, scratch=bench.scratch))
    return out


def _check_sum(kind, x, dims, out):
    over = dims or list(range(x.dim()))
    count = x.numel() // max(out.numel(), 1)
    tolerance = sum_tolerance(count, x.abs().double().sum(dim=over)) / (count if kind == "mean" else 1)
    check(out, getattr(torch, kind)(x.double(), dim=over), 0.0 if kind.startswith("am") else tolerance)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.sampled_from(SHAPES),
    picks=st.lists(st.booleans(), min_size=4, max_size=4),
    kind=st.sampled_from(["sum", "mean", "amax", "amin"]),
    place=st.sampled_from(["plain", "transposed", "offset", "slice", "expanded"]),
)
def test_reduction_over_any_dimensions_equals_float64(shape, picks, kind, place):
    x = layout(_random(*shape), place)
    dims = [d for d in range(len(shape)) if picks[d]]
    _check_sum(kind, x, dims, _reduce(kind, x, dims))


@pytest.mark.parametrize("dims", [[0, 2, 4, 6], [1, 3, 5], [7]])
def test_up_to_eight_dimensions_are_reduced_in_one_go(dims):
    x = _random(2, 3, 2, 3, 2, 3, 2, 3)
    _check_sum("sum", x, dims, _reduce("sum", x, dims))


def test_more_dimensions_are_refused():
    x = _random(*[2] * 10)
    with pytest.raises(Unsupported, match="5 dimensions"):
        _reduce("sum", x, [0, 2, 4, 6, 8])


@pytest.mark.parametrize("shape", [(300, 64), (256, 4, 100), (1, 7), (7,)])
def test_column_sum_is_the_gradient_of_a_bias(shape):
    bench, own = gpu()
    x, out = _random(*shape), empty(shape[-1])
    bench.run(own.column_sum(bench.view(x), bench.view(out), scratch=bench.scratch))
    check(out, x.double().flatten(0, -2).sum(0) if x.dim() > 1 else x, sum_tolerance(1024, x.abs().double().sum()))


@pytest.mark.parametrize(("kind", "value"), list(itertools.product(["sum", "amax", "amin"], [NAN, INF, -INF])), ids=str)
@pytest.mark.parametrize("dims", [[0], [1]])
def test_nan_and_infinities_pass_reductions_as_in_torch(kind, value, dims):
    x = _random(40, 70)
    x[3, 5], x[20, 69] = value, value
    check(_reduce(kind, x, dims), getattr(torch, kind)(x.double(), dim=dims), sum_tolerance(70, 70 * 4.0))


@pytest.mark.parametrize("subgroups", [True, False])
def test_sums_by_subgroups_and_by_trees_equal_float64(subgroups):
    bench, own = _with("subgroups", subgroups=subgroups, max_work_group_size=256)
    x, out, sums, total = _random(5, 1000), empty(5, 1000), empty(5), empty()
    mean, rstd, norm = empty(5), empty(5), empty(5, 1000)
    views = {name: bench.view(t) for name, t in (("x", x), ("out", out), ("sums", sums), ("total", total))}
    launches = own.softmax(views["x"], views["out"], dim=-1)
    assert launches[0].local_size == (256, 1)
    launches += own.reduction("sum", views["x"], views["sums"], dims=[1], scratch=bench.scratch)
    launches += own.reduction("sum", views["x"], views["total"], dims=[], scratch=bench.scratch)
    launches += own.layer_norm(views["x"], None, None, *map(bench.view, (norm, mean, rstd)), width=1000, eps=1e-5)
    bench.run(launches)
    check(out, x.double().softmax(-1), EPS * (2 * float(x.abs().max()) + 8 + 1000**0.5))
    check(sums, x.double().sum(1), sum_tolerance(1000, x.abs().double().sum(1)))
    check(total, x.double().sum(), sum_tolerance(5000, x.abs().double().sum()))
    check(norm, F.layer_norm(x.double(), (1000,)), row_tolerance(1000, 1 + float(x.abs().max())))


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [1, 8])
def test_small_work_groups_are_right_as_well(items):
    bench, own = gpu(items=items)
    view = bench.view
    x, out, mean, rstd = _random(5, 33), empty(5, 33), empty(5), empty(5)
    launches = own.layer_norm(view(x), None, None, view(out), view(mean), view(rstd), width=33, eps=1e-5)
    sums, table, index, dtable = empty(33), _random(5, 33, seed=1), torch.tensor([1, 1, 0, 6, 1]), empty(7, 33)
    launches += own.reduction("sum", view(x), view(sums), dims=[0], scratch=bench.scratch)
    launches += own.embedding_backward(view(table), view(index), view(dtable))
    bench.run(launches)
    assert all(a * b <= items for a, b in (launch.local_size for launch in launches))
    check(out, F.layer_norm(x.double(), (33,)), row_tolerance(33, 1 + x.abs().max().item()))
    check(sums, x.double().sum(0), sum_tolerance(5, x.abs().double().sum(0)))
    expected = torch.ops.aten.embedding_dense_backward(table.double(), index, 7, -1, False)
    check(dtable, expected, sum_tolerance(3, expected.abs().max().item() * 3))


def test_groups_are_at_most_what_the_device_allows_and_at_most_256():
    for limit in (1, 7, 64, 100, 1024, 4096):
        _, own = gpu(items=limit)
        assert isinstance(own, GpuKernels)
        assert own.group_items <= min(limit, 256)
        assert own.group_items * 2 > min(limit, 256)
        for width, rows in itertools.product((1, 3, 64, 5000), (1, 5, 1000)):
            for x, y in (own.row_group(width, rows), own.column_group(width, rows)):
                assert x * y <= own.group_items


def _double(tensor):
    return None if tensor is None else tensor.double()
