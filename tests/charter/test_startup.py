"""Starting while a dependency is unreachable or full: exit code 3, or a wait with --wait."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from charter import startup
from charter.cli import main
from charter.startup import start_when_ready
from engine.errors import BusUnreachable, StoreFull, UsageError
from tests.support.deployment import Deployment
from tests.support.kafka import Broker
from tests.support.waiting import HANG_S


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(startup, "_RETRY_RANGE_S", (0.001, 0.01))


def make_start(errors):
    """Return a function that raises each of these errors once and then returns "ready"."""
    remaining = list(errors)

    def start():
        if remaining:
            raise remaining.pop(0)
        return "ready"

    return start


def test_a_start_waits_for_what_is_unreachable_or_full_and_says_so_once(capsys):
    unreachable = [BusUnreachable("the log is unreachable", "connection refused")] * 3
    start = make_start([*unreachable, StoreFull("the disk is full"), OSError(errno.ENOSPC, "No space left", "x.lock")])
    assert start_when_ready(start, wait=True) == "ready"
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in lines[:3]] == [
        "the log is unreachable: connection refused", "the disk is full", "[Errno 28] No space left: 'x.lock'"
    ]  # fmt: skip
    assert lines[3].startswith("started after 5 failed attempts") and len(lines) == 4


def test_the_reason_is_repeated_at_intervals(capsys, monkeypatch):
    monkeypatch.setattr(startup, "_REPORT_INTERVAL_S", 0.0)
    start_when_ready(make_start([BusUnreachable("the log is unreachable")] * 3), wait=True)
    assert capsys.readouterr().err.count("the log is unreachable") == 3


@pytest.mark.parametrize("error", [UsageError("wrong setting"), OSError(errno.EACCES, "Permission denied")])
def test_a_start_does_not_wait_for_other_errors(error):
    with pytest.raises(type(error)):
        start_when_ready(make_start([error]), wait=True)


def test_without_the_option_a_start_fails_at_once():
    with pytest.raises(BusUnreachable):
        start_when_ready(make_start([BusUnreachable("the log is unreachable")]), wait=False)


def test_a_full_disk_has_exit_code_3(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["charter", "config"])
    monkeypatch.setattr(
        "charter.commands.config.COMMAND.callback", lambda **_: os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    )
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 3 and "No space left" in capsys.readouterr().err


def start_charter(deployment, *arguments):
    flags = [word for key, value in deployment.flags.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "charter", *arguments, *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_sink_waits_until_another_program_closes_the_database(tmp_path):
    deployment = Deployment(tmp_path / "data")
    deployment.publish("One?")
    deployment.call("run", "--until-done")
    deployment.publish("Two?")
    with duckdb.connect(str(deployment.folder / "charter.duckdb")):
        failed = start_charter(deployment, "run", "--until-done")
        assert "has" in failed.communicate(timeout=HANG_S)[1] and failed.returncode == 3
        process = start_charter(deployment, "run", "--until-done", "--wait")
        assert "charter.duckdb open" in process.stderr.readline()
    rest = process.communicate(timeout=HANG_S)[1]
    assert process.returncode == 0 and "started after" in rest
    assert deployment.sql("SELECT count(*) FROM preferences") == [(2,)]  # the sink of this process was not on standby


@pytest.mark.kafka
@pytest.mark.parametrize("command", [["run", "--until-done"], ["train"]], ids=["run", "train"])
def test_a_start_waits_for_a_broker(command, tmp_path):
    if not (home := os.environ.get("KAFKA_HOME")):
        pytest.skip("no Apache Kafka: set KAFKA_HOME to a folder with libs/*.jar")
    (tmp_path / "kafka").mkdir()
    broker = Broker(Path(home), tmp_path / "kafka")
    deployment = Deployment(tmp_path / "data", f"kafka://{broker.address}", "w.")
    if command[0] == "train":
        deployment.flags["models.policy"] = "smollm2"
    failed = start_charter(deployment, *command)
    assert "is unreachable" in failed.communicate(timeout=HANG_S)[1] and failed.returncode == 3
    process = start_charter(deployment, *command, "--wait")
    try:
        assert f"Kafka at {broker.address} is unreachable" in process.stderr.readline()
        with broker:
            while "started after" not in (line := process.stderr.readline()):
                assert line, "the process has ended"
            process.communicate(timeout=HANG_S)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
