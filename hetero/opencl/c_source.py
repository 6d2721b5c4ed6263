"""Pieces of generated kernels: C types, constants, conversions, and functions of float32.

Expressions use operators only: with PoCL 3.0 from PyPI every library builtin is a slow call that also keeps the loop
around it from being vectorised. The functions that matter are written out below; the rare ones, and those of float64,
take the builtin.
"""

from __future__ import annotations

import math

import torch

from hetero.opencl import random_source
from hetero.opencl.errors import Unsupported

C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "long",
    torch.int32: "int",
    torch.int16: "short",
    torch.int8: "char",
    torch.uint8: "uchar",
    torch.bool: "uchar",
}
# What lies in memory. A half is only there: what is computed with it is float, rounded where torch rounds.
STORED_TYPES = {**C_TYPES, torch.float16: "half"}
UNSIGNED = {
    torch.int64: "ulong",
    torch.int32: "uint",
    torch.int16: "ushort",
    torch.int8: "uchar",
    torch.uint8: "uchar",
}

# torch's remainder and floor division (c10/util/generic_math.h) of either type: by fmod, which is exact, where a
# quotient would be rounded first.
_MODULO = """
static inline {type} remainder{n}({type} a, {type} b)
{{
    const {type} mod = fmod(a, b);
    return mod != 0 && (b < 0) != (mod < 0) ? mod + b : mod;
}}
"""
_FLOOR_DIVIDE = """
static inline {type} floor_divide{n}({type} a, {type} b)
{{
    const {type} mod = fmod(a, b), quotient = (a - mod) / b;
    const {type} near = mod != 0 && (b < 0) != (mod < 0) ? quotient - 1 : quotient, below = floor(near);
    const {type} whole = near == 0 ? copysign(({type})0, a / b) : near - below > ({type})0.5 ? below + 1 : below;
    return b == 0 ? a / b : whole;
}}
"""

# torch's erfinv (aten/src/ATen/native/Math.h, calc_erfinv): a rational approximation and two steps of Newton's method.
_ERFINV = """
#define T {type}
static inline {type} erfinv{n}({type} y)
{{
    const {type} z = fabs(y) <= (T)0.7 ? y * y : sqrt(-log((1 - fabs(y)) / 2));
    const {type} a = ((-(T)0.140543331 * z + (T)0.914624893) * z - (T)1.645349621) * z + (T)0.886226899;
    const {type} b = ((T)0.012229801 * z - (T)0.329097515) * z + (T)1.442710462;
    const {type} c = (((T)1.641345311 * z + (T)3.429567803) * z - (T)1.62490649) * z - (T)1.970840454;
    const {type} d = ((T)1.6370678 * z + (T)3.5438892) * z + 1;
    const {type} center = y * a / ((b * z - (T)2.118377725) * z + 1), tail = copysign(c, y) / d;
    {type} x = fabs(y) <= (T)0.7 ? center : tail;
    x = x - (erf(x) - y) / ((T)1.1283791670955126 * exp(-x * x));
    x = x - (erf(x) - y) / ((T)1.1283791670955126 * exp(-x * x));
    return fabs(y) < 1 ? x : fabs(y) == 1 ? copysign((T)INFINITY, y) : (T)NAN;
}}
#undef T
"""

