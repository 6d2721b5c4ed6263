"""Calls in flight, threads, and weights that change between calls."""

from __future__ import annotations

import copy
import gc
import threading
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from hetero.opencl import compile_module, graph, memory_plans
from hetero.opencl.frame import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "opencl:0"


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        result: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return result


def pair() -> tuple[Block, Block]:
    torch.manual_seed(1)
    block = Block()
    return block, copy.deepcopy(block)


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_four_forwards_before_the_first_backward_in_any_order() -> None:
    block, reference = pair()
    compiled = compile_module(block, DEVICE)
    inputs = [torch.randn(3, 5, 16) for _ in range(4)]
    outputs = [compiled(x) for x in inputs]
    for i in (2, 0, 3, 1):
        outputs[i].square().sum().backward()
    for x in inputs:
        reference(x).square().sum().backward()
    assert_same_gradients(block, reference)


def test_dropped_forwards_and_retained_graphs() -> None:
    block, reference = pair()
    compiled = compile_module(block, DEVICE)
    for k in range(6):
        x = torch.randn(3, 5, 16)
        kept = compiled(x)
        compiled(x + 1)  # dropped at once
        kept.sum().backward(retain_graph=True)
        kept.sum().backward()
        for _ in range(2):
            reference(x).sum().backward()
        if k % 2:
            gc.collect()
    assert_same_gradients(block, reference)


def test_two_threads_accumulate_the_right_gradients() -> None:
    block, reference = pair()
    compiled = compile_module(block, DEVICE)
    batches = [[torch.randn(3, 5, 16) for _ in range(4)] for _ in range(2)]
    errors: list[BaseException] = []

    def work(inputs: list[Tensor]) -> None:
        try:
            for _ in range(3):
                outputs = [compiled(x) for x in inputs]
                for y in reversed(outputs):
                    y.square().sum().backward()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(inputs,)) for inputs in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for _ in range(3):
        for x in batches[0] + batches[1]:
            reference(x).square().sum().backward()
    assert_same_gradients(block, reference)


