"""Random numbers of compiled functions: which they are, when they repeat, how they are distributed."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hetero.opencl import fallbacks
from hetero.opencl import graph as compiled_graphs
from hetero.opencl.program import open_device
from tests.philox import words

if TYPE_CHECKING:
    from collections.abc import Callable

# Seeds are fixed, so these tests don't fail by chance; the bounds say how rare a failure would be with other seeds.
SIGMAS = 5.0  # of a normally distributed statistic: 6e-7 on both sides
KOLMOGOROV = 2.7  # sqrt(n) times the largest distance of distribution functions: 2 exp(-2 * 2.7^2) = 9e-7
N = 1 << 18


@pytest.fixture(autouse=True)
def _forget_fallbacks() -> None:
    """Other tests of the process let operations fall back on purpose."""
    compiled_graphs._fallbacks.clear()


def compiled(function: Callable[..., Any], **options: str) -> Callable[..., Any]:
    result: Callable[..., Any] = torch.compile(function, backend="opencl", fullgraph=True, options=options)
    return result


def drawn(function: Callable[..., Any], *arguments: Any, seed: int = 1, **options: str) -> Tensor:
    torch.manual_seed(seed)
    result: Tensor = compiled(function, **options)(*arguments)
    return result


def key_of(seed: int) -> int:
    """The key that the first call after torch.manual_seed draws."""
    generator = torch.Generator().manual_seed(seed)
    return int(torch.empty(1, dtype=torch.int64).random_(-(2**63), None, generator=generator)) % 2**64


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two samples, times sqrt(n): standard normal if they are independent."""
    a, b = (x.double().flatten() - x.double().mean() for x in (a, b))
    return float((a * b).sum() / (a.norm() * b.norm())) * math.sqrt(a.numel())


# --- which numbers ----------------------------------------------------------------------------------------------------


def test_numbers_are_words_of_philox_below_one_key_a_call_and_one_stream_an_operation() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.rand(1003) * x, functional.dropout(x, 0.3)

    torch.manual_seed(7)
    uniform, dropped = compiled(function)(torch.ones(1003))
    expected = torch.from_numpy((words(1003, key_of(7), 1) >> 8).astype("float32")) * 2.0**-24
    assert torch.equal(uniform, expected)
    kept = torch.from_numpy(words(1003, key_of(7), 2) >= round(0.3 * 2**32))
    assert torch.equal(dropped, kept / torch.tensor(0.7))


def test_elements_of_a_transposed_tensor_have_numbers_of_their_own() -> None:
    x = torch.ones(64, 64).t()
    y, other = drawn(lambda x: (functional.dropout(x, 0.5), functional.dropout(x, 0.5).t() + 0), x)  # type: ignore[misc]
    assert abs(correlation(y, y.t())) < SIGMAS * math.sqrt(2)  # each pair counts twice
    assert abs(correlation(y, other)) < SIGMAS


@pytest.mark.parametrize("options", [{"memory": "copy"}, {"device": "opencl:0.1"}])
def test_the_same_bits_on_one_core_and_with_copies(options: dict[str, str]) -> None:
    def function(x: Tensor) -> Tensor:
        return functional.dropout(torch.randn(70, 31) + x, 0.4) * torch.rand_like(x)

    x = torch.ones(70, 31)
    assert torch.equal(drawn(function, x), drawn(function, x, **options))


# --- when they repeat -------------------------------------------------------------------------------------------------


def test_a_seed_repeats_a_run_and_calls_differ() -> None:
    function = compiled(lambda x: functional.dropout(x, 0.5))
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = function(x), function(x)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert torch.equal(function(x), first)
    state = torch.get_rng_state()
    third = function(x)
    torch.set_rng_state(state)
    assert torch.equal(function(x), third)
    assert len({tuple(y.tolist()) for y in (first, second, third)}) == 3


def test_a_graph_without_random_operations_draws_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    state = torch.get_rng_state()
    torch.compile(net, backend="opencl")(torch.ones(2, 4)).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_masks_of_calls_in_flight_are_kept_for_their_backward_passes() -> None:
    function = compiled(lambda x: functional.dropout(x, 0.5))
    x = torch.ones(500, requires_grad=True)
    outputs = [function(x) for _ in range(4)]
    for i in (2, 0, 3, 1):
        for _ in range(2):
            (gradient,) = torch.autograd.grad(outputs[i].sum(), x, retain_graph=True)
            assert torch.equal(gradient, outputs[i])
    assert len({tuple(y.tolist()) for y in outputs}) == 4


def test_threads_draw_different_numbers_and_keep_their_own() -> None:
    function = compiled(lambda x: functional.dropout(x, 0.5))
    function(torch.ones(500, requires_grad=True)).sum().backward()
    found: list[Tensor] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                x = torch.ones(500, requires_grad=True)
                ys = [function(x) for _ in range(3)]
                for y in ys:
                    (gradient,) = torch.autograd.grad(y.sum(), x)
                    assert torch.equal(gradient, y)
                found.extend(y.detach() for y in ys)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len({tuple(y.tolist()) for y in found}) == 45


