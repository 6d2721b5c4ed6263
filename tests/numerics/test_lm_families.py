"""The families of models against Hugging Face's, in float64 with the same weights; positions, masks and objectives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from torch import Tensor

import lm
from lm.model import rotary_table, rotate

if TYPE_CHECKING:
    from collections.abc import Callable

V, T, D, N = 17, 11, 24, 6
EPS32 = torch.finfo(torch.float32).eps
# Float64 through some 50 roundings in sequence and sums of at most 100 terms: 50 * sqrt(100) * 1e-16, times 20.
RTOL = 1e-12
# Hugging Face computes angles of up to T - 1 in float32, from frequencies with an error of eps: T * 2 eps in cosine and
# sine; both round these to float32. A rotation enters twice in each of two layers.
RTOL_ROTARY = 4 * (2 * T + 1) * EPS32


def _model(family: str, seed: int = 0, **settings: Any) -> lm.Transformer:
    sizes = {"n_layer": 2, "d_model": D, "n_head": N, "vocab_size": V, "seq_len": T, **settings}
    model = lm.Transformer(lm.ModelConfig(family=family, **sizes), generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():  # weights far from their initial values, biases and norms included
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.double()


def _rename(ours: dict[str, Tensor], prefix: str, names: dict[str, str]) -> dict[str, Tensor]:
    return {
        f"{prefix}{theirs}.{kind}": ours[f"{name}.{kind}"]
        for name, theirs in names.items()
        for kind in ("weight", "bias")
    }


def _as_gpt2(ours: dict[str, Tensor], config: lm.ModelConfig) -> dict[str, Tensor]:
    theirs = {
        "transformer.wte.weight": ours["embedding.token.weight"],
        "transformer.wpe.weight": ours["embedding.position.weight"],
        "lm_head.weight": ours["head.linear.weight"],
        **_rename(ours, "transformer.", {"head.norm": "ln_f"}),
    }
    for i in range(config.n_layer):
        attention, mlp = f"block{i}.attention", f"block{i}.mlp"
        maps = {f"{attention}.inner.qkv": "attn.c_attn", f"{attention}.inner.proj": "attn.c_proj"}
        maps |= {f"{mlp}.inner.up": "mlp.c_fc", f"{mlp}.inner.down": "mlp.c_proj"}
        linear = _rename(ours, f"transformer.h.{i}.", maps)
        theirs |= {name: t.T if t.dim() == 2 else t for name, t in linear.items()}  # they keep (in, out)
        theirs |= _rename(ours, f"transformer.h.{i}.", {f"{attention}.norm": "ln_1", f"{mlp}.norm": "ln_2"})
    return theirs


def _as_llama(ours: dict[str, Tensor], config: lm.ModelConfig) -> dict[str, Tensor]:
    theirs = {
        "model.embed_tokens.weight": ours["embedding.token.weight"],
        "model.norm.weight": ours["head.norm.weight"],
        "lm_head.weight": ours["head.linear.weight"],
    }
    rows = [config.d_model, config.kv_heads * config.head_dim, config.kv_heads * config.head_dim]
    for i in range(config.n_layer):
        prefix, attention, mlp = f"model.layers.{i}.", f"block{i}.attention", f"block{i}.mlp"
        parts = zip("qkv", ours[f"{attention}.inner.qkv.weight"].split(rows), strict=True)
        theirs |= {f"{prefix}self_attn.{name}_proj.weight": part for name, part in parts}
        gate, up = ours[f"{mlp}.inner.up.weight"].chunk(2)
        theirs |= {
            f"{prefix}self_attn.o_proj.weight": ours[f"{attention}.inner.proj.weight"],
            f"{prefix}mlp.gate_proj.weight": gate,
            f"{prefix}mlp.up_proj.weight": up,
            f"{prefix}mlp.down_proj.weight": ours[f"{mlp}.inner.down.weight"],
            f"{prefix}input_layernorm.weight": ours[f"{attention}.norm.weight"],
            f"{prefix}post_attention_layernorm.weight": ours[f"{mlp}.norm.weight"],
        }
    return theirs


def _as_bert(ours: dict[str, Tensor], config: lm.ModelConfig) -> dict[str, Tensor]:
    embedding, head = "bert.embeddings.", "cls.predictions."
    theirs = {
        f"{embedding}word_embeddings.weight": ours["embedding.token.weight"],
        f"{embedding}position_embeddings.weight": ours["embedding.position.weight"],
        f"{embedding}token_type_embeddings.weight": ours["embedding.token_type.weight"],
        **_rename(ours, embedding, {"embedding.norm": "LayerNorm"}),
        **_rename(ours, head, {"head.transform": "transform.dense", "head.norm": "transform.LayerNorm"}),
        **_rename(ours, head, {"head.linear": "decoder"}),
    }
    for i in range(config.n_layer):
        prefix, attention, mlp = f"bert.encoder.layer.{i}.", f"block{i}.attention", f"block{i}.mlp"
        for kind in ("weight", "bias"):
            parts = zip(("query", "key", "value"), ours[f"{attention}.inner.qkv.{kind}"].chunk(3), strict=True)
            theirs |= {f"{prefix}attention.self.{name}.{kind}": part for name, part in parts}
        maps = {f"{attention}.inner.proj": "attention.output.dense", f"{attention}.norm": "attention.output.LayerNorm"}
        maps |= {f"{mlp}.inner.up": "intermediate.dense", f"{mlp}.inner.down": "output.dense"}
        theirs |= _rename(ours, prefix, maps | {f"{mlp}.norm": "output.LayerNorm"})
    return theirs


def _gpt2(config: lm.ModelConfig) -> torch.nn.Module:
    sizes = {
        "n_embd": config.d_model,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_positions": config.seq_len,
    }
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    own = {"layer_norm_epsilon": config.epsilon, "tie_word_embeddings": False}
    theirs = transformers.GPT2Config(vocab_size=V, **own, **sizes, **no_dropout)
    return transformers.GPT2LMHeadModel(theirs)


def _sizes(config: lm.ModelConfig) -> dict[str, int]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.seq_len,
    }


def _llama(config: lm.ModelConfig) -> torch.nn.Module:
    rope = {"rope_type": "default", "rope_theta": config.rotary_base}
    own = {"num_key_value_heads": config.kv_heads, "rms_norm_eps": config.epsilon, "rope_parameters": rope}
    theirs = transformers.LlamaConfig(**_sizes(config), **own, bos_token_id=0, eos_token_id=0)
    return transformers.LlamaForCausalLM(theirs)


def _bert(config: lm.ModelConfig) -> torch.nn.Module:
    no_dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    own = {"layer_norm_eps": config.epsilon, "pad_token_id": None, "tie_word_embeddings": False}
    theirs = transformers.BertConfig(**_sizes(config), **no_dropout, **own)
    return transformers.BertForMaskedLM(theirs)


Names = dict[str, Tensor]
THEIRS: dict[str, tuple[Callable[[lm.ModelConfig], torch.nn.Module], Callable[[Names, lm.ModelConfig], Names]]] = {
    "gpt": (_gpt2, _as_gpt2),
    "llama": (_llama, _as_llama),
    "bert": (_bert, _as_bert),
}


def _both(family: str, **settings: Any) -> tuple[lm.Transformer, torch.nn.Module]:
    """Our model and Hugging Face's, with equal weights."""
    model = _model(family, **settings)
    build, rename = THEIRS[family]
    theirs = build(model.config).double()
    weights = rename(model.state_dict(), model.config)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"cls.predictions.bias"}  # BERT's own name for decoder.bias
    return model, theirs


