"""Launches of every kernel at five shapes: around the widths of vectors and tiles, and in different places in memory.

A case gets a bench, the table of kernels for its device, a function that puts a tensor into the layout of this turn,
and a shape; it returns launches. Kernels that no case launches at five shapes are found out by test_oclgrind.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hetero.opencl import kernels, kernels_gemm, optimizers
from hetero.opencl.fuse_epilogue import build_epilogue
from hetero.opencl.ir import Launch, View
from hetero.opencl.pointwise import Pointwise
from hetero.opencl.steps import Deferred
from tests.kernel_harness import Bench, empty

Place = Callable[[Tensor], Tensor]
Build = Callable[..., list[Launch]]

N_SHAPES = 5
PLACES = ("plain", "offset", "gaps", "transposed", "slice")
"""Layout of the inputs at the first, second, ... shape."""


@dataclass(frozen=True)
class Case:
    """One operation.

    Attributes:
        name: of the function that builds its launches.
        build: (bench, table of kernels, place, *shape) -> launches.
        shapes: `N_SHAPES` of them.
    """

    name: str
    build: Build
    shapes: tuple[tuple[int, ...], ...]


CASES: list[Case] = []


def at(*shapes: Sequence[int]) -> Callable[[Build], Build]:
    """Register a case."""

    def register(build: Build) -> Build:
        assert len(shapes) == N_SHAPES
        CASES.append(Case(build.__name__, build, tuple(map(tuple, shapes))))
        return build

    return register


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def local(bench: Bench) -> int:
    return bench.device.capabilities.local_memory_bytes


ROWS = ((1, 1), (3, 7), (2, 16), (5, 33), (9, 130))


@at(*ROWS)
def layer_norm(bench: Bench, table: Any, place: Place, rows: int, width: int) -> list[Launch]:
    x, weight, bias = place(random(rows, width)), place(random(width, seed=1)), random(width, seed=2)
    results = (empty(rows, width), empty(rows), empty(rows))
    return table.layer_norm(*map(bench.view, (x, weight, bias, *results)), width=width, eps=1e-5)


@at(*ROWS)
def layer_norm_backward(bench: Bench, table: Any, place: Place, rows: int, width: int) -> list[Launch]:
    x, grad, residual = (place(random(rows, width, seed=k)) for k in range(3))
    read = (grad, x, random(rows), random(rows).abs(), random(width))
    gradients = (empty(rows, width), empty(width), empty(width))
    views = map(bench.view, (*read, *gradients))
    return table.layer_norm_backward(*views, width=width, residual=bench.view(residual), scratch=bench.scratch)


@at((1, 1), (3, 7), (2, 16), (5, 33), (3, 130))
def softmaxes(bench: Bench, table: Any, place: Place, rows: int, width: int) -> list[Launch]:
    launches = []
    for dim, is_log in itertools.product((0, 1), (False, True)):
        x, grad, out, dx = place(random(rows, width)), place(random(rows, width, seed=1)), *empties(2, rows, width)
        names = ("log_softmax", "log_softmax_backward") if is_log else ("softmax", "softmax_backward")
        forward, backward = (getattr(table, name) for name in names)
        launches += forward(bench.view(x), bench.view(out), dim=dim)
        launches += backward(*map(bench.view, (grad, out, dx)), dim=dim)
    return launches


def empties(n: int, *shape: int) -> list[Tensor]:
    return [empty(*shape) for _ in range(n)]


@at((1, 1), (3, 5), (7, 17), (65, 3), (130, 8))
def nll_losses(bench: Bench, table: Any, place: Place, rows: int, vocab: int) -> list[Launch]:
    launches = []
    for reduction in ("none", "mean", "sum"):
        target = torch.arange(rows) % (vocab + 1)  # one class too many: out of range
        target[1::3] = -100
        out = empty(rows) if reduction == "none" else empty()
        grad = torch.ones_like(out)
        log_probs, weight, dx = place(random(rows, vocab)), empty(), empty(rows, vocab)
        options = {"ignore_index": -100, "reduction": reduction}
        launches += table.nll_loss(*map(bench.view, (log_probs, target, out, weight)), **options)
        launches += table.nll_loss_backward(*map(bench.view, (grad, target, weight, dx)), **options)
    return launches


@at((1, 1, 1), (5, 3, 7), (2, 10, 16), (17, 4, 33), (9, 130, 5))
def embeddings(bench: Bench, table: Any, place: Place, n: int, vocab: int, width: int) -> list[Launch]:
    index = torch.arange(n) * 7 % (vocab + 1)  # some out of range
    index[0] = -1
    weight, out = place(random(vocab, width)), empty(n, width)
    grad, dweight = place(random(n, width)), empty(vocab, width)
    launches = table.embedding(*map(bench.view, (weight, index, out)))
    return [*launches, *table.embedding_backward(*map(bench.view, (grad, index, dweight)), padding_idx=0)]


@at((2, 2), (3, 5), (33, 17), (130, 3), (2, 300))
def reductions(bench: Bench, table: Any, place: Place, rows: int, width: int) -> list[Launch]:
    launches = []
    for kind, dims in itertools.product(("sum", "mean", "amax", "amin"), ([0], [1], [])):
        x = place(random(rows, width))
        out = empty(*(n for d, n in enumerate(x.shape) if d not in (dims or (0, 1))))
        views = bench.view(x), bench.view(out)
        launches += table.reduction(kind, *views, dims=dims, scratch=bench.scratch)
    views = bench.view(random(rows, width)), bench.view(empty(width))
    return [*launches, *table.column_sum(*views, scratch=bench.scratch)]


@at((1, 1, 1), (3, 5, 7), (7, 33, 16), (17, 8, 65), (2, 3, 400))
def products(bench: Bench, table: Any, place: Place, M: int, N: int, K: int) -> list[Launch]:
    a, b, residual = place(random(M, K)), place(random(K, N, seed=1)), place(random(M, N, seed=2))
    options = {"local_memory_bytes": local(bench), "scratch": bench.scratch}
    extra = {"bias": bench.view(random(N, seed=3)), "residual": bench.view(residual)}
    launches = table.gemm(*map(bench.view, (a, b, empty(M, N))), **options, **extra)
    batch = (random(2, M, K), random(2, K, N, seed=1), empty(2, M, N))
    launches += table.gemm(*map(bench.view, batch), **options)
    whole = (torch.ones(M, K, dtype=torch.int64), torch.ones(K, N, dtype=torch.int64), torch.zeros(M, N).long())
    return [*launches, *table.product(*map(bench.view, whole))]


@at((1, 1, 1), (3, 5, 7), (14, 33, 16), (17, 65, 8), (2, 40, 100))
def packed_products(bench: Bench, table: Any, place: Place, M: int, N: int, K: int) -> list[Launch]:
    a, b = random(M, K), place(random(K, N, seed=1))
    options = {"local_memory_bytes": local(bench), "scratch": bench.scratch}
    with mock.patch.multiple(kernels_gemm, _UNPACKED_ROWS=0, _UNPACKED_FLOP=0):  # as if there were many rows
        return table.gemm(*map(bench.view, (a, b, empty(M, N))), **options)


@at((1, 1), (1, 2), (2, 1), (2, 3), (3, 2))
def long_products(bench: Bench, table: Any, place: Place, M: int, N: int) -> list[Launch]:
    a, b, extra = random(M, 512 + M), random(512 + M, N, seed=1), {"bias": bench.view(random(N, seed=3))}
    options = {"local_memory_bytes": local(bench), "scratch": bench.scratch}
    return table.gemm(*map(bench.view, (a, b, empty(M, N))), **options, **extra)


@at((1, 1, 1, 1), (3, 5, 4, 4), (7, 9, 8, 3), (5, 17, 3, 16), (17, 3, 2, 3))
def attentions(bench: Bench, table: Any, place: Place, T: int, S: int, E: int, F: int) -> list[Launch]:
    launches = []
    seed = torch.tensor([1, 2])
    for is_causal, is_masked in ((True, False), (False, True)):
        q, k, v = (place(random(1, 2, *shape, seed=i)) for i, shape in enumerate(((T, E), (S, E), (S, F))))
        grad, out, lse, mask = random(1, 2, T, F), empty(1, 2, T, F), empty(1, 2, T), random(1, 2, T, S)
        gradients = [empty(*t.shape) for t in (q, k, v)]
        options: dict[str, Any] = {"scale": 0.5, "is_causal": is_causal, "local_memory_bytes": local(bench)}
        if is_masked:
            dropout = kernels.Dropout(0.25, bench.view(seed), 3)
            options |= {"mask": bench.view(mask), "dropout": dropout}
        views = [bench.view(t) for t in (q, k, v, out, lse)]
        options["scratch"] = bench.scratch
        launches += table.attention(*views, **options)
        if is_masked:
            options["dmask"] = bench.view(empty(1, 2, T, S))
        launches += table.attention_backward(bench.view(grad), *views, *map(bench.view, gradients), **options)
    return launches


@at((1, 2), (3, 5), (4, 16), (2, 33), (5, 70))
def sorts(bench: Bench, table: Any, place: Place, rows: int, n: int) -> list[Launch]:
    launches = []
    for keep in (None, 1):
        count = n if keep is None else keep
        views = map(bench.view, (place(random(rows, n)), empty(rows, count), torch.zeros(rows, count).long()))
        launches += table.sort(*views, dim=1, is_descending=keep is None, keep=keep, scratch=bench.scratch)
    return launches


@at((1,), (3,), (17,), (33,), (16385,))
def updates(bench: Bench, table: Any, place: Place, n: int) -> list[Launch]:
    target, launches = bench.device.capabilities, []
    factor = bench.view(torch.ones(1))
    gradients = [bench.view(random(n)), bench.view(random(3))]  # a sum over one chunk, over two
    partial = bench.scratch(4 * sum(optimizers.n_partial(g.numel) for g in gradients), "partial")
    clipping = optimizers.Clipping(partial, bench.view(empty(1)), bench.view(empty(1)))
    roots = (bench.view(random(min(n, 70))).root for _ in range(2))
    launches.append(optimizers.accumulate(*roots, target))
    launches += optimizers.clear(bench.view(random(n + 2)), ((0, 1), (n, 2)))
    launches += optimizers.clip(gradients, clipping, 1.0, target)
    for rule in (
        optimizers.Adam(),
        optimizers.SGD(has_momentum=True, is_nesterov=True),
        optimizers.SGD(has_momentum=False, is_nesterov=False),
    ):
        p, gradient, *states = (bench.view(random(min(n, 70))) for _ in range(2 + len(rule.states)))
        launches.append(rule.launch(p, gradient, tuple(states), factor, prefix="0", target=target))
    return launches


def led(view: View, shape: tuple[int, ...]) -> View:
    """A matrix as it moves with a loop in which an index tensor leads along its rows."""
    return View(view.root, view.offset, shape, (0, view.strides[1]), view.dtype)


@at((1, 1, 1), (5, 3, 7), (2, 10, 16), (17, 4, 33), (9, 130, 5))
def indexing(bench: Bench, table: Any, place: Place, n: int, size: int, width: int) -> list[Launch]:
    index = (torch.arange(n) * 7 % (size + 1))[:, None].expand(n, width)
    index = torch.where(index == 2, -size - 1, index)
    x, out = place(random(size, width)), empty(n, width)
    along = [kernels.Along(bench.view(index), size, x.stride(0))]
    launches = table.gather(led(bench.view(x), (n, width)), along, bench.view(out), wraps=True)
    target, given = random(size, width), place(random(n, width))
    along = [kernels.Along(bench.view(index), size, width)]
    target_view = led(bench.view(target), (n, width))
    return [*launches, *table.scatter(bench.view(given), along, target_view, ordered={0}, combine="sum")]


@at((1, 33, 5), (2, 16, 7), (7, 35, 16), (12, 32, 3), (13, 1, 9))
def gemm_with_epilogue(bench: Bench, table: Any, place: Place, M: int, N: int, K: int) -> list[Launch]:
    a, b, factor = (bench.view(place(random(*shape))) for shape in ((M, K), (K, N), (M, N)))
    dtype, launches = torch.float32, []
    options = {"local_memory_bytes": local(bench), "scratch": bench.scratch}
    for readers in ("chain", "another"):  # the product is stored in the result's place, or in its own
        product, out = (bench.view(empty(M, N)) for _ in range(2))
        chain = Pointwise("mul", out, "{0} * {1}", (product, factor), (dtype, dtype), dtype, out, key="chain")

        def emit(stored: Sequence[View], _: View | None, epilogue: Any) -> list[Launch]:
            return table.gemm(a, b, stored[0], **options, **({"epilogue": epilogue} if epilogue else {}))

        deferred = Deferred([product], emit, takes_epilogue=True, readers=frozenset({readers}))
        if not table.gemm_takes_epilogue:
            launches += emit([product], None, None)
        else:
            launches += build_epilogue(chain, deferred, {}, is_gpu=False, compute_units=1)[0]
    return launches
