"""Attention and the layers around it, compiled, against float64 in eager PyTorch: values, gradients, where they ran."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hetero.opencl import fallbacks
from hetero.opencl import graph as compiled_graphs
from hetero.opencl.program import open_device

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Sequence

attention = functional.scaled_dot_product_attention
# As in test_compile_units.py: four times as far from float64 as eager float32 is, plus rounding of the norm.
FACTOR, FLOOR = 4.0, 1e-6
WHOLE = {"_scaled_dot_product_flash_attention_for_cpu", "attention"}  # forward, in one launch


@pytest.fixture(autouse=True)
def _forget_fallbacks() -> None:
    """Other tests of the process let operations fall back on purpose."""
    compiled_graphs._fallbacks.clear()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """The same weights each time, and no recompilations that count against a function's limit."""
    torch.manual_seed(0)
    torch._dynamo.reset()


def random(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def heads(*sizes: tuple[int, ...]) -> list[Tensor]:
    return [random(*size, seed=i) for i, size in enumerate(sizes)]


def results(function: Callable[..., Tensor], inputs: Sequence[Tensor], module: nn.Module | None) -> list[Tensor]:
    """Output, and gradients of inputs and parameters if there are any."""
    y = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad] + list(module.parameters() if module else ())
    if not (y.requires_grad and wanted):
        return [y.detach()]
    seed = random(*y.shape, seed=9, grad=False).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, wanted, seed, materialize_grads=True)]


