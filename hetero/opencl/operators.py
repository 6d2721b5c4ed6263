"""Operators that PyTorch doesn't have: attention whole where PyTorch would take it to pieces, and seeds as tensors.

PyTorch's own operator (`_scaled_dot_product_flash_attention_for_cpu`) takes no dropout, no gradient of the mask, no
values of another width than keys. For these it computes all scores and stores them; `attention` stores none. They only
exist while graphs are traced: handlers/ lowers them, and nothing else can run them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.library import Library, register_autograd, register_fake

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? seed"
_SETTINGS = "float dropout_p, bool is_causal, float scale"
_library: Any = Library("heteroq", "DEF")  # type: ignore[no-untyped-call]
_library.define("seed(Tensor? like, int number) -> Tensor", tags=torch.Tag.nondeterministic_seeded)
_library.define(f"attention({_NAMES}, {_SETTINGS}) -> (Tensor, Tensor)")
_library.define(
    f"attention_backward(Tensor grad, {_NAMES}, Tensor out, Tensor lse, {_SETTINGS}, bool with_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
seed = torch.ops.heteroq.seed.default
attention = torch.ops.heteroq.attention.default
attention_backward = torch.ops.heteroq.attention_backward.default


@register_fake("heteroq::seed")  # type: ignore[untyped-decorator]
def _fake_seed(like: Tensor | None, number: int) -> Tensor:
    """(2,) int64: a key, and a stream that nothing else draws from. The number keeps equal calls apart."""
    return torch.empty(2, dtype=torch.int64)


@register_fake("heteroq::attention")  # type: ignore[untyped-decorator]
def _fake_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Out (B, H, T, F) and lse (B, H, T), in memory (B, T, H, ...), as a projection of all heads reads it."""
    (B, H, T, _), F = query.shape, value.shape[3]
    return query.new_empty(B, T, H, F).transpose(1, 2), query.new_empty(B, T, H).transpose(1, 2)


@register_fake("heteroq::attention_backward")  # type: ignore[untyped-decorator]
def _fake_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value in memory (B, T, H, ...); and of mask, (B, H, T, S) or without elements."""
    (B, H, T, _), S = query.shape, key.shape[2]
    gradients = [x.new_empty(B, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (query, key, value)]
    return *gradients, query.new_empty((B, H, T, S) if with_mask else (0,))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, seed, dropout_p, is_causal, scale = inputs
    ctx.save_for_backward(query, key, value, mask, seed, *output)
    ctx.settings = dropout_p, is_causal, scale


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    with_mask = ctx.needs_input_grad[3]
    *gradients, mask = attention_backward(grad, *ctx.saved_tensors, *ctx.settings, with_mask)
    return *gradients, mask if with_mask else None, None, None, None, None


register_autograd("heteroq::attention", _differentiate, setup_context=_save)
