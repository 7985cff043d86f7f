"""Refuse a limit of OpenMP with which PyTorch computes wrong numbers.

OMP_THREAD_LIMIT does not change the number of threads that PyTorch divides its work by. If fewer threads run, a part of the work is not
done: with PyTorch 2.13 and OMP_THREAD_LIMIT=1, a linear layer in bf16 on two threads returns wrong values without an error.
"""

from __future__ import annotations

import os

from engine.errors import UsageError

_VARIABLE = "OMP_THREAD_LIMIT"


def require_thread_limit(num_threads: int) -> None:
    """Raise UsageError if OpenMP may start fewer threads than PyTorch uses."""
    limit = os.environ.get(_VARIABLE, "")
    if limit.isdecimal() and int(limit) < num_threads:
        raise UsageError(
            f"{_VARIABLE}={limit} is below the number of threads of PyTorch, {num_threads}",
            "PyTorch then computes wrong numbers without an error",
            f"type: unset {_VARIABLE}    (to use fewer threads, set models.threads and OMP_NUM_THREADS)",
        )
