"""Show the progress of long work: a rich line on a terminal, and elsewhere a plain line every INTERVAL_S.

The work updates an `engine.progress.WorkProgress`. A thread displays it, so that a call that takes minutes is also shown. Work
that ends within DELAY_S shows nothing. A terminal has one such line: work inside other work that is displayed prints plain lines.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from charter.console import is_logging_json, print_progress
from engine.progress import WorkProgress

DELAY_S = 1.0  # the work must take longer than this to be shown
INTERVAL_S = 15.0  # seconds between two plain lines; a user must not wait longer than 20 s
_TERMINAL_INTERVAL_S = 0.25
_terminal_line = threading.Lock()  # held by the display that has the line of the terminal


@contextmanager
def show_progress(title: str, unit: str, progress: WorkProgress | None = None) -> Iterator[WorkProgress]:
    """Display the progress of the block on standard error, with its rate, its share and the remaining time.

    `unit` is the plural noun of the items, such as "rows". Yield `progress`, or a new WorkProgress, which the block updates.
    """
    progress = progress or WorkProgress()
    done = threading.Event()
    has_line = sys.stderr.isatty() and not is_logging_json() and _terminal_line.acquire(blocking=False)
    show = _show_on_terminal if has_line else _print_lines
    thread = threading.Thread(target=show, args=(title, unit, progress, done), name="progress", daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        done.set()
        thread.join()
        if has_line:
            _terminal_line.release()


@contextmanager
def claim_terminal_line() -> Iterator[None]:
    """Keep the line of the terminal for another display in the block. Work inside the block prints plain lines."""
    claimed = _terminal_line.acquire(blocking=False)
    try:
        yield
    finally:
        if claimed:
            _terminal_line.release()


def _format_progress(progress: WorkProgress, unit: str) -> str:
    """Return a line about the current step, such as "publishing: 120,000 rows, 24 %, 9,000 rows/s, 42 s left"."""
    elapsed, share = time.monotonic() - progress.started_at, progress.get_share()
    parts = []
    if progress.num_done:
        total = f" of {progress.num_total:,}" if progress.num_total else ""
        parts.append(f"{progress.num_done:,}{total} {unit}")
    if share is not None:
        parts.append(f"{share:.0%}")
    if progress.num_done and elapsed > 0:
        rate = progress.num_done / elapsed
        parts.append(f"{rate:,.1f} {unit}/s" if rate < 10 else f"{rate:,.0f} {unit}/s")
    if share and elapsed > 0:
        parts.append(f"{format_duration(elapsed * (1 - share) / share)} left")
    else:
        parts.append(f"{format_duration(elapsed)} so far")
    return (f"{progress.step}: " if progress.step else "") + ", ".join(parts)


def format_duration(seconds: float) -> str:
    """Format a duration, such as "42 s", "3 min 5 s" or "2 h 10 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _print_lines(title: str, unit: str, progress: WorkProgress, done: threading.Event) -> None:
    while not done.wait(INTERVAL_S):
        print_progress(f"{title}: {_format_progress(progress, unit)}", logging.INFO)


def _show_on_terminal(title: str, unit: str, progress: WorkProgress, done: threading.Event) -> None:
    if done.wait(DELAY_S):
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=20))
    # The line is removed at the end. While it is shown, rich prints other lines of the terminal above it. Standard output in a
    # pipe or a file must stay there.
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as display:
        task = display.add_task(title, total=None)
        while True:
            share = progress.get_share()
            description = f"{title}: {_format_progress(progress, unit)}"
            display.update(task, description=description, total=None if share is None else 1.0, completed=share or 0.0)
            if done.wait(_TERMINAL_INTERVAL_S):
                return