def _close(ours: Tensor, theirs: Tensor, rtol: float, scale: float | None = None, name: str = "") -> None:
    atol = rtol * (theirs.abs().max().item() if scale is None else scale)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=(lambda text: f"{name}: {text}"))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt", {"norm_eps": 1e-3}),
        ("llama", {}),
        ("llama", {"n_kv_head": 2, "rope_base": 50.0, "norm_eps": 1e-3}),
        ("llama", {"n_kv_head": 1, "d_ff": 20}),
        ("bert", {}),
        ("bert", {"d_ff": 20, "norm_eps": 1e-2}),
    ],
)
@pytest.mark.parametrize("length", [1, 7, T])
def test_logits_loss_and_gradients_equal_hugging_faces(family: str, settings: dict[str, float], length: int) -> None:
    model, theirs = _both(family, **settings)
    rtol = RTOL_ROTARY if family == "llama" else RTOL
    tokens = torch.randint(0, V, (3, length), generator=torch.Generator().manual_seed(length))
    targets = tokens.roll(1, 0)
    logits, expected = model(tokens), theirs(input_ids=tokens).logits
    _close(logits, expected, rtol)
    lm.loss(logits, targets).backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()

    grads = THEIRS[family][1]({name: p.grad for name, p in model.named_parameters()}, model.config)
    scale = max(p.grad.abs().max().item() for p in theirs.parameters() if p.grad is not None)
    for name, parameter in theirs.named_parameters():
        if name in grads:  # all but Hugging Face's second names
            expected_grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            _close(grads[name], expected_grad, 10 * rtol, scale, name)


