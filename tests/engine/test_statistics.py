"""The statistics of paired comparisons: published and hand-computed cases, and slow independent computations."""

import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.statistics import (
    Z_SCORE_95,
    ComparisonOutcome,
    compute_holm_p,
    compute_mcnemar_p,
    compute_paired_bootstrap,
    compute_paired_interval,
    compute_quantile,
    decide_noninferiority,
)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1.0), (0, 1, 1.0), (0, 5, 2 / 32), (0, 6, 2 / 64), (1, 8, 2 * (1 + 9) / 512), (4, 4, 1.0)],
)
def test_mcnemar_by_hand(only_a, only_b, p):
    assert compute_mcnemar_p(only_a, only_b) == compute_mcnemar_p(only_b, only_a) == pytest.approx(p)


def test_mcnemar_counts_all_outcomes_of_fair_coins():
    for n, k in [(5, 1), (7, 2), (8, 4)]:
        extreme = sum(1 for coins in itertools.product((0, 1), repeat=n) if min(sum(coins), n - sum(coins)) <= k)
        assert compute_mcnemar_p(k, n - k) == pytest.approx(min(1.0, float(Fraction(extreme, 2**n))))
    assert 0 <= compute_mcnemar_p(2000, 2600) < 1e-9  # large counts do not overflow


def compute_score_bounds(only_a, only_b, n):
    """Return the smallest and largest difference that the score test keeps, by a search over the likelihood on a grid."""
    kept = []
    for difference in (step / 100 for step in range(-99, 100)):
        grid = [step / 1000 for step in range(1, 1000)]
        points = [p for p in grid if p + difference > 0 and 2 * p + difference < 1]
        if not points:
            continue

        def log_likelihood(p, d=difference):
            return only_a * math.log(p) + only_b * math.log(p + d) + (n - only_a - only_b) * math.log(1 - 2 * p - d)

        best = max(points, key=log_likelihood)
        variance = n * (2 * best + difference - difference * difference)
        if (only_b - only_a - n * difference) ** 2 <= Z_SCORE_95**2 * variance:
            kept.append(difference)
    return min(kept), max(kept)


@pytest.mark.parametrize("counts", [(3, 9, 40), (12, 2, 60)])
def test_paired_interval_equals_a_search_over_the_likelihood(counts):
    assert compute_paired_interval(*counts) == pytest.approx(compute_score_bounds(*counts), abs=0.012)


def test_paired_interval_of_extreme_counts():
    z2 = Z_SCORE_95**2
    for n in (1, 20, 400):  # no prompt differs: the bounds are the roots of n d^2 = z^2 d (1 - d)
        assert compute_paired_interval(0, 0, n) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)))
    assert compute_paired_interval(0, 50, 50)[1] == pytest.approx(1.0)
    assert compute_paired_interval(0, 0, 0) is None


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 400))
def test_paired_interval_contains_the_difference_and_is_symmetric(only_a, only_b, agreeing):
    n = only_a + only_b + agreeing
    low, high = compute_paired_interval(only_a, only_b, n)
    assert -1 <= low <= (only_b - only_a) / n <= high <= 1
    assert compute_paired_interval(only_b, only_a, n) == pytest.approx((-high, -low))


def test_bootstrap_equals_the_exact_distribution_of_three_prompts():
    # The means per prompt differ by 0, 0.5 and 1. All 27 resamples are equally likely.
    result = compute_paired_bootstrap([[0, 1], [0, 0], [0]], [[1, 0], [0, 1], [1, 1]])
    exact = sorted(sum(draw) / 3 for draw in itertools.product((0, 0.5, 1), repeat=3))
    assert result.difference == pytest.approx(0.5)
    # 1/27 of the resamples is 0, and 1/27 is 1; so the quantiles of 2.5 % are 0 and 1.
    assert (result.low, result.high) == (exact[0], exact[-1]) == (0, 1)
    assert result.p == pytest.approx(2 / 27, abs=0.02)


def test_bootstrap_equals_a_slow_loop():
    rng = random.Random(1)
    a = [[float(rng.random() < 0.5) for _ in range(4)] for _ in range(60)]
    b = [[float(rng.random() < 0.7) for _ in range(3)] for _ in range(60)]
    result = compute_paired_bootstrap(a, b, seed=3)
    differences = [sum(y) / 3 - sum(x) / 4 for x, y in zip(a, b, strict=True)]
    means = sorted(sum(rng.choice(differences) for _ in differences) / 60 for _ in range(2000))
    assert result.difference == pytest.approx(sum(differences) / 60)
    assert (result.low, result.high) == pytest.approx((means[50], means[1950]), abs=0.015)
    assert result == compute_paired_bootstrap(a, b, seed=3) != compute_paired_bootstrap(a, b, seed=4)


def test_bootstrap_of_equal_policies_is_not_significant():
    assert compute_paired_bootstrap([[1, 0]] * 9, [[0, 1]] * 9).p == 1.0
    assert compute_paired_bootstrap([], []) is None
    # 1/3 + 1/3 + 1/3 - 1 is not exactly 0 in floating point.
    assert compute_paired_bootstrap([[1 / 3, 1 / 3, 1 / 3]] * 3, [[1 / 3]] * 3).p == 1.0


def test_quantile_interpolates():
    assert [compute_quantile([1.0, 2.0, 4.0], q) for q in (0, 0.25, 0.5, 0.75, 1)] == [1, 1.5, 2, 3, 4]


def test_holm_by_hand():
    assert compute_holm_p([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compute_holm_p([0.5, 0.9]) == [1.0, 1.0] and compute_holm_p([]) == []


@pytest.mark.parametrize(
    ("low", "high", "p", "outcome"),
    [
        (-0.04, 0.02, 0.5, ComparisonOutcome.NOT_WORSE),
        (-0.05, -0.01, 0.001, ComparisonOutcome.NOT_WORSE),  # a loss, but surely not more than the margin
        (0.1, 0.3, 0.001, ComparisonOutcome.NOT_WORSE),
        (-0.20, -0.10, 0.001, ComparisonOutcome.WORSE),
        (-0.08, -0.01, 0.03, ComparisonOutcome.WORSE),
        (-0.08, -0.01, 0.06, ComparisonOutcome.UNDECIDED),  # the p after Holm's correction is too large
        (-0.08, 0.0, 0.049, ComparisonOutcome.UNDECIDED),
        (-0.3, 0.3, 1.0, ComparisonOutcome.UNDECIDED),
    ],
)
def test_outcome_with_a_margin_of_five_points(low, high, p, outcome):
    assert decide_noninferiority(low, high, p, 0.05) is outcome
