"""The verbs of operation on a stream that has run: replay, runs, dlq, topics, snapshot, backup, restore, forget."""

import json
import uuid

import duckdb
import pytest
from click.testing import CliRunner

from charter.cli import cli
from charter.connect import connect_bus, open_store
from charter.pipeline import STAGES, make_host
from constitutions.loader import ConstitutionError, parse_constitution
from engine.bus import embedded
from engine.bus.read import read_values
from engine.errors import DataFolderVersionMismatch, UsageError
from engine.models.scripted import POISON_TEXT
from engine.settings import load_settings
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer
from schemas.codec import decode_record
from schemas.records import DeadLetter, Prompt

PROMPTS = 6


class Place:
    """A data folder, its log, and the command line on them."""

    def __init__(self, folder, address="", prefix=""):
        self.folder = folder
        self.flags = {
            "data.folder": str(folder),
            "models.policy": "scripted",
            "critique.rounds": "1",
            "prompts.eval_fraction": "0",
        }
        self.flags |= {"bus.address": address, "bus.prefix": prefix} if address else {}

    def settings(self, **more):
        return load_settings(self.flags | {key.replace("__", "."): value for key, value in more.items()}, environment={})[0]

    def call(self, *arguments, code=0):
        words = [word for key, value in self.flags.items() for word in ("--set", f"{key}={value}")]
        done = CliRunner().invoke(cli, [*map(str, arguments), *words])
        if code == 0 and done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == code, done.output
        return done.stdout

    def fails(self, error, match, *arguments):
        with pytest.raises(error, match=match):
            self.call(*arguments)

    def rows(self, *arguments):
        return json.loads(self.call(*arguments, "--json"))

    def sql(self, text):
        return open_store(self.settings()).query(text, limit_s=20.0).rows

    def stream(self, count, sql="SELECT count(*) FROM traces WHERE end_reason IS NOT NULL AND preferences IS NOT NULL", **more):
        """Run all stages until a query gives `count`."""
        settings = self.settings(**more)
        bus = connect_bus(settings)
        with make_host(settings, bus, STAGES, sink=True) as host:
            while not settings.folder.joinpath("charter.duckdb").exists() or self.sql(sql) != [(count,)]:
                host.failure_event.wait(0.05)
                host.raise_if_failed()
        bus.close()

    def publish(self, *texts):
        path = self.folder.parent / f"{uuid.uuid4().hex}.jsonl"
        path.write_text("".join(json.dumps(text) + "\n" for text in texts))
        self.call("produce", path)


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def any_bus(request, tmp_path):
    if request.param == "embedded":
        return Place(tmp_path / "data")
    return Place(tmp_path / "data", request.getfixturevalue("kafka_address"), f"v{uuid.uuid4().hex[:8]}.")


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "data")


def streamed(place):
    bus = connect_bus(place.settings())
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=PROMPTS)
    bus.close()
    place.stream(PROMPTS)
    return place


COUNTS = "SELECT topic, records FROM pipeline_status WHERE topic IN ('responses', 'critiques', 'revisions', 'preferences')"


def test_a_run_until_done_ends_when_all_is_finished_and_written(any_bus):
    any_bus.publish("One?", "Two?", "Three?")
    any_bus.call("run", "--stage", "respond", "--stage", "sink", "--until-done")
    assert any_bus.sql("SELECT count(*) FILTER (responses IS NOT NULL), count(end_reason) FROM traces") == [(3, 0)]
    any_bus.call("run", "--until-done")
    finished = "SELECT count(*), count(end_reason), count(preferences) FROM traces"
    assert any_bus.sql(finished) == [(3, 3, 3)]
    assert {row["lag"] for row in any_bus.rows("status")} <= {0, None}
    before = dict(any_bus.sql(COUNTS))
    any_bus.call("run", "--until-done")
    assert dict(any_bus.sql(COUNTS)) == before


# Replay and runs


def test_judging_again_under_another_constitution_stands_beside_and_generates_nothing(any_bus):
    place = streamed(any_bus)
    before = dict(place.sql(COUNTS))
    said = place.call("replay", "--stage", "judge", "--constitution", "red-team", "--as", "again", "--dry-run")
    assert f"would replay {PROMPTS} records of run live" in said and "judge" in said
    assert [row["run"] for row in place.rows("runs")] == ["live"]  # a dry run leaves nothing behind
    said = place.call("replay", "--stage", "judge", "--constitution", "red-team", "--as", "again")
    assert f"judge {PROMPTS}" in said
    after = dict(place.sql(COUNTS))
    assert after == before | {"preferences": 2 * before["preferences"]}
    runs = {row["run"]: row for row in place.rows("runs")}
    assert runs["again"]["of_run"] == "live" and runs["again"]["constitution"] == "red-team"
    assert (runs["again"]["preferences"], runs["live"]["preferences"]) == (before["preferences"], before["preferences"])
    compared = {row["item"]: row for row in place.rows("runs", "compare", "live", "again")}
    assert (
        compared["constitution"]["again"].startswith("red-team")
        and compared["preferences only in this run"]["again"] == PROMPTS
    )
    assert place.sql("SELECT count(*) FROM dead_letters") == [(0,)]
    assert place.rows("status") and not read_values_of(place, "dead-letters")
    again = place.call("replay", "--stage", "judge", "--constitution", "red-team", "--as", "again")
    assert "judge 0" in again and dict(place.sql(COUNTS)) == after  # it was over


def test_a_replay_without_a_principle_has_a_constitution_of_its_own(place):
    streamed(place)
    again = ("replay", "--stage", "judge", "--constitution", "customer-service")
    place.call(*again, "--as", "full")
    place.call(*again, "--exclude-principle", "kinder", "--exclude-principle", "hands-over", "--as", "less")
    (less,) = place.sql("SELECT constitution, constitution_text FROM runs WHERE run_id = 'less'")
    assert less[0]["name"] == "customer-service-without-kinder-hands-over"
    written = parse_constitution(less[1], "the manifest")
    assert written.hash == less[0]["hash"] and [p.id for p in written.judge] == [
        "solves-more", "promises-less", "safer-with-data"
    ]  # fmt: skip
    moved = place.sql(
        "SELECT one.principle_id, two.principle_id, one.p_a = two.p_a FROM raw.preferences one JOIN raw.preferences two"
        " USING (response_id) WHERE one.run_id = 'full' AND two.run_id = 'less'"
    )
    assert len(moved) == PROMPTS and all(before != after or same for before, after, same in moved)
    assert {before for before, after, _ in moved if before != after} <= {"kinder", "hands-over"}
    place.fails(ConstitutionError, "did you mean kinder", *again, "--exclude-principle", "kidner")
    place.fails(UsageError, "started with another constitution", *again, "--exclude-principle", "kinder", "--as", "less")


def read_values_of(place, topic):
    bus = connect_bus(place.settings())
    try:
        return read_values(bus, topic)
    finally:
        bus.close()


def test_the_same_configuration_makes_the_same_ids_and_adds_nothing(place):
    streamed(place)
    before = dict(place.sql(COUNTS))
    place.call("replay", "--stage", "respond", "--as", "again", "--from", "run:live")
    assert dict(place.sql(COUNTS)) == before
    assert place.sql("SELECT count(*) FROM raw.responses WHERE is_duplicate AND run_id = 'again'") == [(PROMPTS,)]
    runs = {row["run"]: row for row in place.rows("runs")}
    shown = ("responses", "critiques", "revisions", "preferences")
    assert [runs["again"][topic] for topic in shown] == [runs["live"][topic] for topic in shown]


def test_a_replay_reads_what_the_log_keeps_no_more_from_the_archive(place):
    streamed(place)
    (place.folder / embedded.LOG_FILENAME).unlink()
    before = dict(place.sql(COUNTS))
    place.fails(UsageError, "there is no run live", "replay", "--stage", "judge", "--archive", "--as", "again")
    # A new log knows no runs until something has run on it.
    place.publish("something new")
    place.stream(PROMPTS + 1)
    before = dict(place.sql(COUNTS))
    again = ("replay", "--stage", "judge", "--constitution", "customer-service", "--archive", "--as", "again")
    assert "would replay 0 records" in place.call(*again, "--to", "2000-01-01", "--dry-run")
    place.call(*again)
    from_log = [word for word in again if word != "--archive"]
    place.fails(UsageError, "replay again started from the archive", *from_log)
    assert dict(place.sql(COUNTS))["preferences"] == 2 * before["preferences"]


