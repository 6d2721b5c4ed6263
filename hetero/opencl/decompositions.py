"""What is split into simpler operations before lowering.

PyTorch's decompositions into core ATen, but for what has rules or kernels here; some that PyTorch has beyond core ATen;
and a few of our own. An operation whose kernel takes float32 only keeps its decomposition for other types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._decomp import core_aten_decompositions, get_decompositions

from hetero.opencl import rewrites
from hetero.opencl.decompositions_indexing import INDEXING
from hetero.opencl.handlers import HANDLERS
from hetero.opencl.rules import RULES
from hetero.opencl.steps import VIEW_OPS

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten

# Not of core ATen, so that PyTorch's list leaves them whole or makes them something that we have no kernel for.
_FURTHER = (
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit_no_training.default,
    aten.dist.default,
    aten.ldexp.Tensor,
    aten.linalg_vector_norm.default,
    aten.native_batch_norm_backward.default,
    aten.native_group_norm.default,
)
# Their kernels take float32 alone.
_FLOAT32_ONLY = (
    aten._softmax.default,
    aten._log_softmax.default,
    aten._softmax_backward_data.default,
    aten._log_softmax_backward_data.default,
    aten.native_layer_norm.default,
    aten.native_layer_norm_backward.default,
)
# Likewise, and without weights of classes.
_FLOAT32_UNWEIGHTED = (aten.nll_loss_forward.default, aten.nll_loss_backward.default)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The table for AOTAutograd."""
    standard: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    standard |= get_decompositions([*_FURTHER, *_FLOAT32_ONLY, *_FLOAT32_UNWEIGHTED])
    kept = {*RULES, *HANDLERS, *VIEW_OPS}
    table = {op: function for op, function in standard.items() if op not in kept}
    table.update(_OWN)
    table.update(rewrites.DECOMPOSITIONS)
    table.update(INDEXING)
    table.update({op: _unless_float32(standard[op]) for op in _FLOAT32_ONLY})
    table.update({op: _unless_unweighted(op, standard[op]) for op in _FLOAT32_UNWEIGHTED})
    return table


def _unless_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    def decompose(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return NotImplemented if x.dtype == torch.float32 else function(x, *args, **kwargs)

    return decompose


def _unless_unweighted(op: torch._ops.OpOverload, function: Callable[..., Any]) -> Callable[..., Any]:
    position = [argument.name for argument in op._schema.arguments].index("weight")

    def decompose(*args: Any) -> Any:
        is_plain = args[0].dtype == torch.float32 and args[position] is None
        return NotImplemented if is_plain else function(*args)

    return decompose


def _rrelu(
    x: torch.Tensor,
    noise: torch.Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> Any:
    """Without training a leaky ReLU of the mean slope."""
    return NotImplemented if training else aten.leaky_relu(x, (lower + upper) / 2)


def _randperm(n: int, **settings: Any) -> torch.Tensor:
    """The order of random keys of 62 bits."""
    wanted = {name: settings[name] for name in ("device",) if settings.get(name) is not None}
    order = torch.argsort(torch.randint(0, 1 << 62, (n,), dtype=torch.int64, **wanted))
    return order.to(settings.get("dtype") or torch.int64)


_OWN: dict[Any, Callable[..., Any]] = {
    aten.rrelu_with_noise.default: _rrelu,
    aten.randperm.default: _randperm,
    aten._efficientzerotensor.default: torch.zeros,  # gradients that are zero everywhere, as that of sgn
}
