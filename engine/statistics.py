"""Compute statistics for several packages: intervals of fractions, paired tests, calibration of probabilities, and correlation.

The tests of a paired comparison are described in docs/evaluation.md ("Comparing two policies").
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import StatisticsError, correlation

Z_SCORE_95 = 1.959963984540054  # the 0.975 quantile of the normal distribution
SIGNIFICANCE_LEVEL = 0.05
_NUM_BINS = 10
_NUM_RESAMPLES = 5_000
_ROUNDING_ERROR = 1e-12  # of a sum of resampled differences


def compute_wilson_interval(hits: float, total: int) -> tuple[float, float] | None:
    """Return the 95 % score interval of a binomial fraction (Wilson 1927), or None without observations.

    `hits` may be fractional: a tie counts as half a hit.
    """
    if total == 0:
        return None
    fraction, z2 = hits / total, Z_SCORE_95 * Z_SCORE_95 / total
    center = fraction + z2 / 2
    half = Z_SCORE_95 * math.sqrt(fraction * (1 - fraction) / total + z2 / (4 * total))
    low = (center - half) / (1 + z2) if hits > 0 else 0.0  # exact, without a rounding error
    high = (center + half) / (1 + z2) if hits < total else 1.0
    return max(0.0, low), min(1.0, high)


def compute_brier_score(probabilities: Sequence[float]) -> float | None:
    """Return the mean of (1 - p)^2 over the probabilities of the preferred responses, or None for an empty sequence."""
    return math.fsum((1 - p) ** 2 for p in probabilities) / len(probabilities) if probabilities else None


def compute_calibration_error(predicted: Sequence[float], labels: Sequence[float], *, lowest: float = 0.0) -> float | None:
    """Return the expected calibration error, or None for empty sequences.

    The predictions are divided into ten bins of equal width from `lowest` to 1. The error is the mean over the bins of
    |mean prediction - mean label|, weighted by the size of the bins (Naeini et al. 2015). Labels may be soft.
    """
    if not predicted:
        return None
    bins: dict[int, list[float]] = {}
    for p, label in zip(predicted, labels, strict=True):
        index = min(_NUM_BINS - 1, int((p - lowest) / (1 - lowest) * _NUM_BINS))
        bins.setdefault(index, []).append(p - label)
    return math.fsum(abs(math.fsum(gaps)) for gaps in bins.values()) / len(predicted)


def compute_confidence_error(probabilities: Sequence[float]) -> float | None:
    """Return the calibration error of the confidence in a comparison, or None for an empty sequence.

    `probabilities` are the probabilities of the preferred responses. The confidence is max(p, 1 - p), from 0.5 to 1. Its label
    is 1 if p is above 0.5, 0 if p is below 0.5, and 0.5 if p is 0.5.
    """
    return compute_calibration_error(
        [max(p, 1 - p) for p in probabilities],
        [0.5 if p == 0.5 else float(p > 0.5) for p in probabilities],
        lowest=0.5,
    )


def compute_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Pearson's correlation, or 0 if `x` or `y` is constant."""
    try:
        return correlation(x, y)
    except StatisticsError:
        return 0.0


def compute_mcnemar_p(only_a: int, only_b: int) -> float:
    """Return the two-sided p of McNemar's exact test for two policies on the same prompts (McNemar 1947).

    `only_a` is the number of prompts with a hit of A and none of B, `only_b` the opposite. If the policies are equal, each of
    these prompts is in either group with probability 1/2. The p is not the mid-p.
    """
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def compute_paired_interval(only_a: int, only_b: int, total: int) -> tuple[float, float] | None:
    """Return the 95 % score interval of the rate of B minus the rate of A on the same prompts (Tango 1998), or None without prompts.

    `only_a` and `only_b` are those of `compute_mcnemar_p`, and `total` is the number of all prompts. The interval is not empty if
    all prompts agree: it is then plus and minus z^2 / (total + z^2).
    """
    if total == 0:
        return None

    def compute_excess(difference: float) -> float:
        """Return a value that is positive if the difference is rejected at the level of 5 %."""
        # The most likely probability of "only A" if the true difference is `difference`: the root of a quadratic equation.
        a = 2 * total
        b = (2 * total - only_b + only_a) * difference - only_a - only_b
        c = -only_a * difference * (1 - difference)
        p_only_a = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = total * max(0.0, 2 * p_only_a + difference * (1 - difference))
        return float((only_b - only_a - total * difference) ** 2 - Z_SCORE_95**2 * variance)

    estimate = (only_b - only_a) / total
    return _find_boundary(compute_excess, estimate, -1.0), _find_boundary(compute_excess, estimate, 1.0)


