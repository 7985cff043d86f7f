"""Progress of long work: plain lines without a terminal, one changing line on a terminal, nothing for short work."""

import os
import pty
import subprocess
import sys

import pytest

from charter import progress as progress_module
from charter.progress import format_duration, show_progress
from tests.support.waiting import wait_until


def test_plain_lines_have_the_step_the_share_the_rate_and_the_remaining_time(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "INTERVAL_S", 0.01)
    printed = []

    def is_printed(*parts):
        printed.extend(capsys.readouterr().err.splitlines())
        return any(all(part in line for part in parts) for line in printed)

    with show_progress("read p.jsonl", "rows") as progress:
        progress.start_step("computing the hash")
        wait_until(lambda: is_printed("read p.jsonl: computing the hash: ", "so far"))
        progress.start_step("publishing", num_total=200)
        progress.num_done = 50
        wait_until(lambda: is_printed("publishing: 50 of 200 rows, 25%, ", " rows/s, ", " left"))


def test_short_work_prints_nothing(capsys):
    with show_progress("read p.jsonl", "rows") as progress:
        progress.num_done = 5
    assert capsys.readouterr().err == ""


def test_error_in_the_work_ends_the_display():
    with pytest.raises(ZeroDivisionError), show_progress("read p.jsonl", "rows"):
        raise ZeroDivisionError


TERMINAL_CODE = """
import sys, threading, time
from charter import progress
progress.DELAY_S = 0.0
with progress.show_progress("read [p].jsonl", "rows") as work:
    work.num_total, work.num_done = 200, 50
    while threading.active_count() < 3:  # the main thread, the display and the refresh of rich
        time.sleep(0.01)
    print("a row is wrong", file=sys.stderr)
    print("to the pipe")
print("end", file=sys.stderr)
"""


def test_terminal_shows_one_line_and_standard_output_stays_in_its_pipe():
    main, other = pty.openpty()
    command = [sys.executable, "-c", TERMINAL_CODE]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=other, env=environment) as process:
        os.close(other)
        text = b""
        while chunk := _read(main):
            text += chunk
        assert process.stdout.read() == b"to the pipe\n" and process.wait() == 0
    os.close(main)
    assert b"read [p].jsonl: 50 of 200 rows, 25%" in text and b"a row is wrong\r\n" in text and text.endswith(b"end\r\n")


def _read(descriptor):
    try:
        return os.read(descriptor, 10_000)
    except OSError:  # the other end is closed
        return b""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
