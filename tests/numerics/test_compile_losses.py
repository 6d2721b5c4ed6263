"""Activations, losses and norms of torch.nn, forward and backward, against float64."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from hetero.opencl.program import open_device
from tests.kernel_harness import EPS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DEVICE = "opencl:0"
# Functions are within 6 ulp and nest up to three deep, forward and again backward; what they are multiplied by is about
# as large as the result. Sums of up to 100 terms add less than the square root of that in ulp.
RELATIVE = 32 * EPS


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="opencl", fullgraph=True, dynamic=False, options={"device": DEVICE})


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(function: Callable[..., Sequence[torch.Tensor]], tensors: Sequence[torch.Tensor]) -> None:
    """Results and gradients of floating-point tensors within RELATIVE of the largest element; all launched."""
    narrow = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]
    counts = open_device(DEVICE).counts
    before = counts.total()
    got, exact = compiled(function)(*narrow), function(*wide)
    assert counts.total() - before >= len(got) // 2
    assert len(got) == len(exact)
    for i, (g, e) in enumerate(zip(got, exact, strict=True)):
        assert_near(g, e, f"result {i}")
        seed = random(*e.shape, seed=i)
        ours = torch.autograd.grad(
            g, [t for t in narrow if t.requires_grad], seed, retain_graph=True, allow_unused=True
        )
        theirs = torch.autograd.grad(
            e, [t for t in wide if t.requires_grad], seed.double(), retain_graph=True, allow_unused=True
        )
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if b is not None:
                assert a is not None
                assert_near(a, b, f"gradient {k} of result {i}")


def assert_near(got: torch.Tensor, exact: torch.Tensor, name: str) -> None:
    error, scale = (got.double() - exact).abs().max(), exact.abs().max()
    assert bool(error <= RELATIVE * scale.clamp(min=1e-3)), f"{name}: {error} of {scale}"


ACTIVATIONS: list[nn.Module] = [
    nn.CELU(0.7), nn.ELU(1.3), nn.GELU(), nn.GELU("tanh"), nn.GLU(), nn.Hardshrink(), nn.Hardsigmoid(), nn.Hardswish(),
    nn.Hardtanh(-0.4, 0.9), nn.LeakyReLU(0.2), nn.LogSigmoid(), nn.LogSoftmax(-1), nn.Mish(), nn.PReLU(), nn.ReLU(),
    nn.ReLU6(), nn.RReLU().eval(), nn.SELU(), nn.SiLU(), nn.Sigmoid(), nn.Softmax(-1), nn.Softmin(-1), nn.Softplus(2.0),
    nn.Softshrink(0.3), nn.Softsign(), nn.Tanh(), nn.Tanhshrink(), nn.Threshold(0.1, -2.0), nn.Softmax2d(),
]  # fmt: skip


def test_every_activation_of_torch_nn_is_tested() -> None:
    known = {type(module).__name__ for module in ACTIVATIONS} | {"MultiheadAttention"}
    assert set(nn.modules.activation.__all__) <= known


def test_activations_agree_with_float64() -> None:
    x = random(2, 3, 4, 6) * 3

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        modules = ACTIVATIONS if x.dtype == torch.float32 else [copy.deepcopy(m).double() for m in ACTIVATIONS]
        return [module(x) for module in modules]

    check(function, [x])


def test_activations_pass_nan_and_infinities_as_eager() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 200.0, -200.0, -0.0, 1e-30, 0.5]).view(1, 2, 1, 4)
    modules = [m for m in ACTIVATIONS if not isinstance(m, (nn.LogSoftmax, nn.Softmax, nn.Softmin, nn.Softmax2d))]
    got = compiled(lambda x: [m(x) for m in modules])(x)
    for module, g in zip(modules, got, strict=True):
        torch.testing.assert_close(
            g, module(x), rtol=RELATIVE, atol=1e-30, equal_nan=True, msg=lambda m, module=module: f"{module}: {m}"
        )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_agrees_with_float64(reduction: str) -> None:
    def function(x: torch.Tensor, soft: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> list[Any]:
        def loss(target: torch.Tensor, **settings: Any) -> torch.Tensor:
            return functional.cross_entropy(x, target, reduction=reduction, **settings)

        return [
            loss(target),
            loss(target, ignore_index=3),
            loss(target, label_smoothing=0.1),
            loss(target, label_smoothing=0.2, ignore_index=3, weight=weight.detach()),
            loss(target, weight=weight.detach()),
            loss(soft.softmax(-1), label_smoothing=0.1),
        ]

    target = torch.tensor([0, 3, 2, 3, 6, 1, 3, 5, 4])
    check(function, [random(9, 7), random(9, 7, seed=1), random(7, seed=2).abs() + 0.1, target])


def test_cross_entropy_of_images_and_of_sequences_agrees_with_float64() -> None:
    def function(x: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
        return [
            functional.cross_entropy(x, target),
            functional.nll_loss(functional.log_softmax(x, 1), target, ignore_index=1),
            functional.cross_entropy(x.transpose(1, 3).reshape(-1, 5), target.transpose(1, 2).reshape(-1)),
        ]

    check(function, [random(2, 5, 3, 4), torch.randint(5, (2, 3, 4), generator=torch.Generator().manual_seed(0))])


LOSSES: list[Callable[..., torch.Tensor]] = [
    functional.mse_loss,
    functional.l1_loss,
    lambda x, y, reduction: functional.smooth_l1_loss(x, y, beta=0.6, reduction=reduction),
    lambda x, y, reduction: functional.huber_loss(x, y, delta=0.8, reduction=reduction),
    lambda x, y, reduction: functional.binary_cross_entropy(x.sigmoid(), y.detach().sigmoid(), reduction=reduction),
    lambda x, y, reduction: functional.binary_cross_entropy_with_logits(
        x, y.detach().sigmoid(), pos_weight=y.detach()[0].abs(), reduction=reduction
    ),
    lambda x, y, reduction: functional.kl_div(x.log_softmax(-1), y.softmax(-1), reduction=reduction),
    lambda x, y, reduction: functional.kl_div(
        x.log_softmax(-1),
        y.log_softmax(-1),
        log_target=True,
        reduction="batchmean" if reduction == "mean" else reduction,
    ),
]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_other_losses_agree_with_float64(reduction: str) -> None:
    check(lambda x, y: [loss(x, y, reduction=reduction) for loss in LOSSES], [random(6, 11), random(6, 11, seed=1)])


# --- norms ------------------------------------------------------------------------------------------------------------


def test_group_norm_and_rms_norm_agree_with_float64() -> None:
    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        return [
            functional.group_norm(x, 3, weight, bias),
            functional.group_norm(x, 6),
            functional.rms_norm(x, (7,), scale),
            functional.rms_norm(x, (5, 7), eps=1e-5),
        ]

    check(function, [random(4, 6, 5, 7) + 0.5, random(6), random(6, seed=1), random(7)])


def test_norms_are_few_launches() -> None:
    x, weight = random(4, 6, 5, 7), random(6)
    counts = open_device(DEVICE).counts
    for most, function in (
        (4, lambda x, w: functional.group_norm(x, 3, w, w)),
        (2, lambda x, w: functional.rms_norm(x, (7,), x.new_ones(7))),
    ):
        run = compiled(function)
        run(x, weight)
        before = counts.total()
        run(x, weight)
        assert counts.total() - before <= most
