"""Count the fetches of Kafka tokens in this process (engine/bus/tokens.py), for its metrics."""

from __future__ import annotations

import time
from collections import Counter


class TokenStatistics:
    """Holds the number of fetches by outcome, and when the current token of each open provider expires (monotonic clock)."""

    def __init__(self) -> None:
        self.fetch_counts: Counter[str] = Counter()
        self.expiries: dict[int, float] = {}

    def get_remaining_s(self) -> float | None:
        """Return the seconds until the first current token expires, or None without a provider."""
        expiries = list(self.expiries.values())
        return max(0.0, min(expiries) - time.monotonic()) if expiries else None


TOKEN_STATISTICS = TokenStatistics()  # the tokens of this process