def test_two_devices_in_two_threads() -> None:
    blocks = [pair() for _ in range(2)]
    x = torch.randn(3, 5, 16)

    def work(block: Block, device: str) -> None:
        compiled = compile_module(block, device)
        for _ in range(5):
            compiled(x).square().sum().backward()

    threads = [
        threading.Thread(target=work, args=(b, d)) for (b, _), d in zip(blocks, (DEVICE, "opencl:0.0"), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for block, reference in blocks:
        for _ in range(5):
            reference(x).square().sum().backward()
        assert_same_gradients(block, reference)


def test_outputs_belong_to_the_caller() -> None:
    block, _ = pair()
    compiled = compile_module(block, DEVICE)
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        first = compiled(x)
        before = first.clone()
        compiled(x * 2)
    assert torch.equal(first, before)
    compiled(x).sum().backward()
    gradients = [p.grad for p in block.parameters()]
    copies = [g.clone() for g in gradients if g is not None]
    block.zero_grad(set_to_none=True)
    compiled(x * 3).sum().backward()
    for gradient, kept in zip(gradients, copies, strict=True):
        assert gradient is not None
        assert torch.equal(gradient, kept)


def test_a_repeated_call_gives_the_same_bits() -> None:
    block, _ = pair()
    compiled = compile_module(block, DEVICE)
    x = torch.randn(3, 5, 16)
    first = torch.autograd.grad(compiled(x).sum(), list(block.parameters()))
    second = torch.autograd.grad(compiled(x).sum(), list(block.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def change_data(block: Block) -> None:
    block.up.weight.data.mul_(0.5)


def change_storage(block: Block) -> None:
    block.up.weight.data = block.up.weight.data.clone() * 0.25


def change_by_numpy(block: Block) -> None:
    block.down.weight.detach().numpy()[:] *= 2


def change_by_load(block: Block) -> None:
    block.load_state_dict({k: v + 0.1 for k, v in block.state_dict().items()})


def change_by_assignment(block: Block) -> None:
    block.load_state_dict({k: v + 0.1 for k, v in block.state_dict().items()}, assign=True)


def change_parameter(block: Block) -> None:
    block.down.weight = nn.Parameter(block.down.weight.detach() * 3)


def change_by_optimizer(block: Block) -> None:
    block.zero_grad()
    block(torch.ones(2, 16)).sum().backward()
    torch.optim.AdamW(block.parameters(), lr=0.1, fused=True).step()
    block.zero_grad()


@pytest.mark.parametrize(
    "change",
    [
        change_data, change_storage, change_by_numpy, change_by_load, change_by_assignment, change_parameter,
        change_by_optimizer,
    ],
)  # fmt: skip
def test_changed_weights_are_seen_at_the_next_call(change: object) -> None:
    block, _ = pair()
    compiled = compile_module(block, DEVICE)
    x = torch.randn(3, 5, 16)
    compiled(x).sum().backward()
    old = compiled(x).detach()
    assert callable(change)
    change(block)
    block.zero_grad()
    reference = copy.deepcopy(block)
    assert not torch.allclose(compiled(x), old)
    compiled(x).square().sum().backward()
    reference(x).square().sum().backward()
    torch.testing.assert_close(compiled(x), reference(x), rtol=1e-5, atol=1e-5)
    assert_same_gradients(block, reference)


def test_hooks_that_change_the_layout_of_saved_tensors_do_no_harm() -> None:
    block, reference = pair()
    compiled = compile_module(block, DEVICE)
    x = torch.randn(3, 5, 16)
    compiled(x).sum().backward()
    block.zero_grad()

    def unpack(t: Tensor) -> Tensor:
        return t.t().contiguous().t() if t.dim() == 2 else t.clone()

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = compiled(x)
    compiled(x + 1)
    y.square().sum().backward()
    reference(x).square().sum().backward()
    assert_same_gradients(block, reference)


def test_gradients_that_share_a_value_are_accumulated_apart() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2, 2))

        def forward(self, x: Tensor, context: None = None) -> Tensor:
            return x * (self.a + self.b.view(4))

    module = Sum()
    compiled = compile_module(module, DEVICE)
    for _ in range(3):
        compiled(torch.ones(4)).sum().backward()
    assert torch.equal(module.a.grad, torch.full((4,), 3.0))  # type: ignore[arg-type]
    assert torch.equal(module.b.grad, torch.full((2, 2), 3.0))  # type: ignore[arg-type]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """All plans made from here on; `memory_plans` tells their sizes only."""
    made: list[Plan] = []

    def plan(*arguments: object, **options: object) -> Plan:
        made.append(Plan(*arguments, **options))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(graph, "Plan", plan)
    return made


def test_memory_is_known_before_the_first_launch_and_does_not_grow_with_the_number_of_inputs(plans: list[Plan]) -> None:
    block, _ = pair()
    compiled = compile_module(block, DEVICE)
    inputs = [torch.randn(11, 3, 16) for _ in range(24)]
    for x in inputs:
        compiled(x).sum().backward()
        block.zero_grad()
    assert [plan.memory for plan in plans] == memory_plans(DEVICE)[-2:]
    assert sorted(plan.memory.slab_bytes > 0 for plan in plans) == [False, True]  # backward, forward
    for plan in plans:
        assert 0 < sum(pool.nbytes for pool in plan.pools.values()) <= plan.memory.output_bytes


def test_memory_of_outputs_that_were_held_is_bounded(plans: list[Plan]) -> None:
    block, _ = pair()
    compiled = compile_module(block, DEVICE)
    x = torch.randn(13, 3, 16)
    with torch.no_grad():
        held = [compiled(x) for _ in range(40)]
        assert all(torch.equal(y, held[0]) for y in held)
        del held
        compiled(x)
    (plan,) = plans
    assert sum(pool.nbytes for pool in plan.pools.values()) <= 16 * plan.memory.output_bytes


def share(y: Tensor) -> None:
    y.share_memory_()


def enlarge(y: Tensor) -> None:
    y.resize_(100_000)


def shrink(y: Tensor) -> None:
    y.untyped_storage().resize_(4)


@pytest.mark.parametrize("move", [share, enlarge, shrink])
def test_an_output_whose_memory_was_moved_is_not_used_again(move: Callable[[Tensor], None]) -> None:
    function = torch.compile(lambda x: x * 2, backend="opencl", options={"device": DEVICE})
    x = torch.randn(8, 16)
    for _ in range(2):
        y = function(x)
        move(y)
        del y
        x.add_(1)  # in place: the call finds the frame and the output of the last one
        y = function(x)
        assert torch.equal(y, x * 2)


def test_an_output_of_which_only_the_storage_is_held_is_not_used_again() -> None:
    function = torch.compile(lambda x: x * 2, backend="opencl", options={"device": DEVICE})
    y = function(torch.ones(3))
    storage = y.untyped_storage()
    del y
    later = function(7 * torch.ones(3))
    assert torch.tensor([]).set_(storage).tolist() == [2.0] * 3
    assert later.tolist() == [14.0] * 3


def test_a_slab_whose_memory_was_moved_is_not_used_again() -> None:
    block, reference = pair()
    compiled = compile_module(block, DEVICE)
    for _ in range(3):
        x = torch.randn(3, 5, 16)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.share_memory_(), lambda t: t):
            y = compiled(x)
        compiled(x + 1)
        y.square().sum().backward()
        reference(x).square().sum().backward()
    assert_same_gradients(block, reference)


def test_an_output_may_show_its_memory_twice() -> None:
    function = torch.compile(lambda x: (x * 2)[:2].expand(2, 2), backend="opencl", options={"device": DEVICE})
    x = torch.randn(4)
    assert torch.equal(function(x), (x * 2)[:2].expand(2, 2))
    assert function(x).untyped_storage().nbytes() == 16


def test_other_backends_are_left_alone_even_unhashable_ones() -> None:
    class Backend:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
            return gm

    torch.testing.assert_close(torch.compile(lambda x: x + 1, backend=Backend())(torch.ones(3)), torch.full((3,), 2.0))
