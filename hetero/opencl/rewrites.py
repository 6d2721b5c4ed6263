"""Composite functions of PyTorch that are replaced before they come apart, so that hot operations stay whole.

`keep_attention_whole` works on graphs of TorchDynamo, where scaled_dot_product_attention still is one call;
`DECOMPOSITIONS` are for AOTAutograd: fused layers that PyTorch's modules call in evaluation, by what they consist of.
"""

from __future__ import annotations

import itertools
import math
import types
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule
from torch.nn import functional

from hetero.opencl import operators

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

aten = torch.ops.aten
_seed_numbers = itertools.count()


def keep_attention_whole(gm: GraphModule) -> None:
    """Let a graph of TorchDynamo, and those inside it, call `attention`."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function":
                    node.target = _REPLACEMENTS.get(node.target, node.target)
            module.recompile()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, by our operator wherever PyTorch would take it to pieces."""
    if not _is_ours(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    lead, (T, F) = query.shape[:-2], (query.shape[-2], value.shape[-1])
    mask = None
    if attn_mask is not None:
        mask = attn_mask
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -math.inf)
        mask = _four_dimensional(mask.expand(*lead, T, key.shape[-2]))
    seed = operators.seed(query, next(_seed_numbers)) if dropout_p else None
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    tensors = [_four_dimensional(x) for x in (query, key, value)]
    out, _ = operators.attention(*tensors, mask, seed, dropout_p, is_causal, factor)
    result: Tensor = out.reshape(*lead, T, F)
    return result


def _is_ours(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> bool:
    """Whether PyTorch would take it to pieces, and our operator takes it. Mistakes of callers are left to PyTorch."""
    tensors, rank = (query, key, value), query.dim()
    if not all(x.dtype == torch.float32 and x.dim() == rank >= 3 and x.numel() for x in tensors):
        return False
    shares_heads = rank >= 4 and enable_gqa and query.shape[-3] % key.shape[-3] == 0
    from_dim = -3 if shares_heads else -2
    is_alike = (
        key.shape[:-1] == value.shape[:-1]
        and query.shape[:from_dim] == key.shape[:from_dim]
        and query.shape[-1] == key.shape[-1]
    )
    is_mask_alike = mask is None or (
        not is_causal
        and mask.dtype in (torch.bool, torch.float32)
        and 2 <= mask.dim() <= rank
        and all(m in (1, n) for m, n in zip(reversed(mask.shape), (key.shape[-2], *query.shape[-2::-1]), strict=False))
    )
    has_mask_gradient = mask is not None and mask.requires_grad
    is_taken_apart = dropout_p > 0 or has_mask_gradient or rank != 4 or query.shape[-1] != value.shape[-1]
    return is_alike and is_mask_alike and is_taken_apart and 0 <= dropout_p < 1


def _four_dimensional(x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == 3 else x.flatten(0, -4)


def _calling_ours(function: Any) -> Callable[..., Any]:
    """A function of torch.nn.functional, with `attention` for what it calls by the name of PyTorch's."""
    # Of this module, not torch's: torch.fx writes functions of torch into its code by their names.
    names = {**vars(functional), "scaled_dot_product_attention": attention, "__name__": __name__}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    names[function.__name__] = copy  # it passes itself to modes that overrule functions
    return copy


# TorchDynamo keeps these whole.
_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    functional.scaled_dot_product_attention: attention,
    functional.multi_head_attention_forward: _calling_ours(functional.multi_head_attention_forward),
}


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """torch._transformer_encoder_layer_fwd, which nn.TransformerEncoderLayer calls in evaluation without gradients.

    Source: `forward` of that module, which computes the same without it.
    """

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.layer_norm(x, (embed_dim,), weight, bias, eps)

    def attend(x: Tensor) -> Tensor:
        heads = functional.linear(x, qkv_weight, qkv_bias).reshape(*x.shape[:2], 3, num_heads, -1)
        q, k, v = (t.transpose(1, 2) for t in heads.unbind(2))
        out = attention(q, k, v, _additive(mask, mask_type, x))
        return functional.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        activation = functional.gelu if use_gelu else functional.relu
        hidden = activation(functional.linear(x, ffn_weight_1, ffn_bias_1))
        return functional.linear(hidden, ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = src + attend(norm(src, norm_weight_1, norm_bias_1))
        return x + feed_forward(norm(x, norm_weight_2, norm_bias_2))
    x = norm(src + attend(src), norm_weight_1, norm_bias_1)
    return norm(x + feed_forward(x), norm_weight_2, norm_bias_2)


def _additive(mask: Tensor | None, mask_type: int | None, x: Tensor) -> Tensor | None:
    """The mask of nn.MultiheadAttention.merge_masks to be added to (B, H, T, T): of keys (B, T) if the type is 1."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:  # True hides
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask, -math.inf)
    return mask[:, None, None, :] if mask_type == 1 else mask


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {aten._transformer_encoder_layer_fwd.default: _encoder_layer}
