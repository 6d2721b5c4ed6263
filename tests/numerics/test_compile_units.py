"""Compiled modules against the same in float64, values and gradients, beside eager float32."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lm
from hetero.opencl import compile_module, fallbacks
from hetero.opencl.program import open_device

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "opencl:0"
# A float32 result may be four times as far from float64's as eager's is, plus rounding of the gradient's norm.
FACTOR, FLOOR = 4.0, 1e-6


def gradients(
    module: nn.Module, call: Callable[..., Tensor], inputs: list[Tensor], seed: Tensor | None
) -> list[Tensor]:
    """Output, gradients of the floating-point inputs, gradients of the parameters."""
    wanted = [x for x in inputs if x.requires_grad] + [p for p in module.parameters() if p.requires_grad]
    y = call(*inputs)
    return [y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y) if seed is None else seed.to(y.dtype))]


def distance(ours: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Error of the output and of all gradients together, each relative to its own norm."""

    def relative(a: list[Tensor], b: list[Tensor]) -> float:
        scale = sum(float(y.double().square().sum()) for y in b) ** 0.5
        return sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True)) ** 0.5 / (
            scale or 1
        )

    return relative(ours[:1], exact[:1]), relative(ours[1:], exact[1:])


def check(module: nn.Module, inputs: list[Tensor], context: dict[str, Tensor] | None = None) -> None:
    seed = torch.randn(module(*inputs, *([context] if context else [])).shape)
    double = copy.deepcopy(module).double()
    wide = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    extra = [context] if context else []
    exact = gradients(double, lambda *x: double(*x, *extra), wide, seed)
    eager = gradients(module, lambda *x: module(*x, *extra), inputs, seed)
    compiled = compile_module(module, DEVICE)
    ours = gradients(module, lambda *x: compiled(*x, *extra), inputs, seed)
    for a, b in zip(distance(ours, exact), distance(eager, exact), strict=True):
        assert a <= FACTOR * b + FLOOR
    assert [g.shape for g in ours] == [e.shape for e in eager]


def model(**changes: float) -> lm.Transformer:
    settings = {"n_layer": 1, "d_model": 24, "n_head": 3, "vocab_size": 13, "seq_len": 16, **changes}
    return lm.Transformer(lm.ModelConfig(family="gpt", **settings), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]


UNITS = ("block0.attention", "block0.mlp", "head")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("batch", "length", "d_model", "n_head"), [(1, 1, 24, 3), (3, 7, 15, 3), (2, 16, 64, 4), (5, 13, 8, 1)]
)
def test_every_unit_has_the_gradients_of_float64(unit: str, batch: int, length: int, d_model: int, n_head: int) -> None:
    torch.manual_seed(0)
    part = dict(model(d_model=d_model, n_head=n_head).layers())[unit]
    check(part, [torch.randn(batch, length, d_model, requires_grad=True)])


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7)])
def test_the_embedding_has_the_gradients_of_float64(batch: int, length: int) -> None:
    check(dict(model().layers())["embedding"], [torch.randint(0, 13, (batch, length))])


@pytest.mark.parametrize("unit", UNITS[:2])
def test_dropout_is_the_same_on_the_device(unit: str) -> None:
    part = dict(model(dropout=0.3).layers())[unit]
    context = {"dropout": torch.randint(-(2**62), 2**62, (3,))}
    x = torch.randn(3, 7, 24, requires_grad=True)
    check(part, [x], context)
    ours, theirs = compile_module(part, DEVICE)(x, context), part(x, context)
    assert torch.equal((ours - x).abs() < 1e-12, (theirs - x).abs() < 1e-12)


class Chain(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, context: dict[str, Tensor] | None = None) -> Tensor:
        for part in self.parts:
            x = part(x, context)
        return x


def test_several_units_compile_as_one_module() -> None:
    units = [unit for _, unit in model(n_layer=2).layers()]
    check(Chain(*units), [torch.randint(0, 13, (2, 9))])


