"""Which C expression each activation of torch.nn is, and its derivative; others torch writes in simpler operations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as KIND

from hetero.opencl.c_source import literal
from hetero.opencl.expressions import Rule

if TYPE_CHECKING:
    from collections.abc import Mapping

aten = torch.ops.aten


# GELU and its derivative, exact and by tanh: torch.nn.functional.gelu. (1 + tanh(u)) / 2 is the sigmoid of 2 u, which
# doesn't cancel in the lower tail.
def _gelu_parts(dtype: torch.dtype) -> tuple[str, str, str]:
    """Of the tanh form the sigmoid and the derivative of 2 u; of the exact one the density."""
    a, b, c = (literal(x, dtype) for x in (2 * math.sqrt(2 / math.pi), 0.044715, 3 * 0.044715))
    gate = f"(1 / (1 + EXP(-{a} * ({{self}} + {b} * {{self}} * {{self}} * {{self}}))))"
    slope = f"{a} * (1 + {c} * {{self}} * {{self}})"
    half, scale = literal(0.5, dtype), literal(1 / math.sqrt(2 * math.pi), dtype)
    return gate, slope, f"{scale} * EXP(-{half} * {{self}} * {{self}})"


def _gelu(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    gate, _, _ = _gelu_parts(dtype)
    return f"{{self}} * {gate}" if arguments.get("approximate") == "tanh" else "{self} * CDF({self})"


def _gelu_backward(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    gate, slope, density = _gelu_parts(dtype)
    if arguments.get("approximate") == "tanh":
        return f"{{grad_output}} * ({gate} + {{self}} * {gate} * (1 - {gate}) * {slope})"
    return f"{{grad_output}} * (CDF({{self}}) + {{self}} * {density})"


_SIGMOID = "1 / (1 + EXP(-{self}))"
# x < 0: alpha (exp(x) - 1), scaled on both sides: torch.nn.functional.elu, with celu and selu as special cases.
_ELU = "{self} > 0 ? {self} * {scale} : EXPM1({self} * {input_scale}) * ({alpha} * {scale})"
_ACROSS = "({self} >= -{lambd} && {self} <= {lambd}) ? 0 : {grad_out}"

ACTIVATIONS: dict[Any, Rule] = {
    aten.tanh.default: Rule("TANH({self})", ("self",), KIND.INT_TO_FLOAT),
    aten.sigmoid.default: Rule(_SIGMOID, ("self",), KIND.INT_TO_FLOAT),
    aten.silu.default: Rule("{self} / (1 + EXP(-{self}))", ("self",), KIND.INT_TO_FLOAT),
    aten.relu.default: Rule("{self} <= 0 ? 0 : {self}", ("self",)),
    aten.elu.default: Rule(_ELU, ("self",)),
    aten.gelu.default: Rule(_gelu, ("self",)),
    aten.gelu_backward.default: Rule(_gelu_backward, ("grad_output", "self")),
    aten.tanh_backward.default: Rule("{grad_output} * (1 - {output} * {output})", ("grad_output", "output")),
    aten.sigmoid_backward.default: Rule("{grad_output} * (1 - {output}) * {output}", ("grad_output", "output")),
    aten.silu_backward.default: Rule(
        f"{{grad_output}} * ({_SIGMOID}) * (1 + {{self}} * (1 - ({_SIGMOID})))", ("grad_output", "self")
    ),
    aten.threshold_backward.default: Rule("{self} <= {threshold} ? 0 : {grad_output}", ("grad_output", "self")),
    aten.leaky_relu.default: Rule("{self} > 0 ? {self} : {self} * {negative_slope}", ("self",)),
    aten.leaky_relu_backward.default: Rule(
        "{self} > 0 ? {grad_output} : {grad_output} * {negative_slope}", ("grad_output", "self")
    ),
    aten.hardtanh.default: Rule("{self} < {min_val} ? {min_val} : {self} > {max_val} ? {max_val} : {self}", ("self",)),
    aten.hardshrink_backward.default: Rule(_ACROSS, ("grad_out", "self")),
    aten.softshrink_backward.default: Rule(_ACROSS.replace("grad_out", "grad_output"), ("grad_output", "self")),
}
