"""What a reduction does with its elements, as C statements: the table of reducers.

The state of a reduction is one variable or several. `update` takes an element into the state, `merge` another state:
both for lanes, parts of a long dimension, and whatever else is reduced side by side. A state that has seen nothing
changes nothing when it is merged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hetero.opencl.c_source import C_TYPES, literal

INDEX_TYPE = torch.int32  # of positions among the elements, within a kernel
_NOWHERE = 2**31 - 1


@dataclass(frozen=True)
class Reducer:
    """How elements of one type become results.

    Attributes:
        element: the type that elements are converted to.
        states: types of the state's variables.
        start: their first values, C constants.
        update: statements with fields {s0}, {s1}... for the state, {e} for the element, {i} for its index.
        merge: the same with {t0}, {t1}... for the other state, whose elements have larger indices or are others.
        results: expressions of the state, and of {n}, the number of elements as floating-point number.
        types: of the results.
        is_scan: whether every element has results, those of the elements up to it, which are taken in order.
    """

    element: torch.dtype
    states: tuple[torch.dtype, ...]
    start: tuple[str, ...]
    update: str
    merge: str
    results: tuple[str, ...]
    types: tuple[torch.dtype, ...]
    is_scan: bool = False

    @property
    def uses_index(self) -> bool:
        """Whether elements are told apart by their index."""
        return "{i}" in self.update


def _fold(dtype: torch.dtype, start: str, update: str, result: str = "{s0}", *, is_scan: bool = False) -> Reducer:
    """A state of the elements' own type, combined with elements as with other states."""
    return Reducer(dtype, (dtype,), (start,), update, update.replace("{e}", "{t0}"), (result,), (dtype,), is_scan)


def total(dtype: torch.dtype, *, is_scan: bool = False) -> Reducer:
    """The sum. Of a scan, whose elements come one after the other, with Kahan's compensation."""
    if not (is_scan and dtype.is_floating_point):
        return _fold(dtype, "0", "{s0} += {e};", is_scan=is_scan)
    kind = C_TYPES[dtype]
    update = (
        f"{{{{ const {kind} term = {{e}} - {{s1}}, next = {{s0}} + term; "
        "{s1} = next - next == 0 ? (next - {s0}) - term : 0; {s0} = next; }}"  # no more once infinite or NaN
    )
    return Reducer(dtype, (dtype, dtype), ("0", "0"), update, "{s0} += {t0};", ("{s0}",), (dtype,), is_scan=True)


def mean(dtype: torch.dtype) -> Reducer:
    """The arithmetic mean of floating-point numbers."""
    return _fold(dtype, "0", "{s0} += {e};", "{s0} / {n}")


def product(dtype: torch.dtype, *, is_scan: bool = False) -> Reducer:
    """The product."""
    return _fold(dtype, "1", "{s0} *= {e};", is_scan=is_scan)


def any_of(dtype: torch.dtype) -> Reducer:
    """Whether an element isn't zero."""
    del dtype
    return _fold(torch.bool, "0", "{s0} |= {e};")


def all_of(dtype: torch.dtype) -> Reducer:
    """Whether no element is zero."""
    del dtype
    return _fold(torch.bool, "1", "{s0} &= {e};")


def largest(dtype: torch.dtype) -> Reducer:
    """The maximum; NaN if there is one."""
    return _fold(dtype, _lowest(dtype), "{s0} = {e} > {s0} || {e} != {e} ? {e} : {s0};")


def smallest(dtype: torch.dtype) -> Reducer:
    """The minimum; NaN if there is one."""
    return _fold(dtype, _highest(dtype), "{s0} = {e} < {s0} || {e} != {e} ? {e} : {s0};")


def largest_with_index(dtype: torch.dtype, *, is_scan: bool = False) -> Reducer:
    """The maximum and the index of the first element that has it; of the last one in a scan, as torch.cummax."""
    return _extremum(dtype, _lowest(dtype), ">", is_scan=is_scan)


def smallest_with_index(dtype: torch.dtype, *, is_scan: bool = False) -> Reducer:
    """The minimum and the index of the first element that has it; of the last one in a scan, as torch.cummin."""
    return _extremum(dtype, _highest(dtype), "<", is_scan=is_scan)


def _extremum(dtype: torch.dtype, start: str, better: str, *, is_scan: bool) -> Reducer:
    def take(value: str, index: str) -> str:
        is_equal = f"({value} == {{s0}} || ({value} != {value} && {{s0}} != {{s0}}))"
        is_first = is_equal if is_scan else f"{is_equal} && {index} < {{s1}}"
        is_better = f"{value} {better} {{s0}} || ({value} != {value} && {{s0}} == {{s0}}) || ({is_first})"
        chosen = f"{{s1}} = take ? {index} : {{s1}}; {{s0}} = take ? {value} : {{s0}};"
        return f"{{{{ const int take = {is_better}; {chosen} }}}}"

    return Reducer(
        element=dtype,
        states=(dtype, INDEX_TYPE),
        start=(start, str(_NOWHERE)),
        update=take("{e}", "{i}"),
        merge=take("{t0}", "{t1}"),
        results=("{s0}", "{s1}"),
        types=(dtype, INDEX_TYPE),
        is_scan=is_scan,
    )


def spread(dtype: torch.dtype, *, correction: float, is_root: bool) -> Reducer:
    """Variance (or its root) and mean of floating-point numbers.

    Welford's update and the merge of Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", 1979: no difference of large sums. State: mean, sum of squared deviations, number of elements.
    The divisor is n - correction, but not below 0, as torch.var.
    """
    c = C_TYPES[dtype]
    update = (
        f"{{{{ const {c} delta = {{e}} - {{s0}}; {{s2}} += 1; {{s0}} += delta / {{s2}}; "
        "{s1} += delta * ({e} - {s0}); }}"
    )
    merge = (
        f"if ({{t2}} != 0) {{{{ const {c} delta = {{t0}} - {{s0}}, all = {{s2}} + {{t2}}, share = {{t2}} / all; "
        "{s0} += delta * share; {s1} += {t1} + delta * delta * {s2} * share; {s2} = all; }}"
    )
    n = f"({{n}} - {literal(correction, dtype)})"
    variance = f"{{s1}} / ({n} > 0 ? {n} : 0)"
    root = "SQRT" if dtype == torch.float32 else "sqrt"
    return Reducer(
        element=dtype,
        states=(dtype,) * 3,
        start=("0",) * 3,
        update=update,
        merge=merge,
        results=(f"{root}({variance})" if is_root else variance, "{s0}"),
        types=(dtype, dtype),
    )


def _lowest(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "(-INFINITY)"
    return "0" if dtype == torch.bool else literal(torch.iinfo(dtype).min, dtype)


def _highest(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "INFINITY"
    return "1" if dtype == torch.bool else literal(torch.iinfo(dtype).max, dtype)
