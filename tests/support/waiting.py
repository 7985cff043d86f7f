"""Waiting for a condition in tests, with one limit that only a hang reaches."""

import time

# A passing test waits for its condition and never for this limit, so the limit may be far above what a slow machine needs.
HANG_S = 600.0


def wait_until(condition, host=None, *, description="the condition is met", interval_s=0.02):
    """Wait until `condition()` is true; raise what failed in `host`, or TimeoutError after HANG_S seconds."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {HANG_S:.0f} s it does not hold that {description}")
        if host is None:
            time.sleep(interval_s)
        else:
            host.raise_if_failed()
            host.failure_event.wait(interval_s)


def read_until_hang(process, handle_line=None):
    """Read the lines of a process's standard output until it ends; kill a process that prints nothing for HANG_S seconds.

    Return the output. Reading stops at the first line for which `handle_line(line)` is true.
    """
    from threading import Timer

    lines = []
    while True:
        watchdog = Timer(HANG_S, process.kill)
        watchdog.start()
        line = process.stdout.readline()
        watchdog.cancel()
        lines.append(line)
        if not line or (handle_line and handle_line(line)):
            return "".join(lines)
