"""Statistics that several packages share: the interval of a fraction, and the calibration of probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    """Return the mean squared distance of each p(preferred response) from 1, or None for an empty sequence."""
    return math.fsum((1 - p) ** 2 for p in probabilities) / len(probabilities) if probabilities else None


def compute_calibration_error(probabilities: Sequence[float]) -> float | None:
    """Return the expected calibration error of p(preferred response), or None for an empty sequence.

    Ten bins of confidence from 0.5 to 1: the mean distance between confidence and the fraction of correct labels, weighted by
    the size of the bins (Naeini et al. 2015). A label of exactly one half is half correct.
    """
    if not probabilities:
        return None
    bins: dict[int, list[float]] = {}
    for p in probabilities:
        confidence = max(p, 1 - p)
        index = min(_NUM_BINS - 1, int((confidence - 0.5) * 2 * _NUM_BINS))
        bins.setdefault(index, []).append(confidence - (0.5 if p == 0.5 else float(p > 0.5)))
    return math.fsum(abs(math.fsum(gaps)) for gaps in bins.values()) / len(probabilities)
