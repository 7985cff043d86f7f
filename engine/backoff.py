"""The pause before another attempt: exponential backoff with full jitter."""

from __future__ import annotations

import random

BACKOFF_RANGE_S = (0.5, 30.0)  # the upper limit of the first pause, and of the longest


def compute_backoff(failures: int, range_s: tuple[float, float] | None = None) -> float:
    """Return a random pause in seconds after `failures` earlier failures.

    The upper limit doubles with each failure, from the first to the second number of `range_s` (BACKOFF_RANGE_S if None). Full jitter keeps clients that
    failed together from retrying together (https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/).
    """
    first, longest = range_s or BACKOFF_RANGE_S
    return random.uniform(0, min(longest, first * 2 ** min(failures, 32)))
