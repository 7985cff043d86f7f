"""95 % confidence intervals of a share and of a mean."""

from __future__ import annotations

import math

Z = 1.959964


def of_share(hits: int, of: int) -> tuple[float, float] | None:
    """Wilson's score interval of a binomial share (Wilson 1927); None without observations."""
    if of == 0:
        return None
    p, z2 = hits / of, Z * Z / of
    middle, half = p + z2 / 2, Z * math.sqrt(p * (1 - p) / of + z2 / (4 * of))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def of_mean(mean: float | None, deviation: float | None, of: int) -> tuple[float, float] | None:
    """The normal interval of a mean with sample standard deviation `deviation`; None with fewer than two observations."""
    if mean is None or deviation is None or of < 2:
        return None
    half = Z * deviation / math.sqrt(of)
    return mean - half, mean + half