def widened(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x


def error(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Distance of the output and of all gradients together, relative to their norm."""
    found = []
    for a, b in ((ours[:1], exact[:1]), (ours[1:], exact[1:])):
        norm = math.sqrt(sum(float(y.square().sum()) for y in b)) or 1.0
        found.append(math.sqrt(sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True))) / norm)
    return found


def check(
    call: Callable[..., Tensor], inputs: Sequence[Tensor], module: nn.Module | None = None, **options: str
) -> Counter[str]:
    """Compare call(*inputs), or call(module, *inputs), with float64; gives the launches."""
    double = copy.deepcopy(module).double() if module else None
    compiled = torch.compile(call, backend="opencl", fullgraph=True, options=options)
    device = open_device(options.get("device", "opencl:0"))

    def bound(function: Callable[..., Tensor], m: nn.Module | None) -> Callable[..., Tensor]:
        return (lambda *x: function(m, *x)) if m else function

    before = device.counts.copy()
    ours = results(bound(compiled, module), inputs, module)
    launches = device.counts - before
    exact = results(bound(call, double), [widened(x) for x in inputs], double)
    eager = results(bound(call, module), inputs, module)
    for a, b in zip(error(ours, exact), error(eager, exact), strict=True):
        assert a <= FACTOR * b + FLOOR
    assert [x.shape for x in ours] == [x.shape for x in exact]
    assert launches.total() > 0
    assert fallbacks(device.name) == []
    return launches


# --- scaled_dot_product_attention -------------------------------------------------------------------------------------

FOUR = (2, 4, 9, 8)


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ([FOUR] * 3, {}),
        ([FOUR] * 3, {"is_causal": True, "scale": 0.3}),
        ([(2, 3, 5, 7), (2, 3, 11, 7), (2, 3, 11, 7)], {"is_causal": True}),
        ([(2, 3, 11, 7), (2, 3, 5, 7), (2, 3, 5, 7)], {"is_causal": True}),
        ([(1, 2, 33, 1)] * 3, {"is_causal": True}),
        ([(1, 2, 7, 200)] * 3, {}),
        ([FOUR, FOUR, (2, 4, 9, 5)], {"is_causal": True}),
        ([FOUR, (2, 2, 9, 8), (2, 2, 9, 8)], {"enable_gqa": True, "is_causal": True}),
        ([FOUR, (2, 1, 9, 8), (2, 1, 9, 3)], {"enable_gqa": True}),
        ([(3, 9, 8)] * 3, {}),
        ([(2, 3, 2, 9, 8)] * 3, {"is_causal": True}),
    ],
)
def test_attention_without_mask_is_one_launch_each_way(sizes: list[tuple[int, ...]], settings: dict[str, Any]) -> None:
    launches = check(lambda q, k, v: attention(q, k, v, **settings), heads(*sizes))
    assert sum(launches[op] for op in WHOLE) == 1
    assert sum(launches[f"{op}_backward"] for op in WHOLE) == 1
    assert not {"bmm", "_softmax"} & set(launches)


@pytest.mark.parametrize("size", [(2, 0, 4), (0, 3, 4), (2, 3, 0)])
def test_attention_of_nothing(size: tuple[int, ...]) -> None:
    check(attention, heads(*[(2, *size)] * 3))


def test_attention_to_nothing() -> None:
    check(attention, heads((2, 2, 3, 4), (2, 2, 0, 4), (2, 2, 0, 4)))


@pytest.mark.slow
def test_attention_of_matrices_and_of_broadcast_batches_runs_in_pieces() -> None:
    check(attention, heads((5, 7), (6, 7), (6, 7)))
    check(attention, heads((2, 3, 5, 7), (1, 3, 6, 7), (1, 3, 6, 7)))


@pytest.mark.parametrize(
    "shape", [(9, 9), (2, 1, 1, 9), *(pytest.param(s, marks=pytest.mark.slow) for s in [(1, 4, 9, 9), (2, 4, 9, 1)])]
)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_are_broadcast_and_added_in_the_kernel(shape: tuple[int, ...], kind: torch.dtype) -> None:
    mask = random(*shape, seed=7, grad=False)
    mask[(0,) * (len(shape) - 1)] = -1.0  # a row that sees nothing
    mask = mask > -0.5 if kind == torch.bool else torch.where(mask > -0.5, mask, -math.inf)
    launches = check(lambda q, k, v, m: attention(q, k, v, m), [*heads(*[FOUR] * 3), mask])
    assert launches["_scaled_dot_product_flash_attention_for_cpu"] == 1
    assert "_softmax" not in launches


@pytest.mark.parametrize(
    ("shape", "shared"), [((9, 9), 2), ((2, 1, 1, 9), 4), ((4, 9, 9), 4), ((2, 4, 9, 1), 2), ((2, 4, 9, 9), 4)]
)
def test_masks_get_gradients(shape: tuple[int, ...], shared: int) -> None:
    inputs = heads(FOUR, (2, shared, 9, 8), (2, shared, 9, 8), shape)
    launches = check(lambda q, k, v, m: attention(q, k, v, m, enable_gqa=shared != 4), inputs)
    assert launches["attention"] == launches["attention_backward"] == 1


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient() -> None:
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[4] = False
    q, k, v = heads(*[FOUR] * 3)
    y = torch.compile(lambda q, k, v: attention(q, k, v, mask), backend="opencl")(q, k, v)
    gradients = torch.autograd.grad(y.sum(), (q, k, v))
    assert bool((y[:, :, 4] == 0).all())
    assert bool((gradients[0][:, :, 4] == 0).all())
    assert all(bool(g.isfinite().all()) for g in gradients)


def test_wrong_arguments_are_refused_as_in_torch() -> None:
    q, k, v = heads(FOUR, (2, 3, 9, 8), (2, 3, 9, 8))
    with pytest.raises(Exception, match=r"[Nn]umber of heads"):
        torch.compile(lambda q, k, v: attention(q, k, v, enable_gqa=True), backend="opencl")(q, k, v)
    with pytest.raises(Exception, match="is_causal"):
        torch.compile(lambda q: attention(q, q, q, torch.ones(9, 9), 0.1, is_causal=True), backend="opencl")(q)


# --- dropout inside ---------------------------------------------------------------------------------------------------

P = 0.25


def dropped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    return attention(q, k, v, mask, P, is_causal, enable_gqa=q.shape[1] != k.shape[1])


def with_kept(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, mask: Tensor | None = None, *, is_causal: bool = False
) -> Tensor:
    """Attention with dropout whose mask is known."""
    share = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(share, 1).mT / math.sqrt(q.shape[-1]) + (0 if mask is None else mask)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, -math.inf)
    return scores.softmax(-1) * keep / (1 - P) @ v.repeat_interleave(share, 1)


@pytest.mark.parametrize("options", [{}, {"memory": "copy"}, {"device": "opencl:0.1"}])
@pytest.mark.parametrize(
    ("n_head", "shared", "is_causal"), [pytest.param(3, 3, True, marks=pytest.mark.slow), (4, 2, False)]
)
def test_gradients_under_dropout_are_those_of_the_mask_that_was_drawn(
    n_head: int, shared: int, is_causal: bool, options: dict[str, str]
) -> None:
    """Values are unit vectors, so that the output shows the dropped weights themselves."""
    T = 70
    q, k = random(2, n_head, T, 8), random(2, shared, T, 8, seed=1)
    v = torch.eye(T).expand(2, shared, T, T).clone().requires_grad_()
    mask = None if is_causal else random(n_head, T, T, seed=3)
    inputs = [x for x in (q, k, v, mask) if x is not None]
    torch.manual_seed(5)
    compiled = torch.compile(lambda *x: dropped(*x, is_causal=is_causal), backend="opencl", options=options)
    y = compiled(*inputs)
    keep = y.detach() != 0
    wide = [widened(x) for x in inputs]
    exact = with_kept(*wide[:3], keep, *wide[3:], is_causal=is_causal)
    seed = random(*y.shape, seed=4, grad=False)
    ours = [y.detach(), *torch.autograd.grad(y, inputs, seed)]
    expected = [exact.detach(), *torch.autograd.grad(exact, wide, seed.double())]
    for a in error(ours, expected):
        assert a <= 2e-6  # rounding of sums over T = 70 with eps 1.2e-7
    n_weights = keep.numel() * (T + 1) // (2 * T) if is_causal else keep.numel()
    assert abs(int(keep.sum()) - (1 - P) * n_weights) < 5 * math.sqrt(P * (1 - P) * n_weights)  # 6e-7 by chance
    torch.manual_seed(5)
    reference = torch.compile(lambda *x: dropped(*x, is_causal=is_causal), backend="opencl")(*inputs)
    assert torch.equal(y, reference)  # the same bits on one core, and with copies


def test_dropout_inside_attention_stores_no_mask() -> None:
    counts = open_device("opencl:0").counts
    inputs = heads(*[FOUR] * 3)
    before = counts.copy()
    y = torch.compile(dropped, backend="opencl", fullgraph=True)(*inputs)
    y.sum().backward()
    launches = counts - before
    assert launches["attention"] == launches["attention_backward"] == launches["seed"] == 1
    assert not {"_softmax", "native_dropout", "bmm"} & set(launches)


def test_layers_calls_and_heads_drop_different_weights() -> None:
    q = torch.zeros(2, 3, 40, 4)
    v = torch.eye(40).expand(2, 3, 40, 40)

    def function(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, q, v, dropout_p=0.5), attention(q, q, v, dropout_p=0.5)

    compiled = torch.compile(function, backend="opencl", fullgraph=True)
    masks = [y != 0 for _ in range(2) for y in compiled(q, v)]
    flat = torch.stack([m for y in masks for m in y.flatten(0, 1)]).flatten(1).double() - 0.5
    correlations = flat @ flat.T / 0.25 / math.sqrt(flat.shape[1])
    assert float((correlations - correlations.diagonal().diag()).abs().max()) < 6  # 276 pairs: 5e-7 by chance


def test_checkpointed_attention_drops_the_same_weights_again() -> None:
    inputs = heads(*[(2, 2, 20, 8)] * 3)

    def saving(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dropped(q.sin(), k, v).cos()

    def recomputing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = checkpoint(lambda *x: dropped(x[0].sin(), *x[1:]), q, k, v, use_reentrant=False)
        return result.cos()

    found = []
    for function in (saving, recomputing):
        torch.manual_seed(6)
        y = torch.compile(function, backend="opencl", fullgraph=True)(*inputs)
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- modules ----------------------------------------------------------------------------------------------------------

B, T, S, D, H = 2, 5, 7, 16, 4
HIDDEN = torch.zeros(B, T, dtype=torch.bool)
HIDDEN[0, 3:] = True
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
MODES = [(True, True), (False, False)]  # training, gradients


def run(
    module: nn.Module, call: Callable[..., Tensor], inputs: Sequence[Tensor], *, training: bool, gradients: bool
) -> Counter[str]:
    module.train(training)
    with torch.set_grad_enabled(gradients):
        return check(call, inputs, module)


@pytest.mark.parametrize(("training", "gradients"), MODES)
@pytest.mark.parametrize("need_weights", [pytest.param(True, marks=pytest.mark.slow), False])
def test_multihead_attention_with_masks(need_weights: bool, training: bool, gradients: bool) -> None:
    module = nn.MultiheadAttention(D, H, batch_first=True)

    def call(m: nn.Module, x: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
        result: Tensor = m(x, x, x, attn_mask=mask, key_padding_mask=hidden, need_weights=need_weights)[0]
        return result

    inputs = [random(B, T, D), CAUSAL, HIDDEN]
    launches = run(module, call, inputs, training=training, gradients=gradients)
    assert ("_softmax" in launches) == need_weights


@pytest.mark.parametrize(("training", "gradients"), [(False, True), (False, False)])
def test_multihead_attention_of_other_keys_and_its_weights(training: bool, gradients: bool) -> None:
    cross = nn.MultiheadAttention(D, H, kdim=6, vdim=9, bias=False, add_bias_kv=True, add_zero_attn=True)
    inputs = [random(T, B, D), random(S, B, 6, seed=1), random(S, B, 9, seed=2)]
    run(cross, lambda m, q, k, v: m(q, k, v)[0], inputs, training=training, gradients=gradients)
    own = nn.MultiheadAttention(D, H, batch_first=True)
    weights = lambda m, x: m(x, x, x, average_attn_weights=False)[1]  # noqa: E731
    run(own, weights, [random(B, T, D)], training=training, gradients=gradients)


@pytest.mark.parametrize(("training", "gradients"), MODES)
@pytest.mark.parametrize(
    ("norm_first", "activation"), [pytest.param(False, "relu", marks=pytest.mark.slow), (True, "gelu")]
)
def test_encoder_layers(norm_first: bool, activation: str, training: bool, gradients: bool) -> None:
    """Without gradients, in evaluation, the module calls one fused operation: it has to run here as well."""
    p = 0.0 if training else 0.3
    module = nn.TransformerEncoderLayer(D, H, 24, p, activation, batch_first=True, norm_first=norm_first)
    calls: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
        (lambda m, x, mask, hidden: m(x, mask, hidden), [CAUSAL, HIDDEN]),
        (lambda m, x, hidden: m(x, src_key_padding_mask=hidden), [HIDDEN]),
    ]
    for call, masks in calls:
        launches = run(module, call, [random(B, T, D), *masks], training=training, gradients=gradients)
        assert launches["_scaled_dot_product_flash_attention_for_cpu"] == 1
        assert "_transformer_encoder_layer_fwd" not in launches


def test_masks_of_two_types_of_which_pytorch_warns_break_no_graph() -> None:
    module = nn.TransformerEncoderLayer(D, H, 24, 0.0, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    call = lambda m, x, mask, hidden: m(x, mask, hidden)  # noqa: E731
    run(module, call, [random(B, T, D), mask, HIDDEN], training=True, gradients=True)


@pytest.mark.parametrize(("training", "gradients"), MODES)
def test_a_stack_of_encoder_layers_with_padding(training: bool, gradients: bool) -> None:
    layer = nn.TransformerEncoderLayer(D, H, 24, 0.0, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, nn.LayerNorm(D), enable_nested_tensor=False)
    call = lambda m, x, hidden: m(x, src_key_padding_mask=hidden)  # noqa: E731
    launches = run(module, call, [random(B, T, D), HIDDEN], training=training, gradients=gradients)
    assert launches["_scaled_dot_product_flash_attention_for_cpu"] == 2


def test_a_stack_that_would_nest_tensors_does_not_when_compiled() -> None:
    layer = nn.TransformerEncoderLayer(D, H, 24, 0.1, batch_first=True)
    module = nn.TransformerEncoder(layer, 2).eval()
    x = random(B, T, D, grad=False)
    with torch.no_grad():
        ours = torch.compile(module, backend="opencl", fullgraph=True)(x, src_key_padding_mask=HIDDEN)
        exact = copy.deepcopy(module).double()(x.double(), src_key_padding_mask=HIDDEN)
    assert not ours.is_nested
    torch.testing.assert_close(ours[~HIDDEN].double(), exact[~HIDDEN], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("training", "gradients"), MODES)
@pytest.mark.parametrize(
    ("norm_first", "activation"), [(False, "gelu"), pytest.param(True, "relu", marks=pytest.mark.slow)]
)
def test_decoder_layers(norm_first: bool, activation: str, training: bool, gradients: bool) -> None:
    p = 0.0 if training else 0.3
    module = nn.TransformerDecoderLayer(D, H, 24, p, activation, batch_first=True, norm_first=norm_first)

    def call(m: nn.Module, x: Tensor, memory: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
        result: Tensor = m(x, memory, tgt_mask=mask, tgt_is_causal=True, tgt_key_padding_mask=hidden)
        return result

    inputs = [random(B, T, D), random(B, S, D, seed=1), CAUSAL, HIDDEN]
    launches = run(module, call, inputs, training=training, gradients=gradients)
    assert launches["_scaled_dot_product_flash_attention_for_cpu"] == 2


@pytest.mark.parametrize("norm_first", [False, True])
def test_layers_with_dropout_keep_attention_whole_and_have_the_right_expectation(norm_first: bool) -> None:
    """The mean over many calls tends to the output without dropout, as far as the layer is linear in its masks."""
    counts = open_device("opencl:0").counts
    module = nn.MultiheadAttention(D, H, dropout=0.3, batch_first=True)
    x = random(B, T, D)
    compiled = torch.compile(lambda x: module(x, x, x, need_weights=False)[0], backend="opencl", fullgraph=True)
    before = counts.copy()
    y = compiled(x)
    y.sum().backward()
    launches = counts - before
    assert launches["attention"] == launches["attention_backward"] == 1
    assert not {"_softmax", "bmm"} & set(launches)
    with torch.no_grad():
        samples = torch.stack([compiled(x) for _ in range(400)]).double()
        exact = copy.deepcopy(module).double().eval()(*[x.double()] * 3, need_weights=False)[0]
    spread = samples.std(0) / math.sqrt(400)
    assert float(((samples.mean(0) - exact) / spread).abs().max()) < 6  # 160 values: 3e-7 by chance


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_training_with_dropout_is_repeatable_and_has_gradients_for_all_parameters(kind: type[nn.Module]) -> None:
    module = kind(D, H, 24, 0.2, batch_first=True)
    x, memory = random(B, T, D), random(B, S, D, seed=1)
    inputs = (x,) if kind is nn.TransformerEncoderLayer else (x, memory)
    compiled = torch.compile(module, backend="opencl", fullgraph=True)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        y = compiled(*inputs)
        found.append([y, *torch.autograd.grad(y.square().sum(), [*inputs, *module.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
    assert all(bool(g.isfinite().all()) for g in found[0])
    assert fallbacks("opencl:0") == []
