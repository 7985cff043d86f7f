"""Stop signals: two signals at random times neither hang a process nor are lost."""

import os
import random
import signal
import subprocess
import sys
import time

import duckdb
import pytest

from engine.stop_signals import is_interrupted_query
from tests.support.signals import accept_interrupts
from tests.support.waiting import HANG_S

# The main thread holds the event's lock most of the time; a signal handler that sets the event would then deadlock.
CODE = """
import threading
from engine.stop_signals import stop_on_signals
stop = stop_on_signals()
print("ready", flush=True)
while not stop.is_set():
    stop.wait(0.00001)
print("stopped", flush=True)
"""
ENDS = (0, -signal.SIGINT, -signal.SIGTERM)  # during interpreter shutdown the default handlers apply
PAIRS = int(os.environ.get("CHARTER_SIGNAL_PAIRS", "30"))


def start(code=CODE):
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_signals_always_stop_a_process():
    rng = random.Random(0)
    for _ in range(PAIRS):
        process = start()
        for _ in range(2):
            time.sleep(rng.uniform(0, 0.002))  # the interval between the signals is what the test varies
            process.send_signal(rng.choice((signal.SIGINT, signal.SIGTERM)))
        out, _ = process.communicate(timeout=HANG_S)
        assert out == "stopped\n" and process.returncode in ENDS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_repeated_signals_end_a_process_that_does_not_stop(number):
    code = CODE.replace("while not stop.is_set():\n    stop.wait(0.00001)", "while True:\n    threading.Event().wait(0.01)")
    with start(code) as process:
        process.send_signal(number)
        deadline = time.monotonic() + HANG_S
        while process.poll() is None:
            assert time.monotonic() < deadline
            process.send_signal(number)
            time.sleep(0.05)  # the interval between signals
        assert process.returncode == 128 + number


def test_many_signals_are_one_stop_request():
    with start() as process:
        for _ in range(5_000):
            process.send_signal(signal.SIGTERM)
            if process.poll() is not None:
                break
        assert process.communicate(timeout=HANG_S)[0] == "stopped\n"
        assert process.returncode in ENDS


INTERRUPT_CODE = """
import signal, time
if {ignored}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
from charter.__main__ import end_on_interrupt
from engine.stop_signals import interrupt_once
end_on_interrupt()
interrupt_once()
try:
    print("ready", flush=True)
    time.sleep({sleep_s})
    print("not interrupted", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    time.sleep(600)  # until the second signal
"""


def test_second_interrupt_ends_a_process_without_a_traceback():
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPT_CODE.format(ignored=False, sleep_s=600)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=accept_interrupts,  # noqa: PLW1509
    )  # fmt: skip
    for line in ("ready\n", "interrupted\n"):
        assert process.stdout.readline() == line
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == -signal.SIGINT and not errors


def test_ignored_interrupts_stay_ignored():
    process = start(INTERRUPT_CODE.format(ignored=True, sleep_s=0.2))
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=HANG_S)
    assert out == "not interrupted\n" and process.returncode == 0


def test_interrupt_of_a_query_is_recognized():
    def raise_interrupt(number, frame):
        raise KeyboardInterrupt

    connection = duckdb.connect(config={"threads": 1})  # this thread runs the query, and looks for signals between its parts
    previous = signal.signal(signal.SIGALRM, raise_interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(RuntimeError) as error:
            connection.sql("SELECT count(*) FROM range(100_000_000_000)").fetchall()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        connection.close()
    assert is_interrupted_query(error.value) and not is_interrupted_query(RuntimeError("another error"))
