"""Signals of processes that tests start."""

import signal


def accept_interrupts() -> None:
    """Restore the default reaction to Ctrl-C. A shell that starts the tests in the background ignores it for all processes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
