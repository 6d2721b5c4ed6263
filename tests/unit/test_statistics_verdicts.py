"""What a comparison may say."""

import numpy as np
import pytest

from experiments.comparison import compare, overall_verdict

FLOORS = {"unigram": 3.0, "bigram": 2.4}


def losses(n, shift, spread=0.01, **others):
    noise = np.random.default_rng(3).normal(0, spread, n)
    arms = {"baseline": {k: 2.0 + 0.1 * k for k in range(n)}}
    arms["hybrid"] = {k: 2.0 + 0.1 * k + shift + noise[k] for k in range(n)}
    return arms | {name: {k: 2.0 + 0.1 * k + value for k in range(n)} for name, value in others.items()}


def verdict(n, shift, *, margin=None, **others):
    return compare(losses(n, shift, **others), metric="test_loss", margin=margin, alpha=0.05)[0].verdict


def test_below_ten_seeds_there_is_no_claim():
    assert verdict(9, -0.5) == "too few seeds for a claim (n = 9 < 10)"
    assert verdict(1, -0.5) == "too few seeds for a claim (n = 1 < 10)"


@pytest.mark.parametrize(
    ("shift", "margin", "expected"),
    [
        (-0.5, None, "better"),
        (0.5, None, "worse"),
        (0.0, None, "no evidence of a difference"),
        (0.0, 0.05, "equivalent within 0.05"),
        (0.5, 0.05, "worse"),
        (-0.03, 0.05, "better, but by less than the margin of 0.05"),
        (0.0, 0.0001, "no evidence of a difference"),
    ],
)
def test_the_verdict_follows_from_p_interval_and_margin(shift, margin, expected):
    assert verdict(12, shift, margin=margin) == expected


def test_pairing_by_seed_takes_out_what_seeds_have_in_common():
    one = compare(losses(12, -0.02, spread=0.001), metric="test_loss", margin=None, alpha=0.05)[0]
    assert one.difference == pytest.approx(-0.02, abs=0.002)
    assert one.interval[1] < 0  # the seeds differ by 1.1 among themselves


def test_every_arm_meets_the_baseline_and_the_hybrid_its_controls():
    arms = losses(3, 0.1, twin=0.1, frozen=0.2, identity=0.3)
    found = compare(arms, metric="test_loss", margin=None, alpha=0.05)
    assert [(one.arm, one.against) for one in found] == [
        ("hybrid", "baseline"),
        ("twin", "baseline"),
        ("frozen", "baseline"),
        ("identity", "baseline"),
        ("hybrid", "twin"),
        ("hybrid", "frozen"),
        ("hybrid", "identity"),
    ]


def test_p_values_are_adjusted_for_all_comparisons():
    found = compare(losses(12, -0.5, twin=0.0), metric="test_loss", margin=None, alpha=0.05)
    assert found[0].p_permutation == 2 / 2**12
    assert found[0].p_holm == pytest.approx(3 * 2 / 2**12)  # hybrid, twin, hybrid against twin


def test_tests_of_equivalence_share_the_adjustment_with_those_of_a_difference():
    found = compare(losses(12, -0.5, twin=0.0), metric="test_loss", margin=0.05, alpha=0.05)
    # The twin equals the baseline: p = 0 comes first of the six, then the hybrid against either, 2 / 2^12 each.
    assert [one.p_tost for one in found][1] == 0.0
    assert found[0].p_holm == found[2].p_holm == pytest.approx(5 * 2 / 2**12)
    assert found[1].p_tost_holm == 0.0
    assert found[0].p_tost_holm == pytest.approx(1.0)


def test_the_overall_verdict_names_the_floor():
    found = compare(losses(3, 0.1), metric="test_loss", margin=None, alpha=0.05)
    text = overall_verdict(found, {"baseline": 2.1, "hybrid": 2.2}, FLOORS)
    assert text.startswith(
        "hybrid against baseline: too few seeds for a claim (n = 3 < 10); +0.0997 nat/token, interval "
    )
    assert "Against the bigram floor of 2.400 nat/token: baseline 2.100 (-0.300), hybrid 2.200 (-0.200)." in text


def test_a_single_arm_is_compared_with_the_floor_alone():
    assert overall_verdict([], {"baseline": 2.5}, FLOORS).startswith("One arm, so nothing is compared.")
