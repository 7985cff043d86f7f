"""The embedded log with several processes: killed publishers, concurrent writers, expired leases, and versions."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from engine.bus import open_bus
from engine.bus.embedded import EmbeddedBus
from engine.bus.kafka import parse_address
from engine.bus.port import ProducerRecord
from engine.bus.read import read_topic, read_values
from engine.errors import BusUnreachable, DataFolderVersionMismatch, TopicChanged, UsageError
from engine.topic_guard import TopicGuard
from schemas.topics import TOPICS
from tests.support.waiting import HANG_S


def start_process(code, *arguments, **options):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd(), **options)


PUBLISH = """
    import sys
    from engine.bus import open_bus
    from engine.bus.port import ProducerRecord
    bus = open_bus(sys.argv[1])
    for batch in range(int(sys.argv[3])):
        bus.publish([ProducerRecord("prompts", sys.argv[2].encode(), f"{sys.argv[2]}/{batch}/{i}".encode()) for i in range(10)])
        print(batch, flush=True)
"""


def test_killed_publisher_loses_no_acknowledged_batch_and_writes_no_partial_batch(bus, tmp_path):
    publisher = start_process(PUBLISH, tmp_path / "data", "k", 100_000)
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


def test_many_processes_publish_concurrently(bus, tmp_path):
    publishers = [start_process(PUBLISH, tmp_path / "data", name, 20) for name in "abcd"]
    for publisher in publishers:
        publisher.communicate()
        assert publisher.returncode == 0
    values = read_values(bus, "prompts")
    assert len(values) == len(set(values)) == 4 * 20 * 10


def test_partitions_of_a_dead_member_are_reassigned_after_its_lease(tmp_path):
    bus = EmbeddedBus(tmp_path, lease_timeout_s=0.5)
    bus.create_topics(list(TOPICS.values()))
    silent = bus.open_consumer("g", ["prompts"], member="silent")
    active = bus.open_consumer("g", ["prompts"], member="active")
    silent.poll(0.01, 1)
    while len(active.assignment()) < 12:  # it gets half of them at once, and the rest when the lease of the other expires
        active.poll(0.1, 1)
    active.close()
    bus.close()


@pytest.mark.parametrize("change", ["the wall clock is set back", "the machine was started again"])
def test_leases_do_not_depend_on_the_wall_clock(tmp_path, monkeypatch, change):
    bus = EmbeddedBus(tmp_path, lease_timeout_s=0.5)
    bus.create_topics(list(TOPICS.values()))
    silent = bus.open_consumer("g", ["prompts"], member="silent")
    silent.poll(0.01, 1)
    if change == "the wall clock is set back":
        monkeypatch.setattr("time.time", lambda wall=time.time: wall() - 7200)
    else:  # the times in the file are far in the future of the new boot's clock
        bus.lease_timeout_s = 1e9
        silent.rebalance()
        bus.lease_timeout_s = 0.5
        monkeypatch.setattr("engine.bus.embedded.read_boot_id", lambda: "another boot")
    active = bus.open_consumer("g", ["prompts"], member="active")
    deadline = time.monotonic() + HANG_S
    while len(active.assignment()) < 12:
        active.poll(0.1, 1)
        assert time.monotonic() < deadline
    active.close()
    bus.close()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_worker_ends_if_its_log_is_deleted_or_replaced(tmp_path, is_replaced):
    """Otherwise the process would continue with the deleted file, and nobody would see its results."""
    bus = open_bus(str(tmp_path))
    bus.create_topics(list(TOPICS.values()))
    guard = TopicGuard(bus, bus.topic_ids(["prompts"]))
    guard.verify()
    for path in tmp_path.glob("log.sqlite*"):
        path.unlink()
    if is_replaced:
        open_bus(str(tmp_path)).close()
    with pytest.raises(TopicChanged, match=r"log\.sqlite was deleted or replaced"):
        guard.verify()
    bus.close()


def test_log_of_another_version_is_rejected(tmp_path):
    open_bus(str(tmp_path)).close()
    with sqlite3.connect(tmp_path / "log.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(DataFolderVersionMismatch, match=r"99.*expected 2"):
        open_bus(str(tmp_path))


def test_file_that_is_not_a_log_is_rejected(tmp_path):
    (tmp_path / "log.sqlite").write_bytes(b"not a database, but long enough to have a header" * 20)
    with pytest.raises(BusUnreachable, match="not a database"):
        open_bus(str(tmp_path))


def test_impossible_data_folder_is_rejected(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="data folder"):
        open_bus(str(tmp_path / "file" / "folder"))


def test_publishing_to_an_unknown_topic_writes_nothing(bus):
    with pytest.raises(UsageError):
        bus.publish([ProducerRecord("prompts", b"k", b"v"), ProducerRecord("nowhere", b"k", b"v")])
    assert read_values(bus, "prompts") == []


def test_parse_address_accepts_a_list_of_hosts_with_ports():
    assert parse_address("kafka://a:1,b:2") == ["a:1", "b:2"]
    for address in ("kafka://", "kafka://host", "kafka://host:port", "kafka://a:1,b"):
        with pytest.raises(UsageError, match="HOST:PORT"):
            parse_address(address)


def test_missing_broker_raises_bus_unreachable():
    with pytest.raises(BusUnreachable, match=r"127\.0\.0\.1:9: .*refused"):
        open_bus("kafka://127.0.0.1:9", options={"bootstrap_timeout_ms": 500})


def test_erased_values_leave_no_bytes_in_the_files(bus, tmp_path):
    """Records of all partitions are written alternately, so that SQLite moves some of them to other pages."""
    lengths = random.Random(0)
    texts = {f"k{number}".encode(): f"secret-{number:04d}-".encode() for number in range(400)}
    for key, text in texts.items():
        bus.publish([ProducerRecord("prompts", key, text + b"x" * lengths.randrange(50, 900))])
    bus.connection.fetch_rows("PRAGMA wal_checkpoint(TRUNCATE)")
    assert sum(read_files(tmp_path).count(text) for text in texts.values()) > 400  # some are copies in unused space
    assert bus.erase_values(["prompts"], list(texts)) == 400
    assert not any(text in read_files(tmp_path) for text in texts.values())


def read_files(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_erasure_reports_a_reader_that_keeps_the_write_ahead_log(bus, monkeypatch):
    monkeypatch.setattr("engine.bus.embedded.BUSY_TIMEOUT_S", 0.05)
    bus.publish([ProducerRecord("prompts", b"k", b"secret")])
    reader = sqlite3.connect(bus.path, isolation_level=None)
    reader.execute("BEGIN").execute("SELECT count(*) FROM messages").fetchall()
    with pytest.raises(BusUnreachable, match="still contains erased text"):
        bus.erase_values(["prompts"], [b"k"])
    reader.close()
    bus.erase_values(["prompts"], [b"k"])
    assert b"secret" not in bus.path.with_name("log.sqlite-wal").read_bytes() + bus.path.read_bytes()