@pytest.mark.parametrize("options", [{}, {"memory": "copy"}])
@pytest.mark.parametrize("dynamic", [False, True])
def test_checkpointing_computes_the_same_masks_again(options: dict[str, str], dynamic: bool) -> None:
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def block(x: Tensor) -> Tensor:
        return functional.dropout(torch.relu(x @ weight), 0.3) * functional.dropout(x, 0.5) + torch.rand_like(x)

    def saving(x: Tensor) -> Tensor:
        return block(x).sin()

    def recomputing(x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False).sin()  # type: ignore[no-any-return]

    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    results = []
    for function in (saving, recomputing):
        run = torch.compile(function, backend="opencl", fullgraph=True, dynamic=dynamic, options=options)
        torch.manual_seed(2)
        for _ in range(2):  # the second call's keys differ from the first
            y = run(x)
            gradients = torch.autograd.grad(y.square().sum(), (x, weight), retain_graph=True)
            again = torch.autograd.grad(y.square().sum(), (x, weight))
            assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
            results.append((y, *gradients))
    for i in (0, 1):
        for saved, recomputed in zip(results[i], results[i + 2], strict=True):
            torch.testing.assert_close(saved, recomputed, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results[0][0], results[1][0])
    assert fallbacks("opencl:0") == []


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_nothing_and_of_all_is_as_in_torch(p: float, training: bool) -> None:
    x = torch.tensor([math.nan, math.inf, -1.0, 2.0], requires_grad=True)
    results = []
    for function in (functional.dropout, compiled(functional.dropout)):
        y = function(x, p, training)
        results.append((y, *torch.autograd.grad(y.sum(), x)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_dropped_infinity_is_nan_as_in_torch() -> None:
    y = drawn(lambda x: functional.dropout(x, 0.5), torch.full((400,), math.inf))
    assert 100 < int(y.isnan().sum()) < 300
    assert bool((y.isnan() | (y == math.inf)).all())


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0, 2), (7, 11), (1, 5, 13)])
def test_the_gradient_of_dropout_is_its_mask(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, requires_grad=True)
    y = drawn(lambda x: functional.dropout(x, 0.5), x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y)
    assert y.shape == shape


def test_dropout_is_one_launch_with_its_neighbours() -> None:
    counts = open_device("opencl:0").counts
    function = compiled(lambda x, y: y + functional.dropout(functional.relu(x), 0.1))
    x, y = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    before = counts.copy()
    function(x, y)
    assert counts - before == {"relu+native_dropout+add": 1}


def test_every_layer_shares_the_kernel_of_its_dropout() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = functional.dropout(layer(x), 0.35)
            return x

    programs = open_device("opencl:0")._programs
    before = {key for key in programs if "bits1" in str(key)}
    torch.compile(Net(), backend="opencl", fullgraph=True)(torch.ones(3, 6, requires_grad=True))
    assert len({key for key in programs if "bits1" in str(key)} - before) == 1


def test_dropout_keeps_the_right_share_independently_of_neighbours_layers_and_calls() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.dropout(x, 0.3), functional.dropout(x, 0.3)

    run = compiled(function)
    torch.manual_seed(11)
    masks = [(y != 0).double() for _ in range(2) for y in run(torch.ones(N))]
    spread = math.sqrt(0.3 * 0.7 / N)
    for mask in masks:
        assert abs(float(mask.mean()) - 0.7) < SIGMAS * spread
        for lag in (1, 2, 3, 4, 5, 8, 16, 1024):
            assert abs(correlation(mask[lag:], mask[:-lag])) < SIGMAS
    for i in range(4):
        for j in range(i):
            assert abs(correlation(masks[i], masks[j])) < SIGMAS


# --- distributions ----------------------------------------------------------------------------------------------------


