"""Elementwise operations in the launch of the matrix product that they read: numbers, launches, what is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hetero.opencl.handlers import products
from hetero.opencl.program import open_device, open_variant
from tests.kernel_harness import DEVICE, EPS

if TYPE_CHECKING:
    from collections import Counter

Function = Callable[..., Any]


def _inputs(M: int, N: int, K: int) -> list[Tensor]:
    """x (M, K), weight (N, K), bias (N,), z (M, N), row (M, 1)."""
    generator = torch.Generator().manual_seed(M + N + K)
    shapes = ((M, K), (N, K), (N,), (M, N), (M, 1))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def _run(function: Function, inputs: list[Tensor], *, device: str = DEVICE) -> tuple[list[Tensor], Counter[str]]:
    """Result and gradients of a compiled function, and its launches."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="opencl", dynamic=False, options={"device": device})
    before = open_device(device).counts.copy()
    return _passes(compiled, inputs), open_device(device).counts - before


def _passes(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    result = function(*inputs)
    results = result if isinstance(result, tuple) else (result,)
    wanted = [x for x in inputs if x.requires_grad]
    weights = [torch.linspace(-1, 2, r.numel()).view(r.shape).to(r.dtype) for r in results]
    total = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    return [*(r.detach() for r in results), *(g for g in gradients if g is not None)]


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> Function:
    """What `_run` gives where no product takes an epilogue."""

    def run(function: Function, inputs: list[Tensor]) -> tuple[list[Tensor], Counter[str]]:
        defer = products.defer
        with monkeypatch.context() as patch:
            patch.setattr(products, "defer", lambda *args, takes_epilogue, **options: defer(*args, **options))
            return _run(function, inputs)

    return run


def _close(found: list[Tensor], function: Function, inputs: list[Tensor]) -> None:
    """Against float64: sums of at most K products, or M in the backward pass, of numbers of size 1."""
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    longest = sum(x.shape[0] + x.shape[-1] for x in inputs[:2])
    for a, b in zip(found, _passes(function, wide), strict=True):
        scale = max(float(b.abs().max()), 1.0) * longest**0.5
        torch.testing.assert_close(a.double(), b, rtol=8 * EPS, atol=8 * EPS * scale)


CHAINS: dict[str, Function] = {
    "gelu": lambda p, z, row: functional.gelu(p),
    "gelu tanh": lambda p, z, row: functional.gelu(p, approximate="tanh"),
    "relu": lambda p, z, row: functional.relu(p),
    "silu": lambda p, z, row: functional.silu(p),
    "tanh": lambda p, z, row: torch.tanh(p),
    "product of rows and elements": lambda p, z, row: torch.sigmoid(p) * row + z * 0.5,
    "another order of what else is read": lambda p, z, row: p * z.t().contiguous().t(),
    "a part of something larger": lambda p, z, row: p.tanh() * torch.cat([z, z], 1)[:, : z.shape[1]],
    "twice in one expression": lambda p, z, row: p.exp().clamp(max=2) * p,
    "transposed": lambda p, z, row: functional.silu(p.t()) * 2,
}
QUICK = ("gelu", "relu", "product of rows and elements", "transposed")  # of the chains, in the default run
SIZES = [(1, 1, 4), (2, 1, 3), (1, 33, 7), (12, 32, 16), (97, 129, 385), (800, 40, 130)]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CHAINS]
)
def test_a_chain_has_the_bits_of_launches_of_its_own(name: str, unfused: Function) -> None:
    inputs, function = _inputs(13, 131, 385), _function(name)
    fused, launched = _run(function, inputs)
    separate, more = unfused(function, inputs)
    assert all(torch.equal(a, b) for a, b in zip(fused, separate, strict=True))
    assert launched.total() < more.total()
    _close(fused, function, inputs)


def _function(name: str) -> Function:
    def function(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor, row: Tensor) -> Tensor:
        return CHAINS[name](functional.linear(x, weight, bias), z, row)

    return function


@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_any_shape_equals_float64(M: int, N: int, K: int) -> None:
    inputs = _inputs(M, N, K)
    found, launched = _run(_function("gelu"), inputs)
    _close(found, _function("gelu"), inputs)
    assert ("addmm+gelu" in launched) == (M * N > 1)


def test_an_mlp_has_as_few_launches_as_products() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 10))
    x = torch.randn(3, 7, 20)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="opencl", options={"device": DEVICE})
    before = open_device(DEVICE).counts.copy()
    with torch.no_grad():
        compiled(x)
    assert open_device(DEVICE).counts - before == {"addmm+gelu": 1, "addmm": 1}
    before = open_device(DEVICE).counts.copy()
    compiled(x)  # what the backward pass reads is stored by the same launches
    assert open_device(DEVICE).counts - before == {"addmm+gelu": 1, "addmm": 1}


def test_the_derivative_of_the_activation_ends_the_product_that_gives_its_gradient() -> None:
    inputs = [*_inputs(10, 20, 30)[:2], torch.randn(5, 20)]

    def function(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return functional.gelu(x @ first.t()) @ second.t()

    found, launched = _run(function, inputs)
    assert launched["mm+gelu"] == 1
    assert launched["mm+gelu_backward"] == 1
    assert launched["gelu_backward"] == 0
    _close(found, function, inputs)


def test_layers_of_one_shape_or_another_share_one_program() -> None:
    device = open_variant(DEVICE, "sharing")
    layers = [nn.Linear(n, n + 1) for n in (30, 31, 32)]

    def function(x: Tensor) -> Tensor:
        for layer in layers:
            x = functional.silu(layer(x))
        return x

    with torch.no_grad():
        torch._dynamo.reset()
        torch.compile(function, backend="opencl", options={"device": "sharing"})(torch.randn(9, 30))
    assert device.counts == {"addmm+silu": 3}
    assert device.programs_built.total() == 1


@pytest.mark.parametrize("batched", [False, True])
def test_residual_after_dropout_in_training_is_in_the_launch(batched: bool, unfused: Function) -> None:
    x, weight, bias, z, _ = _inputs(24, 33, 16)

    def function(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor) -> Tensor:
        if batched:
            x, z = x.view(4, 6, -1), z.view(4, 6, -1)
        return z + functional.dropout(functional.linear(x, weight, bias), 0.3, True)

    inputs, results = [x, weight, bias, z], []
    for run in (_run, unfused):
        torch.manual_seed(3)
        found, launched = run(function, inputs)
        results.append(found)
        assert ("addmm+native_dropout+add" in launched) == (run is _run)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    out, dropped = results[0][0].reshape(24, 33), (x @ weight.t() + bias).double()
    kept = ((out - z).abs() > 0).double()  # a kept element is not 0, and an ulp of z is far below it
    assert 0.6 < float(kept.mean()) < 0.8  # of 792 draws; 6 standard deviations
    torch.testing.assert_close(out.double(), z.double() + kept * dropped / 0.7, rtol=0, atol=1e-5)


def test_two_consumers_get_the_product_and_the_chain(unfused: Function) -> None:
    def function(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        p = functional.linear(x, weight, bias)
        y = functional.gelu(p)
        return y * z, p.sum(0), y.t() @ z, p

    inputs = _inputs(17, 37, 20)
    fused, launched = _run(function, inputs)
    separate, _ = unfused(function, inputs)
    assert any(op.startswith("addmm+gelu") for op in launched)
    assert all(torch.equal(a, b) for a, b in zip(fused, separate, strict=True))
    _close(fused, function, inputs)


def test_of_two_products_in_one_expression_the_second_computes_it(unfused: Function) -> None:
    def function(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(x @ gate.t()) * (x @ up.t())

    inputs = [*_inputs(11, 35, 20)[:2], torch.randn(35, 20).requires_grad_()]
    fused, launched = _run(function, inputs)
    separate, _ = unfused(function, inputs)
    assert launched["mm+silu+mul"] == 1
    assert all(torch.equal(a, b) for a, b in zip(fused, separate, strict=True))
    _close(fused, function, inputs)


@pytest.mark.parametrize("chain", [lambda p: p.t().contiguous() + p.t()[:1], lambda p: (p + p.sum(0)).tanh()])
def test_what_does_not_fit_reads_the_stored_product(chain: Function) -> None:
    inputs = _inputs(9, 14, 10)[:2]

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return chain(x @ weight.t())

    found, launched = _run(function, inputs)
    assert launched["mm"] >= 1
    _close(found, function, inputs)


def test_a_batch_of_products_and_other_types() -> None:
    def function(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        p = a @ b
        return p * scale, (p > 0).double() * 2

    a, b, scale = torch.randn(3, 7, 9), torch.randn(3, 9, 33), torch.randn(3, 1, 33)
    inputs = [x.requires_grad_() for x in (a, b, scale)]
    found, launched = _run(function, inputs)
    assert any(op.startswith("bmm+") for op in launched)
    _close(found[:1] + found[2:], lambda *x: function(*x)[0] + 0 * function(*x)[1], inputs)
    assert torch.equal(found[1], (found[0] * scale > 0).double() * 2)


def test_a_sum_of_no_products_has_its_epilogue() -> None:
    bias = torch.randn(40)
    inputs = [torch.empty(3, 0), torch.empty(0, 40), bias.requires_grad_()]
    found, _ = _run(lambda x, weight, bias: functional.relu(torch.addmm(bias, x, weight)) + 1, inputs)
    assert torch.equal(found[0], (functional.relu(bias) + 1).detach().expand(3, 40))


def test_nan_and_infinities_pass() -> None:
    x, weight, bias, *rest = _inputs(13, 33, 20)
    with torch.no_grad():
        x[3, 4], x[5, 6], x[7, 8] = float("nan"), float("inf"), -float("inf")
    expected = functional.gelu(functional.linear(x, weight, bias))
    (found, *_), _ = _run(_function("gelu"), [x, weight, bias, *rest])
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isposinf(), expected.isposinf())


@pytest.mark.parametrize(("M", "N", "K"), [(7, 33, 20), (390, 17, 20)])
def test_vectors_of_16_give_the_same(M: int, N: int, K: int) -> None:
    open_variant(DEVICE, "wide", lanes=16)
    inputs = _inputs(M, N, K)
    found, launched = _run(_function("silu"), inputs, device="wide")
    assert launched["addmm+silu"] == 1
    _close(found, _function("silu"), inputs)
