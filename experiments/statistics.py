"""Statistics of paired differences: Student's t interval, exact sign-flip test, Holm, two one-sided tests.

No bootstrap: a percentile bootstrap of five values covers 82 % where it says 95 %. With few seeds the t interval keeps
its promise for anything near a normal distribution, and the sign-flip test for anything symmetric, whatever its shape.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MAX_PAIRS = 40  # two tables of 2^20 half sums; a configuration takes no more seeds than that


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of a mean; None for fewer than two values, which say nothing about their spread.

    Source: Student, "The probable error of a mean", Biometrika 6(1) 1908.
    """
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * _standard_error(values)
    return mean - half, mean + half


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided p value of a zero centre: the share of all 2^n sign patterns with a sum at least as far from 0.

    Exact, by meeting in the middle: the sums of all sign patterns of either half, one of them sorted; for each sum of
    the other half a binary search counts its partners. 2^(n/2) memory instead of 2^n. Sums that differ from the
    observed one by rounding count as equal to it.

    Args:
        differences: at most 40 paired differences, in any unit.

    Source: Fisher, "The Design of Experiments", 1935, section 21; Good, "Permutation Tests", 2000, chapter 3.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) > MAX_PAIRS:
        raise ValueError(f"{len(values)} pairs; the exact test takes at most {MAX_PAIRS}")
    observed = abs(math.fsum(differences))
    threshold = observed - 1e-12 * float(np.abs(values).sum())
    if threshold <= 0:
        return 1.0
    left, right = _signed_sums(values[::2]), np.sort(_signed_sums(values[1::2]))
    above = len(right) - np.searchsorted(right, threshold - left, side="left")
    below = np.searchsorted(right, -threshold - left, side="right")
    return float((above.sum() + below.sum()) / 2.0 ** len(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for their number: claiming all below alpha is wrong with probability alpha at most.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 1979.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def equivalence_test(differences: Sequence[float], margin: float) -> float | None:
    """P value of |mean| >= margin: two one-sided t tests, the larger of their p values; None for fewer than two values.

    Source: Schuirmann, "A comparison of the two one-sided tests procedure and the power approach", J. Pharmacokinetics
    and Biopharmaceutics 15 1987, eq. 2.
    """
    n = len(differences)
    if n < 2:
        return None
    mean, error = math.fsum(differences) / n, _standard_error(differences)
    if error == 0.0:
        return 0.0 if abs(mean) < margin else 1.0
    return float(stats.t.sf((margin - abs(mean)) / error, n - 1))


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(np.asarray(values, dtype=np.float64), ddof=1)) / math.sqrt(len(values))


def _signed_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums
