"""How an elementwise operation of ATen becomes a C expression, with torch's type promotion; which: rules.py."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as KIND
from torch._prims_common import elementwise_dtypes

from hetero.opencl.c_source import require_c_types

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# What a name in upper case stands for in an expression of float32 and of float64.
_NAMES = {
    "EXP": ("exp1", "exp"),
    "LOG": ("log1", "log"),
    "TANH": ("tanh1", "tanh"),
    "ERF": ("erf1", "erf"),
    "CDF": ("cdf1", "cdf2"),
    "SQRT": ("sqrt1", "sqrt"),
    "EXPM1": ("exp_minus_one1", "expm1"),
    "LOG1P": ("log_one_plus1", "log1p"),
    "ERFINV": ("erfinv1", "erfinv2"),
    "ABS": ("abs1", "fabs"),
    "REMAINDER": ("remainder1", "remainder2"),
    "FLOOR_DIVIDE": ("floor_divide1", "floor_divide2"),
}
_FUNCTION = re.compile(r"\b([A-Z][A-Z0-9_]*)\(")


@dataclass(frozen=True)
class Rule:
    """How an ATen operation becomes an expression.

    Attributes:
        template: with fields named as in the ATen schema; or a function of (arguments, computation type) giving it.
        promote: the arguments that are promoted together; the computation has their common type.
        kind: torch's kind of type promotion.
        fixed: types of other arguments.
        result: type of the expression if it isn't the computation's.
    """

    template: str | Callable[[Mapping[str, Any], torch.dtype], str]
    promote: tuple[str, ...]
    kind: KIND = KIND.DEFAULT
    fixed: Mapping[str, torch.dtype] = field(default_factory=dict)
    result: torch.dtype | None = None


@dataclass(frozen=True)
class Expression:
    """A rule applied to one call: template with fields {0}, {1}...; operands as nodes of the graph or numbers."""

    template: str
    operands: tuple[Any, ...]
    types: tuple[torch.dtype, ...]
    result_type: torch.dtype


def expression(rule: Rule, arguments: Mapping[str, Any], values: Mapping[str, Any]) -> Expression:
    """Apply a rule.

    Args:
        rule: of the operation.
        arguments: by schema name: nodes, numbers, None...
        values: the same with nodes replaced by their (fake) tensors.

    Raises:
        Unsupported: a type without C counterpart.
    """
    promoted = [values[name] for name in rule.promote if values[name] is not None]
    compute, _ = elementwise_dtypes(*promoted, type_promotion_kind=rule.kind)
    if compute == torch.float16:  # lies in memory only, if the device has it at all: `Lowering.expression` asks
        compute = torch.float32
    tensors = [value.dtype for value in values.values() if isinstance(value, torch.Tensor)]
    require_c_types(compute, *(dtype for dtype in tensors if dtype != torch.float16))
    template = rule.template(arguments, compute) if callable(rule.template) else rule.template
    template = _FUNCTION.sub(lambda match: f"{_NAMES[match[1]][compute == torch.float64]}(", template)
    names = list(dict.fromkeys(re.findall(r"\{(\w+)\}", template)))
    types = tuple(rule.fixed.get(name, compute) for name in names)
    for i, name in enumerate(names):
        template = template.replace(f"{{{name}}}", f"{{{i}}}")
    return Expression(template, tuple(arguments[name] for name in names), types, rule.result or compute)
