"""Generation with a cache against the whole model run for each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lm


class _Tanh(nn.Module):
    """A token-wise inner module without a cache, as a bottleneck is."""

    def forward(self, x: torch.Tensor, context: object = None) -> torch.Tensor:
        return torch.tanh(x)


FAMILIES = [
    {"family": "gpt"},
    {"family": "gpt", "n_kv_head": 1},
    {"family": "llama"},
    {"family": "llama", "n_kv_head": 2},
]


def _model(dtype: torch.dtype = torch.float32, **settings: Any) -> lm.Transformer:
    config = lm.ModelConfig(
        **{"n_layer": 2, "d_model": 24, "n_head": 4, "vocab_size": 13, "seq_len": 10, "dropout": 0.1, **settings}
    )
    model = lm.Transformer(config, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return model.to(dtype)


def _prompt(B: int, T: int) -> torch.Tensor:
    return torch.randint(0, 13, (B, T), generator=torch.Generator().manual_seed(T))


def _greedy_without_cache(model: lm.Transformer, tokens: torch.Tensor, n: int) -> torch.Tensor:
    for _ in range(n):
        next_token = model(tokens[:, -10:])[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, next_token], 1)
    return tokens


@pytest.mark.parametrize("T", [1, 3, 7, 9, 10, 11, 23])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("settings", FAMILIES)
def test_greedy_tokens_equal_those_without_a_cache(B: int, T: int, settings: dict[str, Any]) -> None:
    model = _model(**settings)
    tokens = _prompt(B, T)
    assert torch.equal(lm.generate(model, tokens, 15, temperature=0.0), _greedy_without_cache(model, tokens, 15))


@pytest.mark.parametrize("pieces", [(10,), (1,) * 10, (3, 1, 1, 5), (7, 3), (1, 9)])
@pytest.mark.parametrize("settings", FAMILIES)
def test_logits_with_a_cache_equal_those_of_the_whole_sequence(
    pieces: tuple[int, ...], settings: dict[str, Any]
) -> None:
    model, tokens = _model(**settings), _prompt(2, 10)
    model.replace_inner("block1.mlp", _Tanh())
    cache, position, logits = model.new_cache(2), 0, []
    for n in pieces:
        part, cache = model.decode(tokens[:, position : position + n], cache, torch.tensor(position))
        logits.append(part)
        position += n
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens), rtol=1e-5, atol=1e-5)


def test_the_cache_holds_the_heads_of_keys_and_values_alone() -> None:
    shapes = [tuple(t.shape) for cache in _model(family="llama", n_kv_head=2).new_cache(3) for t in cache]
    assert shapes == [(3, 2, 10, 6)] * 4


class _Noting:
    """Notes in which layouts tokens come; uniform logits."""

    def __init__(self) -> None:
        self.layouts: list[tuple[Any, ...]] = []

    def new_cache(self, batch_size: int) -> None:
        return None

    def decode(self, tokens: torch.Tensor, cache: object, position: torch.Tensor) -> tuple[torch.Tensor, tuple[()]]:
        self.layouts.append((tokens.shape, tokens.stride()))
        return torch.zeros(*tokens.shape, 13), ()


@pytest.mark.parametrize("B", [1, 3])
def test_a_compiled_model_meets_three_layouts_however_many_tokens(B: int) -> None:
    """Graphs are compiled for shapes and strides: a slice of all tokens so far would have other strides each time."""
    model = _Noting()
    lm.generate(model, _prompt(B, 4), 20, seq_len=10, temperature=0)
    assert len(model.layouts) == 20
    assert set(model.layouts) == {((B, 4), (4, 1)), ((B, 1), (1, 1)), ((B, 10), (10, 1))}


def test_an_encoder_cannot_generate() -> None:
    with pytest.raises(lm.SettingError, match=r"encoder can't generate\n.*\n.*gpt or llama"):
        lm.generate(_model(family="bert"), _prompt(1, 3), 1)


def test_a_float64_model_generates() -> None:
    tokens = _prompt(1, 4)
    model = _model(torch.float64)
    assert torch.equal(lm.generate(model, tokens, 8, temperature=0), _greedy_without_cache(model, tokens, 8))


def test_draws_depend_on_the_generator_alone() -> None:
    model, tokens = _model(), _prompt(2, 3)
    torch.manual_seed(0)
    a = lm.generate(model, tokens, 12, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    assert torch.equal(a, lm.generate(model, tokens, 12, generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(a, lm.generate(model, tokens, 12, generator=torch.Generator().manual_seed(6)))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 4), (1.0, 100)])
def test_tokens_are_drawn_with_the_models_probabilities(temperature: float, top_k: int | None) -> None:
    """Chi-square over at most 13 tokens; 60 is beyond 1e-7 of 12 degrees of freedom."""
    model = _model()
    tokens = _prompt(1, 5).expand(4000, 5)
    drawn = lm.generate(
        model, tokens, 1, generator=torch.Generator().manual_seed(0), temperature=temperature, top_k=top_k
    )[:, -1]
    logits = model(tokens[:1])[0, -1] / temperature
    if top_k is not None and top_k < 13:
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    expected = logits.softmax(-1) * 4000
    counts = torch.bincount(drawn, minlength=13)
    assert counts[expected == 0].sum() == 0
    likely = expected > 5
    assert (((counts - expected) ** 2 / expected)[likely]).sum().item() < 60


def test_top_1_is_greedy() -> None:
    model, tokens = _model(), _prompt(2, 3)
    assert torch.equal(lm.generate(model, tokens, 9, top_k=1), lm.generate(model, tokens, 9, temperature=0))


def test_no_tokens_asked_gives_the_prompt() -> None:
    tokens = _prompt(2, 3)
    assert torch.equal(lm.generate(_model(), tokens, 0), tokens)


@pytest.mark.parametrize(
    ("tokens", "settings", "text"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, "at least one token"),
        (torch.zeros(3, dtype=torch.int64), {}, "at least one token"),
        (torch.zeros(1, 1, dtype=torch.int64), {"n": -1}, "n is out of range"),
        (torch.zeros(1, 1, dtype=torch.int64), {"temperature": -0.1}, "temperature"),
        (torch.zeros(1, 1, dtype=torch.int64), {"top_k": 0}, "top_k"),
        (torch.zeros(1, 1, dtype=torch.int64), {"seq_len": 11}, "seq_len is out of range"),
        (torch.zeros(1, 1, dtype=torch.int64), {"seq_len": 0}, "seq_len is out of range"),
    ],
)
def test_what_can_t_be_generated_is_an_error(tokens: torch.Tensor, settings: dict[str, float], text: str) -> None:
    with pytest.raises(lm.SettingError, match=text):
        lm.generate(_model(), tokens, **{"n": 1, **settings})