def test_bounds_of_a_replay(place):
    streamed(place)
    assert "would replay 0 records" in place.call("replay", "--stage", "respond", "--from", "2999-01-01", "--dry-run")
    assert f"would replay {PROMPTS} records" in place.call("replay", "--stage", "respond", "--to", "2999-01-01", "--dry-run")
    assert "would replay 0 records" in place.call("replay", "--stage", "respond", "--from", "1000000", "--dry-run")
    place.fails(UsageError, "is not a replay bound", "replay", "--stage", "respond", "--from", "yesterday-ish", "--dry-run")
    place.fails(UsageError, "there is no run nowhere", "replay", "--stage", "judge", "--from", "run:nowhere")
    place.fails(UsageError, "the replay of run live cannot have the same name", "replay", "--stage", "judge", "--as", "live")


def test_two_runs_at_once_share_one_database(tmp_path):
    """The second process's sink stands by; each run's stages leave the other's records alone."""
    place = Place(tmp_path / "data")
    place.publish("one", "two")
    other = place.settings(run__id="other")
    bus = connect_bus(other)
    FileProducer(bus, "other", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), first_row=10, last_row=12)
    with make_host(other, bus, STAGES, sink=True) as second:
        place.stream(5)
        second.raise_if_failed()
    bus.close()
    per_run = "SELECT run_id, count(*) FROM run_records WHERE topic = 'preferences' GROUP BY 1 ORDER BY 1"
    assert place.sql(per_run) == [("live", 2), ("other", 3)]
    assert place.sql("SELECT count(*) FROM raw.preferences WHERE is_duplicate") == [(0,)]


# Dead letters


def test_dead_letters_are_listed_shown_and_tried_again_once(any_bus):
    place = any_bus
    place.publish("a good one", f"a bad one: {POISON_TEXT}")
    place.stream(1, sql="SELECT count(*) FROM dead_letters WHERE stage = 'respond'")
    (letter,) = place.rows("dlq", "list")
    assert (letter["stage"], letter["kind"], letter["state"], letter["attempts"]) == ("respond", "PERMANENT", "open", 1)
    assert "poisoned" in letter["message"] and letter["came_from"].startswith("prompts[")
    (shown,) = place.rows("dlq", "show", letter["id"][:13])
    assert shown["value"]["messages"][0]["content"].endswith(POISON_TEXT) and shown["headers"]["run"] == "live"
    assert "published again: 1" in place.call("dlq", "retry", "--kind", "permanent")
    place.stream(2, sql="SELECT count(*) FROM dead_letters WHERE stage = 'respond'")  # the model has not changed
    states = [row["state"] for row in place.rows("dlq", "list", "--stage", "respond")]
    assert sorted(states) == ["open", "retried"]
    assert "published again: 0; already retried: 1" in place.call("dlq", "retry", letter["id"])
    letters = [decode_record(value, DeadLetter) for value in read_values_of(place, "dead-letters")]
    assert len(letters) == 2 and {decode_record(letter.value, Prompt).record_id for letter in letters} == {
        shown["value"]["record_id"]
    }
    assert place.call("dlq", "retry", code=2) == ""


# Topics


def test_topics_are_created_listed_and_described_and_their_lag_is_told(any_bus):
    place = any_bus
    said = place.call("topics", "create", "--set", "bus.partitions=3")
    assert "prompts: created, 3 partitions" in said and "exists" in place.call("topics", "create")
    place.publish("one", "two")
    assert {row["topic"]: row["offsets"] > 0 for row in place.rows("topics")}["prompts"]
    (described,) = place.rows("topics", "describe", "prompts")
    assert (described["partitions"], described["max_instances"], described["replicas"]) == (3, 3, 1)
    lag = {(row["consumer"], row["topic"]): row for row in place.rows("topics", "lag")}
    behind = lag["respond", "prompts"]["lag"]  # on Kafka with the marker of the transaction in each partition
    assert behind in ((2,) if not place.flags.get("bus.prefix") else (3, 4)) and lag["respond", "prompts"]["lag_seconds"] >= 0
    place.stream(2)
    lag = {(row["consumer"], row["topic"]): row["lag"] for row in place.rows("topics", "lag")}
    assert lag["sink", "preferences"] == 0 and not any(lag.values())
    place.fails(UsageError, "there is no topic promts", "topics", "describe", "promts")


