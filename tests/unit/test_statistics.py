"""Statistics against scipy, brute force and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from experiments import statistics

RNG = np.random.default_rng(5)
SAMPLES = [list(RNG.normal(0.3, 1.0, n)) for n in (2, 3, 5, 8, 11)]
TIED = [[1.0, -1.0, 0.5, 0.5], [0.1] * 6, [0.0, 0.0, 1.0], [0.0, 0.0], [3.0], [0.1, 0.2, -0.3]]


def brute_force(values):
    observed = abs(math.fsum(values))
    patterns = itertools.product((1, -1), repeat=len(values))
    sums = [abs(math.fsum(s * v for s, v in zip(signs, values, strict=True))) for signs in patterns]
    return sum(total >= observed - 1e-12 * sum(map(abs, values)) for total in sums) / len(sums)


@pytest.mark.parametrize("values", SAMPLES)
def test_the_mean_interval_is_scipys(values):
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert statistics.mean_interval(values) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_one_value_has_no_interval():
    assert statistics.mean_interval([1.0]) is None


@pytest.mark.parametrize("values", SAMPLES + TIED)
def test_the_sign_flip_test_is_the_enumeration(values):
    assert statistics.sign_flip_test(values) == brute_force(values)


@pytest.mark.parametrize("values", SAMPLES[1:4])
def test_the_sign_flip_test_is_scipys(values):
    def total(sample, axis):
        return np.sum(sample, axis=axis)

    expected = stats.permutation_test((np.array(values),), total, permutation_type="samples", n_resamples=math.inf)
    assert statistics.sign_flip_test(values) == pytest.approx(expected.pvalue, abs=1e-12)


def test_the_sign_flip_test_is_exact_for_many_pairs():
    # All 30 alike: only the two patterns without a minus (or without a plus) reach the sum.
    assert statistics.sign_flip_test([0.1] * 30) == 2 / 2**30


def test_more_pairs_than_can_be_enumerated_are_refused():
    with pytest.raises(ValueError, match="at most 40"):
        statistics.sign_flip_test([1.0] * 41)


def test_holm_is_the_textbook_example():
    # Holm 1979 by hand: 4 * .01, max(.04, 3 * .015), max(.045, 2 * .03), max(.06, .04)
    assert statistics.holm([0.03, 0.01, 0.04, 0.015]) == pytest.approx([0.06, 0.04, 0.06, 0.045])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@pytest.mark.parametrize("values", SAMPLES)
def test_the_equivalence_test_is_two_one_sided_t_tests(values):
    margin = 0.7
    low = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    high = stats.ttest_1samp(values, margin, alternative="less").pvalue
    assert statistics.equivalence_test(values, margin) == pytest.approx(max(low, high), rel=1e-12)


def test_equal_values_are_equivalent_only_inside_the_margin():
    assert statistics.equivalence_test([0.25, 0.25, 0.25], 0.5) == 0.0
    assert statistics.equivalence_test([0.5, 0.5, 0.5], 0.5) == 1.0
    assert statistics.equivalence_test([0.25], 0.5) is None


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_interval_covers_as_often_as_it_says(n):
    # 20 000 trials: the share has a standard deviation of 0.0015; 0.0075 is five of them (false alarm 6e-7).
    rng = np.random.default_rng(n)
    trials = 20_000
    covered = sum(
        low <= 0 <= high
        for low, high in (statistics.mean_interval(list(rng.normal(size=n))) or (1, -1) for _ in range(trials))
    )
    assert covered / trials == pytest.approx(0.95, abs=0.0075)


@pytest.mark.slow
def test_the_sign_flip_test_rejects_no_more_often_than_alpha():
    # A skewed, symmetrised law with heavy tails: t tests lose their level here, sign flips don't.
    rng = np.random.default_rng(1)
    trials = 4000
    rejected = sum(statistics.sign_flip_test(list(rng.standard_cauchy(10))) <= 0.05 for _ in range(trials))
    assert rejected / trials <= 0.05 + 5 * math.sqrt(0.05 * 0.95 / trials)


@pytest.mark.slow
def test_the_equivalence_test_errs_no_more_often_than_alpha_at_the_margin():
    rng = np.random.default_rng(2)
    trials = 4000
    claims = [statistics.equivalence_test(list(rng.normal(0.5, 1.0, 10)), 0.5) for _ in range(trials)]
    assert sum(p is not None and p <= 0.05 for p in claims) / trials <= 0.05 + 5 * math.sqrt(0.05 * 0.95 / trials)
