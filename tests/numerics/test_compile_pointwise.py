"""Generated elementwise kernels against eager PyTorch: types, broadcasting, layouts, special values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from hetero.opencl.program import open_device

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "opencl:0"
# Own exp, tanh, erf are within 3 ulp where PyTorch's are within 1; expressions nest up to six of them.
RELATIVE = 4e-6


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    torch._dynamo.reset()
    return torch.compile(function, backend="opencl", dynamic=False, options={"device": DEVICE})


def check(function: Callable[..., torch.Tensor], *inputs: torch.Tensor, rtol: float = RELATIVE) -> None:
    expected, got = function(*inputs), compiled(function)(*inputs)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == expected.dtype
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol, equal_nan=True)


FLOAT_OPS: list[Callable[..., torch.Tensor]] = [
    torch.add,
    torch.sub,
    torch.mul,
    lambda a, b: a / (b.abs() + 1),
    lambda a, b: torch.where(a > b, a, b * 2),
    torch.maximum,
    torch.minimum,
    lambda a, b: torch.tanh(a) + b,
    lambda a, b: torch.sigmoid(a) * b,
    lambda a, b: functional.relu(a) - b,
    lambda a, b: torch.exp(-a.abs()) * b,
    lambda a, b: a.masked_fill(b > 0, 0.5),
    lambda a, b: torch.clamp(a, -1.0, 1.5) + (b != 0).float(),
    lambda a, b: functional.gelu(a) + b,
    lambda a, b: functional.silu(a) + (b * b),
]
INTEGER_OPS: list[Callable[..., torch.Tensor]] = [
    torch.add,
    torch.sub,
    torch.mul,
    torch.bitwise_and,
    torch.bitwise_or,
    torch.bitwise_xor,
    lambda a, b: a >> 3,
    lambda a, b: torch.where(a < b, a, -b),
    lambda a, b: torch.div(a, b | 1, rounding_mode="floor"),
    lambda a, b: torch.remainder(a, b | 1),
    lambda a, b: (a >= b).to(torch.int64) + a,
    lambda a, b: torch.arange(a.shape[-1]) ^ a if a.dim() and a.shape[-1] > 1 else a,
]


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    """The same values as a plain tensor, a slice, a transposed one and a broadcast one."""
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] * 2 + 1, dtype=x.dtype)
    wide[..., 1::2] = x
    return [x, wide[..., 1::2], x.transpose(0, -1).contiguous().transpose(0, -1), x[..., :1], x[:1], x[0, 0, 0]]


@settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_expressions_agree_with_eager(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.sampled_from([1, 2, 3, 5, 17])] * 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    is_float = data.draw(st.booleans())
    if is_float:
        base = torch.randn(shape, generator=generator)
        operations = FLOAT_OPS
    else:
        dtype = data.draw(st.sampled_from([torch.int64, torch.int32]))
        base = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator).to(dtype)
        operations = INTEGER_OPS
    inputs = [data.draw(st.sampled_from(layouts(base + k))) for k in range(3)]
    program = data.draw(
        st.lists(st.tuples(st.sampled_from(operations), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6)
    )
    turn = data.draw(st.booleans())

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = list(tensors)
        for operation, i, j in program:
            values.append(operation(values[i % len(values)], values[j % len(values)]))
        last = values[-1]
        return (last.transpose(0, -1) * 2 if turn and last.dim() > 1 else last, values[-2] + 1)

    expected, got = function(*inputs), compiled(function)(*inputs)
    for e, g in zip(expected, got, strict=True):  # type: ignore[call-overload]
        assert g.dtype == e.dtype
        assert g.shape == e.shape
        if is_float:
            torch.testing.assert_close(g, e, rtol=RELATIVE, atol=RELATIVE * float(e.abs().max().clamp(1)))
        else:
            assert torch.equal(g, e)


SPECIAL = torch.tensor([math.nan, math.inf, -math.inf, 100.0, -100.0, 1e-30, -0.0, 2.0, 0.0, -3.0, 88.7, 1e38])


UNARY: list[Callable[[torch.Tensor], torch.Tensor]] = [
    torch.exp, torch.tanh, torch.relu, torch.sigmoid, torch.log, torch.sqrt, torch.abs, torch.neg, torch.erf,
    torch.floor, torch.isnan, functional.silu, torch.reciprocal, torch.log1p, torch.rsqrt, torch.expm1, torch.sign,
    lambda x: x.clamp(-1, 1), lambda x: x**2, lambda x: x > 0, lambda x: torch.maximum(x, x[:1]), lambda x: x / 0.0,
]  # fmt: skip
RARE_UNARY: list[Callable[[torch.Tensor], torch.Tensor]] = [
    torch.acos, torch.acosh, torch.asin, torch.asinh, torch.atan, torch.atanh, torch.cosh, torch.sinh, torch.erfc,
    torch.erfinv, torch.log10, torch.log2, torch.exp2, torch.signbit, torch.isinf, torch.isfinite, torch.sgn,
    torch.trunc, torch.square, torch.nan_to_num, functional.softplus, functional.elu, functional.hardtanh,
]  # fmt: skip
BINARY: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
    torch.atan2, torch.fmod, torch.hypot, torch.copysign, torch.fmax, torch.fmin, torch.maximum, torch.minimum,
    torch.pow, torch.xlogy, torch.logaddexp, torch.div, lambda a, b: torch.clamp(a, b, b + 1),
]  # fmt: skip


def together(functions: list[Callable[..., torch.Tensor]]) -> Callable[..., list[torch.Tensor]]:
    """All results of the same inputs, and their sum, which makes them one kernel: a program costs a quarter second."""

    def function(*inputs: torch.Tensor) -> list[torch.Tensor]:
        results = [f(*inputs) for f in functions]
        total = results[0].float()
        for result in results[1:]:
            total = total + result.float()
        return [*results, total]

    return function


def check_special(functions: list[Callable[..., torch.Tensor]], *inputs: torch.Tensor) -> None:
    """NaN, infinities and types as eager, everything else within RELATIVE."""
    run = together(functions)
    for k, (got, expected) in enumerate(zip(compiled(run)(*inputs)[:-1], run(*inputs)[:-1], strict=True)):  # type: ignore[index]
        torch.testing.assert_close(
            got, expected, rtol=RELATIVE, atol=1e-6, equal_nan=True, msg=lambda m, k=k: f"{functions[k]}: {m}"
        )


def test_special_values_are_those_of_eager() -> None:
    check_special(UNARY, SPECIAL)
    check_special(RARE_UNARY, torch.cat([SPECIAL, torch.tensor([1.0, -1.0, 0.5, -0.999, 0.7])]))


def test_special_pairs_are_those_of_eager() -> None:
    check_special(BINARY, SPECIAL[:, None], SPECIAL[None, :])


@pytest.mark.parametrize(
    ("function", "low", "high", "ulp"),
    [
        (torch.expm1, -20.0, 20.0, 6), (torch.expm1, -0.01, 0.01, 6), (torch.log1p, -0.99, 50.0, 5),
        (torch.log1p, -1e-3, 1e-3, 5), (torch.erfinv, -0.999, 0.999, 16),
    ],
)  # fmt: skip
def test_functions_without_cancellation_are_near_float64(
    function: Callable[[torch.Tensor], torch.Tensor], low: float, high: float, ulp: int
) -> None:
    x = torch.linspace(low, high, 5003)
    got, exact = compiled(function)(x), function(x.double())
    assert isinstance(got, torch.Tensor)
    error = (got.double() - exact).abs() / exact.abs().clamp(min=1e-30)
    assert float(error.max()) <= ulp * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integer_powers_are_those_of_eager(dtype: torch.dtype) -> None:
    base, exponent = torch.tensor([0, 1, 2, 3, 7, 200]).to(dtype), torch.tensor([0, 1, 2, 5, 31, 63])
    check(lambda a, b: a[:, None] ** b.to(dtype)[None, :], base, exponent)
    check(lambda a, b: torch.stack([a**5, a**0, a**2]), base, exponent)
    check(lambda a, b: 2**b, base, exponent)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_near_float64_in_both_tails(approximate: str) -> None:
    x = torch.linspace(-6, 6, 1001, requires_grad=True)
    exact = functional.gelu(x.double(), approximate=approximate)
    got = compiled(lambda x: functional.gelu(x, approximate=approximate))(x)
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=3e-7)
    ours = torch.autograd.grad(got.sum(), x)[0]
    torch.testing.assert_close(ours.double(), torch.autograd.grad(exact.sum(), x)[0].double(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("a", [torch.float32, torch.int64, torch.int32, torch.bool, torch.uint8])
def test_types_are_promoted_as_by_eager(a: torch.dtype) -> None:
    x = torch.tensor([[0, 1, 3], [7, 2, 0]]).to(a)
    kinds = (torch.float32, torch.int64, torch.int32, torch.bool)
    others = [*(torch.tensor([2, 0, 5]).to(kind) for kind in kinds), 2, 0.5]

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        return [f for y in others for f in ((x + y) * x, x / 3 + y, torch.where(x > 1, x, y))]

    for got, expected in zip(compiled(function)(x), function(x), strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(got, expected, rtol=RELATIVE, atol=RELATIVE)  # dtypes as well


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_bounds_are_promoted_with_what_they_clamp(dtype: torch.dtype) -> None:
    x = torch.arange(-3, 4).to(dtype)
    check(lambda x: torch.clamp(x, min=0.5), x)
    check(lambda x: torch.clamp(x, max=0.5), x)
    check(lambda x: torch.clamp(x, -1, 1.5), x)
    check(lambda x: torch.clamp(x, -1, 2), x)
    check(lambda x: torch.ops.aten.clamp_min(x, 0.5), x)
    check(lambda x: torch.ops.aten.clamp_max(x, 0.5), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_remainders_and_floor_divisions_are_exactly_those_of_eager(dtype: torch.dtype) -> None:
    numbers = [0.0, -0.0, 1.0, -1.0, 0.1, -0.1, 5.0, -7.5, 1e8, -1e8, math.inf, -math.inf, math.nan, 1e-30, 0.3]
    x = torch.tensor(numbers, dtype=dtype)

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        a, b = x[:, None], x[None, :]
        by_numbers = [f for n in (0.1, -0.3, math.inf) for f in (x % n, torch.div(x, n, rounding_mode="floor"))]
        return [a % b, torch.div(a, b, rounding_mode="floor"), a // b, *by_numbers]

    for got, expected in zip(compiled(function)(x), function(x), strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", [torch.floor, torch.ceil, torch.round, torch.trunc])
def test_integers_are_rounded_already(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    check(lambda x: function(x) + 1, torch.tensor([2**62 + 1, -5, 0]))
    check(function, torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.7]))


@pytest.mark.parametrize("function", [
    lambda x: x.half() + 1, lambda x: x.bfloat16() @ x.bfloat16().t(), lambda x: torch.cat([x.half(), x.half()]),
    lambda x: functional.pad(x.half(), (1, 1)), lambda x: torch.zeros(3, dtype=torch.float16) + x[0, :3].half(),
    lambda x: x.half().sum(0), lambda x: (x.half() * 2)[1:, ::2].float(),
])  # fmt: skip
def test_what_kernels_have_no_type_for_is_an_error_or_falls_back(function: Callable[[torch.Tensor], object]) -> None:
    x = torch.randn(4, 8)
    with pytest.raises(Exception, match=r"can't run on OpenCL(.|\n)*float16"):
        compiled(function)(x)
    torch._dynamo.reset()
    got = torch.compile(function, backend="opencl", options={"device": DEVICE, "fallback": "cpu"})(x)
    torch.testing.assert_close(got, function(x))


def test_autocast_falls_back() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    function = torch.compile(lambda x: x @ x.t(), backend="opencl", options={"device": DEVICE, "fallback": "cpu"})
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = function(x), x @ x.t()
    torch.testing.assert_close(got, expected)
    ours, theirs = (torch.autograd.grad(y.float().sum(), x)[0] for y in (got, expected))
    torch.testing.assert_close(ours, theirs)


def test_integers_wrap_as_by_eager() -> None:
    x = torch.tensor([2**63 - 1, -(2**63), 12345678901234567])
    check(lambda x: (x * 6364136223846793005 + 1442695040888963407) >> 33, x)
    check(lambda x: (-x) ^ (x << 7), x)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_float64_is_computed_in_float64(approximate: str) -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    exact = functional.gelu(x, approximate=approximate)
    got = compiled(lambda x: functional.gelu(x, approximate=approximate))(x)
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-14)
    ours, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (got, exact))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_chain_is_one_launch() -> None:
    x = torch.randn(8, 8)
    counts = open_device(DEVICE).counts
    function = compiled(lambda x: torch.tanh(x * 2 + 1).t() * x[:1] - x.view(64)[:8])
    function(x)
    before = counts.total()
    function(x)
    assert counts.total() - before == 1


def test_a_value_used_twice_is_computed_once_and_stored_if_returned() -> None:
    x = torch.randn(5, 7)
    counts = open_device(DEVICE).counts

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.exp(x)
        return y, y * y + y

    f = compiled(function)
    f(x)
    before = counts.total()
    got = f(x)
    assert counts.total() - before <= 2
    for g, e in zip(got, function(x), strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(g, e, rtol=RELATIVE, atol=RELATIVE)


def test_a_very_long_chain_is_cut() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        for k in range(200):
            x = torch.relu(x * 1.01 + (k % 3 - 1))
        return x

    check(function, torch.randn(33))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0, 2)])
def test_zero_size_tensors_pass(shape: tuple[int, ...]) -> None:
    check(lambda x: torch.tanh(x) * 2 + 1, torch.zeros(shape))
    check(lambda x: (x + 1).sum(), torch.zeros(shape))
    check(lambda x: torch.cat([x, x]), torch.zeros(shape))


def test_data_movement_agrees_with_eager() -> None:
    x = torch.randn(4, 6, 5)
    check(lambda x: torch.cat([x * 2, x.transpose(0, 1)[:4, :, :].new_zeros(4, 1, 5), x[:, 1:3]], dim=1), x)
    check(lambda x: x.permute(2, 0, 1).contiguous() + 1, x)
    check(lambda x: x.expand(3, 4, 6, 5).reshape(3, 24, 5) * 2, x)
    check(lambda x: functional.pad(x, (1, 2, 0, 1)), x)
    check(lambda x: torch.stack([x[0], x[1] * 2], dim=-1), x)
    check(lambda x: torch.full((3, 5), 2.5) + torch.arange(5), x)
    check(lambda x: x.view(2, 2, 6, 5).transpose(1, 2).reshape(12, 10).t() * x.reshape(12, 10).t(), x)


@pytest.mark.parametrize(
    "join",
    [
        lambda h: torch.cat([h, h], -1), lambda h: torch.cat([h, h[:, :4]], -1), lambda h: torch.stack([h, h]),
        lambda h: torch.cat([h[:, :16], h[:, 16:]]), lambda h: torch.cat([h, h[:0]]),
    ],
)  # fmt: skip
def test_a_matrix_product_may_be_several_parts_of_a_concatenation(join: Callable[[torch.Tensor], torch.Tensor]) -> None:
    check(lambda x, w: join(x @ w), torch.randn(8, 16), torch.randn(16, 32), rtol=1e-5)


def test_a_concatenation_of_several_types_has_their_common_type() -> None:
    x, w, i = torch.randn(8, 16), torch.randn(16, 32), torch.ones(8, 3, dtype=torch.int64)
    check(lambda x, w, i: torch.cat([x @ w, i], -1), x, w, i, rtol=1e-5)


def test_the_gradient_of_a_sum_over_rows_agrees_with_eager() -> None:
    x, w, seed = torch.randn(8, 16), torch.randn(16, 32, requires_grad=True), torch.randn(32)
    ours = torch.autograd.grad(compiled(lambda x, w: (x @ w).sum(0))(x, w), w, seed)[0]  # type: ignore[call-overload]
    torch.testing.assert_close(ours, torch.autograd.grad((x @ w).sum(0), w, seed)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sum", "mean", "amax"])
def test_reductions_agree_with_eager(kind: str) -> None:
    reduce = getattr(torch, kind)

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        results = [reduce(x * 2) + 1]
        for dim in (0, -1, (0, 1), (0, 2), (1,)):
            for keepdim in (False, True):
                results += [reduce(y, dim=dim, keepdim=keepdim) for y in (x * 3, x.transpose(0, 2))]
        return results

    x = torch.randn(5, 3, 7)
    for got, expected in zip(compiled(function)(x), function(x), strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", [(1, 3), (0, 2), (0, 2, 3), (0,), (1, 2)])
def test_every_second_dimension_may_be_reduced(dims: tuple[int, ...]) -> None:
    check(lambda x: x.sum(dims), torch.randn(2, 3, 4, 5), rtol=1e-5)


@pytest.mark.parametrize("kind", ["sum", "mean", "amax"])
def test_a_scalar_may_be_reduced(kind: str) -> None:
    check(lambda x: getattr(torch, kind)(x, dim=-1) * 2, torch.tensor(3.0))


def test_gradients_of_slices_and_broadcasts_agree_with_eager() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((x[1:, ::2] * y).sum(0) + x[0, :3].exp()).tanh()

    x, y = torch.randn(4, 6, requires_grad=True), torch.randn(3, requires_grad=True)
    ours = torch.autograd.grad(compiled(function)(x, y).sum(), (x, y))  # type: ignore[attr-defined]
    theirs = torch.autograd.grad(function(x, y).sum(), (x, y))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=RELATIVE, atol=RELATIVE)