# Functions by name, those of float32 end in 1; a function may use those above it.
_FUNCTIONS = {
    "abs1": "static inline float abs1(float x) { return as_float(as_int(x) & 0x7fffffff); }\n",
    # 2^n exp(r) as in common.cl, of which this is the scalar form that the loop vectoriser takes. 2 ulp.
    "exp1": """
static inline float exp1(float x)
{
    float y = x < -87.336f ? -87.336f : x;
    y = y > 89.0f ? 89.0f : y;
    const float t = y * 1.44269504f + 12582912.0f;
    const float n = t - 12582912.0f;
    float r = y - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const int i = as_int(t) - 0x4B400000, half_i = i >> 1;
    const float result = p * as_float((half_i + 127) << 23) * as_float((i - half_i + 127) << 23);
    return x < -87.336f ? 0.0f : result;
}
""",
    # Cephes' tanhf: a polynomial below 0.625, 1 - 2 / (exp(2 x) + 1) above. 3 ulp.
    "tanh1": """
static inline float tanh1(float x)
{
    const float z = x * x;
    float p = -5.70498872745e-3f * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const float below = p * z * x + x, above = 1.0f - 2.0f / (exp1(2.0f * x) + 1.0f);
    return z < 0.390625f ? below : above;
}
""",
    # (exp(x) - 1) = tanh(x / 2) (exp(x) + 1): without cancellation. 6 ulp.
    "exp_minus_one1": """
static inline float exp_minus_one1(float x)
{
    return tanh1(0.5f * x) * (exp1(x) + 1.0f);
}
""",
    # Cephes' logf, as in common.cl. 2 ulp.
    "log1": """
static inline float log1(float x)
{
    const float shift = x < 1.17549435e-38f ? 25.0f : 0.0f;
    const int bits = as_int(x < 1.17549435e-38f ? x * 33554432.0f : x);
    float e = (float)((bits >> 23) - 126) - shift;
    float m = as_float((bits & 0x007fffff) | 0x3f000000);
    e = m < 0.707106781f ? e - 1.0f : e;
    m = m < 0.707106781f ? m + m - 1.0f : m - 1.0f;
    const float z = m * m;
    float p = 7.0376836292e-2f * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * z - 2.12194440e-4f * e - 0.5f * z;
    float result = m + p + 0.693359375f * e;
    result = x == 0.0f ? -INFINITY : result;
    result = x < 0.0f ? NAN : result;
    return x == INFINITY || x != x ? x : result;
}
""",
    # log(u) x / (u - 1) for u = 1 + x rounded: the errors of log(u) and of u - 1 cancel. 5 ulp.
    # Source: Goldberg, "What every computer scientist should know about floating-point arithmetic", theorem 4.
    "log_one_plus1": """
static inline float log_one_plus1(float x)
{
    const float u = 1.0f + x, near = log1(u) * (x / (u - 1.0f));
    return u == 1.0f ? x : u == INFINITY ? u : near;
}
""",
    # Eigen's generic_fast_erf_float: x P(x^2) / Q(x^2) on [-4, 4]. Absolute error 5e-7.
    "erf1": """
static inline float erf1(float x)
{
    float y = x > 4.0f ? 4.0f : x;
    y = y < -4.0f ? -4.0f : y;
    const float z = y * y;
    float p = -2.72614225801306e-10f * z + 2.77068142495902e-08f;
    p = p * z - 2.10102402082508e-06f;
    p = p * z - 5.69250639462346e-05f;
    p = p * z - 7.34990630326855e-04f;
    p = p * z - 2.95459980854025e-03f;
    p = p * z - 1.60960333262415e-02f;
    float q = -1.45660718464996e-05f * z - 2.13374055278905e-04f;
    q = q * z - 1.68282697438203e-03f;
    q = q * z - 7.37332916720468e-03f;
    q = q * z - 1.42647390514189e-02f;
    return y * p / q;
}
""",
    # Normal distribution function erfc(-x / sqrt(2)) / 2, without cancellation in the lower tail. erfc as in Numerical
    # Recipes (Press et al., 2nd ed., 6.2, erfcc): a Chebyshev fit with relative error 1.2e-7.
    "cdf1": """
static inline float cdf1(float x)
{
    const float z = abs1(x) * 0.70710678f, t = 1.0f / (1.0f + 0.5f * z);
    float p = 0.17087277f * t - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    const float tail = 0.5f * t * exp1(p - z * z);
    return x < 0.0f ? tail : 1.0f - tail;
}
""",
    "cdf2": "static inline double cdf2(double x) { return 0.5 * erfc(-0.7071067811865476 * x); }\n",
    "erfinv1": _ERFINV.format(type="float", n=1),
    "erfinv2": _ERFINV.format(type="double", n=2),
    # Wraps; a negative power is 0, but of 1 and -1.
    "integer_power": """
static inline long integer_power(long base, long exponent)
{
    ulong result = exponent >= 0 || base == 1 || base == -1, factor = (ulong)base;
    for (ulong n = exponent < 0 ? exponent & 1 : exponent; n != 0; n >>= 1) {
        result *= (n & 1) ? factor : 1;
        factor *= factor;
    }
    return (long)result;
}
""",
    "remainder1": _MODULO.format(type="float", n=1),
    "remainder2": _MODULO.format(type="double", n=2),
    "floor_divide1": _FLOOR_DIVIDE.format(type="float", n=1),
    "floor_divide2": _FLOOR_DIVIDE.format(type="double", n=2),
    "sqrt1": "static inline float sqrt1(float x) { return SQRT(x); }\n",
    **random_source.FUNCTIONS,
}
_NEEDS = {
    "tanh1": ("exp1",),
    "cdf1": ("abs1", "exp1"),
    "exp_minus_one1": ("exp1", "tanh1"),
    "log_one_plus1": ("log1",),
    **random_source.NEEDS,
}


def functions_of(text: str) -> str:
    """Definitions of the functions that a kernel's body calls, and the pragma that double needs."""
    used = {name for name in _FUNCTIONS if f"{name}(" in text}
    used |= {needed for name in used for needed in _NEEDS.get(name, ())}
    head = "#pragma OPENCL EXTENSION cl_khr_fp64 : enable\n" if "double" in text else ""
    head += "#pragma OPENCL EXTENSION cl_khr_fp16 : enable\n" if "half" in text else ""
    return head + "".join(source.lstrip() for name, source in _FUNCTIONS.items() if name in used)


def require_stored_types(*dtypes: torch.dtype, fp16: bool) -> None:
    """Raise Unsupported unless all are types of memory: of kernels, or float16 where the device has `fp16`."""
    require_c_types(*(dtype for dtype in dtypes if not (fp16 and dtype == torch.float16)))


def require_c_types(*dtypes: torch.dtype) -> None:
    """Raise Unsupported unless all are types of kernels."""
    others = sorted({str(dtype) for dtype in dtypes if dtype not in C_TYPES})
    if others:
        raise Unsupported(f"no kernels for {', '.join(others)}")


def literal(value: float | int | bool, dtype: torch.dtype) -> str:
    """A number as a C constant of a type; exact."""
    if dtype.is_floating_point:
        number = float(value)
        suffix = "" if dtype == torch.float64 else "f"
        if math.isnan(number):
            return "NAN"
        if dtype != torch.float64 and not math.isinf(number):
            number = float(torch.tensor(number, dtype=dtype))
        if math.isinf(number):
            return "INFINITY" if number > 0 else "(-INFINITY)"
        return f"({number!r}{suffix})" if number < 0 or math.copysign(1, number) < 0 else f"{number!r}{suffix}"
    if dtype == torch.bool:
        return str(int(bool(value)))
    number = int(value)
    if dtype != torch.int64:
        return f"({number})"
    return "(-9223372036854775807L - 1L)" if number == -(2**63) else f"({number}L)"


def cast(text: str, source: torch.dtype, target: torch.dtype) -> str:
    """An expression of one type converted to another. One of float16 is a float that has been rounded."""
    if source == target:
        return text
    if target == torch.bool:
        return f"({text} != 0)"
    if target == torch.float16:
        return f"((float)(half)({text}))"
    if (source, target) == (torch.float16, torch.float32):
        return text
    return f"(({C_TYPES[target]}){text})"
