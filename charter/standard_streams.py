"""Prepare the standard streams of a command: closed streams, characters that the output does not support, and closed pipes."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NoReturn

from engine.errors import UsageError

BROKEN_PIPE_EXIT_CODE = 141  # 128 + SIGPIPE, the exit code of `yes | head -1` and other tools


def prepare_standard_streams() -> None:
    """Make the standard streams safe to use. Output to a closed stream is discarded. Input from a closed stream is an error.

    A closed descriptor (`>&-` in a shell) is replaced by the null device. Otherwise the next file that this process opens, such
    as the database, would get its number, and a library that prints could write into the file.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = _ClosedInput()
    sys.stdout = sys.stdout or io.TextIOWrapper(open(1, "wb", closefd=False))  # noqa: SIM115
    sys.stderr = sys.stderr or io.TextIOWrapper(open(2, "wb", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # print characters as escapes if the output does not support them
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _ClosedInput(io.TextIOBase):
    """The standard input if it is closed. Each read raises UsageError."""

    @property
    def buffer(self) -> BinaryIO:
        self._fail()

    def read(self, size: int | None = -1, /) -> str:
        self._fail()

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        self._fail()

    def _fail(self) -> NoReturn:
        raise UsageError(
            "standard input is closed",
            "this command reads standard input, and the program that started it has closed the input",
            "pipe the input into the command, or redirect it: charter COMMAND < FILE",
        )


class ReaderClosed(Exception):
    """The reader of the output has closed it, e.g. `| head`. It is not an OSError, which click would turn into exit code 1."""


@contextmanager
def detect_closed_reader() -> Iterator[None]:
    """Raise ReaderClosed instead of BrokenPipeError, if the broken pipe is the output of this process and not a connection."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if _has_closed_reader():
            raise ReaderClosed from None
        raise


def _has_closed_reader() -> bool:
    poller = select.poll()
    for descriptor in (1, 2):
        poller.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poller.poll(0))


def discard_output() -> None:
    """Send all further output to the null device, so that the flush at the end of the process does not fail again."""
    null_device = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null_device, descriptor)
