"""Stop on SIGINT and SIGTERM without taking a lock inside a signal handler.

A handler can run between any two bytecodes of the main thread, even while the main thread holds the lock of a
`threading.Event`. If the handler then called `Event.set`, it would wait for this lock forever. So the handler only writes one
byte to a pipe. A daemon thread reads the pipe and sets the event.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

# Signals within this time count as one signal, because the command `timeout` sends a signal to the process and to its group.
FORCE_INTERVAL_S = 1.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def interrupt_once() -> None:
    """Let the first SIGINT raise KeyboardInterrupt. A second SIGINT ends the process at once.

    A second KeyboardInterrupt would be raised while the process handles the first one, and Python would print a traceback.
    """

    def raise_interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):
        signal.signal(signal.SIGINT, raise_interrupt)


def is_interrupted_query(error: BaseException) -> bool:
    """Return whether an error is Ctrl-C during a query. DuckDB then raises RuntimeError instead of KeyboardInterrupt."""
    return type(error) is RuntimeError and str(error) == "Query interrupted"


def stop_on_signals(on_stop: Callable[[], None] = lambda: None) -> threading.Event:
    """Return an event that SIGINT and SIGTERM set. Call this function in the main thread.

    `on_stop` is called in another thread before the event is set. A second signal more than FORCE_INTERVAL_S after the first
    ends the process at once. The exit code is then 128 plus the number of the signal, as in a shell.
    """
    stop = threading.Event()
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def write_signal_number(number: int, _: object) -> None:
        with suppress(BlockingIOError):  # the pipe is full of unread signals, so another signal has no effect
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
