"""exp, log, tanh, erf and the lane operations of common.cl against float64."""

from __future__ import annotations

import pytest
import torch

from hetero.opencl.ir import Launch
from tests.kernel_harness import EPS, Bench, check, empty

_SOURCE = """
KERNEL apply(TENSOR(x), TENSOR_OUT(out), const int n)
{
    int i = 0;
    for (; i + LANES <= n; i += LANES) STORE(BASE(out) + i, FUNCTION(LOAD(BASE(x) + i)));
    for (; i < n; i++) BASE(out)[i] = FUNCTION(BASE(x)[i]);
}
KERNEL transposed(TENSOR(x), TENSOR_OUT(out))
{
    vec tile[LANES];
    for (int i = 0; i < LANES; i++) tile[i] = LOAD(BASE(x) + i * LANES);
    transpose(tile);
    for (int i = 0; i < LANES; i++) STORE(BASE(out) + i * LANES, tile[i]);
}
"""
SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 88.7, 88.8, 1e30, -1e30, 1e-30]
)


def _apply(function, x, lanes):
    bench, out = Bench(lanes=lanes), empty(*x.shape)
    arguments = (bench.view(x), bench.view(out), x.numel())
    defines = {"FUNCTION": function}
    bench.run(
        [Launch(function, "apply", _SOURCE, arguments, (1,), (1,), (bench.view(out),), defines, is_generated=True)]
    )
    return out


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize(
    ("function", "low", "high", "relative", "absolute"),
    [
        ("exp_", -87.3, 88.7, 2 * EPS, 0.0),
        ("log_", 1e-6, 1e6, 2 * EPS, EPS),  # near 1 the logarithm is small and its error is absolute
        ("tanh_", -12.0, 12.0, 3 * EPS, 0.0),
        ("erf_", -6.0, 6.0, 0.0, 5e-7),
        ("sqrt_", 0.0, 1e6, EPS, 0.0),
    ],
)
def test_function_equals_float64_within_its_stated_error(function, low, high, relative, absolute, lanes):
    x = torch.cat([torch.linspace(low, high, 20001), torch.linspace(max(low, -0.7), 0.7, 3001).clamp(min=low)])
    expected = getattr(torch, function.rstrip("_"))(x.double())
    check(_apply(function, x, lanes), expected, relative * expected.abs() + absolute + 1e-38)


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("function", ["exp_", "log_", "tanh_", "erf_", "sqrt_"])
def test_function_gives_nan_and_infinities_where_torch_does(function, lanes):
    x = SPECIAL.repeat(4)  # vectors and a rest
    expected = getattr(torch, function.rstrip("_"))(x)
    check(_apply(function, x, lanes), expected, 4 * EPS * expected.abs() + 5e-7 * (function == "erf_"))


def test_exp_of_very_negative_numbers_is_zero_without_denormals():
    assert _apply("exp_", torch.tensor([-87.5, -100.0, -1e10] * 6), 8).tolist() == [0.0] * 18


@pytest.mark.parametrize("lanes", [8, 16])
def test_transpose_in_registers(lanes):
    bench, x, out = (
        Bench(lanes=lanes),
        torch.randn(lanes, lanes, generator=torch.Generator().manual_seed(0)),
        empty(lanes, lanes),
    )
    arguments = (bench.view(x), bench.view(out))
    defines = {"FUNCTION": "exp_"}
    launch = Launch("t", "transposed", _SOURCE, arguments, (1,), (1,), (bench.view(out),), defines, is_generated=True)
    bench.run([launch])
    assert torch.equal(out, x.t())
