"""Commands on a finished run: replay, runs, dlq, topics, snapshot, backup, restore, forget."""

import uuid

import duckdb
import pytest

from charter.connect import connect_bus
from charter.pipeline import STAGES, make_host
from constitutions.loader import ConstitutionError, parse_constitution
from engine.bus import embedded
from engine.bus.read import read_values
from engine.errors import DataFolderVersionMismatch, StoreMismatch, UsageError
from engine.models.scripted import POISON_TEXT
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer
from schemas.codec import decode_record
from schemas.records import DeadLetter, Prompt
from tests.support.deployment import PROMPTS, Deployment, finished_deployment
from tests.support.waiting import wait_until


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def any_bus(request, tmp_path):
    if request.param == "embedded":
        return Deployment(tmp_path / "data")
    return Deployment(tmp_path / "data", request.getfixturevalue("kafka_address"), f"v{uuid.uuid4().hex[:8]}.")


@pytest.fixture
def deployment(tmp_path):
    return Deployment(tmp_path / "data")


COUNTS = "SELECT topic, records FROM pipeline_status WHERE topic IN ('responses', 'critiques', 'revisions', 'preferences')"


def test_run_until_done_exits_once_all_records_are_stored(any_bus):
    any_bus.publish("One?", "Two?", "Three?")
    any_bus.call("run", "--stage", "respond", "--stage", "sink", "--until-done")
    assert any_bus.sql("SELECT count(*) FILTER (responses IS NOT NULL), count(end_reason) FROM traces") == [(3, 0)]
    any_bus.call("run", "--until-done")
    finished = "SELECT count(*), count(end_reason), count(preferences) FROM traces"
    assert any_bus.sql(finished) == [(3, 3, 3)]
    assert {row["lag"] for row in any_bus.rows("status")["topics"]} <= {0, None}
    before = dict(any_bus.sql(COUNTS))
    any_bus.call("run", "--until-done")
    assert dict(any_bus.sql(COUNTS)) == before


# Replay and runs


def test_rejudging_under_another_constitution_adds_labels_without_generation(any_bus):
    deployment = finished_deployment(any_bus)
    before = dict(deployment.sql(COUNTS))
    output = deployment.call("replay", "--stage", "judge", "--constitution", "red-team", "--as", "again", "--dry-run")
    assert f"would replay {PROMPTS} records of run live" in output and "judge" in output
    assert [row["run"] for row in deployment.rows("runs")] == ["live"]  # a dry run creates nothing
    output = deployment.call("replay", "--stage", "judge", "--constitution", "red-team", "--as", "again")
    assert f"judge {PROMPTS}" in output
    after = dict(deployment.sql(COUNTS))
    assert after == before | {"preferences": 2 * before["preferences"]}
    runs = {row["run"]: row for row in deployment.rows("runs")}
    assert runs["again"]["of_run"] == "live" and runs["again"]["constitution"] == "red-team"
    assert (runs["again"]["preferences"], runs["live"]["preferences"]) == (before["preferences"], before["preferences"])
    compared = {row["item"]: row for row in deployment.rows("runs", "compare", "live", "again")}
    assert (
        compared["constitution"]["again"].startswith("red-team")
        and compared["preferences only in this run"]["again"] == PROMPTS
    )
    assert deployment.sql("SELECT count(*) FROM dead_letters") == [(0,)]
    assert deployment.rows("status")["topics"] and not read_values_of(deployment, "dead-letters")
    repeated = deployment.call("replay", "--stage", "judge", "--constitution", "red-team", "--as", "again")
    assert "(0 in this start)" in repeated and dict(deployment.sql(COUNTS)) == after  # the replay is complete


def test_replay_without_a_principle_has_another_constitution(deployment):
    finished_deployment(deployment)
    replay = ("replay", "--stage", "judge", "--constitution", "customer-service")
    deployment.call(*replay, "--as", "full")
    deployment.call(*replay, "--exclude-principle", "kinder", "--exclude-principle", "hands-over", "--as", "less")
    (less,) = deployment.sql("SELECT constitution, constitution_text FROM runs WHERE run_id = 'less'")
    assert less[0]["name"] == "customer-service-without-kinder-hands-over"
    written = parse_constitution(less[1], "the manifest")
    assert written.hash == less[0]["hash"] and [p.id for p in written.judge] == [
        "solves-more", "promises-less", "safer-with-data"
    ]  # fmt: skip
    moved = deployment.sql(
        "SELECT one.principle_id, two.principle_id, one.p_a = two.p_a FROM raw.preferences one JOIN raw.preferences two"
        " USING (response_id) WHERE one.run_id = 'full' AND two.run_id = 'less'"
    )
    assert len(moved) == PROMPTS and all(before != after or same for before, after, same in moved)
    assert {before for before, after, _ in moved if before != after} <= {"kinder", "hands-over"}
    deployment.fails(ConstitutionError, "did you mean kinder", *replay, "--exclude-principle", "kidner")
    deployment.fails(UsageError, "run.constitution was", *replay, "--exclude-principle", "kinder", "--as", "less")


