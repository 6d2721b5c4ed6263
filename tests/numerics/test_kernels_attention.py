"""Attention, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero.opencl import kernels
from hetero.opencl.errors import Unsupported
from tests.kernel_harness import EPS, LAYOUTS, OUTPUT_LAYOUTS, Bench, check, empty, layout
from tests.philox import attention_words

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


@settings(deadline=None, max_examples=12)
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


# --- masks, dropout, shared heads -------------------------------------------------------------------------------------

KEY, STREAM = -(2**63) + 12345, 7


def _keep(heads, queries, keys, p):
    """1 / (1 - p) where a weight is kept, 0 elsewhere, (heads, queries, keys)."""
    words = attention_words(heads, queries, keys, KEY % 2**64, STREAM + 2)
    return torch.from_numpy((words >= round(p * 2**32)).astype("float64")) / (1 - p)


def _general(bench, q, k, v, grad, mask, p, *, scale, is_causal, wants_dmask=False, local=0):
    """(out, lse, dq, dk, dv, dmask)."""
    out, lse = empty(*q.shape[:3], v.shape[3]), empty(*q.shape[:3])
    gradients = [empty(*t.shape) for t in (q, k, v)]
    options = {"scale": scale, "is_causal": is_causal, "local_memory_bytes": local or _local(bench)}
    if mask is not None:
        options["mask"] = bench.view(mask.expand(*q.shape[:3], k.shape[2]))
    if p:
        seed = bench.view(torch.tensor([KEY, 2]))
        options["dropout"] = kernels.Dropout(p, seed, STREAM)
    dmask = empty(*q.shape[:3], k.shape[2])
    views = [bench.view(t) for t in (q, k, v, out, lse)]
    bench.run(kernels.attention(*views, **options))
    more = {"dmask": bench.view(dmask)} if wants_dmask else {}
    backward = kernels.attention_backward(bench.view(grad), *views, *map(bench.view, gradients), **options, **more)
    bench.run(backward)
    return out, lse, *gradients, *([dmask] if wants_dmask else [])


def _general_reference(q, k, v, grad, mask, p, *, scale, is_causal, wants_dmask=False):
    share = q.shape[1] // k.shape[1]
    leaves = [t.double().detach().requires_grad_() for t in (q, k, v)]
    q, k, v = leaves[0], *(t.repeat_interleave(share, 1) for t in leaves[1:])
    scores = q @ k.transpose(-1, -2) * scale
    mask = torch.zeros(()) if mask is None else mask
    mask = mask.double().expand(scores.shape).clone().requires_grad_()
    scores = scores + mask
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, -float("inf"))
    is_seen = (scores > -float("inf")).any(-1, keepdim=True)
    scores = torch.where(is_seen, scores, 0.0)
    weights = torch.where(is_seen, scores.softmax(-1), 0.0)
    keep = _keep(q.shape[0] * q.shape[1], *scores.shape[-2:], p).view(scores.shape) if p else 1.0
    out = (weights * keep) @ v
    gradients = torch.autograd.grad(out, [*leaves, *([mask] if wants_dmask else [])], grad.double())
    lse = torch.where(is_seen, scores, -float("inf")).logsumexp(-1).detach()
    return out.detach(), torch.where(is_seen[..., 0], lse, 0.0), *gradients


def _general_tolerances(q, k, v, grad, mask, p, scale):
    """As `_tolerances`; values and gradients grow by 1 / (1 - p), sums by the heads that share, scores by the mask."""
    share, grown = q.shape[1] // k.shape[1], 1 / (1 - p)
    extra = 1.0 if mask is None else 1 + float(torch.where(mask.isfinite(), mask, 0.0).abs().max())
    out, lse, dq, dk, dv = _tolerances(q, k, v * grown, grad, scale)
    return [t * extra for t in (out, lse, dq, dk * share, dv * share * grown, dq / scale / float(k.abs().max()))]


MASKS = ("none", "full", "keys", "queries", "heads")


def _mask(kind, heads, T, S):
    shape = {"full": (*heads, T, S), "keys": (heads[0], 1, 1, S), "queries": (T, 1), "heads": (heads[1], T, S)}[kind]
    mask = _random(*shape, seed=5)
    return torch.where(mask < -0.7, -float("inf"), mask)


@settings(deadline=None, max_examples=10)
@given(
    lanes=st.sampled_from([8, 16]),
    sizes=st.tuples(
        st.sampled_from(LENGTHS), st.sampled_from(LENGTHS), st.sampled_from(WIDTHS), st.sampled_from(WIDTHS)
    ),
    heads=st.sampled_from([(1, 1, 1), (2, 3, 1), (1, 4, 2)]),
    kind=st.sampled_from(MASKS),
    p=st.sampled_from([0.0, 0.1, 0.75]),
    local=st.sampled_from([0, 24_000]),
    is_causal=st.booleans(),
)
def test_masks_dropout_and_shared_heads_equal_float64(lanes, sizes, heads, kind, p, local, is_causal):
    (T, S, E, F), (B, H, shared) = sizes, heads
    local = 0 if max(E, F) > 17 else local
    q, grad = _random(B, H, T, E), _random(B, H, T, F, seed=3)
    k, v = _random(B, shared, S, E, seed=1), _random(B, shared, S, F, seed=2)
    mask = None if kind == "none" else _mask(kind, (B, H), T, S)
    options = {"scale": E**-0.5, "is_causal": is_causal, "wants_dmask": mask is not None and not is_causal}
    actual = _general(Bench(lanes=lanes), q, k, v, grad, mask, p, local=local, **options)
    expected = _general_reference(q, k, v, grad, mask, p, **options)
    tolerances = _general_tolerances(q, k, v, grad, mask, p, E**-0.5)
    for a, e, tolerance in zip(actual, expected, tolerances, strict=False):
        check(a, e, tolerance)


def test_a_query_that_sees_no_key_gives_zeros_as_in_torch():
    q, k, v, grad = (_random(1, 2, 40, 8, seed=s) for s in range(4))
    mask = torch.zeros(40, 40)
    mask[[3, 35]] = -float("inf")
    out, lse, dq, *_ = _general(Bench(), q, k, v, grad, mask, 0.0, scale=1.0, is_causal=False)
    torch_out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
    check(out, torch_out, 1e-5)
    for rows in (out, lse, dq):
        assert bool((rows[:, :, [3, 35]] == 0).all())


def test_a_nan_in_the_mask_reaches_its_row_alone():
    q, k, v, grad = (_random(1, 1, 40, 8, seed=s) for s in range(4))
    mask = torch.zeros(40, 40)
    mask[7, 3] = float("nan")
    out, *_ = _general(Bench(), q, k, v, grad, mask, 0.0, scale=1.0, is_causal=False)
    assert torch.equal(out.isnan().all(-1), out.isnan().any(-1))
    assert out[0, 0].isnan().any(-1).nonzero().flatten().tolist() == [7]


def test_dropout_has_the_same_bits_on_one_core_and_for_every_width_of_vectors():
    q, k, v, grad = (_random(2, 2, 150, 16, seed=s) for s in range(4))
    options = {"scale": 0.25, "is_causal": False}
    outputs = [_general(Bench(n), q, k, v, grad, None, 0.3, **options) for n in ("opencl:0", "opencl:0.1")]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    dropped = [torch.zeros(1, 1, 40, 50).expand(1, 2, 40, 50) for _ in range(2)]
    for i, lanes in enumerate((8, 16)):  # scores of 0 and values of 1: row sums count the kept weights
        ones = torch.ones(1, 2, 50, 1)
        zero = torch.zeros(1, 2, 40, 1)
        dropped[i], *_ = _general(Bench(lanes=lanes), zero, ones, ones, zero, None, 0.3, **options)
    check(dropped[0], dropped[1].double(), 50 * EPS)
    check(dropped[0][..., 0], _keep(2, 40, 50, 0.3).mean(-1)[None], 50 * EPS)


def test_the_gradient_of_a_mask_beside_is_causal_is_refused():
    bench = Bench()
    views = [bench.view(_random(1, 1, 8, 8, seed=s)) for s in range(5)]
    lse, more = bench.view(empty(1, 1, 8)), [bench.view(empty(1, 1, 8, 8)) for _ in range(4)]
    with pytest.raises(Unsupported, match="beside is_causal"):
        kernels.attention_backward(
            *views, lse, *more[:3], mask=views[0], dmask=more[3], scale=1.0, is_causal=True, local_memory_bytes=1 << 20
        )
