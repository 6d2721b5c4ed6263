"""Which C expression each elementwise operation of ATen is.

Signed arithmetic that may wrap is done unsigned, where C defines it. Minimum, maximum, clamp and relu are written so
that NaN passes: a comparison with NaN is false and must leave the NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as KIND

from hetero.opencl.c_source import C_TYPES, UNSIGNED
from hetero.opencl.expressions import Rule
from hetero.opencl.rules_activations import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Template = Callable[[Mapping[str, Any], torch.dtype], str]

aten = torch.ops.aten


def _wrapping(operator: str) -> Template:
    """Template of `self op other * alpha`; integers modulo 2^n."""

    def template(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
        alpha = arguments.get("alpha", 1)
        if dtype == torch.bool:
            return "({self} != 0 && {other} != 0)" if operator == "*" else "({self} != 0 || {other} != 0)"
        other = "{other}" if alpha == 1 else "{other} * {alpha}"
        if dtype.is_floating_point:
            return f"{{self}} {operator} {other}"
        unsigned = UNSIGNED[dtype]
        other = other.replace("{other}", f"({unsigned}){{other}}").replace("{alpha}", f"({unsigned}){{alpha}}")
        return f"({C_TYPES[dtype]})(({unsigned}){{self}} {operator} {other})"

    return template


def _rsub(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    text = _wrapping("-")(arguments, dtype)
    return text.replace("{self}", "\0").replace("{other}", "{self}").replace("\0", "{other}")


def _negate(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    return "-{self}" if dtype.is_floating_point else f"({C_TYPES[dtype]})(0 - ({UNSIGNED[dtype]}){{self}})"


def _absolute(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    return "ABS({self})" if dtype.is_floating_point else "({self} < 0 ? -{self} : {self})"


def _not(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    return "!{self}" if dtype == torch.bool else "~{self}"


def _shift(operator: str) -> Template:
    """Arithmetic shift; beyond the width, as torch, all sign bits or zeros."""

    def template(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
        bits = dtype.itemsize * 8
        outside = f"{{other}} < 0 || {{other}} >= {bits}"
        if operator == ">>":
            return f"({outside}) ? ({{self}} < 0 ? -1 : 0) : {{self}} >> ({{other}} & {bits - 1})"
        shifted = f"({C_TYPES[dtype]})(({UNSIGNED[dtype]}){{self}} << ({{other}} & {bits - 1}))"
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


def _fmod(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    return "fmod({self}, {other})" if dtype.is_floating_point else f"({_REMAINDER})"


def _power(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    if not dtype.is_floating_point:
        return f"({C_TYPES[dtype]})integer_power({{self}}, {{exponent}})"
    exponent = arguments["exponent"]
    if isinstance(exponent, (int, float)):
        if exponent in (1, 2, 3, 4):
            return " * ".join(["{self}"] * int(exponent))
        if exponent in _SHORT_POWERS:
            return _SHORT_POWERS[exponent]
    return "pow({self}, {exponent})"


_SHORT_POWERS = {0.5: "SQRT({self})", -0.5: "1 / SQRT({self})", -1: "1 / {self}", -2: "1 / ({self} * {self})"}


def _clamp(arguments: Mapping[str, Any], dtype: torch.dtype) -> str:
    """Bounds may be tensors; their NaN passes as well."""
    text = "{self}"
    if arguments.get("min") is not None:
        text = "({self} < {min} || {min} != {min} ? {min} : {self})"
    if arguments.get("max") is not None:
        text = f"({text} > {{max}} || {{max}} != {{max}} ? {{max}} : {text})"
    return text


def _rounded(function: str) -> Rule:
    """A function that leaves integers as they are."""
    return Rule(lambda _, dtype: f"{function}({{self}})" if dtype.is_floating_point else "{self}", ("self",))


def _unary(template: str, kind: KIND = KIND.INT_TO_FLOAT) -> Rule:
    return Rule(template, ("self",), kind)


def _binary(template: str | Template, kind: KIND = KIND.DEFAULT) -> Rule:
    return Rule(template, ("self", "other"), kind)


def _comparison(operator: str) -> Rule:
    return Rule(f"{{self}} {operator} {{other}}", ("self", "other"), KIND.DEFAULT, result=torch.bool)


def _logical(template: str, *names: str) -> Rule:
    return Rule(template, names, KIND.DEFAULT, dict.fromkeys(names, torch.bool), torch.bool)


def _floating(text: str, otherwise: str) -> Template:
    """A template for floating-point numbers, and one for all others."""
    return lambda _, dtype: text if dtype.is_floating_point else otherwise


_COPY = Rule("{self}", ("self",))
_SELECT = {"condition": torch.bool}
_MASK = {"mask": torch.bool}
# Rare functions of real numbers: OpenCL's own.
_INVERSE = ("acos", "acosh", "asin", "asinh", "atan", "atanh", "log10", "log2")
_BUILTINS = (*_INVERSE, "cos", "cosh", "erfc", "exp2", "lgamma", "sin", "sinh", "tan")

RULES: dict[Any, Rule] = {
    **ACTIVATIONS,
    **{getattr(aten, name).default: _unary(f"{name}({{self}})") for name in _BUILTINS},
    aten._to_copy.default: _COPY,
    aten.clone.default: _COPY,
    aten.lift_fresh_copy.default: _COPY,
    aten.neg.default: Rule(_negate, ("self",)),
    aten.abs.default: Rule(_absolute, ("self",)),
    aten.sign.default: Rule("({self} > 0) - ({self} < 0)", ("self",)),
    aten.signbit.default: Rule(_floating("signbit({self}) != 0", "{self} < 0"), ("self",), result=torch.bool),
    aten.exp.default: _unary("EXP({self})"),
    aten.expm1.default: _unary("EXPM1({self})"),
    aten.log.default: _unary("LOG({self})"),
    aten.log1p.default: _unary("LOG1P({self})"),
    aten.sqrt.default: _unary("SQRT({self})"),
    aten.rsqrt.default: _unary("1 / SQRT({self})"),
    aten.reciprocal.default: _unary("1 / {self}"),
    aten.erf.default: _unary("ERF({self})"),
    aten.erfinv.default: _unary("ERFINV({self})"),
    aten.floor.default: _rounded("floor"),
    aten.ceil.default: _rounded("ceil"),
    aten.round.default: _rounded("rint"),
    aten.trunc.default: _rounded("trunc"),
    aten.isnan.default: Rule("{self} != {self}", ("self",), result=torch.bool),
    aten.isinf.default: Rule(_floating("ABS({self}) == INFINITY", "0"), ("self",), result=torch.bool),
    aten.logical_not.default: _logical("!{self}", "self"),
    aten.logical_and.default: _logical("{self} & {other}", "self", "other"),
    aten.logical_or.default: _logical("{self} | {other}", "self", "other"),
    aten.logical_xor.default: _logical("{self} ^ {other}", "self", "other"),
    aten.bitwise_not.default: Rule(_not, ("self",)),
    aten.where.self: Rule("{condition} ? {self} : {other}", ("self", "other"), fixed=_SELECT),
    aten.masked_fill.Scalar: Rule("{mask} ? {value} : {self}", ("self",), fixed=_MASK),
    aten.masked_fill.Tensor: Rule("{mask} ? {value} : {self}", ("self",), fixed=_MASK),
    aten.clamp.default: Rule(_clamp, ("self", "min", "max")),
    aten.clamp.Tensor: Rule(_clamp, ("self", "min", "max")),
    aten.clamp_min.default: Rule(_clamp, ("self", "min")),
    aten.clamp_max.default: Rule(_clamp, ("self", "max")),
    aten.maximum.default: _binary("({self} > {other} || {self} != {self}) ? {self} : {other}"),
    aten.minimum.default: _binary("({self} < {other} || {self} != {self}) ? {self} : {other}"),
    aten.fmax.default: _binary("({self} >= {other} || {other} != {other}) ? {self} : {other}"),
    aten.fmin.default: _binary("({self} <= {other} || {other} != {other}) ? {self} : {other}"),
    aten.atan2.default: _binary("atan2({self}, {other})", KIND.INT_TO_FLOAT),
    aten.hypot.default: _binary("hypot({self}, {other})"),
    aten.pow.Scalar: Rule(_power, ("self", "exponent"), KIND.BOOL_TO_LONG),
    aten.addcmul.default: Rule("{self} + {value} * {tensor1} * {tensor2}", ("self", "tensor1", "tensor2")),
    aten.addcdiv.default: Rule("{self} + {value} * {tensor1} / {tensor2}", ("self", "tensor1", "tensor2")),
}
for _name, _operator in (("add", "+"), ("sub", "-"), ("mul", "*")):
    for _overload in ("Tensor", "Scalar"):
        RULES[getattr(getattr(aten, _name), _overload)] = _binary(_wrapping(_operator))
for _overload in ("Tensor", "Scalar"):
    RULES[getattr(aten.div, _overload)] = _binary(_divide, KIND.INT_TO_FLOAT)
    RULES[getattr(aten.div, f"{_overload}_mode")] = _binary(_divide)
    RULES[getattr(aten.rsub, _overload)] = _binary(_rsub)
    RULES[getattr(aten.remainder, _overload)] = _binary(_remainder)
    RULES[getattr(aten.fmod, _overload)] = _binary(_fmod)
    RULES[getattr(aten.copysign, _overload)] = _binary("copysign({self}, {other})", KIND.INT_TO_FLOAT)
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
