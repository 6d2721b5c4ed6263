"""Views, layouts and data movement through torch.compile, forward and gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from hetero.opencl.errors import UnsupportedOperationError
from hetero.opencl.program import open_device
from tests.kernel_harness import layout
from tests.polynomial_harness import DEVICE, check

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS = ["plain", "transposed", "gaps"]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


VIEWS: list[Callable[[torch.Tensor], object]] = [
    lambda x: x.unfold(1, 3, 2) * 2,
    lambda x: x.unfold(0, 2, 1).sum(-1),
    lambda x: x.unsqueeze(0).squeeze() * 2 + x.unsqueeze(1).squeeze(1) + x[None, :, None].squeeze((0, 2)),
    lambda x: [y * 2 for y in (*x.split(2), *x.split([1, 6], 1), *x.chunk(3), *x.tensor_split(3))],
    lambda x: [y * 2 for y in (*torch.tensor_split(x, [1, 2], 1), *x.unbind(1), *torch.hsplit(x, 7))],
    lambda x: x.movedim(0, 1) * 2 + x.mT + x.swapaxes(0, 1),
    lambda x: x.narrow(1, 1, 3) + x[:, 2:5] + x[:, -3:],
    lambda x: x.diagonal() + x.diagonal(1)[:4].sum() + x.diagonal(-1)[:1],
    lambda x: x.expand(3, *x.shape) * 2 + x.repeat(3, 1, 1),
    lambda x: x.t().reshape(-1) + x.flatten() + x.ravel() + x.view(5, 7, 1)[..., 0].reshape(-1),
    lambda x: x[1:, ::3] + x[:-1, 1::3][:, :2].sum() + x[2, 3],
]
MOVES: list[Callable[[torch.Tensor], object]] = [
    lambda x: [x.flip(0), x.flip(0, 1), x.flip(-1).t().flip(0) * 2],
    lambda x: [x.roll(2), x.roll((1, -2), (0, 1)), x.rot90(1), x.rot90(2), x.rot90(-1)],
    lambda x: [x.repeat(2, 1), x.repeat(2, 3, 1), x.tile(2), x.repeat_interleave(3, 1), x.repeat(1, 0)],
    lambda x: [x.tril(), x.triu(1), x.tril(-1), x[:4, :4].diag(), x[0].diag(1), x.diag_embed(), x[:5, :5].trace()],
    lambda x: [F.pad(x, (1, 2)), F.pad(x, (-1, 2)), F.pad(x, (2, -3, -1, 1), value=2.0), F.pad(x, (0, -7))],
    lambda x: [F.pad(x[None], (2, 1), mode="reflect"), F.pad(x[None], (2, 3), mode="circular")],
    lambda x: [F.pad(x[None], (2, 1), mode="replicate"), F.pad(x[None, None], (1, 0, 2, 2), mode="replicate")],
    lambda x: [torch.cat([x, x[:, :2], x[:, :0]], 1), torch.cat([x, torch.ones(2, 7, dtype=torch.int64)])],
    lambda x: [torch.stack([x, x.flip(0)], 1), torch.vstack([x[0], x]), torch.column_stack([x[:, 0], x])],
    lambda x: [y + 0 for y in torch.meshgrid(x[0], x[:, 0], indexing="ij")],
    lambda x: [torch.block_diag(x, x[:1]), torch.cartesian_prod(x[0], x[:, 1])],
    lambda x: [torch.slice_scatter(x, x[:, :2], 1, 1, 7, 3), torch.select_scatter(x, x[0], 0, -1)],
    lambda x: torch.diagonal_scatter(x, x[0, :5], 1),
    lambda x: [x[None, None].clone(memory_format=torch.channels_last), x.clone().contiguous().t().contiguous()],
    lambda x: x.new_empty_strided((2, 3), (4, 1)).fill_(2) + torch.empty_strided((2, 3), (1, 2)).fill_(1) * x[0, 0],
]


@pytest.mark.parametrize("kind", KINDS)
def test_views_and_their_gradients_are_those_of_eager(kind: str) -> None:
    check(VIEWS, layout(_random(5, 7), kind), terms=200)


@pytest.mark.parametrize("kind", KINDS)
def test_moves_and_their_gradients_are_those_of_eager(kind: str) -> None:
    check(MOVES, layout(_random(5, 7), kind), terms=200)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 1), (2, 0)])
def test_small_and_empty_tensors_move(shape: tuple[int, int]) -> None:
    functions: list[Callable[[torch.Tensor], object]] = [
        lambda x: [x.flip(0), x.roll(1), x.repeat(2, 2), x.tril(), F.pad(x, (1, 1)), F.pad(x, (0, 2))],
        lambda x: [torch.cat([x, x]), torch.stack([x, x]), x.t().contiguous(), x.diagonal() + 1],
        lambda x: [torch.slice_scatter(x, x[:0], 0, 0, 0), x.sum().repeat(3), x.sum().flip(()), x.sum().expand(2) + 0],
    ]
    check(functions, _random(*shape), terms=8)


def test_assignments_to_parts_are_those_of_eager() -> None:
    def assign(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        a = torch.zeros(5, 7)
        a.copy_(x)
        a[1] = y
        a[:, 1:3] = 2
        a[0, 0] = y[0]
        a[::2, ::3].copy_(x[::2, :3])
        b = x.t().contiguous()
        b[1:].mul_(2)
        b.t()[1].add_(y)
        b.fill_diagonal_(3.0)
        c = x.clone()
        c[:, ::2] += y[:4]
        c.diagonal().zero_()
        return [a, b, c]

    check([assign], _random(5, 7), _random(7, seed=1), terms=20)


def test_inputs_changed_in_place_are_changed_as_by_eager() -> None:
    def change(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        x[:, 1:] = 3
        x.t()[0].mul_(2)
        return x.sum(0)

    ours, theirs = _random(3, 4), _random(3, 4)
    torch._dynamo.reset()
    got = torch.compile(change, backend="opencl", fullgraph=True, options={"device": DEVICE})(ours)
    torch.testing.assert_close(got, change(theirs))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_as_strided_and_its_gradient_are_those_of_eager(training: bool) -> None:
    functions: list[Callable[[torch.Tensor], object]] = [
        lambda x: x.as_strided((2, 3), (1, 2), 1) * 2,
        lambda x: x.as_strided((4, 3), (2, 1), 0) + 0,  # overlaps: gradients meet
        lambda x: x.as_strided((3, 5), (0, 1), 4) + 0,
        lambda x: (x * 2).as_strided((6,), (2,), 3) + 0,
        lambda x: torch.as_strided_scatter(x, x[0, :4].view(2, 2), (2, 2), (1, 4), 2),
    ]
    check(functions, _random(4, 5), terms=30, training=training)


def test_as_strided_beyond_its_input_is_an_error() -> None:
    base = _random(20)
    torch._dynamo.reset()
    function = torch.compile(
        lambda x: x.as_strided((4,), (1,), 0) * 2, backend="opencl", fullgraph=True, options={"device": DEVICE}
    )
    with pytest.raises(Exception, match="beyond the tensor") as caught:
        function(base[8:])
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), UnsupportedOperationError)


def test_numbers_may_be_seen_as_another_type_of_their_size() -> None:
    functions: list[Callable[[torch.Tensor], object]] = [
        lambda x: x.view(torch.int32) + 1,
        lambda x: (x.view(torch.int32) & 0x7FFFFFFF).view(torch.float32),
        lambda x: x.t().view(torch.int32) >> 3,
    ]
    x = _random(4, 6)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: [f(x) for f in functions], backend="opencl", fullgraph=True, options={"device": DEVICE}
    )
    for got, f in zip(compiled(x), functions, strict=True):
        torch.testing.assert_close(got, f(x), rtol=0, atol=0)


def test_a_flip_goes_into_the_kernel_that_reads_it() -> None:
    x = _random(8, 9)
    torch._dynamo.reset()
    function = torch.compile(
        lambda x: torch.relu(x.flip(0)) + x, backend="opencl", fullgraph=True, options={"device": DEVICE}
    )
    function(x)
    counts = open_device(DEVICE).counts
    before = counts.total()
    assert torch.equal(function(x), torch.relu(x.flip(0)) + x)
    assert counts.total() - before == 1
