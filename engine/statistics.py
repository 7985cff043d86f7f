"""Compute statistics for several packages: intervals of fractions, calibration of probabilities, and correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import StatisticsError, correlation

Z_SCORE_95 = 1.959963984540054  # the 0.975 quantile of the normal distribution
_NUM_BINS = 10


def compute_wilson_interval(hits: float, total: int) -> tuple[float, float] | None:
    """Return the 95 % score interval of a binomial fraction (Wilson 1927), or None without observations.

    `hits` may be fractional: a tie counts as half a hit.
    """
    if total == 0:
        return None
    fraction, z2 = hits / total, Z_SCORE_95 * Z_SCORE_95 / total
    center = fraction + z2 / 2
    half = Z_SCORE_95 * math.sqrt(fraction * (1 - fraction) / total + z2 / (4 * total))
    return max(0.0, (center - half) / (1 + z2)), min(1.0, (center + half) / (1 + z2))


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