def normal(x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return 0.5 * (1 + torch.erf((x - mean) / (std * math.sqrt(2))))


def uniform(x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    return (x - low) / (high - low)


DISTRIBUTIONS: list[tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
    ("rand", lambda x: torch.rand(N), uniform),
    ("rand float64", lambda x: torch.rand(N, dtype=torch.float64), uniform),
    ("rand_like", torch.rand_like, uniform),
    ("uniform_", lambda x: torch.empty(N).uniform_(-2, 5), lambda y: uniform(y, -2, 5)),
    ("randn", lambda x: torch.randn(N), normal),
    ("randn float64", lambda x: torch.randn(N, dtype=torch.float64), normal),
    ("randn_like", torch.randn_like, normal),
    ("normal_", lambda x: torch.empty(N).normal_(3, 0.5), lambda y: normal(y, 3, 0.5)),
    ("normal of tensors", lambda x: torch.normal(x, 2 * x), lambda y: normal(y, 1, 2)),
    ("normal of a mean", lambda x: torch.normal(x, 2.0), lambda y: normal(y, 1, 2)),
    ("normal of a deviation", lambda x: torch.normal(1.0, x), lambda y: normal(y, 1, 1)),
    ("normal of numbers", lambda x: torch.normal(1.0, 2.0, (N,)), lambda y: normal(y, 1, 2)),
    ("exponential_", lambda x: torch.empty(N).exponential_(2.0), lambda y: 1 - torch.exp(-2 * y)),
]


@pytest.mark.parametrize(
    ("function", "distribution"), [d[1:] for d in DISTRIBUTIONS], ids=[d[0] for d in DISTRIBUTIONS]
)
def test_samples_follow_their_distribution(
    function: Callable[[Tensor], Tensor], distribution: Callable[[Tensor], Tensor]
) -> None:
    y = drawn(function, torch.ones(N))
    p = distribution(y.double().sort().values)
    rank = torch.arange(N, dtype=torch.float64) / N
    assert float(torch.maximum(p - rank, rank + 1 / N - p).max()) * math.sqrt(N) < KOLMOGOROV
    for lag in (1, 2, 3, 4):
        assert abs(correlation(y[lag:], y[:-lag])) < SIGMAS
    assert fallbacks("opencl:0") == []


@pytest.mark.parametrize(
    ("function", "low", "high", "dtype"),
    [
        (lambda x: torch.randint(-3, 10, (N,)), -3, 10, torch.int64),
        (lambda x: torch.randint(5, (N,), dtype=torch.int32), 0, 5, torch.int32),
        (lambda x: torch.randint_like(x, 7), 0, 7, torch.float32),
        (lambda x: torch.randint_like(x, 2, 9), 2, 9, torch.float32),
    ],
)
def test_integers_are_equally_frequent(
    function: Callable[[Tensor], Tensor], low: int, high: int, dtype: torch.dtype
) -> None:
    y = drawn(function, torch.ones(N))
    assert y.dtype == dtype
    counts = torch.bincount(y.long() - low, minlength=high - low).double()
    assert counts.numel() == high - low
    expected = N / (high - low)
    assert float((counts - expected).abs().max()) < SIGMAS * math.sqrt(expected)


def test_integers_of_a_wide_range_use_all_their_bits() -> None:
    y = drawn(lambda x: torch.randint(-(2**63), 2**63 - 1, (N,)), torch.ones(1))
    for bit in range(64):
        assert abs(float(((y >> bit) & 1).double().mean()) - 0.5) < SIGMAS * 0.5 / math.sqrt(N)


@pytest.mark.parametrize(
    "function",
    [
        lambda p: torch.bernoulli(p),
        lambda p: torch.empty_like(p).bernoulli_(p),
        lambda p: torch.empty_like(p).bernoulli_(0.2),
    ],
)
def test_bernoulli_has_its_probability(function: Callable[[Tensor], Tensor]) -> None:
    y = drawn(function, torch.full((N,), 0.2))
    assert set(y.unique().tolist()) == {0.0, 1.0}
    assert abs(float(y.double().mean()) - 0.2) < SIGMAS * math.sqrt(0.2 * 0.8 / N)


def test_normal_numbers_have_four_right_moments_and_tails() -> None:
    y = drawn(lambda x: torch.randn(N), torch.ones(1)).double()
    for power, (expected, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs(float((y**power).mean()) - expected) < SIGMAS * math.sqrt(variance / N)
    beyond = 2 * (1 - float(normal(torch.tensor(3.0, dtype=torch.float64))))
    assert abs(float((y.abs() > 3).double().mean()) - beyond) < SIGMAS * math.sqrt(beyond / N)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: functional.alpha_dropout(x, 0.3, training=True),
        lambda x: functional.feature_alpha_dropout(x, 0.3, training=True),
        lambda x: functional.dropout1d(x, 0.3),
        lambda x: functional.dropout2d(x[None], 0.3),
        lambda x: functional.gumbel_softmax(x, hard=False),
    ],
)
def test_other_random_layers_run_with_gradients(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(9, 4, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = drawn(function, x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert y.isfinite().all()
    assert gradient.isfinite().all()
    assert not torch.equal(y, drawn(function, x, seed=2))
    assert fallbacks("opencl:0") == []


@pytest.mark.parametrize("training", [True, False])
def test_randomised_leaky_relu_has_slopes_between_its_bounds(training: bool) -> None:
    x = torch.linspace(-2, 2, 1001, requires_grad=True)
    y = drawn(lambda x: functional.rrelu(x, 0.1, 0.4, training=training), x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y[x > 0], x[x > 0])
    slopes = gradient[x < 0]
    torch.testing.assert_close(y[x < 0], x[x < 0] * slopes)
    assert bool(((slopes >= 0.1) & (slopes <= 0.4)).all())
    assert float(slopes.std()) > 0.05 if training else torch.allclose(slopes, torch.tensor(0.25))