def _find_boundary(function: Callable[[float], float], inside: float, outside: float) -> float:
    """Return the point between `inside` and `outside` at which the function becomes positive, by bisection."""
    for _ in range(60):
        middle = (inside + outside) / 2
        if function(middle) > 0:
            outside = middle
        else:
            inside = middle
    return (inside + outside) / 2


@dataclass(frozen=True)
class PairedBootstrap:
    """Holds the mean difference B - A over prompts, its 95 % interval and the two-sided p."""

    difference: float
    low: float
    high: float
    p: float


def compute_paired_bootstrap(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], *, seed: int = 0, num_resamples: int = _NUM_RESAMPLES
) -> PairedBootstrap | None:
    """Compare two policies with several samples for each prompt, or return None without prompts.

    `a[i]` and `b[i]` are the values of the samples for prompt i; both must have at least one. The mean for each prompt is computed
    first, so a prompt counts once. Prompts are then resampled with replacement (Efron and Tibshirani 1993). The interval has the
    0.025 and 0.975 quantiles of the resampled means. The p is twice the smaller share of resampled means on either side of 0; a
    mean of 0 counts on both sides, and one resample is added to each side, so p is never 0. The same seed gives the same result.
    """
    differences = [math.fsum(y) / len(y) - math.fsum(x) / len(x) for x, y in zip(a, b, strict=True)]
    if not differences:
        return None
    n, rng = len(differences), random.Random(f"bootstrap/{seed}")
    means = sorted(sum(rng.choices(differences, k=n)) / n for _ in range(num_resamples))
    not_above = sum(mean <= _ROUNDING_ERROR for mean in means)
    not_below = sum(mean >= -_ROUNDING_ERROR for mean in means)
    p = min(1.0, 2 * (min(not_above, not_below) + 1) / (num_resamples + 1))
    return PairedBootstrap(math.fsum(differences) / n, compute_quantile(means, 0.025), compute_quantile(means, 0.975), p)


def compute_quantile(ordered: Sequence[float], probability: float) -> float:
    """Return a quantile of a sorted sequence, with linear interpolation."""
    place = probability * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def compute_holm_p(p_values: Sequence[float]) -> list[float]:
    """Return the p values after Holm's correction for the number of tests (Holm 1979), in the same order.

    If each null hypothesis with a corrected p below 0.05 is rejected, the probability of a false rejection is at most 0.05.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


class ComparisonOutcome(StrEnum):
    """Whether B is worse than A: the three outcomes of a non-inferiority test with a margin."""

    WORSE = "worse"
    NOT_WORSE = "not worse by margin"
    UNDECIDED = "undecided"


def decide_noninferiority(low: float, high: float, p: float, margin: float) -> ComparisonOutcome:
    """Decide whether B is worse than A, from the 95 % interval of (B - A), on a scale on which higher is better.

    * NOT_WORSE: `low` is at least -margin. A loss of more than the margin is excluded. A smaller loss is not.
    * WORSE: otherwise, if `high` is below 0 and `p` (after Holm's correction) is below 0.05. A loss is certain, and it may be larger
      than the margin.
    * UNDECIDED: in all other cases. More prompts are needed.
    """
    if low >= -margin:
        return ComparisonOutcome.NOT_WORSE
    if high < 0 and p < SIGNIFICANCE_LEVEL:
        return ComparisonOutcome.WORSE
    return ComparisonOutcome.UNDECIDED
