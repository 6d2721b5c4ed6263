"""Whole models through `torch.compile(model, backend="opencl")`, training and evaluation, against float64."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import hetero
import lm
from hetero.opencl import fallbacks
from hetero.opencl.program import open_device
from hetero.runtime import place_stages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEVICE = "opencl:0"
V = 19
# A float32 result may be four times as far from float64's as eager's is, plus some roundings of the norm. Gradients are
# measured together: those that are zero in theory (a key's bias) are nothing but rounding.
FACTOR, FLOOR = 4.0, 1e-6


@pytest.fixture(autouse=True)
def _no_earlier_graphs() -> Iterator[None]:
    """Models of one class share the code object by which TorchDynamo counts recompilations."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _distance(ours: list[Tensor], exact: list[Tensor]) -> float:
    """Norm of all differences over that of all exact values."""
    errors = sum(float((a.double() - b).square().sum()) for a, b in zip(ours, exact, strict=True))
    scale = sum(float(b.square().sum()) for b in exact)
    return float((errors / (scale or 1.0)) ** 0.5)


def _passes(module: nn.Module, call: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Output; gradients of all floating-point inputs and parameters, for a fixed gradient of the output."""
    wanted = [x for x in inputs if x.requires_grad] + list(module.parameters())
    y = call(*inputs)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    grads = torch.autograd.grad(y, wanted, seed, allow_unused=True)
    return [y.detach()], [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]


def _wide(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]


def check(module: nn.Module, inputs: list[Tensor], *, ops: tuple[str, ...] = ()) -> None:
    """Compiled forward and backward passes, and evaluation without gradients, against float64.

    Args:
        module: in training mode; without randomness.
        inputs: of a call; those that require it get gradients.
        ops: names of operations that have to be among those launched.
    """
    counts, fell_back = open_device(DEVICE).counts, fallbacks(DEVICE)
    double = copy.deepcopy(module).double()
    compiled = torch.compile(module, backend="opencl", fullgraph=True, dynamic=False)
    before = counts.copy()
    exact, eager = _passes(double, double, _wide(inputs)), _passes(module, module, inputs)
    assert counts == before
    ours = _passes(module, compiled, inputs)
    launched = counts - before
    for a, b, c in zip(ours, exact, eager, strict=True):
        assert _distance(a, b) <= FACTOR * _distance(c, b) + FLOOR
        assert [x.shape for x in a] == [x.shape for x in b]
    done = {part for name in launched for part in name.split("+")}  # `addmm+gelu` is one launch
    missing = [op for op in ops if op not in done]
    assert not missing, launched

    module.eval(), double.eval()
    before = counts.copy()
    with torch.no_grad():
        expected, plain, found = double(*_wide(inputs)), module(*inputs), compiled(*inputs)
    assert counts.total() > before.total()
    assert _distance([found], [expected]) <= FACTOR * _distance([plain], [expected]) + FLOOR
    assert fallbacks(DEVICE) == fell_back


# --- lm ---------------------------------------------------------------------------------------------------------------


def _model(family: str, **settings: Any) -> lm.Transformer:
    sizes = {"n_layer": 2, "d_model": 24, "n_head": 4, "vocab_size": V, "seq_len": 16, **settings}
    return lm.Transformer(lm.ModelConfig(family=family, **sizes), generator=torch.Generator().manual_seed(0))


class _WithLoss(nn.Module):
    """A model's loss, with a context of tensors given one by one."""

    def __init__(self, model: lm.Transformer, keys: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.model, self.keys = model, keys

    def forward(self, tokens: Tensor, targets: Tensor, *context: Tensor) -> Tensor:
        return lm.loss(self.model(tokens, dict(zip(self.keys, context, strict=True))), targets)


def _tokens(B: int, T: int, high: int = V) -> Tensor:
    return torch.randint(0, high, (B, T), generator=torch.Generator().manual_seed(T))


@pytest.mark.parametrize(("family", "settings"), [("gpt", {}), ("llama", {"n_kv_head": 2}), ("bert", {})])
def test_logits_of_every_family(family: str, settings: dict[str, Any]) -> None:
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    check(_model(family, **settings), [_tokens(3, 13)], ops=(attention, f"{attention}_backward", "mm"))


@pytest.mark.parametrize(("settings", "B", "T"), [({"n_kv_head": 1}, 2, 16), ({}, 1, 1)])
def test_a_llamas_loss_with_dropout(settings: dict[str, Any], B: int, T: int) -> None:
    targets = _tokens(B, T).flip(0)
    targets[:, 1::3] = -100
    rows = torch.tensor([2**62 + 5, -(2**61)])[:B]
    check(_WithLoss(_model("llama", dropout=0.2, n_layer=1, **settings), ("dropout",)), [_tokens(B, T), targets, rows])


def test_a_berts_loss_of_masked_tokens_with_dropout() -> None:
    """Masking is done on the host, in whole numbers; the training step on the device."""
    model = _model("bert", dropout=0.1, n_layer=1)
    source = lm.Batch(_tokens(4, 15, V - 1), _tokens(4, 15, V - 1), {"dropout": torch.arange(4)})
    batch = lm.mask_batch(source, seed=0, step=3, mask_token=model.config.mask_token)
    check(_WithLoss(model, ("dropout",)), [batch.inputs, batch.targets, batch.context["dropout"]])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padded_batches(family: str) -> None:
    mask = torch.arange(11) < torch.tensor([[11], [4], [7]])
    targets = _tokens(3, 11).masked_fill(~mask, -100)
    context = {"mask": mask} if family == "llama" else {"mask": mask, "token_types": _tokens(3, 11, 2)}
    model = _WithLoss(_model(family, n_layer=1), tuple(context))
    check(model, [_tokens(3, 11), targets, *context.values()])


# --- Hugging Face -----------------------------------------------------------------------------------------------------


class _Logits(nn.Module):
    """A Hugging Face model called with tokens (and a mask of padding) that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        return logits


def _gpt2(attention: str) -> nn.Module:
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_embd": 24, "n_layer": 1, "n_head": 3, "n_positions": 16, "vocab_size": V}
    config = transformers.GPT2Config(**sizes, **no_dropout, attn_implementation=attention)
    return transformers.GPT2LMHeadModel(config)


_SIZES = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}


def _llama(attention: str) -> nn.Module:
    own = {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, **own, attn_implementation=attention))


def _bert(attention: str) -> nn.Module:
    no_dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    config = transformers.BertConfig(**_SIZES, **no_dropout, attn_implementation=attention)
    return transformers.BertForMaskedLM(config)


@pytest.mark.parametrize("build", [_gpt2, _llama, _bert], ids=["gpt2", "llama", "bert"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hugging_faces_models(build: Callable[[str], nn.Module], attention: str) -> None:
    ops = ("_scaled_dot_product_flash_attention_for_cpu",) if attention == "sdpa" else ("bmm",)
    check(_Logits(build(attention)), [_tokens(2, 13)], ops=ops)


@pytest.mark.parametrize("build", [_llama, _bert], ids=["llama", "bert"])
def test_hugging_faces_models_with_padding(build: Callable[[str], nn.Module]) -> None:
    mask = (torch.arange(11) < torch.tensor([[11], [4]])).long()
    check(_Logits(build("sdpa")), [_tokens(2, 11), mask])


# --- torch's own ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_encoder_layer(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, batch_first=True, norm_first=norm_first)
    check(layer, [torch.randn(2, 7, 24, requires_grad=True)], ops=("addmm",))


def test_torchs_decoder_layer() -> None:
    layer = nn.TransformerDecoderLayer(24, 3, 40, dropout=0.0, activation="gelu", batch_first=True)
    inputs = [torch.randn(2, 7, 24, requires_grad=True), torch.randn(2, 5, 24, requires_grad=True)]
    check(layer, inputs, ops=("addmm",))


def _activations() -> dict[str, nn.Module]:
    """Every activation of torch.nn but attention, with settings that leave no gradient everywhere zero."""
    arguments: dict[str, dict[str, Any]] = {
        "Threshold": {"threshold": 0.1, "value": -2.0},
        "GLU": {"dim": -1},
        "Hardshrink": {"lambd": 0.4},
        # Of one slope: training draws it from a generator that no other device has.
        "RReLU": {"lower": 0.2, "upper": 0.2},
        **{name: {"dim": -1} for name in ("Softmin", "Softmax", "LogSoftmax")},
    }
    names = [name for name in nn.modules.activation.__all__ if name != "MultiheadAttention"]
    return {name: getattr(nn, name)(**arguments.get(name, {})) for name in names}


class _Activations(nn.Module):
    """A small network with every activation, side by side, each with inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(_activations())
        self.up, self.down = nn.Linear(5, 8), nn.Linear(4, 3)

    def forward(self, *inputs: Tensor) -> Tensor:
        after = [part(self.up(x)) for part, x in zip(self.parts.values(), inputs, strict=True)]
        return torch.stack([self.down(y[..., :4]) for y in after])


def test_a_network_with_every_activation_of_torch() -> None:
    inputs = [torch.randn(2, 3, 5, requires_grad=True) for _ in _activations()]
    check(_Activations(), inputs, ops=("addmm",))


class _Losses(nn.Module):
    """Losses of torch.nn over logits (B, V), as a vector."""

    def forward(self, logits: Tensor, target: Tensor, classes: Tensor) -> Tensor:
        ranked = functional.log_softmax(logits, -1)
        weight, sign = target[0].detach().abs(), target.detach().sign()
        return torch.stack(
            [
                functional.cross_entropy(logits, classes),
                functional.cross_entropy(logits, classes, ignore_index=2),
                functional.cross_entropy(logits, classes, label_smoothing=0.1, ignore_index=2),
                functional.cross_entropy(logits, classes, reduction="sum"),
                functional.cross_entropy(logits, target.softmax(-1)),
                functional.cross_entropy(logits, classes, weight=weight),
                functional.nll_loss(ranked, classes),
                functional.mse_loss(logits, target),
                functional.mse_loss(logits, target, reduction="none").amax(),
                functional.l1_loss(logits, target),
                functional.smooth_l1_loss(logits, target),
                functional.huber_loss(logits, target, delta=0.5),
                functional.binary_cross_entropy_with_logits(logits, target.sigmoid()),
                functional.binary_cross_entropy_with_logits(logits, target.sigmoid(), pos_weight=weight),
                functional.binary_cross_entropy(logits.sigmoid(), target.sigmoid()),
                functional.kl_div(ranked, target.softmax(-1), reduction="batchmean"),
                functional.soft_margin_loss(logits, sign),
                functional.cosine_embedding_loss(logits, target, sign[:, 0]),
            ]
        )


def test_the_losses_of_torch() -> None:
    inputs = [torch.randn(7, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)]
    check(_Losses(), [*inputs, torch.tensor([0, 2, 4, 1, 2, 3, 0])])


# --- placed -----------------------------------------------------------------------------------------------------------


def _step(model: lm.Transformer, batch: lm.Batch) -> tuple[float, list[Tensor]]:
    loss = lm.loss(model(batch.inputs, batch.context), batch.targets)
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def test_a_placed_llama_trains_and_generates_on_its_devices() -> None:
    model = _model("llama", n_kv_head=2, dropout=0.1)
    rows = torch.tensor([7, 2**40, -3, 11])
    batch = lm.Batch(_tokens(4, 15), _tokens(4, 15).roll(-1, 1), {"dropout": rows})
    exact_loss, exact = _step(copy.deepcopy(model).double(), batch)
    loss, eager = _step(model, batch)
    expected = lm.generate(model, _tokens(2, 3), 10, temperature=0)

    stages = [("opencl:0", 0, 2), ("cpu", 3, 3), ("opencl:0", 4, 5)]
    with place_stages(model, stages, hetero.discover(["cpu", "opencl:0"]), loss=lm.loss, n_microbatches=2) as placed:
        before = open_device(DEVICE).counts.copy()
        found = placed.step(batch)
        launched = open_device(DEVICE).counts - before
        assert found == pytest.approx(exact_loss, abs=FACTOR * abs(loss - exact_loss) + FLOOR * exact_loss)
        ours = [p.grad for p in model.parameters() if p.grad is not None]
        assert _distance(ours, exact) <= FACTOR * _distance(eager, exact) + FLOOR
        assert launched["mm"] > 0
        assert launched["_scaled_dot_product_flash_attention_for_cpu_backward"] > 0
        before = open_device(DEVICE).counts.copy()
        assert torch.equal(lm.generate(placed, _tokens(2, 3), 10, temperature=0), expected)
        assert (open_device(DEVICE).counts - before)["bmm"] > 0