def test_a_padded_batch_with_token_types_equals_hugging_faces() -> None:
    model, theirs = _both("bert")
    generator = torch.Generator().manual_seed(0)
    tokens, types = torch.randint(0, V, (3, T), generator=generator), torch.randint(0, 2, (3, T), generator=generator)
    mask = torch.arange(T) < torch.tensor([[T], [4], [1]])
    logits = model(tokens, {"mask": mask, "token_types": types})
    expected = theirs(input_ids=tokens, attention_mask=mask.long(), token_type_ids=types).logits
    _close(logits[mask], expected[mask], RTOL)


# --- positions --------------------------------------------------------------------------------------------------------


def _turn(x: Tensor, position: int, base: float) -> Tensor:
    """RoFormer's equation 13 as products of complex numbers: pair i of x (H,) turned by position * base**(-2 i / H)."""
    half = len(x) // 2
    angles = torch.tensor([position * base ** (-2 * i / len(x)) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag])


@pytest.mark.parametrize(("base", "head_dim"), [(10_000.0, 8), (500_000.0, 2), (10.0, 6)])
def test_rotary_positions_turn_pairs_by_their_angle(base: float, head_dim: int) -> None:
    """Two roundings of the table, each of half an eps, for numbers of size 1."""
    config = lm.ModelConfig(1, 2 * head_dim, 2, V, 3000, family="llama", rope_base=base)
    table = rotary_table(config)
    assert table.shape == (3000, head_dim)
    x = torch.randn(2, 3, 3000, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, table.double())
    for position in (0, 1, 2, 1237, 2999):
        expected = _turn(x[1, 2, position], position, base)
        assert (turned[1, 2, position] - expected).abs().max().item() <= EPS32 * x.abs().max().item()


def test_scores_depend_on_the_distance_of_positions_alone() -> None:
    config = lm.ModelConfig(1, 8, 1, V, 200, family="llama")
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = rotary_table(config).double()
    q, k = rotate(q.expand(1, 1, 200, 8), table)[0, 0], rotate(k.expand(1, 1, 200, 8), table)[0, 0]
    scores = torch.stack([(q[7:] * k[:-7]).sum(-1), (q[:-7] * k[7:]).sum(-1)])
    assert (scores - scores[:, :1]).abs().max().item() < 16 * EPS32 * 8
    assert (scores[0, 0] - scores[1, 0]).abs().item() > 0.1  # and on its sign


def test_left_padding_of_a_rotary_model_changes_nothing() -> None:
    """Positions shift with the padding; only their differences matter."""
    model = _model("llama", n_kv_head=2)
    tokens = torch.randint(0, V, (2, 6), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.full((2, 5), 3), tokens], 1)
    logits = model(padded, {"mask": (torch.arange(11) >= 5).expand(2, 11)})[:, 5:]
    _close(logits, model(tokens), RTOL_ROTARY)


# --- what a token sees ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt", "llama", "bert"])
def test_a_changed_token_reaches_those_that_see_it(family: str) -> None:
    model = _model(family)
    tokens = torch.randint(0, V, (1, T), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 6] = (tokens[0, 6] + 1) % V
    differs = (model(tokens) != model(changed)).any(-1)[0].tolist()
    assert differs == [family == "bert"] * 6 + [True] * (T - 6)


@pytest.mark.parametrize("family", ["gpt", "llama", "bert"])
def test_hidden_tokens_reach_nobody_and_rows_of_padding_stay_finite(family: str) -> None:
    model = _model(family)
    tokens = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(T) < torch.tensor([[T], [4], [0]])
    logits = model(tokens, {"mask": mask})
    for row, n in enumerate((T, 4)):
        _close(logits[row : row + 1, :n], model(tokens[row : row + 1, :n]), RTOL)
    logits.square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt", "llama", "bert"])
def test_gradients_agree_with_finite_differences(family: str) -> None:
    model = _model(family, n_kv_head=3)
    tokens = torch.randint(0, V, (2, 5), generator=torch.Generator().manual_seed(0))
    unit = dict(model.layers())["block1.attention"]
    x = model.embedding(tokens).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dict(model.layers())["block1.mlp"](unit(x)), (x,))


@pytest.mark.parametrize(("family", "logit_sd"), [("gpt", 0.55), ("llama", 0.55), ("bert", 0.55)])
def test_an_untrained_model_of_any_width_is_about_uniform(family: str, logit_sd: float) -> None:
    for width in (24, 192):
        config = lm.ModelConfig(2, width, 6, V, T, family=family)
        model = lm.Transformer(config, generator=torch.Generator().manual_seed(0))
        tokens = torch.randint(0, V, (64, T), generator=torch.Generator().manual_seed(0))
        logits = model(tokens)
        assert logits.std().item() == pytest.approx(logit_sd, rel=0.25)
        loss = lm.loss(logits, torch.randint(0, V, (64, T), generator=torch.Generator().manual_seed(1)))
        assert loss.item() == pytest.approx(math.log(V) + logit_sd**2 / 2, abs=0.1)
