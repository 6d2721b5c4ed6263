"""ATen's elementwise operations as C expressions, with torch's type promotion.

Signed arithmetic that may wrap is done unsigned, where C defines it. Minimum, maximum, clamp and relu are written so
that NaN passes: a comparison with NaN is false and must leave the NaN.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as KIND
from torch._prims_common import elementwise_dtypes

from hetero.opencl.c_source import C_TYPES, literal, require_c_types
from hetero.opencl.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

aten = torch.ops.aten

_UNSIGNED = {
    torch.int64: "ulong",
    torch.int32: "uint",
    torch.int16: "ushort",
    torch.int8: "uchar",
    torch.uint8: "uchar",
}
# What a name in upper case stands for in an expression of float32 and of float64.
_NAMES = {
    "EXP": ("exp1", "exp"),
    "LOG": ("log1", "log"),
    "TANH": ("tanh1", "tanh"),
    "ERF": ("erf1", "erf"),
    "CDF": ("cdf1", "cdf2"),
    "SQRT": ("sqrt1", "sqrt"),
    "ABS": ("abs1", "fabs"),
    "REMAINDER": ("remainder1", "remainder2"),
    "FLOOR_DIVIDE": ("floor_divide1", "floor_divide2"),
}


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
    require_c_types(compute, *(value.dtype for value in values.values() if isinstance(value, torch.Tensor)))
    template = rule.template(arguments, compute) if callable(rule.template) else rule.template
    for name, (single, double) in _NAMES.items():
        template = template.replace(f"{name}(", f"{double if compute == torch.float64 else single}(")
    names = list(dict.fromkeys(re.findall(r"\{(\w+)\}", template)))
    types = tuple(rule.fixed.get(name, compute) for name in names)
    for i, name in enumerate(names):
        template = template.replace(f"{{{name}}}", f"{{{i}}}")
    return Expression(template, tuple(arguments[name] for name in names), types, rule.result or compute)


def _wrapping(operator: str) -> Callable[[Mapping[str, Any], torch.dtype], str]:
    """Template of `self op other * alpha`; integers modulo 2^n."""

    def template(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
        alpha = arguments.get("alpha", 1)
        if dtype == torch.bool:
            return "({self} != 0 && {other} != 0)" if operator == "*" else "({self} != 0 || {other} != 0)"
        other = "{other}" if alpha == 1 else "{other} * {alpha}"
        if dtype.is_floating_point:
            return f"{{self}} {operator} {other}"
        unsigned = _UNSIGNED[dtype]
        other = other.replace("{other}", f"({unsigned}){{other}}").replace("{alpha}", f"({unsigned}){{alpha}}")
        return f"({C_TYPES[dtype]})(({unsigned}){{self}} {operator} {other})"

    return template


def _rsub(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    text = _wrapping("-")(arguments, dtype)
    return text.replace("{self}", "\0").replace("{other}", "{self}").replace("\0", "{other}")


def _negate(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    return "-{self}" if dtype.is_floating_point else f"({C_TYPES[dtype]})(0 - ({_UNSIGNED[dtype]}){{self}})"


def _absolute(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    return "ABS({self})" if dtype.is_floating_point else "({self} < 0 ? -{self} : {self})"


def _not(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    return "!{self}" if dtype == torch.bool else "~{self}"


def _shift(operator: str) -> Callable[[Mapping[str, Any], torch.dtype], str]:
    """Arithmetic shift; beyond the width, as torch, all sign bits or zeros."""

    def template(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
        bits = dtype.itemsize * 8
        outside = f"{{other}} < 0 || {{other}} >= {bits}"
        if operator == ">>":
            return f"({outside}) ? ({{self}} < 0 ? -1 : 0) : {{self}} >> ({{other}} & {bits - 1})"
        shifted = f"({C_TYPES[dtype]})(({_UNSIGNED[dtype]}){{self}} << ({{other}} & {bits - 1}))"
        return f"({outside}) ? 0 : {shifted}"

    return template


def _divide(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    mode = arguments.get("rounding_mode")
    if mode is None:
        return "{self} / {other}"
    if dtype.is_floating_point:
        return "FLOOR_DIVIDE({self}, {other})" if mode == "floor" else "trunc({self} / {other})"
    quotient = "{self} / ({other} == 0 || {other} == -1 ? 1 : {other})"
    whole = f"{{other}} == 0 ? 0 : {{other}} == -1 ? -{{self}} : {quotient}"
    if mode == "trunc":
        return whole
    return (
        f"({whole}) - ({{other}} != 0 && {{other}} != -1 && {_REMAINDER} != 0 && (({{self}} < 0) != ({{other}} < 0)))"
    )


_REMAINDER = "{self} % ({other} == 0 || {other} == -1 ? 1 : {other})"


def _remainder(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "REMAINDER({self}, {other})"
    return f"({_REMAINDER}) + (({_REMAINDER}) != 0 && ((({_REMAINDER}) < 0) != ({{other}} < 0)) ? {{other}} : 0)"


def _power(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    exponent = arguments["exponent"]
    if isinstance(exponent, (int, float)) and not isinstance(exponent, bool):
        if exponent in (1, 2, 3, 4):
            return " * ".join(["{self}"] * int(exponent))
        if dtype.is_floating_point and exponent in (0.5, -0.5, -1, -2):
            return {0.5: "SQRT({self})", -0.5: "1 / SQRT({self})", -1: "1 / {self}", -2: "1 / ({self} * {self})"}[
                exponent
            ]
    if not dtype.is_floating_point:
        raise Unsupported("integer power")
    return "pow({self}, {exponent})"


def _clamp(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    text = "{self}"
    if arguments.get("min") is not None:
        text = "({self} < {min} ? {min} : {self})"
    if arguments.get("max") is not None:
        text = f"({text} > {{max}} ? {{max}} : {text})"
    return text


def _rounded(function: str) -> Rule:
    """A function that leaves integers as they are."""
    return Rule(lambda _, dtype: f"{function}({{self}})" if dtype.is_floating_point else "{self}", ("self",))


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


def _unary(template: str, kind: KIND = KIND.INT_TO_FLOAT) -> Rule:
    return Rule(template, ("self",), kind)


def _binary(template: str | Callable[[Mapping[str, Any], torch.dtype], str], kind: KIND = KIND.DEFAULT) -> Rule:
    return Rule(template, ("self", "other"), kind)


def _comparison(operator: str) -> Rule:
    return Rule(f"{{self}} {operator} {{other}}", ("self", "other"), KIND.DEFAULT, result=torch.bool)


def _logical(template: str, *names: str) -> Rule:
    return Rule(template, names, KIND.DEFAULT, dict.fromkeys(names, torch.bool), torch.bool)


_COPY = Rule("{self}", ("self",))
_SELECT = {"condition": torch.bool}

RULES: dict[Any, Rule] = {
    aten._to_copy.default: _COPY,
    aten.clone.default: _COPY,
    aten.lift_fresh_copy.default: _COPY,
    aten.neg.default: Rule(_negate, ("self",)),
    aten.abs.default: Rule(_absolute, ("self",)),
    aten.sign.default: Rule("({self} > 0) - ({self} < 0)", ("self",)),
    aten.exp.default: _unary("EXP({self})"),
    aten.exp2.default: _unary("exp2({self})"),
    aten.expm1.default: _unary("expm1({self})"),
    aten.log.default: _unary("LOG({self})"),
    aten.log2.default: _unary("log2({self})"),
    aten.log1p.default: _unary("log1p({self})"),
    aten.sqrt.default: _unary("SQRT({self})"),
    aten.rsqrt.default: _unary("1 / SQRT({self})"),
    aten.reciprocal.default: _unary("1 / {self}"),
    aten.tanh.default: _unary("TANH({self})"),
    aten.sigmoid.default: _unary(_SIGMOID),
    aten.silu.default: _unary("{self} / (1 + EXP(-{self}))"),
    aten.erf.default: _unary("ERF({self})"),
    aten.sin.default: _unary("sin({self})"),
    aten.cos.default: _unary("cos({self})"),
    aten.atan.default: _unary("atan({self})"),
    aten.floor.default: _rounded("floor"),
    aten.ceil.default: _rounded("ceil"),
    aten.round.default: _rounded("rint"),
    aten.trunc.default: _rounded("trunc"),
    aten.relu.default: Rule("{self} <= 0 ? 0 : {self}", ("self",)),
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
    aten.isnan.default: Rule("{self} != {self}", ("self",), result=torch.bool),
    aten.logical_not.default: _logical("!{self}", "self"),
    aten.logical_and.default: _logical("{self} & {other}", "self", "other"),
    aten.logical_or.default: _logical("{self} | {other}", "self", "other"),
    aten.logical_xor.default: _logical("{self} ^ {other}", "self", "other"),
    aten.bitwise_not.default: Rule(_not, ("self",)),
    aten.where.self: Rule("{condition} ? {self} : {other}", ("self", "other"), fixed=_SELECT),
    aten.clamp.default: Rule(_clamp, ("self", "min", "max")),
    aten.clamp_min.default: Rule("({self} < {min} ? {min} : {self})", ("self", "min")),
    aten.clamp_max.default: Rule("({self} > {max} ? {max} : {self})", ("self", "max")),
    aten.maximum.default: _binary("({self} > {other} || {self} != {self}) ? {self} : {other}"),
    aten.minimum.default: _binary("({self} < {other} || {self} != {self}) ? {self} : {other}"),
    aten.addcmul.default: Rule("{self} + {value} * {tensor1} * {tensor2}", ("self", "tensor1", "tensor2")),
    aten.addcdiv.default: Rule("{self} + {value} * {tensor1} / {tensor2}", ("self", "tensor1", "tensor2")),
    aten.masked_fill.Scalar: Rule("{mask} ? {value} : {self}", ("self",), fixed={"mask": torch.bool}),
    aten.masked_fill.Tensor: Rule("{mask} ? {value} : {self}", ("self",), fixed={"mask": torch.bool}),
}
for _name, _operator in (("add", "+"), ("sub", "-"), ("mul", "*")):
    for _overload in ("Tensor", "Scalar"):
        RULES[getattr(getattr(aten, _name), _overload)] = _binary(_wrapping(_operator))
for _overload in ("Tensor", "Scalar"):
    RULES[getattr(aten.div, _overload)] = _binary(_divide, KIND.INT_TO_FLOAT)
    RULES[getattr(aten.div, f"{_overload}_mode")] = _binary(_divide)
    RULES[getattr(aten.rsub, _overload)] = _binary(_rsub)
    RULES[getattr(aten.remainder, _overload)] = _binary(_remainder)
    RULES[getattr(aten.pow, f"Tensor_{_overload}")] = Rule(_power, ("self", "exponent"), KIND.BOOL_TO_LONG)
    for _name, _operator in (("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
        RULES[getattr(getattr(aten, _name), _overload)] = _comparison(_operator)
    for _name in ("bitwise_right_shift", "bitwise_left_shift"):
        _rule = _binary(_shift(">>" if "right" in _name else "<<"))
        RULES[getattr(getattr(aten, _name), "Tensor" if _overload == "Tensor" else "Tensor_Scalar")] = _rule
    RULES[getattr(aten.__rshift__, _overload)] = _binary(_shift(">>"))
    RULES[getattr(aten.__lshift__, _overload)] = _binary(_shift("<<"))
    for _name, _operator in (("and", "&"), ("or", "|"), ("xor", "^")):
        RULES[getattr(getattr(aten, f"bitwise_{_name}"), _overload)] = _binary(f"{{self}} {_operator} {{other}}")
        RULES[getattr(getattr(aten, f"__{_name}__"), _overload)] = _binary(f"{{self}} {_operator} {{other}}")
