"""Start a command although a dependency is unreachable or full: wait for it with --wait. End a process with unfinished threads.

A process that already runs waits for its dependencies in any case. A process that starts exits with code 3, so that a wrong
address is reported at once. With --wait, it waits as well.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import TypeVar

import click

from charter.console import print_progress
from engine.backoff import compute_backoff
from engine.errors import DependencyUnreachable, is_disk_full
from engine.host import Host
from engine.text import format_count

T = TypeVar("T")

_RETRY_RANGE_S = (0.5, 5.0)
_REPORT_INTERVAL_S = 30.0


def exit_if_abandoned(host: Host, exit_code: int) -> None:
    """End the process if a thread of a closed host did not finish in time. `sys.exit` would wait for the unfinished threads.

    The exit code is that of the failure of the host, if there is one. Otherwise it is `exit_code`.
    """
    if not host.abandoned_threads:
        return
    print_progress(
        f"stopped before {', '.join(host.abandoned_threads)} finished; the next start processes the uncommitted records again"
    )
    sys.stderr.flush()
    os._exit(exit_code if host.failure is None else getattr(host.failure, "exit_code", 1))


wait_option = click.option(
    "--wait", is_flag=True, help="At the start, wait for a dependency that is unreachable or full instead of exiting."
)


def start_when_ready(start: Callable[[], T], *, wait: bool) -> T:
    """Return the result of `start`. If `wait` is true, call it again while a dependency is unreachable or a disk is full.

    The reason of the wait is printed at once, when it changes, and every 30 seconds. `start` must close what it has opened when
    it raises an error.
    """
    started = time.monotonic()
    reported_reason, reported_at = "", started
    for failures in count():
        try:
            result = start()
        except (DependencyUnreachable, OSError) as error:
            if not wait or not (isinstance(error, DependencyUnreachable) or is_disk_full(error)):
                raise
            reason, now = _describe_reason(error), time.monotonic()
            if reason != reported_reason or now - reported_at >= _REPORT_INTERVAL_S:
                print_progress(f"waiting ({now - started:.0f} s so far): {reason}", logging.WARNING)
                reported_reason, reported_at = reason, now
        else:
            if failures:
                print_progress(
                    f"started after {format_count(failures, 'failed attempts')} in {time.monotonic() - started:.0f} s"
                )
            return result
        threading.Event().wait(compute_backoff(failures, _RETRY_RANGE_S))
    raise AssertionError("count() does not end")


def _describe_reason(error: Exception) -> str:
    if isinstance(error, DependencyUnreachable):
        return f"{error.what}: {error.why}" if error.why else error.what
    return f"{error}"
