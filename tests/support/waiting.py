"""Waiting for a condition in tests, with one limit that only a hang reaches."""

import time

# A passing test waits for its condition and never for this limit, so the limit may be far above what a slow machine needs.
HANG_S = 600.0
_PAUSE_FACTOR, _MAX_PAUSE_S = 3.0, 0.3  # relative to the duration of a check


def wait_until(condition, host=None, *, description="the condition is met", interval_s=0.02):
    """Wait until `condition()` is true; raise what failed in `host`, or TimeoutError after HANG_S seconds.

    A condition that is expensive to check is checked less often, so that it leaves the processor to the work it waits for.
    """
    deadline = time.monotonic() + HANG_S
    while True:
        checked_at = time.monotonic()
        if condition():
            return
        now = time.monotonic()
        if now > deadline:
            raise TimeoutError(f"after {HANG_S:.0f} s it does not hold that {description}")
        pause_s = max(interval_s, min(_PAUSE_FACTOR * (now - checked_at), _MAX_PAUSE_S))
        if host is None:
            time.sleep(pause_s)
        else:
            host.raise_if_failed()
            host.failure_event.wait(pause_s)


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
