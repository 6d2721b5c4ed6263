"""Calls on a device with memory of its own: `memory="copy"` gives the same bits as shared memory."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import lm
from hetero.opencl import compile_module, fallbacks, memory_plans
from hetero.opencl.program import open_device

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "opencl:0"


class Chain(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, context: dict[str, Tensor] | None = None) -> Tensor:
        for part in self.parts:
            x = part(x, context)
        return x


class Plus(nn.Module):
    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return x + torch.tensor([1.0, 2.0, 3.0])


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        result: Tensor = self.linear(x)
        return result


def block() -> Chain:
    config = lm.ModelConfig(family="gpt", n_layer=1, d_model=24, n_head=3, vocab_size=13, seq_len=16)
    model = lm.Transformer(config, generator=torch.Generator().manual_seed(0))
    return Chain(*(unit for _, unit in model.layers()))


def copied(function: Callable[..., object], **options: object) -> Callable[..., object]:
    torch._dynamo.reset()
    return torch.compile(function, backend="opencl", options={"device": DEVICE, "memory": "copy", **options})  # type: ignore[call-overload]


def gradients(module: nn.Module) -> list[Tensor]:
    found = [p.grad for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    return found


@pytest.mark.parametrize("dropout", [False, True])
def test_a_whole_model_has_the_same_bits_as_in_shared_memory(dropout: bool) -> None:
    module, tokens = block(), torch.randint(0, 13, (3, 7))
    context = {"dropout": torch.randint(0, 100, (3,))} if dropout else None
    results = []
    for memory in (None, "copy"):
        y = compile_module(module, DEVICE, memory=memory)(tokens, context)
        y.square().sum().backward()
        results.append([y.detach(), *gradients(module)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_four_forwards_before_the_first_backward() -> None:
    module = block()
    batches = [torch.randint(0, 13, (2, 5)) for _ in range(4)]
    results = []
    for memory in (None, "copy"):
        compiled = compile_module(module, DEVICE, memory=memory)
        outputs = [compiled(tokens) for tokens in batches]
        for i in (2, 0, 3, 1):
            outputs[i].square().sum().backward()
        results.append([*outputs, *gradients(module)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weights_are_copied_at_each_call() -> None:
    module = Line()
    compiled = compile_module(module, DEVICE, memory="copy")
    x = torch.randn(2, 4)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-6)
        module.linear.weight.detach().numpy()[:] *= 2


def test_inputs_and_outputs_stay_resizable() -> None:
    x = torch.randn(3)
    y = copied(lambda x: x * 2)(x)
    assert isinstance(y, Tensor)
    assert x.untyped_storage().resizable()
    assert y.untyped_storage().resizable()


def test_bytes_are_counted_in_both_directions() -> None:
    function, moved = copied(lambda x, y: x[:, None] * y), open_device(DEVICE).bytes_moved
    x, y = torch.randn(3), torch.randn(5)
    function(x, y)
    before = moved.copy()
    function(x, y)
    assert moved - before == {"h2d": (3 + 5) * 4, "d2h": 3 * 5 * 4}


def test_shared_memory_moves_nothing() -> None:
    torch._dynamo.reset()
    function, moved = torch.compile(lambda x: x * 3, backend="opencl"), open_device(DEVICE).bytes_moved
    before = moved.copy()
    function(torch.randn(3))
    assert moved == before


@pytest.mark.parametrize(
    "place",
    [
        lambda x: x, lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape), lambda x: x.t(),
        lambda x: x[:1].expand(4, 6), lambda x: x[:, ::2], lambda x: x[:0], lambda x: x[:, :0], lambda x: x[1, 2],
    ],
)  # fmt: skip
def test_inputs_may_lie_anyhow_and_be_empty(place: Callable[[Tensor], Tensor]) -> None:
    x = place(torch.randn(4, 6))
    assert torch.equal(copied(lambda x: (x * 2, x.sum() * 0))(x)[0], x * 2)  # type: ignore[index]
    integers = place(torch.arange(24).view(4, 6) + 2**40)
    assert torch.equal(copied(lambda x: x + 1)(integers), integers + 1)  # type: ignore[arg-type]
    bits = place(torch.arange(24).view(4, 6) % 2 == 0)
    assert torch.equal(copied(lambda x: ~x)(bits), ~bits)  # type: ignore[arg-type]


def test_outputs_may_be_inputs_views_and_constants() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        return x, x[1:], y, y.t(), y[:, 1], torch.tensor([1.0, 2.0]), y[:2, :1].expand(2, 3), torch.full((2,), 3.0)

    x = torch.randn(4, 3)
    got, expected = copied(function)(x), function(x)
    for a, b in zip(got, expected, strict=True):  # type: ignore[call-overload]
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


class Sorted(nn.Module):
    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return torch.logcumsumexp((x * 2).t(), dim=1)[:, 1:] + 1


def test_what_runs_on_the_host_is_copied_there_and_back() -> None:
    module = Sorted()
    compiled = compile_module(module, DEVICE, fallback="cpu", memory="copy")
    x = torch.randn(4, 6, requires_grad=True)
    seed = torch.randn(6, 3)
    torch.testing.assert_close(compiled(x), module(x))
    ours, theirs = (torch.autograd.grad(f(x), x, seed)[0] for f in (compiled, module))
    torch.testing.assert_close(ours, theirs)
    assert "logcumsumexp" in {f.op for f in fallbacks(compiled)}
    half = copied(lambda x: (x.half() * 2).float() + 1, fallback="cpu")
    assert torch.equal(half(x.detach()), (x.detach().half() * 2).float() + 1)  # type: ignore[arg-type]


def test_hooks_may_change_the_layout_of_saved_tensors() -> None:
    module, tokens = block(), torch.randint(0, 13, (2, 6))
    reference = copy.deepcopy(module)
    compiled = compile_module(module, DEVICE, memory="copy")

    def unpack(t: Tensor) -> Tensor:
        return t.t().contiguous().t() if t.dim() == 2 else t.clone()

    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), unpack):
            y = compiled(tokens)
        y.square().sum().backward()
        reference(tokens).square().sum().backward()
    for a, b in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_a_device_with_memory_of_its_own_copies_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_device(DEVICE)
    capabilities = dataclasses.replace(device.capabilities, kind="gpu", shares_host_memory=False)
    monkeypatch.setattr(device, "capabilities", capabilities)
    torch._dynamo.reset()
    plus = torch.compile(Plus(), backend="opencl", options={"device": DEVICE})
    before = device.bytes_moved.copy()
    assert torch.equal(plus(torch.ones(2, 3)), Plus()(torch.ones(2, 3)))
    assert (device.bytes_moved - before)["d2h"] == 2 * 3 * 4
    module, tokens = block(), torch.randint(0, 13, (1, 9))
    y, expected = torch.compile(module, backend="opencl", options={"device": DEVICE})(tokens), module(tokens)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_the_arena_holds_everything_that_is_copied() -> None:
    copied(lambda x: torch.tanh(x) @ x.t())(torch.randn(40, 50))
    plan = memory_plans(DEVICE)[-1]
    assert plan.arena_bytes >= 2 * 40 * 50 * 4
    assert plan.slab_bytes == 0
    assert plan.output_bytes == 40 * 40 * 4
