"""The sink: exactly once with duplicates, crashes and a second sink; a record that it cannot decode becomes a dead letter."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import uuid
from contextlib import closing

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from charter.lag import compute_lag_rows, read_sink_offsets
from consumers.sink import Sink, collect_sink_metrics
from engine.bus import open_bus
from engine.bus.port import ProducerRecord, TopicPartition
from engine.errors import CharterError, OffsetsLost, StoreDamaged, StoreMismatch
from engine.store import Store
from engine.worker import to_producer_record
from schemas.topics import TOPICS, make_topic_table
from tests.support.kafka_operator import KafkaOperator
from tests.support.records import copy_empty_database


@pytest.fixture
def store(tmp_path):
    copy_empty_database(tmp_path / "data" / "charter.duckdb")
    return Store(tmp_path / "data" / "charter.duckdb")


def drain(sink):
    while sink.step():
        pass
    sink.close()


def run_and_stop(sink, num_prompts):
    while read_counts(sink.store)[0] < num_prompts:
        sink.step()
    stop = threading.Event()
    stop.set()
    sink.run(stop)


def read_counts(store, topic="prompts"):
    sql = "SELECT records, duplicates, content_mismatches FROM pipeline_status WHERE topic = ?"
    return store.query(sql, [topic]).rows[0]


def test_sink_writes_rows_once_in_the_order_of_the_commit_sequence(bus, store, make_prompt, make_response):
    prompts = [make_prompt(f"prompt {n}") for n in range(20)]
    bus.publish([to_producer_record(p) for p in prompts])
    bus.publish([to_producer_record(make_response())])
    drain(Sink(bus, store, max_wait_s=0.05))
    drain(Sink(bus, store, max_wait_s=0.05))  # a second start finds nothing new
    assert read_counts(store) == (20, 0, 0) and read_counts(store, "responses") == (1, 0, 0)
    sql = "SELECT commit_seq FROM prompts UNION ALL SELECT commit_seq FROM responses ORDER BY 1"
    assert [seq for (seq,) in store.query(sql).rows] == list(range(21))
    row = store.query_dicts("SELECT * FROM prompts WHERE prompt_id = ?", [prompts[3].prompt_id])[0]
    assert row["messages"] == [{"role": "user", "content": "prompt 3"}] and str(row["record_id"]) == prompts[3].record_id
    response = store.query_dicts("SELECT completions, policy_version FROM responses")[0]
    assert [c["text"] for c in response["completions"]] == ["first answer", "second answer"] and response["policy_version"] == 3


def test_sink_marks_duplicates_and_counts_content_mismatches(bus, store, make_prompt):
    prompt = make_prompt("one")
    bus.publish([to_producer_record(prompt), to_producer_record(prompt)])
    drain(Sink(bus, store, max_wait_s=0.05))
    bus.publish(
        [
            to_producer_record(prompt.model_copy(update={"run_id": "again"})),
            to_producer_record(prompt.model_copy(update={"source": "other"})),
        ]
    )
    drain(Sink(bus, store, max_wait_s=0.05))
    assert read_counts(store) == (1, 2, 1)  # the record of the run "again" is not a duplicate
    assert store.query("SELECT source FROM prompts").rows == [("test",)]  # the lowest commit sequence wins


def test_sink_writes_a_dead_letter_for_a_record_that_it_cannot_decode(bus, store, make_prompt):
    bus.publish([ProducerRecord("prompts", b"k", b"garbage", (("run", b"r"),)), to_producer_record(make_prompt())])
    bus.publish([ProducerRecord("responses", b"k", to_producer_record(make_prompt()).value)])
    drain(Sink(bus, store, max_wait_s=0.05))
    dead_letters = store.query("SELECT source_topic, kind, error_class, value FROM dead_letters ORDER BY source_topic").rows
    assert [row[:3] for row in dead_letters] == [("prompts", "DECODE", "NotARecord"), ("responses", "DECODE", "WrongRecord")]
    assert dead_letters[0][3] == b"garbage" and read_counts(store) == (1, 0, 0)


def test_second_sink_on_the_same_database_fails(bus, store, make_prompt):
    first, second = Sink(bus, store, max_wait_s=0.05), Sink(bus, store, max_wait_s=0.05)
    bus.publish([to_producer_record(make_prompt())])
    assert first.step() == 1
    with pytest.raises(CharterError, match="another sink"):
        second.step()
    assert read_counts(store) == (1, 0, 0)
    first.close()
    second.close()


def test_two_databases_receive_the_same_log(bus, store, tmp_path, make_prompt):
    bus.publish([to_producer_record(make_prompt())])
    for target in (store, Store(tmp_path / "other.duckdb")):
        drain(Sink(bus, target, max_wait_s=0.05))
        assert read_counts(target) == (1, 0, 0)


def test_sink_reads_a_recreated_topic_from_its_beginning(tmp_path, store, make_prompt):
    for text in ("first", "second"):
        bus = open_bus(str(tmp_path / "log"))
        bus.create_topics(list(TOPICS.values()))
        bus.publish([to_producer_record(make_prompt(text))])
        drain(Sink(bus, store, max_wait_s=0.05))
        bus.close()
        with closing(sqlite3.connect(tmp_path / "log" / "log.sqlite", isolation_level=None)) as log:
            log.execute("DELETE FROM messages")
            log.execute("DELETE FROM topics")
    assert read_counts(store) == (2, 0, 0)


def test_sink_refuses_a_database_of_another_log(tmp_path, store, make_prompt):
    for folder in ("a", "b"):
        bus = open_bus(str(tmp_path / folder))
        bus.create_topics(list(TOPICS.values()))
        bus.publish([to_producer_record(make_prompt(folder))])
        if folder == "a":
            drain(Sink(bus, store, max_wait_s=0.05))
        else:
            with pytest.raises(StoreMismatch, match="records of another log"):
                Sink(bus, store)
        bus.close()
    assert read_counts(store) == (1, 0, 0)


def test_sink_refuses_a_log_that_ends_below_its_offsets(tmp_path, store, bus, make_prompt):
    """An older copy of the log would otherwise hide its next records from the sink."""
    bus.publish([to_producer_record(make_prompt("kept"))])
    drain(Sink(bus, store, max_wait_s=0.05))
    with closing(sqlite3.connect(bus.folder / "log.sqlite", isolation_level=None)) as log:
        log.execute("DELETE FROM messages")
    with pytest.raises(StoreMismatch, match="log ends at 0"):
        Sink(bus, store)


def test_sink_stops_if_its_database_disappears_or_is_replaced(bus, store, make_prompt):
    sink = Sink(bus, store, max_wait_s=0.05)
    bus.publish([to_producer_record(make_prompt("one"))])
    store.path.unlink()
    with pytest.raises(StoreDamaged, match="disappeared"):
        sink.step()
    store.create_schema()
    with pytest.raises(StoreDamaged, match="replaced"):
        sink.write_with_retry(sink.write_completeness)
    sink.close()
    drain(Sink(bus, store, max_wait_s=0.05))
    assert read_counts(store) == (1, 0, 0)


def test_sink_raises_if_retention_deleted_unread_records(bus, store, make_prompt, monkeypatch):
    drain(Sink(bus, store, max_wait_s=0.05))
    monkeypatch.setattr(bus, "beginning_offsets", lambda topics: dict.fromkeys(type(bus).beginning_offsets(bus, topics), 5))
    with pytest.raises(OffsetsLost, match="retention"):
        Sink(bus, store)


@pytest.mark.kafka
def test_deleted_transaction_markers_are_no_lost_records(kafka_address, store, make_prompt):
    """Retention deletes everything while the sink is stopped. Then a record is deleted that the sink has not read."""
    bus = open_bus(kafka_address, prefix=f"s{uuid.uuid4().hex[:8]}.")
    bus.create_topics(list(make_topic_table(1).values()))
    operator = KafkaOperator(bus.servers, bus.prefix)
    writer = bus.open_writer("w")
    for number in (1, 2):
        writer.commit([to_producer_record(make_prompt(f"prompt {number}"))])
        run_and_stop(Sink(bus, store, max_wait_s=0.05), number)
        operator.delete_records("prompts")
    writer.commit([to_producer_record(make_prompt("three"))])
    assert {row[4] for row in compute_lag_rows(bus, "sink", ["prompts"], read_sink_offsets(store, bus))} == {2}
    operator.delete_records("prompts")
    assert {row[4] for row in compute_lag_rows(bus, "sink", ["prompts"], read_sink_offsets(store, bus))} == {2}
    with pytest.raises(OffsetsLost, match="deleted 2 records"):
        Sink(bus, store)
    operator.recreate_topics("prompts")  # the offsets of the deleted topic do not count for the new one
    assert not any(tp.topic == "prompts" for tp in read_sink_offsets(store, bus))
    writer.close()
    bus.close()
    assert read_counts(store) == (2, 0, 0)


def test_sink_with_a_new_database_reports_once_what_was_deleted_before(bus, store, make_prompt, monkeypatch, caplog):
    bus.publish([to_producer_record(make_prompt("one"))])
    beginnings = bus.beginning_offsets(list(TOPICS)) | {TopicPartition("prompts", 0): 7, TopicPartition("runs", 0): 2}
    ends = {tp: max(end, beginnings[tp]) for tp, end in bus.end_offsets(list(TOPICS)).items()}
    monkeypatch.setattr(bus, "beginning_offsets", lambda topics: beginnings)
    monkeypatch.setattr(bus, "end_offsets", lambda topics: ends)
    sinks = [Sink(bus, store, max_wait_s=0.05) for _ in range(2)]
    for sink in sinks:
        sink.close()
    (message,) = [record.message for record in caplog.records if "deleted" in record.message]
    assert message.endswith("prompts[0]: 7 offsets, runs[0]: 2 offsets")
    counts = [{sample.name: sample.value for sample in collect_sink_metrics(sink)} for sink in sinks]
    assert [count["charter_deleted_offsets_total"] for count in counts] == [9, 0]


def test_sink_waits_for_a_locked_file_and_loses_no_record(bus, store, make_prompt, monkeypatch):
    monkeypatch.setattr("consumers.sink.LOCK_TIMEOUT_S", 0.05)
    sink = Sink(bus, store, max_wait_s=0.05)
    bus.publish([to_producer_record(make_prompt(f"{n}")) for n in range(5)])
    holder = duckdb.connect(str(store.path), read_only=True)  # in one process DuckDB refuses the other mode
    attempts = []

    def open_after_two_attempts(wait_s):
        if len(attempts) == 2:
            holder.close()
        attempts.append(wait_s)
        return open_write_session(wait_s)

    open_write_session, store.open_write_session = store.open_write_session, open_after_two_attempts
    assert sink.step() == 5 and len(attempts) >= 3
    sink.close()
    store.open_write_session = open_write_session
    assert read_counts(store) == (5, 0, 0)


SINK_PROGRAM = """
    import sys
    from pathlib import Path
    from consumers.sink import Sink
    from engine.bus import open_bus
    from engine.store import Store
    sink = Sink(open_bus(sys.argv[1]), Store(Path(sys.argv[1]) / "charter.duckdb"), max_rows=7, max_wait_s=0.05)
    while True:
        if sink.step():
            print(sink.num_written, flush=True)
"""


def test_sink_killed_repeatedly_writes_each_record_once(bus, store, make_prompt):
    bus.publish([to_producer_record(make_prompt(f"prompt {n}")) for n in range(120)])
    for kill_after in (1, 3, 2, 4):
        command = [sys.executable, "-c", textwrap.dedent(SINK_PROGRAM), str(bus.folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sink:
            for _ in range(kill_after):
                sink.stdout.readline()
            os.kill(sink.pid, signal.SIGKILL)
    drain(Sink(bus, store, max_wait_s=0.05))
    assert read_counts(store) == (120, 0, 0)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50))
def test_sink_keeps_any_text_unchanged(bus, store, make_prompt, text):
    prompt = make_prompt(text)
    bus.publish([to_producer_record(prompt)])
    drain(Sink(bus, store, max_wait_s=0.02))
    rows = store.query("SELECT messages[1].content FROM prompts WHERE record_id = ?", [prompt.record_id]).rows
    assert rows == [(text,)]
