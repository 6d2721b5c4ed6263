"""Attention, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero.opencl import kernels
from hetero.opencl.errors import Unsupported
from tests.kernel_harness import EPS, LAYOUTS, OUTPUT_LAYOUTS, Bench, check, empty, layout

LENGTHS = [1, 2, 13, 31, 32, 33, 64, 65, 129, 150]
WIDTHS = [1, 3, 8, 16, 17, 64, 70]


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _local(bench):
    return bench.device.capabilities.local_memory_bytes


def _ours(bench, q, k, v, grad, *, scale, is_causal, kind="plain", local=0):
    """(out, lse, dq, dk, dv)."""
    out, lse = empty(*q.shape[:3], v.shape[3], kind=kind), empty(*q.shape[:3])
    gradients = [empty(*t.shape, kind=kind) for t in (q, k, v)]
    options = {"scale": scale, "is_causal": is_causal, "local_memory_bytes": local or _local(bench)}
    views = [bench.view(t) for t in (q, k, v, out, lse)]
    bench.run(kernels.attention(*views, **options))
    bench.run(kernels.attention_backward(bench.view(grad), *views, *map(bench.view, gradients), **options))
    return out, lse, *gradients


def _reference(q, k, v, grad, *, scale, is_causal):
    q, k, v = (t.double().detach().requires_grad_() for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, -float("inf"))
    out = scores.softmax(-1) @ v
    gradients = torch.autograd.grad(out, (q, k, v), grad.double())
    return out.detach(), scores.logsumexp(-1).detach(), *gradients


def _tolerances(q, k, v, grad, scale):
    """Scores are off by eps E |q||k|; weights by as much, relatively; sums over T or S add their own roundings."""
    largest = [float(t.abs().max()) for t in (q, k, v, grad)]
    score = largest[0] * largest[1] * scale * q.shape[3]
    relative = EPS * (q.shape[3] + 8 + score) + EPS * (k.shape[2] + q.shape[2])
    slope = largest[2] * largest[3] * v.shape[3]
    sums = (largest[2], score + 1, slope * largest[1] * scale, slope * largest[0] * scale * q.shape[2])
    return [relative * s for s in (*sums, largest[3] * q.shape[2])]


@settings(deadline=None, max_examples=25)
@given(
    lanes=st.sampled_from([8, 16]),
    sizes=st.tuples(
        st.sampled_from(LENGTHS), st.sampled_from(LENGTHS), st.sampled_from(WIDTHS), st.sampled_from(WIDTHS)
    ),
    heads=st.sampled_from([(1, 1), (2, 3)]),
    kinds=st.tuples(*map(st.sampled_from, (LAYOUTS, LAYOUTS, LAYOUTS, LAYOUTS, OUTPUT_LAYOUTS))),
    is_causal=st.booleans(),
)
def test_attention_and_its_gradients_equal_float64(lanes, sizes, heads, kinds, is_causal):
    T, S, E, F = sizes
    q = layout(_random(*heads, T, E), kinds[0])
    k, v = layout(_random(*heads, S, E, seed=1), kinds[1]), layout(_random(*heads, S, F, seed=2), kinds[2])
    grad = layout(_random(*heads, T, F, seed=3), kinds[3])
    options = {"scale": E**-0.5, "is_causal": is_causal}
    actual = _ours(Bench(lanes=lanes), q, k, v, grad, kind=kinds[4], **options)
    expected = _reference(q, k, v, grad, **options)
    for a, e, tolerance in zip(actual, expected, _tolerances(q, k, v, grad, E**-0.5), strict=True):
        check(a, e, tolerance)


def test_gradients_may_be_slices_of_one_as_a_fused_projection_needs():
    bench = Bench()
    B, H, T, E = 2, 3, 40, 16
    qkv, dqkv = _random(B, T, 3 * H * E), empty(B, T, 3 * H * E)
    q, k, v = (t.view(B, T, H, E).transpose(1, 2) for t in qkv.split(H * E, -1))
    gradients = [t.view(B, T, H, E).transpose(1, 2) for t in dqkv.split(H * E, -1)]
    grad, out, lse = _random(B, H, T, E, seed=1), empty(B, H, T, E), empty(B, H, T)
    options = {"scale": 0.25, "is_causal": True, "local_memory_bytes": _local(bench)}
    views = [bench.view(t) for t in (q, k, v, out, lse)]
    bench.run(kernels.attention(*views, **options))
    bench.run(kernels.attention_backward(bench.view(grad), *views, *map(bench.view, gradients), **options))
    expected = _reference(q, k, v, grad, scale=0.25, is_causal=True)
    for a, e, tolerance in zip(gradients, expected[2:], _tolerances(q, k, v, grad, 0.25)[2:], strict=True):
        check(a, e, tolerance)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize(("width", "local"), [(512, 0), (17, 56_000), (17, 24_000), (17, 15_000)])
def test_blocks_fit_the_local_memory(width, local, lanes, is_causal):
    q, k, v, grad = (_random(1, 2, 70, width, seed=s) for s in range(4))
    options = {"scale": width**-0.5, "is_causal": is_causal}
    actual = _ours(Bench(lanes=lanes), q, k, v, grad, local=local, **options)
    expected = _reference(q, k, v, grad, **options)
    for a, e, tolerance in zip(actual, expected, _tolerances(q, k, v, grad, width**-0.5), strict=True):
        check(a, e, tolerance)


def test_heads_too_wide_for_the_local_memory_are_refused_with_both_sizes():
    bench = Bench()
    q = _random(1, 1, 8, 64)
    out, lse = empty(1, 1, 8, 64), empty(1, 1, 8)
    views, options = [bench.view(t) for t in (q, q, q, out, lse)], {"scale": 1.0, "is_causal": True}
    with pytest.raises(Unsupported, match=r"64 wide heads needs \d+ bytes of local memory, the device has 9000"):
        kernels.attention(*views, local_memory_bytes=9000, **options)
    gradients = [bench.view(empty(1, 1, 8, 64)) for _ in range(3)]
    with pytest.raises(Unsupported, match=r"64 wide heads needs \d+ bytes of local memory, the device has 9000"):
        kernels.attention_backward(views[0], *views, *gradients, local_memory_bytes=9000, **options)


def test_large_scores_do_not_overflow():
    q, k, v, grad = (_random(1, 1, 50, 16, seed=s) * f for s, f in enumerate((30.0, 30.0, 1.0, 1.0)))
    out, lse, *_ = _ours(Bench(), q, k, v, grad, scale=1.0, is_causal=True)
    expected = _reference(q, k, v, grad, scale=1.0, is_causal=True)
    check(out, expected[0], 2e-2)
    check(lse, expected[1], 16 * 30**2 * 9 * 16 * EPS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["q", "k"])
def test_nan_and_infinities_reach_the_rows_that_see_them(which, value):
    q, k, v = (_random(1, 1, 70, 8, seed=s) for s in range(3))
    {"q": q, "k": k}[which][0, 0, 40, 3] = value
    out, *_ = _ours(Bench(), q, k, v, torch.ones(1, 1, 70, 8), scale=1.0, is_causal=True)
    expected = _reference(q, k, v, torch.ones(1, 1, 70, 8), scale=1.0, is_causal=True)[0]
    check(out[..., :40, :], expected[..., :40, :], 1e-4)
    affected = ~expected.isfinite()
    assert bool(affected.any()) == bool((~out.isfinite()).any())
    assert bool((~out[affected].isfinite()).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_value_reaches_the_queries_that_see_it_and_no_earlier_block(value):
    q, k, v = (_random(1, 1, 70, 8, seed=s) for s in range(3))
    clean = _reference(q, k, v, torch.ones(1, 1, 70, 8), scale=1.0, is_causal=True)[0]
    v[0, 0, 40, 3] = value
    out, *_ = _ours(Bench(), q, k, v, torch.ones(1, 1, 70, 8), scale=1.0, is_causal=True)
    check(
        out[..., :32, :], clean[..., :32, :], 1e-4
    )  # a block is 32 queries: inside it, 0 times NaN is NaN, as in torch
    assert not out[..., 40:, 3].isfinite().any()
    check(out[..., 40:, [0, 7]], clean[..., 40:, [0, 7]], 1e-4)


def test_the_same_bits_on_one_core_and_on_all():
    q, k, v, grad = (_random(2, 4, 150, 16, seed=s) for s in range(4))
    results = [_ours(Bench(n), q, k, v, grad, scale=0.25, is_causal=True) for n in ("opencl:0", "opencl:0.1")]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
