"""Indexing, sorting and matrix products through torch.compile, forward and gradient."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from hetero.opencl.program import open_device
from tests.kernel_harness import layout
from tests.polynomial_harness import DEVICE, check

if TYPE_CHECKING:
    from collections.abc import Callable

Functions = list["Callable[..., Any]"]
KINDS = ["plain", "transposed", "gaps"]
ROWS = torch.tensor([0, 2, 1, 2, 4, 2])  # with duplicates
COLUMNS = torch.tensor([6, 0, 3, 3, 1, 6])


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _positions(*shape: int, size: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, size, shape, generator=torch.Generator().manual_seed(seed))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="opencl", fullgraph=True, dynamic=False, options={"device": DEVICE})


READS: Functions = [
    lambda x, i, j, at: [x.index_select(0, i), x.index_select(1, j), x.index_select(-1, j.int())],
    lambda x, i, j, at: [x.gather(1, at), x.gather(0, at % 5), x[0, 0].gather(0, at[0, 0])],
    lambda x, i, j, at: [x[i], x[:, j], x[i, j], x[i[:, None], j], x[-i, -1], x[None, i, None], x[i, 1:3], x[i.int()]],
    lambda x, i, j, at: [x.view(5, 7, 1)[i, :, 0], x.expand(2, 5, 7)[:, i, j], x.expand(2, 5, 7)[0, :, j]],
    lambda x, i, j, at: [x.expand(2, 5, 7)[i % 2, :, j], x[at % 5, at].contiguous(), x[..., j]],
    lambda x, i, j, at: [x.take(i * 7 + j), x.take(-i - 1), x.take_along_dim(at[:1], 1), x.t()[j].t()],
    lambda x, i, j, at: [F.embedding(i, x), F.embedding(at % 5, x, padding_idx=2), F.embedding(i.int(), x)],
    lambda x, i, j, at: F.embedding(i, x, scale_grad_by_freq=True),
]
WRITES: Functions = [
    lambda x, s, i, j, at: [x.scatter_add(1, at, s[:5]), x.scatter_add(0, at[:, :7], s[:5, :7]), x.scatter(1, at, 2.5)],
    lambda x, s, i, j, at: [x.index_put((i, j), s[0, :6], accumulate=True), x.index_put((i,), s[:1, :7], True)],
    lambda x, s, i, j, at: [x.index_add(0, i, s[:, :7]), x.index_add(1, j, s[:5, :6], alpha=2)],
    lambda x, s, i, j, at: [x.index_copy(0, i[:3], s[:3, :7]), x.index_fill(1, j, 2.0), x.put(i, s[0, :6], True)],
    lambda x, s, i, j, at: [x.scatter(0, i[:3, None].expand(3, 7), s[:3, :7]), x.scatter_reduce(1, at, s[:5], "sum")],
    lambda x, s, i, j, at: [
        x.scatter_reduce(1, at, s[:5], "sum", include_self=False),
        x.scatter_reduce(1, at, s[:5], "mean"),
    ],
    lambda x, s, i, j, at: [x.masked_fill(at[:5, :7] > 3, 2.0), x.masked_scatter(at[:5, :7] > 3, s)],
]


@pytest.mark.parametrize("kind", KINDS)
def test_reads_and_their_gradients_are_those_of_eager(kind: str) -> None:
    check(READS, layout(_random(5, 7), kind), ROWS, COLUMNS, layout(_positions(3, 7, size=7), kind), terms=300)


@pytest.mark.parametrize("kind", KINDS)
def test_writes_and_their_gradients_are_those_of_eager(kind: str) -> None:
    x, s, at = _random(5, 7), _random(6, 8, seed=2), _positions(5, 8, size=5)
    check(WRITES, *(layout(t, kind) for t in (x, s)), ROWS, COLUMNS, layout(at, kind), terms=300)


def test_assignments_by_index_are_those_of_eager() -> None:
    def assign(x: torch.Tensor, v: torch.Tensor, i: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        a, b, c = x.clone(), x * 2, x.clone()
        a[i] = v
        a[:, i] += 1
        a[i, i] = 0
        b[mask] = 0
        b[mask[:, 0]] = v[0].detach()  # its gradient would be as long as data says
        b[:, mask[0]] = 3
        c[-1, i] = v[0, :2]
        c[i, 1:4] *= 2
        return [a, b, c]

    x, v = _random(5, 7), _random(2, 7, seed=1)
    check([assign], x, v, torch.tensor([4, 1]), x > 0, terms=20)


def test_one_hot_is_that_of_eager_and_says_that_it_does_not_check_classes(caplog: pytest.LogCaptureFixture) -> None:
    function = _compiled(lambda i: F.one_hot(i, 5))
    with caplog.at_level("WARNING"):
        assert torch.equal(function(ROWS), F.one_hot(ROWS, 5))
    assert "a check of data is not made" in caplog.text
    assert not function(ROWS + 100).any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float64])
def test_other_types_are_indexed_as_by_eager(dtype: torch.dtype) -> None:
    x, s = (_random(5, 7) * 3).to(dtype), (_random(6, 7, seed=1) * 3).to(dtype)

    def function(x: torch.Tensor, s: torch.Tensor, i: torch.Tensor) -> list[torch.Tensor]:
        results = [x[i], x.gather(0, i[:, None].expand(6, 7)), x.index_put((i,), s, accumulate=True), x[:, i].flip(0)]
        return [*results, x.index_copy(0, i[:3], s[:3]), *torch.sort(x, dim=0, stable=True), x.roll(1)]

    for got, expected in zip(_compiled(function)(x, s, ROWS), function(x, s, ROWS), strict=True):
        torch.testing.assert_close(got, expected)


def test_extremes_of_what_is_scattered_are_those_of_eager() -> None:
    x, s, at = _random(5, 7), _random(5, 8, seed=1), _positions(5, 8, size=7)
    s[1, 2], s[3, 4] = math.nan, math.inf

    def function(x: torch.Tensor, s: torch.Tensor, at: torch.Tensor) -> list[torch.Tensor]:
        kinds = [(kind, own) for kind in ("amax", "amin", "prod") for own in (True, False)]
        found = [x.scatter_reduce(1, at, s, kind, include_self=own) for kind, own in kinds]
        return [*found, x.index_reduce(0, at[0, :3] % 5, s[:3, :7], "amax")]

    for got, expected in zip(_compiled(function)(x, s, at), function(x, s, at), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_an_accumulated_gradient_is_the_same_bits_at_every_call() -> None:
    x, i, seed = _random(30, 17).requires_grad_(), _positions(5000, size=30), _random(5000, 17, seed=2)
    function = _compiled(lambda x, i: x[i])
    first, *others = (torch.autograd.grad(function(x, i), x, seed)[0] for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_an_index_out_of_range_gives_nan_and_is_not_written_to() -> None:
    x, i = _random(4, 3), torch.tensor([1, 4, -5, 2**40])

    def function(x: torch.Tensor, i: torch.Tensor) -> list[torch.Tensor]:
        return [x[i], x.index_select(0, i), x.index_put((i,), x, accumulate=True)]

    rows, selected, added = _compiled(function)(x, i)
    assert torch.equal(rows[0], x[1])
    assert bool(rows[1:].isnan().all() and selected[1:].isnan().all())
    expected = x.clone()
    expected[1] += x[0]
    assert torch.equal(added, expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.masked_select(x > 0),
        lambda x: x.index_put((x > 0,), torch.arange(3.0)),
    ],
)  # fmt: skip
def test_what_depends_on_how_many_elements_a_mask_selects_is_an_error(function: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="opencl", options={"device": DEVICE})
    with pytest.raises(Exception, match=r"(?i)depends on (input tensor )?data"):
        compiled(torch.tensor([1.0, -1.0, 2.0, 3.0]))


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sorting_and_its_gradients_are_those_of_eager(kind: str) -> None:
    functions: Functions = [
        lambda x: [*torch.sort(x, dim=1), *torch.sort(x, dim=0, descending=True), torch.msort(x)],
        lambda x: [*x.topk(3), *x.topk(2, dim=0, largest=False), *x.topk(1), *x.topk(0), *x[0].topk(7)],
        lambda x: [x.argsort(1), x.argsort(0, descending=True), *x.kthvalue(2), *x.kthvalue(3, dim=0, keepdim=True)],
        lambda x: [*x[0, 0].sort(), *x[0, 0].topk(1), *x[:, :1].sort(), x.take_along_dim(x.argsort(1), 1)],
    ]
    x = torch.randperm(35, generator=torch.Generator().manual_seed(0)).view(5, 7) + 1.0  # all different and positive
    check(functions, layout(x, kind), terms=30)


def test_the_order_is_stable_and_nan_is_largest() -> None:
    x = torch.tensor([2.0, math.nan, 1.0, -math.inf, 2.0, 1.0, math.inf, math.nan, 0.0, -0.0]).repeat(3)

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        return [y for d in (False, True) for y in torch.sort(x, stable=True, descending=d)]

    for got, expected in zip(_compiled(function)(x), function(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("right", [False, True])
def test_places_in_sorted_rows_are_those_of_eager(right: bool) -> None:
    rows, values = torch.sort(_random(3, 9).round(decimals=1)).values, _random(3, 4, seed=1).round(decimals=1)
    values[0, 0], values[1, 1], values[2, 2] = math.nan, math.inf, float(rows[2, 4])

    def function(rows: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.searchsorted(rows, values, right=right), torch.bucketize(values, rows[0], right=right)]
        return [*found, torch.bucketize(values, rows[0, :0], right=right, out_int32=True)]

    for got, expected in zip(_compiled(function)(rows, values), function(rows, values), strict=True):
        torch.testing.assert_close(got, expected)


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_their_gradients_are_those_of_eager(kind: str) -> None:
    functions: Functions = [
        lambda x, y, z: [x @ y, y.t() @ x.t(), x.expand(2, 5, 7) @ y, torch.bmm(x[None], y[None]), x[:, :0] @ y[:0]],
        lambda x, y, z: [torch.addmm(z, x, y), torch.addmm(z, x, y, alpha=2, beta=0.5), torch.addmm(z[0], x, y)],
        lambda x, y, z: [torch.addmm(z[:, :1], x, y), torch.addmm(z[0, 0], x, y), torch.addmm(z, x, y, beta=0)],
        lambda x, y, z: [torch.addmm(z, x[:, :0], y[:0]), torch.addmm(z[:1, :1], x, y, alpha=3)],
        lambda x, y, z: [
            torch.baddbmm(z[None], x[None], y[None], beta=2).contiguous(),
            torch.addbmm(z, x[None], y[None], alpha=2),
        ],
        lambda x, y, z: [torch.mv(x, y[:, 0]), x[0] @ y, torch.dot(x[0], y[:, 0]), torch.outer(x[0], z[0])],
        lambda x, y, z: [torch.addmv(z[:, 0], x, y[:, 0]), torch.addmv(z[:, 0], x, y[:, 0], alpha=2, beta=0)],
        lambda x, y, z: [F.linear(x[0], y.t(), z[0]), F.linear(x[0], y.t()), F.linear(x[None], y.t(), z[0])],
        lambda x, y, z: [torch.einsum("ij,jk->ik", x, y), torch.einsum("ij,ik->jk", x, z), torch.einsum("ij->j", x)],
        lambda x, y, z: [torch.tensordot(x, y, 1), torch.kron(x, y[:2, :2]), torch.linalg.multi_dot([x, y, z.t()])],
        lambda x, y, z: F.bilinear(x[:, :2], x[:, 2:5], y[:6, :1].reshape(1, 2, 3)),
    ]
    check(functions, *(layout(_random(*s, seed=n), kind) for n, s in enumerate([(5, 7), (7, 3), (5, 3)])), terms=200)


def test_what_beta_0_leaves_out_may_be_nan() -> None:
    x, y, z = _random(5, 7), _random(7, 3, seed=1), torch.full((5, 3), math.nan)

    def function(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> list[torch.Tensor]:
        pair = torch.addmm(z, x, y, beta=0), torch.addmm(z, x, y, beta=0, alpha=2)
        return [*pair, torch.baddbmm(z[None], x[None], y[None], beta=0), torch.addmv(z[:, 0], x, y[:, 0], beta=0)]

    check([function], x, y, torch.zeros(5, 3), terms=7)
    for got in _compiled(function)(x, y, z):
        assert bool(got.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float64])
def test_products_of_other_types_are_those_of_eager(dtype: torch.dtype) -> None:
    x, y = (_random(5, 7) * 50).to(dtype), (_random(7, 3, seed=1) * 50).to(dtype)

    def function(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        products = [x @ y, torch.bmm(x[None], y[None]), torch.mv(x, y[:, 0]), x[:, :0] @ y[:0]]
        return [*products, torch.addmm(y[0], x, y), torch.addmm(y[0], x, y, alpha=2, beta=3)]

    for got, expected in zip(_compiled(function)(x, y), function(x, y), strict=True):
        torch.testing.assert_close(got, expected)


def test_launches_are_counted_as_the_operation_that_they_serve() -> None:
    def function(x: torch.Tensor, i: torch.Tensor) -> list[torch.Tensor]:
        return [x[i], x.gather(0, i[:, None]), x.scatter_add(0, i[:, None], x[:1, :1]), *x.sort(), *x.topk(2)]

    counts = open_device(DEVICE).counts
    before = counts.copy()
    _compiled(function)(_random(5, 7), ROWS[:1])
    made = counts - before
    assert {"index", "gather", "scatter_add", "sort", "topk"} <= made.keys()