def read_values_of(deployment, topic):
    bus = connect_bus(deployment.settings())
    try:
        return read_values(bus, topic)
    finally:
        bus.close()


def test_replay_with_the_same_configuration_adds_nothing(deployment):
    finished_deployment(deployment)
    before = dict(deployment.sql(COUNTS))
    deployment.call("replay", "--stage", "respond", "--as", "again", "--from", "run:live")
    assert dict(deployment.sql(COUNTS)) == before
    assert deployment.sql("SELECT count(*) FROM raw.responses WHERE is_duplicate AND run_id = 'again'") == [(PROMPTS,)]
    runs = {row["run"]: row for row in deployment.rows("runs")}
    topics = ("responses", "critiques", "revisions", "preferences")
    assert [runs["again"][topic] for topic in topics] == [runs["live"][topic] for topic in topics]


def test_replay_reads_expired_records_from_the_archive(deployment):
    finished_deployment(deployment)
    (deployment.folder / embedded.LOG_FILENAME).unlink()
    before = dict(deployment.sql(COUNTS))
    deployment.fails(UsageError, "there is no log in", "replay", "--stage", "judge", "--archive", "--as", "again")
    # A new log has no runs until a stage has run on it. The sink refuses the rows of the old log until they are accepted.
    deployment.publish("something new")
    deployment.fails(StoreMismatch, "records of another log", "run", "--stage", "sink")
    deployment.call("repair", "--keep-rows")
    deployment.stream(PROMPTS + 1)
    before = dict(deployment.sql(COUNTS))
    replay = ("replay", "--stage", "judge", "--constitution", "customer-service", "--archive", "--as", "again")
    assert "would replay 0 records" in deployment.call(*replay, "--to", "2000-01-01", "--dry-run")
    deployment.call(*replay)
    from_log = [word for word in replay if word != "--archive"]
    deployment.fails(UsageError, "replay again started from the archive", *from_log)
    assert dict(deployment.sql(COUNTS))["preferences"] == 2 * before["preferences"]
    deployment.call(*replay)  # nothing is left to do
    (deployment.folder / "charter.duckdb").unlink()
    deployment.call("run", "--stage", "sink", "--until-done")
    deployment.fails(UsageError, "numbered its rows again", *replay)  # the end of the archive is no longer known


def test_replay_start_and_limits(deployment):
    finished_deployment(deployment)
    assert "would replay 0 records" in deployment.call("replay", "--stage", "respond", "--from", "2999-01-01", "--dry-run")
    assert f"would replay {PROMPTS} records" in deployment.call(
        "replay", "--stage", "respond", "--to", "2999-01-01", "--dry-run"
    )
    assert "would replay 0 records" in deployment.call("replay", "--stage", "respond", "--from", "1000000", "--dry-run")
    deployment.fails(
        UsageError, "is not a replay bound", "replay", "--stage", "respond", "--from", "yesterday-ish", "--dry-run"
    )
    deployment.fails(UsageError, "there is no run nowhere", "replay", "--stage", "judge", "--from", "run:nowhere")
    deployment.fails(
        UsageError, "the replay of run live cannot have the same name", "replay", "--stage", "judge", "--as", "live"
    )


def test_two_concurrent_runs_share_one_database(tmp_path):
    """The second process's sink is on standby, and the stages of each run skip the records of the other."""
    deployment = Deployment(tmp_path / "data")
    deployment.publish("one", "two")
    other = deployment.settings(run__id="other")
    bus = connect_bus(other)
    FileProducer(bus, "other", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), first_row=10, last_row=12)
    with make_host(other, bus, STAGES, sink=True) as second:
        deployment.stream(5)
        second.raise_if_failed()
    bus.close()
    per_run = "SELECT run_id, count(*) FROM run_records WHERE topic = 'preferences' GROUP BY 1 ORDER BY 1"
    assert deployment.sql(per_run) == [("live", 2), ("other", 3)]
    assert deployment.sql("SELECT count(*) FROM raw.preferences WHERE is_duplicate") == [(0,)]


