"""The 95 % confidence interval of a share."""

from __future__ import annotations

import math
from typing import Any

Z = 1.959964


def of_share(hits: float, of: int) -> tuple[float, float] | None:
    """Wilson's score interval of a binomial share (Wilson 1927); None without observations. A tie is half a hit."""
    if of == 0:
        return None
    p, z2 = hits / of, Z * Z / of
    middle, half = p + z2 / 2, Z * math.sqrt(p * (1 - p) / of + z2 / (4 * of))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def shares(name: str, hits: float, of: int) -> dict[str, Any]:
    """A share and its interval."""
    return {f"{name}_share": hits / of if of else None, f"{name}_interval": of_share(hits, of)}
