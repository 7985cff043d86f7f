"""Stop signals: pairs of them at random times neither hang a process nor go unnoticed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

# A main thread that is inside the event's own lock most of the time, which is where a handler that sets it would hang.
CODE = """
import threading
from engine.stop_signals import stop_on_signals
stop = stop_on_signals()
print("ready", flush=True)
while not stop.is_set():
    stop.wait(0.00001)
print("stopped", flush=True)
"""
HANGS_AFTER_S = 60
ENDS = (0, -signal.SIGINT, -signal.SIGTERM)  # an interpreter that is ending has the default handlers again
PAIRS = int(os.environ.get("CHARTER_SIGNAL_PAIRS", "30"))


def start(code=CODE):
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_pairs_of_signals_always_stop_a_process():
    rng = random.Random(0)
    for _ in range(PAIRS):
        process = start()
        for _ in range(2):
            time.sleep(rng.uniform(0, 0.002))  # the gap is the input of this test
            process.send_signal(rng.choice((signal.SIGINT, signal.SIGTERM)))
        out, _ = process.communicate(timeout=HANGS_AFTER_S)
        assert out == "stopped\n" and process.returncode in ENDS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_later_signal_ends_a_process_that_does_not_stop(number):
    code = CODE.replace("while not stop.is_set():\n    stop.wait(0.00001)", "while True:\n    threading.Event().wait(0.01)")
    with start(code) as process:
        process.send_signal(number)
        deadline = time.monotonic() + HANGS_AFTER_S
        while process.poll() is None:
            assert time.monotonic() < deadline
            process.send_signal(number)
            time.sleep(0.05)  # the pace of the signals, not a wait for a result
        assert process.returncode == 128 + number


def test_a_storm_of_signals_is_one_request():
    with start() as process:
        for _ in range(5_000):
            process.send_signal(signal.SIGTERM)
            if process.poll() is not None:
                break
        assert process.communicate(timeout=HANGS_AFTER_S)[0] == "stopped\n"
        assert process.returncode in ENDS
