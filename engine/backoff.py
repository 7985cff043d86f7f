"""Compute the pause before a retry: exponential backoff with full jitter."""

from __future__ import annotations

import random

BACKOFF_RANGE_S = (0.5, 30.0)  # the upper limit of the first pause, and the upper limit of every pause


def compute_backoff(failures: int, range_s: tuple[float, float] | None = None) -> float:
    """Return a random pause in seconds before the next attempt, after `failures` failed attempts.

    The upper limit of the pause starts at the first number of `range_s` and doubles with each failure, up to the second number.
    If `range_s` is None, BACKOFF_RANGE_S is used. With full jitter, clients that failed at the same time retry at different
    times (https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/).
    """
    first, longest = range_s or BACKOFF_RANGE_S
    return random.uniform(0, min(longest, first * 2 ** min(failures, 32)))
