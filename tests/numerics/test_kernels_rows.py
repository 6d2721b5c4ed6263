"""Layer norm, softmax, the loss and embeddings against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero.opencl import kernels
from tests.kernel_harness import (
    EPS,
    LAYOUTS,
    OUTPUT_LAYOUTS,
    WIDE,
    Bench,
    check,
    empty,
    layout,
    row_tolerance,
    sum_tolerance,
)

WIDTHS = [1, 2, 7, 8, 15, 16, 17, 33, 64, 101, 384]
ROWS = [1, 3, 64, 65, 257]
INF = float("inf")


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=20)
@given(
    lanes=st.sampled_from([8, 16]),
    rows=st.sampled_from(ROWS),
    width=st.sampled_from(WIDTHS),
    kinds=st.tuples(*map(st.sampled_from, (LAYOUTS, LAYOUTS, OUTPUT_LAYOUTS))),
    has_weight=st.booleans(),
    has_bias=st.booleans(),
)
def test_layer_norm_equals_float64(lanes, rows, width, kinds, has_weight, has_bias):
    bench = Bench(lanes=lanes)
    x = layout(_random(rows, width) * 3 + 2, kinds[0])
    weight = layout(_random(width, seed=1), kinds[1]) if has_weight else None
    bias = _random(width, seed=2) if has_bias else None
    out, mean, rstd = empty(rows, width, kind=kinds[2]), empty(rows), empty(rows)
    views = [bench.view(t) if t is not None else None for t in (x, weight, bias, out, mean, rstd)]
    bench.run(kernels.layer_norm(*views, width=width, eps=1e-5))
    reference = torch.native_layer_norm(x.double(), (width,), _double(weight), _double(bias), 1e-5)
    # an error of the mean is magnified by rstd
    scale = 1 + reference[2].abs() * x.double().abs().amax(-1, keepdim=True)
    factor = 1.0 if weight is None else weight.abs()
    check(out, reference[0], row_tolerance(width, scale) * factor + WIDE * EPS * reference[0].abs())
    check(mean, reference[1].flatten(), row_tolerance(width, x.double().abs().amax(-1)))
    check(rstd, reference[2].flatten(), row_tolerance(width, (scale * reference[2]).flatten()))


@settings(deadline=None, max_examples=20)
@given(
    lanes=st.sampled_from([8, 16]),
    rows=st.sampled_from(ROWS),
    width=st.sampled_from(WIDTHS[1:]),
    kinds=st.tuples(*map(st.sampled_from, (LAYOUTS, LAYOUTS, OUTPUT_LAYOUTS))),
    has_weight=st.booleans(),
    has_residual=st.booleans(),
    mask=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_layer_norm_gradients_equal_float64(lanes, rows, width, kinds, has_weight, has_residual, mask):
    bench = Bench(lanes=lanes)
    x, grad = layout(_random(rows, width) + 1, kinds[0]), layout(_random(rows, width, seed=3), kinds[1])
    weight = _random(width, seed=1) if has_weight else None
    residual = layout(_random(rows, width, seed=4), kinds[0]) if has_residual else None
    _, mean, rstd = torch.native_layer_norm(x, (width,), weight, None, 1e-5)
    outputs = [empty(rows, width, kind=kinds[2]), empty(width), empty(width)]
    targets = [bench.view(t) if wanted else None for t, wanted in zip(outputs, mask, strict=True)]
    read = [bench.view(t) if t is not None else None for t in (grad, x, mean.flatten(), rstd.flatten(), weight)]
    view = bench.view(residual) if residual is not None else None
    bench.run(kernels.layer_norm_backward(*read, *targets, width=width, residual=view, scratch=bench.scratch))
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


def test_layer_norm_of_a_row_with_nan_is_nan_and_others_are_not():
    bench = Bench()
    x, out, mean, rstd = _random(3, 20), empty(3, 20), empty(3), empty(3)
    x[1, 5], x[2, 0] = float("nan"), INF
    views = [bench.view(t) for t in (x, out, mean, rstd)]
    bench.run(kernels.layer_norm(views[0], None, None, *views[1:], width=20, eps=1e-5))
    check(out, F.layer_norm(x.double(), (20,)), 1e-5)


@settings(deadline=None, max_examples=25)
@given(
    lanes=st.sampled_from([8, 16]),
    shape=st.sampled_from([(1, 1), (3, 7), (65, 16), (5, 101), (2, 17, 3), (4, 5, 6), (70, 384)]),
    dim=st.integers(-2, 1),
    kinds=st.tuples(*[st.sampled_from(["plain", "offset", "gaps"])] * 2),
    is_log=st.booleans(),
    scale=st.sampled_from([1.0, 40.0]),
)
def test_softmax_and_its_gradient_equal_float64_along_any_dimension(lanes, shape, dim, kinds, is_log, scale):
    bench = Bench(lanes=lanes)
    x, grad = layout(_random(*shape) * scale, kinds[0]), layout(_random(*shape, seed=1), kinds[0])
    out, dx = empty(*shape, kind=kinds[1]), empty(*shape, kind=kinds[1])
    forward, backward = (
        (kernels.log_softmax, kernels.log_softmax_backward) if is_log else (kernels.softmax, kernels.softmax_backward)
    )
    bench.run(forward(bench.view(x), bench.view(out), dim=dim))
    bench.run(backward(bench.view(grad), bench.view(out), bench.view(dx), dim=dim))
    xd = x.double().requires_grad_()
    expected = (torch.log_softmax if is_log else torch.softmax)(xd, dim)
    (dx_expected,) = torch.autograd.grad(expected, xd, grad.double())
    width = shape[dim]
    largest = float(x.abs().max())
    # exp magnifies the rounding of its argument, which is at most twice the largest |x|
    relative = EPS * (2 * largest + 8 + width**0.5)
    total = grad.abs().double().sum(dim, keepdim=True)
    check(out, expected.detach(), WIDE * EPS * (largest + 1) + relative if is_log else relative)
    check(dx, dx_expected, (relative + EPS * width) * (total + 1))


@pytest.mark.parametrize(
    "row", [[-INF, 1.0, 2.0], [-INF] * 3, [INF, 1.0, 2.0], [float("nan"), 1.0, 2.0], [-200.0, 0.0, 90.0]]
)
@pytest.mark.parametrize("width", [3, 40])
def test_softmax_treats_nan_and_infinities_as_torch(row, width):
    bench = Bench()
    x = torch.tensor([row + row[-1:] * (width - 3), [0.0] * width])
    for ours, theirs in ((kernels.softmax, torch.softmax), (kernels.log_softmax, torch.log_softmax)):
        out = empty(2, width)
        bench.run(ours(bench.view(x), bench.view(out), dim=-1))
        check(out, theirs(x.double(), -1), 1e-4)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (7, 5), (65, 100), (300, 17), (9, 32)])
@pytest.mark.parametrize("kind", ["plain", "gaps"])
def test_nll_loss_and_its_gradient_equal_float64(rows, vocab, reduction, kind):
    bench = Bench()
    log_probs = layout(torch.log_softmax(_random(rows, vocab), -1), kind)
    target = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(1))
    target[1::3] = -100
    shape = (rows,) if reduction == "none" else ()
    out, weight, dx, grad = empty(*shape), empty(), empty(rows, vocab, kind=kind), _random(*shape, seed=2)
    options = {"ignore_index": -100, "reduction": reduction}
    bench.run(kernels.nll_loss(*map(bench.view, (log_probs, target, out, weight)), **options))
    bench.run(kernels.nll_loss_backward(*map(bench.view, (grad, target, weight, dx)), **options))
    xd = log_probs.double().requires_grad_()
    expected = F.nll_loss(xd, target, **options)
    (dx_expected,) = torch.autograd.grad(expected, xd, grad.double())
    check(out, expected.detach(), sum_tolerance(64 + rows // 64, float(log_probs.abs().sum())))
    check(dx, dx_expected, 2 * EPS * float(grad.abs().max()))
    if reduction != "none":
        assert weight.item() == (target != -100).sum().item()


def test_mean_loss_of_nothing_is_nan_and_its_gradient_zero():
    bench = Bench()
    log_probs, target = torch.zeros(3, 4), torch.full((3,), -100)
    out, weight, dx, grad = empty(), empty(), empty(3, 4), torch.ones(())
    options = {"ignore_index": -100, "reduction": "mean"}
    bench.run(kernels.nll_loss(*map(bench.view, (log_probs, target, out, weight)), **options))
    bench.run(kernels.nll_loss_backward(*map(bench.view, (grad, target, weight, dx)), **options))
    assert out.isnan().item()
    assert not dx.any()


@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_a_target_or_token_out_of_range_gives_nan_there_and_only_there(wrong):
    bench = Bench()
    table, index = torch.log_softmax(_random(4, 4), -1), torch.tensor([0, wrong, 3])
    out, loss, weight, dx = empty(3, 4), empty(3), empty(), empty(3, 4)
    bench.run(kernels.embedding(bench.view(table), bench.view(index), bench.view(out)))
    options = {"ignore_index": -100, "reduction": "none"}
    bench.run(
        kernels.nll_loss(bench.view(table[:3]), bench.view(index), bench.view(loss), bench.view(weight), **options)
    )
    bench.run(kernels.nll_loss_backward(*map(bench.view, (torch.ones(3), index, weight, dx)), **options))
    for rows in (out, loss[:, None], dx):
        assert rows.isnan().all(1).tolist() == [False, True, False]
        assert not rows[[0, 2]].isnan().any()


@settings(deadline=None, max_examples=15)
@given(
    lanes=st.sampled_from([8, 16]),
    shape=st.sampled_from([(1,), (3, 5), (64,), (7, 131)]),
    vocab=st.sampled_from([1, 3, 100]),
    width=st.sampled_from(WIDTHS),
    kinds=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(OUTPUT_LAYOUTS)),
    padding_idx=st.sampled_from([-1, 0, 2]),
)
def test_embedding_and_its_gradient_equal_float64(lanes, shape, vocab, width, kinds, padding_idx):
    bench = Bench(lanes=lanes)
    weight = layout(_random(vocab, width), kinds[0])
    index = torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(1))
    out, grad, dweight = empty(*shape, width), _random(*shape, width, seed=2), empty(vocab, width, kind=kinds[1])
    bench.run(kernels.embedding(bench.view(weight), bench.view(index), bench.view(out)))
    assert torch.equal(out, weight[index])
    bench.run(kernels.embedding_backward(*map(bench.view, (grad, index, dweight)), padding_idx=padding_idx))
    expected = torch.ops.aten.embedding_dense_backward(grad.double(), index, vocab, padding_idx, False)
    absolute = torch.ops.aten.embedding_dense_backward(grad.double().abs(), index, vocab, padding_idx, False)
    check(dweight, expected, sum_tolerance(index.numel(), absolute))


def test_rows_give_the_same_bits_on_one_core_and_on_all():
    results = []
    for name in ("opencl:0", "opencl:0.1"):
        bench = Bench(name)
        x, grad = _random(700, 101), _random(700, 101, seed=1)
        mean, rstd = empty(700), empty(700)
        out, dx, dw, db = empty(700, 101), empty(700, 101), empty(101), empty(101)
        v = bench.view
        bench.run(kernels.layer_norm(v(x), None, None, v(out), v(mean), v(rstd), width=101, eps=1e-5))
        read = [v(t) for t in (grad, x, mean, rstd)]
        bench.run(kernels.layer_norm_backward(*read, None, v(dx), v(dw), v(db), width=101, scratch=bench.scratch))
        bench.run(kernels.softmax(v(x), v(x), dim=-1))
        results.append([out, dx, dw, db, x])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _double(tensor):
    return None if tensor is None else tensor.double()
