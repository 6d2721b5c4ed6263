"""What a layer says about itself: where it can run, what it costs, and which other layers are built alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from hetero.backends import Context
    from hetero.device import Device


_TORCHS_OWN = vars(nn.Module()).keys() - {"training"}
"""Attributes that every module has: parameters, parts, hooks."""


def apis_of(module: nn.Module) -> frozenset[str] | None:
    """Runtimes that can execute all of the module's parts: what those with `device_apis` have in common.

    Returns:
        None where no part names any: plain torch, for any runtime but those that only run what names them.
    """
    named = [frozenset(apis) for part in module.modules() if (apis := getattr(part, "device_apis", None)) is not None]
    return frozenset.intersection(*named) if named else None


def can_run(module: nn.Module, device: Device) -> bool:
    """Whether the device's runtime executes the module; a quantum device only runs what names its runtime."""
    apis = apis_of(module)
    return device.kind != "qpu" if apis is None else device.api in apis


def stated_cost(module: nn.Module, api: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """What the outermost part that has `layer_cost(api, shape)` answers; empty where none has."""
    for part in module.modules():
        layer_cost: Callable[..., dict[str, Any]] | None = getattr(part, "layer_cost", None)
        if layer_cost is not None:
            return layer_cost(api, shape)
    return {}


def forward_flops(module: nn.Module, x: Tensor, context: Context) -> float:
    """Floating-point operations of a forward pass [FLOP].

    The first that is there: the module's own `flops(shape)`; its stated cost; what torch's counter finds (matrix
    products and attention).
    """
    own: Callable[[tuple[int, ...]], float] | None = getattr(module, "flops", None)
    if own is not None:
        return float(own(tuple(x.shape)))
    if stated := next((f for api in sorted(apis_of(module) or ()) if (f := _stated_flops(module, api, x))), None):
        return stated
    return float(sum(_counted(module, x, context).values()))


def _counted(module: nn.Module, x: Tensor, context: Context) -> dict[str, int]:
    """Floating-point operations of a forward pass by op; those that torch counts, and its attention on the host."""

    def attention(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        (B, N, T, H), S, V = q, k[-2], v[-1]
        return int(2 * B * N * T * S * (H + V))

    on_host = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}  # torch's own table lacks it
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=on_host) as counter:
        module(x, context)
    return {str(op): n for op, n in counter.get_flop_counts().get("Global", {}).items()}


def operation(module: nn.Module, x: Tensor, context: Context) -> str:
    """What takes most of a forward pass's operations, by torch's counter: `matmul`, `attention`, `convolution`.

    `movement` where it counts none: such a layer copies, looks up, or computes element by element.
    """
    counts = _counted(module, x, context)
    if not counts:
        return "movement"
    name = max(counts, key=lambda op: counts[op])
    kinds = {"attention": ("bmm", "attention"), "convolution": ("conv",)}
    return next((kind for kind, marks in kinds.items() if any(mark in name for mark in marks)), "matmul")


def moved_bytes(module: nn.Module, x: Tensor, output_bytes: int) -> int:
    """What a forward pass reads and writes at least: parameters, input and output [B]."""
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    return parameters + x.numel() * x.element_size() + output_bytes


def _stated_flops(module: nn.Module, api: str, x: Tensor) -> float | None:
    return stated_cost(module, api, tuple(x.shape)).get("flops")


def saved_bytes(module: nn.Module, x: Tensor, context: Context) -> int:
    """Memory that torch's autograd keeps for the backward pass beside the parameters [B]; runs a forward pass."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = x.detach().requires_grad_(x.is_floating_point())
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x, context)  # bound to a name: the graph, and with it what is kept, must live until the sum
        total = sum(kept.values())
    del y
    return total


def signature(module: nn.Module) -> list[Any]:
    """Equal for modules that are built alike, whatever their weights: classes, shapes, settings (private ones too)."""
    return [
        [
            name,
            f"{type(part).__module__}.{type(part).__qualname__}",
            [(k, list(t.shape), str(t.dtype), t.requires_grad) for k, t in part.named_parameters(recurse=False)],
            [(k, list(t.shape), str(t.dtype)) for k, t in part.named_buffers(recurse=False)],
            sorted((k, repr(v)) for k, v in vars(part).items() if k not in _TORCHS_OWN and _is_setting(v)),
        ]
        for name, part in module.named_modules()
    ]


def _is_setting(value: object) -> bool:
    """Whether a value is plain, all the way down."""
    if isinstance(value, dict):
        return all(_is_setting(item) for pair in value.items() for item in pair)
    if isinstance(value, (tuple, list)):
        return all(_is_setting(item) for item in value)
    parameters: Any = getattr(type(value), "__dataclass_params__", None)
    is_frozen = parameters is not None and bool(parameters.frozen)
    return value is None or is_frozen or isinstance(value, (bool, int, float, str, torch.dtype))