# Dead letters


def test_dead_letters_are_listed_shown_and_retried_once(any_bus):
    deployment = any_bus
    deployment.publish("a good one", f"a bad one: {POISON_TEXT}")
    deployment.stream(1, sql="SELECT count(*) FROM dead_letters WHERE stage = 'respond'")
    (dead_letter,) = deployment.rows("dlq", "list")
    assert (dead_letter["stage"], dead_letter["kind"], dead_letter["state"], dead_letter["attempts"]) == (
        "respond",
        "PERMANENT",
        "open",
        1,
    )
    assert "poisoned" in dead_letter["message"] and dead_letter["came_from"].startswith("prompts[")
    (details,) = deployment.rows("dlq", "show", dead_letter["id"][:13])
    assert details["value"]["messages"][0]["content"].endswith(POISON_TEXT) and details["headers"]["run"] == "live"
    assert "published again: 1" in deployment.call("dlq", "retry", "--kind", "permanent")
    deployment.stream(2, sql="SELECT count(*) FROM dead_letters WHERE stage = 'respond'")  # the model is unchanged
    states = [row["state"] for row in deployment.rows("dlq", "list", "--stage", "respond")]
    assert sorted(states) == ["open", "retried"]
    assert "published again: 0; already retried: 1" in deployment.call("dlq", "retry", dead_letter["id"])
    dead_letters = [decode_record(value, DeadLetter) for value in read_values_of(deployment, "dead-letters")]
    assert len(dead_letters) == 2 and {decode_record(dead_letter.value, Prompt).record_id for dead_letter in dead_letters} == {
        details["value"]["record_id"]
    }
    assert deployment.call("dlq", "retry", code=2) == ""


# Topics


def test_topics_are_created_listed_and_described_with_their_lag(any_bus):
    deployment = any_bus
    output = deployment.call("topics", "create", "--set", "bus.partitions=3")
    assert "prompts: created, 3 partitions" in output and "exists" in deployment.call("topics", "create")
    deployment.publish("one", "two")
    assert {row["topic"]: row["offsets"] > 0 for row in deployment.rows("topics")}["prompts"]
    (described,) = deployment.rows("topics", "describe", "prompts")
    assert (described["partitions"], described["max_instances"], described["replicas"]) == (3, 3, 1)
    lag = {(row["consumer"], row["topic"]): row for row in deployment.rows("topics", "lag")}
    behind = lag["respond", "prompts"]["lag"]  # Kafka counts a transaction marker in each partition
    assert (
        behind in ((2,) if not deployment.flags.get("bus.prefix") else (3, 4)) and lag["respond", "prompts"]["lag_seconds"] >= 0
    )
    deployment.stream(2)
    lag = {(row["consumer"], row["topic"]): row["lag"] for row in deployment.rows("topics", "lag")}
    assert lag["sink", "preferences"] == 0 and not any(lag.values())
    deployment.fails(UsageError, "there is no topic promts", "topics", "describe", "promts")


# Storage


def test_erased_prompt_is_removed_everywhere_and_stays_removed(deployment):
    finished_deployment(deployment)
    ((prompt,),) = deployment.sql("SELECT prompt_id::VARCHAR FROM prompts ORDER BY commit_seq LIMIT 1")
    deployment.call("erase", prompt[:13], "--reason", "asked by its author", "--yes")
    deployment.stream(PROMPTS - 1, sql="SELECT count(*) FROM prompts")
    for table in ("prompts", "responses", "critiques", "revisions", "preferences"):
        assert deployment.sql(f"SELECT count(*) FROM raw.{table} WHERE prompt_id = '{prompt}'") == [(0,)]
    assert deployment.sql("SELECT reason FROM erasures") == [("asked by its author",)]
    # A replay of the same run does not restore it, and a second database of the same log does not get it.
    deployment.call("replay", "--stage", "respond", "--from", "run:live", "--as", "again")
    assert deployment.sql(f"SELECT count(*) FROM raw.responses WHERE prompt_id = '{prompt}'") == [(0,)]
    other = Deployment(deployment.folder.parent / "other", str(deployment.folder))
    other.stream(PROMPTS - 1)
    assert other.sql(f"SELECT count(*) FROM raw.responses WHERE prompt_id = '{prompt}'") == [(0,)]


