"""Stop on SIGINT and SIGTERM without taking a lock inside a signal handler.

A handler may run between any two bytecodes of the main thread, also while that thread holds the lock of a `threading.Event`.
A handler that calls `Event.set` would then wait for itself forever. So the handler only writes one byte to a pipe, and one
daemon thread reads the pipe and sets the event.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

FORCE_INTERVAL_S = 1.0  # `timeout` and some supervisors signal a process and its group: two signals at once are one request
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def stop_on_signals(on_stop: Callable[[], None] = lambda: None) -> threading.Event:
    """Return an event that SIGINT and SIGTERM set. A signal more than one second after the first ends the process at once.

    `on_stop` is called in another thread before the event is set.

    Call it in the main thread. The exit code of a forced end is 128 plus the number of the signal, as a shell reports it.
    """
    stop = threading.Event()
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def write_signal_number(number: int, _: object) -> None:
        with suppress(BlockingIOError):  # the pipe holds thousands of signals that are not read yet: one more changes nothing
            os.write(write_end, bytes([number]))

    def set_event_when_signaled() -> None:
        first_at = 0.0
        while received := os.read(read_end, 1):
            now = time.monotonic()
            if not first_at:
                first_at = now
                try:
                    on_stop()
                finally:
                    stop.set()
            elif now - first_at > FORCE_INTERVAL_S:
                os._exit(128 + received[0])

    threading.Thread(target=set_event_when_signaled, name="stop-signals", daemon=True).start()
    for number in _STOP_SIGNALS:
        signal.signal(number, write_signal_number)
    return stop
