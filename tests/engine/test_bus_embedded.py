"""The embedded log across processes: kills, crowds, expiry, versions."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from engine.bus import open_bus
from engine.bus.embedded import EmbeddedBus
from engine.bus.kafka import parse_address
from engine.bus.port import ProducerRecord
from engine.bus.read import read_topic, read_values
from engine.errors import BusUnreachable, DataFolderVersionMismatch, UsageError
from schemas.topics import TOPICS


def process(code, *arguments, **more):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd(), **more)


PUBLISH = """
    import sys
    from engine.bus import open_bus
    from engine.bus.port import ProducerRecord
    bus = open_bus(sys.argv[1])
    for batch in range(int(sys.argv[3])):
        bus.publish([ProducerRecord("prompts", sys.argv[2].encode(), f"{sys.argv[2]}/{batch}/{i}".encode()) for i in range(10)])
        print(batch, flush=True)
"""


def test_killing_a_publisher_loses_nothing_that_was_acknowledged_and_tears_no_batch(bus, tmp_path):
    publisher = process(PUBLISH, tmp_path / "data", "k", 100_000)
    acknowledged = 0
    while acknowledged < 30:
        acknowledged = int(publisher.stdout.readline()) + 1
    os.kill(publisher.pid, signal.SIGKILL)
    publisher.wait()
    for line in publisher.stdout:
        acknowledged = int(line) + 1
    publisher.stdout.close()
    messages = list(read_topic(bus, "prompts"))
    assert len(messages) % 10 == 0 and len(messages) >= acknowledged * 10
    assert [m.offset for m in messages] == list(range(len(messages)))


def test_many_processes_write_at_once(bus, tmp_path):
    crowd = [process(PUBLISH, tmp_path / "data", name, 20) for name in "abcd"]
    for one in crowd:
        one.communicate()
        assert one.returncode == 0
    found = read_values(bus, "prompts")
    assert len(found) == len(set(found)) == 4 * 20 * 10


def test_a_dead_members_partitions_go_to_the_living_when_its_lease_ends(tmp_path):
    bus = EmbeddedBus(tmp_path, lease_timeout_s=0.5)
    bus.create_topics(list(TOPICS.values()))
    dead = bus.open_consumer("g", ["prompts"], member="dead")
    living = bus.open_consumer("g", ["prompts"], member="living")
    dead.poll(0.01, 1)
    while len(living.assignment()) < 12:  # it takes its half at once, and the rest once the other is silent for its lease
        living.poll(0.1, 1)
    living.close()
    bus.close()


def test_a_log_of_another_version_is_left_alone(tmp_path):
    open_bus(str(tmp_path)).close()
    with sqlite3.connect(tmp_path / "log.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(DataFolderVersionMismatch, match=r"99.*ours: 1"):
        open_bus(str(tmp_path))


def test_a_file_that_is_no_log_is_an_error(tmp_path):
    (tmp_path / "log.sqlite").write_bytes(b"not a database, but long enough to have a header" * 20)
    with pytest.raises(BusUnreachable, match="not a database"):
        open_bus(str(tmp_path))


def test_a_folder_that_cannot_be_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="data folder"):
        open_bus(str(tmp_path / "file" / "folder"))


def test_publishing_to_an_unknown_topic_writes_nothing(bus):
    with pytest.raises(UsageError):
        bus.publish([ProducerRecord("prompts", b"k", b"v"), ProducerRecord("nowhere", b"k", b"v")])
    assert read_values(bus, "prompts") == []


def test_kafka_addresses():
    assert parse_address("kafka://a:1,b:2") == ["a:1", "b:2"]
    for bad in ("kafka://", "kafka://host", "kafka://host:port", "kafka://a:1,b"):
        with pytest.raises(UsageError, match="HOST:PORT"):
            parse_address(bad)


def test_no_broker_is_an_error_that_says_so():
    with pytest.raises(BusUnreachable, match=r"127\.0\.0\.1:9: .*refused"):
        open_bus("kafka://127.0.0.1:9", options={"bootstrap_timeout_ms": 500})