# Storage over time


def test_a_forgotten_prompt_is_gone_everywhere_and_stays_away(place):
    streamed(place)
    ((prompt,),) = place.sql("SELECT prompt_id::VARCHAR FROM prompts ORDER BY commit_seq LIMIT 1")
    place.call("erase", prompt[:13], "--reason", "asked by its author", "--yes")
    place.stream(PROMPTS - 1, sql="SELECT count(*) FROM prompts")
    for table in ("prompts", "responses", "critiques", "revisions", "preferences"):
        assert place.sql(f"SELECT count(*) FROM raw.{table} WHERE prompt_id = '{prompt}'") == [(0,)]
    assert place.sql("SELECT reason FROM erasures") == [("asked by its author",)]
    # A replay of the same run does not bring it back, nor does a second database of the same log get it.
    place.call("replay", "--stage", "respond", "--from", "run:live", "--as", "again")
    assert place.sql(f"SELECT count(*) FROM raw.responses WHERE prompt_id = '{prompt}'") == [(0,)]
    other = Place(place.folder.parent / "other", str(place.folder))
    other.stream(PROMPTS - 1)
    assert other.sql(f"SELECT count(*) FROM raw.responses WHERE prompt_id = '{prompt}'") == [(0,)]


def test_a_snapshot_is_whole_and_readable_while_the_sink_writes(place):
    streamed(place)
    settings = place.settings()
    bus = connect_bus(settings)
    with make_host(settings, bus, STAGES, sink=True):
        target = place.folder.parent / "copy.duckdb"
        place.call("snapshot", target)
    bus.close()
    with duckdb.connect(str(target), read_only=True) as copy:
        assert copy.execute("SELECT count(*) FROM traces").fetchall() == [(PROMPTS,)]
    place.fails(UsageError, "already exists", "snapshot", target)


def test_a_snapshot_of_what_is_no_database_of_ours_leaves_nothing(tmp_path):
    (tmp_path / "d").mkdir()
    duckdb.connect(str(tmp_path / "d" / "charter.duckdb")).execute("CREATE TABLE t (i INT)").close()
    Place(tmp_path / "d").fails(
        DataFolderVersionMismatch, "d/charter.duckdb was created by", "snapshot", tmp_path / "copies" / "c.duckdb"
    )
    assert list((tmp_path / "copies").iterdir()) == []


def test_a_backup_restores_to_a_folder_that_goes_on(place, tmp_path):
    streamed(place)
    place.call("backup", tmp_path / "kept")
    restored = Place(tmp_path / "restored")
    restored.call("restore", tmp_path / "kept")
    assert restored.sql(COUNTS) == place.sql(COUNTS)
    restored.publish("one more")
    restored.stream(PROMPTS + 1)
    assert restored.sql("SELECT sum(duplicates)::INT FROM pipeline_status") == [(0,)]
    place.fails(UsageError, "nowhere", "restore", tmp_path / "nowhere")
    Place(tmp_path / "empty").fails(UsageError, "nothing to back up", "backup", tmp_path / "b")


def test_a_token_limit_stops_admission_finishes_what_is_begun_and_loses_nothing(place):
    bus = connect_bus(place.settings())
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=60)
    bus.close()
    limit = {
        "budget__max_tokens": "200",
        "respond__num_completions": "2",
        "models__max_batch_size": "4",
        "worker__max_in_flight": "4",
    }
    settings = place.settings(**limit)
    bus = connect_bus(settings)
    with make_host(settings, bus, STAGES, sink=True) as host:
        respond = host.workers[0]
        while not (respond.admission_closed and all(worker.num_in_flight == 0 for worker in host.workers[1:])):
            host.failure_event.wait(0.05)
            host.raise_if_failed()
        begun = respond.num_committed
    bus.close()
    assert 0 < begun < 60 and not read_values_of(place, "dead-letters")
    place.stream(60, respond__num_completions="2")
    assert place.sql("SELECT count(*) FROM raw.responses") == [(60,)]


# A broker of one's own
