"""The sink: exactly once through duplicates, crashes and rivals; what it cannot decode is kept with its reason."""

import os
import signal
import subprocess
import sys
import textwrap

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consumers.sink import Sink
from engine.bus import open_bus
from engine.bus.port import ProducerRecord
from engine.errors import CharterError, OffsetsLost
from engine.store import Store
from engine.worker import to_producer_record
from schemas.topics import TOPICS


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "data" / "charter.duckdb")


def drain(sink):
    while sink.step():
        pass
    sink.close()


def counts(store, topic="prompts"):
    sql = "SELECT records, duplicates, content_mismatches FROM pipeline_status WHERE topic = ?"
    return store.query(sql, [topic]).rows[0]


def test_rows_land_once_in_the_order_of_the_commit_sequence(bus, store, make_prompt, make_response):
    prompts = [make_prompt(f"prompt {n}") for n in range(20)]
    bus.publish([to_producer_record(p) for p in prompts])
    bus.publish([to_producer_record(make_response())])
    drain(Sink(bus, store, max_wait_s=0.05))
    drain(Sink(bus, store, max_wait_s=0.05))  # a second start finds nothing new
    assert counts(store) == (20, 0, 0) and counts(store, "responses") == (1, 0, 0)
    seqs = [
        s for (s,) in store.query("SELECT commit_seq FROM prompts UNION ALL SELECT commit_seq FROM responses ORDER BY 1").rows
    ]
    assert seqs == list(range(21))
    row = store.query_dicts("SELECT * FROM prompts WHERE prompt_id = ?", [prompts[3].prompt_id])[0]
    assert row["messages"] == [{"role": "user", "content": "prompt 3"}] and str(row["record_id"]) == prompts[3].record_id
    answer = store.query_dicts("SELECT completions, policy_version FROM responses")[0]
    assert [c["text"] for c in answer["completions"]] == ["first answer", "second answer"] and answer["policy_version"] == 3


def test_a_record_that_comes_twice_is_marked_and_other_content_is_counted(bus, store, make_prompt):
    one = make_prompt("one")
    bus.publish([to_producer_record(one), to_producer_record(one)])
    drain(Sink(bus, store, max_wait_s=0.05))
    bus.publish(
        [
            to_producer_record(one.model_copy(update={"run_id": "again"})),
            to_producer_record(one.model_copy(update={"source": "other"})),
        ]
    )
    drain(Sink(bus, store, max_wait_s=0.05))
    assert counts(store) == (1, 3, 1)
    assert store.query("SELECT source FROM prompts").rows == [("test",)]  # the lowest commit sequence wins


def test_what_cannot_be_decoded_is_a_dead_letter_with_its_bytes(bus, store, make_prompt):
    bus.publish([ProducerRecord("prompts", b"k", b"rubbish", (("run", b"r"),)), to_producer_record(make_prompt())])
    bus.publish([ProducerRecord("responses", b"k", to_producer_record(make_prompt()).value)])
    drain(Sink(bus, store, max_wait_s=0.05))
    letters = store.query("SELECT source_topic, kind, error_class, value FROM dead_letters ORDER BY source_topic").rows
    assert [row[:3] for row in letters] == [("prompts", "DECODE", "NotARecord"), ("responses", "DECODE", "WrongRecord")]
    assert letters[0][3] == b"rubbish" and counts(store) == (1, 0, 0)


def test_two_sinks_never_both_write(bus, store, make_prompt):
    first, second = Sink(bus, store, max_wait_s=0.05), Sink(bus, store, max_wait_s=0.05)
    bus.publish([to_producer_record(make_prompt())])
    assert first.step() == 1
    with pytest.raises(CharterError, match="another sink"):
        second.step()
    assert counts(store) == (1, 0, 0)
    first.close()
    second.close()


def test_a_second_database_of_the_same_log(bus, store, tmp_path, make_prompt):
    bus.publish([to_producer_record(make_prompt())])
    other = Store(tmp_path / "other.duckdb")
    for one in (store, other):
        drain(Sink(bus, one, max_wait_s=0.05))
        assert counts(one) == (1, 0, 0)


def test_a_topic_made_anew_is_not_taken_for_the_old_one(tmp_path, store, make_prompt):
    for folder in ("a", "b"):
        bus = open_bus(str(tmp_path / folder))
        bus.create_topics(list(TOPICS.values()))
        bus.publish([to_producer_record(make_prompt(folder))])
        drain(Sink(bus, store, max_wait_s=0.05))
        bus.close()
    assert counts(store) == (2, 0, 0)


def test_retention_that_passed_the_sink_is_loud(bus, store, make_prompt, monkeypatch):
    drain(Sink(bus, store, max_wait_s=0.05))
    monkeypatch.setattr(bus, "beginning_offsets", lambda topics: dict.fromkeys(type(bus).beginning_offsets(bus, topics), 5))
    with pytest.raises(OffsetsLost, match="retention"):
        Sink(bus, store)


def test_a_held_file_makes_the_sink_wait_and_lose_nothing(bus, store, make_prompt, monkeypatch):
    monkeypatch.setattr("consumers.sink.LOCK_TIMEOUT_S", 0.05)
    sink = Sink(bus, store, max_wait_s=0.05)
    bus.publish([to_producer_record(make_prompt(f"{n}")) for n in range(5)])
    holder = duckdb.connect(str(store.path), read_only=True)  # in one process DuckDB refuses the other mode
    released = []

    def release_later(wait_s):
        if len(released) == 2:
            holder.close()
        released.append(wait_s)
        return real(wait_s)

    real, store.open_write_session = store.open_write_session, release_later
    assert sink.step() == 5 and len(released) >= 3
    sink.close()
    store.open_write_session = real
    assert counts(store) == (5, 0, 0)


KILLED = """
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


def test_killed_again_and_again_it_loses_and_doubles_nothing(bus, store, make_prompt):
    bus.publish([to_producer_record(make_prompt(f"prompt {n}")) for n in range(120)])
    for kill_after in (1, 3, 2, 4):
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(bus.folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sink:
            for _ in range(kill_after):
                sink.stdout.readline()
            os.kill(sink.pid, signal.SIGKILL)
    drain(Sink(bus, store, max_wait_s=0.05))
    assert counts(store) == (120, 0, 0)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50))
def test_any_text_survives(bus, store, make_prompt, text):
    prompt = make_prompt(text)
    bus.publish([to_producer_record(prompt)])
    drain(Sink(bus, store, max_wait_s=0.02))
    found = store.query("SELECT messages[1].content FROM prompts WHERE record_id = ?", [prompt.record_id]).rows
    assert found == [(text,)]
