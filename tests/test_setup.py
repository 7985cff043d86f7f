"""setup.sh shows that a long command still runs, and stops it on Ctrl-C."""

import os
import signal
import subprocess
from pathlib import Path

from tests.support.signals import accept_interrupts
from tests.support.waiting import HANG_S, wait_until

ROOT = Path(__file__).parents[1]
SCRIPT = (ROOT / "setup.sh").read_text(encoding="utf-8")
FUNCTIONS = SCRIPT[SCRIPT.index("interval=15") : SCRIPT.index("pip=(")].replace("interval=15", "interval=1")


def start_script(commands):
    return subprocess.Popen(
        ["bash", "-c", f"set -euo pipefail\n{FUNCTIONS}\n{commands}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=accept_interrupts,  # noqa: PLW1509
    )  # fmt: skip


def test_a_long_command_prints_the_time_and_its_last_line():
    process = start_script("quietly bash -c 'echo Collecting torch; sleep 3.5'; echo done")
    output, errors = process.communicate(timeout=HANG_S)
    lines = output.splitlines()
    assert (process.returncode, lines[-1], errors) == (0, "done", "")
    assert len(lines) >= 3 and all(line.endswith("s so far: Collecting torch") for line in lines[:-1])


def test_the_output_of_a_failed_command_is_printed():
    process = start_script("quietly bash -c 'echo no space left; exit 7' || { echo failed; exit 1; }")
    output, errors = process.communicate(timeout=HANG_S)
    assert (process.returncode, output, errors) == (1, "failed\n", "no space left\n")


def test_ctrl_c_stops_the_command(tmp_path):
    file = tmp_path / "pid"
    process = start_script(f"quietly bash -c 'echo $$ >{file}; exec sleep 1000'")
    wait_until(lambda: file.exists() and file.read_text().strip())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=HANG_S)
    assert process.returncode == 130
    wait_until(lambda: not Path(f"/proc/{file.read_text().strip()}").exists() or is_zombie(int(file.read_text())))


def is_zombie(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True