class MLP(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(7, 11), activation, nn.Linear(11, 5, bias=False), activation)

    def forward(self, x: Tensor, context: dict[str, Tensor] | None = None) -> Tensor:
        result: Tensor = self.net(x)
        return result


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(), nn.SiLU(), nn.Sigmoid(), nn.GELU(), nn.LeakyReLU()])
@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7)])
def test_plain_networks_have_the_gradients_of_float64(activation: nn.Module, shape: tuple[int, ...]) -> None:
    check(MLP(activation), [torch.randn(shape, requires_grad=True)])


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = model(n_layer=2, dropout=0.1)

    def forward(self, tokens: Tensor, context: dict[str, Tensor]) -> Tensor:
        return lm.loss(self.model(tokens, context), context["targets"])


def test_a_whole_model_with_its_loss_has_the_gradients_of_float64() -> None:
    targets = torch.randint(0, 13, (3, 16))
    targets[0, :5] = -100
    context = {"dropout": torch.randint(-(2**62), 2**62, (3,)), "targets": targets}
    check(Loss(), [torch.randint(0, 13, (3, 16))], context)


def test_nothing_of_the_model_falls_back() -> None:
    counts = open_device(DEVICE).counts
    before = counts.copy()
    compiled = compile_module(Loss(), DEVICE)
    targets = {"targets": torch.randint(0, 13, (2, 8)), "dropout": torch.randint(0, 100, (2,))}
    compiled(torch.randint(0, 13, (2, 8)), targets).backward()
    launched = counts - before
    assert launched.total() > 20
    assert any("addmm" in op.split("+") for op in launched)
    assert fallbacks(compiled) == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_agrees_with_eager(mode: Callable[[], torch.no_grad]) -> None:
    part = dict(model().layers())["block0.mlp"].eval()
    compiled = compile_module(part, DEVICE)
    x = torch.randn(2, 5, 24)
    with mode():
        torch.testing.assert_close(compiled(x), part(x), rtol=1e-5, atol=1e-5)
    y = compiled(x)
    assert y.requires_grad


def test_frozen_parameters_get_no_gradient() -> None:
    part = dict(model().layers())["block0.attention"]
    for name, parameter in part.named_parameters():
        parameter.requires_grad_("proj" in name or name.endswith("norm.bias"))
    check(part, [torch.randn(2, 5, 24, requires_grad=True)])
    check(part, [torch.randn(2, 6, 24)])


def test_inputs_of_any_layout_are_taken() -> None:
    part = dict(model().layers())["block0.mlp"]
    wide = torch.randn(3, 48, 5)
    check(part, [wide[:, ::2].transpose(1, 2).detach().requires_grad_()])


def test_attention_without_flash_and_batched_products_run_here() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor, context: None = None) -> Tensor:
            scores = (x @ x.transpose(1, 2)) / 3.0
            mask = torch.ones(x.shape[1], x.shape[1]).tril() == 0
            return functional.softmax(scores.masked_fill(mask, float("-inf")), dim=-1) @ x

    check(Plain(), [torch.randn(2, 6, 9, requires_grad=True)])


def test_modules_of_equal_structure_share_compiled_graphs() -> None:
    first, second = (dict(model(n_layer=2).layers())[f"block{i}.mlp"] for i in (0, 1))
    x = torch.randn(2, 4, 24, requires_grad=True)
    compile_module(first, DEVICE)(x).sum().backward()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    ours = compile_module(second, DEVICE)
    torch.testing.assert_close(ours(x), second(x), rtol=1e-5, atol=1e-5)
    ours(x).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_many_different_modules_never_reach_the_recompile_limit() -> None:
    for width in range(1, 14):
        net = nn.Linear(3, width)

        class One(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor, context: None = None) -> Tensor:
                result: Tensor = self.inner(x)
                return result

        x = torch.randn(2, 3)
        torch.testing.assert_close(compile_module(One(net), DEVICE)(x), net(x), rtol=1e-5, atol=1e-5)
