"""The 95 % confidence interval of a share."""

from __future__ import annotations

import math
from typing import Any

_Z_95 = 1.959964


def compute_wilson_interval(hits: float, total: int) -> tuple[float, float] | None:
    """Wilson's score interval of a binomial share (Wilson 1927); None without observations. A tie is half a hit."""
    if total == 0:
        return None
    p, z2 = hits / total, _Z_95 * _Z_95 / total
    middle, half = p + z2 / 2, _Z_95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def compute_share(name: str, hits: float, total: int) -> dict[str, Any]:
    """A share and its interval."""
    return {f"{name}_share": hits / total if total else None, f"{name}_interval": compute_wilson_interval(hits, total)}