def test_snapshot_is_complete_and_readable_while_the_sink_writes(deployment):
    finished_deployment(deployment)
    settings = deployment.settings()
    bus = connect_bus(settings)
    with make_host(settings, bus, STAGES, sink=True):
        target = deployment.folder.parent / "copy.duckdb"
        deployment.call("snapshot", target)
    bus.close()
    with duckdb.connect(str(target), read_only=True) as copy:
        assert copy.execute("SELECT count(*) FROM traces").fetchall() == [(PROMPTS,)]
    deployment.fails(UsageError, "already exists", "snapshot", target)


def test_snapshot_of_a_foreign_database_leaves_no_file(tmp_path):
    (tmp_path / "d").mkdir()
    duckdb.connect(str(tmp_path / "d" / "charter.duckdb")).execute("CREATE TABLE t (i INT)").close()
    Deployment(tmp_path / "d").fails(
        DataFolderVersionMismatch, "d/charter.duckdb was created by", "snapshot", tmp_path / "copies" / "c.duckdb"
    )
    assert list((tmp_path / "copies").iterdir()) == []


def test_backup_restores_to_a_folder_that_continues(deployment, tmp_path):
    finished_deployment(deployment)
    deployment.call("backup", tmp_path / "kept")
    restored = Deployment(tmp_path / "restored")
    restored.call("restore", tmp_path / "kept")
    assert restored.sql(COUNTS) == deployment.sql(COUNTS)
    restored.publish("one more")
    restored.stream(PROMPTS + 1)
    assert restored.sql("SELECT sum(duplicates)::INT FROM pipeline_status") == [(0,)]
    deployment.fails(UsageError, "nowhere", "restore", tmp_path / "nowhere")
    Deployment(tmp_path / "empty").fails(UsageError, "nothing to back up", "backup", tmp_path / "b")


def test_token_limit_stops_admission_and_finishes_started_prompts(deployment):
    bus = connect_bus(deployment.settings())
    FileProducer(bus, "live", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=60)
    bus.close()
    limit = {
        "budget__max_tokens": "200",
        "respond__num_completions": "2",
        "models__max_batch_size": "4",
        "worker__max_in_flight": "4",
    }
    settings = deployment.settings(**limit)
    bus = connect_bus(settings)
    with make_host(settings, bus, STAGES, sink=True) as host:
        respond = host.workers[0]
        wait_until(lambda: respond.admission_closed and all(worker.num_in_flight == 0 for worker in host.workers[1:]), host)
        num_started = respond.num_committed
    bus.close()
    assert 0 < num_started < 60 and not read_values_of(deployment, "dead-letters")
    deployment.stream(60, respond__num_completions="2")
    assert deployment.sql("SELECT count(*) FROM raw.responses") == [(60,)]


# A local broker


# Runs


@pytest.mark.parametrize("run_id", ["../../outside", ".hidden", "a b", "", "x" * 101, "a/b", "naïve"])
def test_unsafe_run_id_is_rejected(deployment, run_id):
    deployment.fails(UsageError, r"setting run\.id cannot be", "status", "--run", run_id)


def test_run_names_the_run_of_the_records_that_it_passes_over(deployment):
    deployment.publish("One?", "Two?", "Three?")
    output = deployment.call("run", "--run", "other", "--until-done", stream="stderr")
    assert "run other has no prompts yet; 3 prompts belong to run live" in output
    assert "respond=0 critique=0 revise=0 judge=0" in output


def test_sink_alone_creates_no_run(deployment):
    deployment.publish("One?")
    deployment.call("run", "--run", "maintenance", "--stage", "sink", "--until-done")
    assert deployment.rows("runs") == [] and deployment.sql("SELECT count(*) FROM prompts") == [(1,)]


def test_producers_of_two_runs_read_standard_input_at_the_same_time(deployment):
    bus = connect_bus(deployment.settings())
    first = bus.open_writer("produce.live.stdin")
    deployment.call("produce", "-", "--run", "second", stdin='"From the second run"\n')
    first.commit([])  # the producer of the other run has not fenced this one
    first.close()
    bus.close()
