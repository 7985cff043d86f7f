"""Erasure: after it no byte of the data folder has the text, and nothing that reads the log again brings the text back."""

import json
import os
import re
import shutil
import uuid
from datetime import UTC, datetime, timedelta

import pytest

from charter.connect import connect_bus
from charter.erasure import publish_erasures
from charter.pipeline import make_host
from charter.stages import STAGES
from consumers.sink import Sink
from engine.bus.read import read_topic
from engine.dead_letters import make_dead_letter
from engine.errors import StoreFull, UsageError
from engine.models.scripted import POISON_TEXT
from engine.store import Store
from engine.worker import to_producer_record
from schemas import ids
from schemas.records import BatchManifest, ChatMessage, DeadLetterKind, Erasure, PolicyKind, PolicyUpdate, Prompt
from schemas.topics import TOPICS
from tests.support.deployment import Deployment
from tests.support.records import RecordDatabase, make_chain_end, make_response
from tests.support.waiting import wait_until

SECRET = "My neighbor Ottoline Quarrington-Vexley keeps 47 peacocks."
POISONED = f"The password of Ottoline is heliotrope-77. {POISON_TEXT}"
DEMONSTRATION = "Ottoline should build a brick enclosure for them."
CHOSEN, REJECTED = "Ottoline may keep peacocks.", "Ottoline must sell every peacock."
OTHERS = [f"What is the use of tool number {number}?" for number in range(5)]
TABLES = ("prompts", "responses", "critiques", "revisions", "preferences", "grades", "demonstrations", "dead_letters")


@pytest.fixture
def kafka_deployment(tmp_path, kafka_address):
    deployment = Deployment(tmp_path / "data", kafka_address, f"e{uuid.uuid4().hex[:8]}.")
    deployment.flags |= {"bus.retention_ms": "600000000", "bus.prompts_retention_ms": "1200000000", "bus.partitions": "2"}
    fill(deployment)
    return deployment


@pytest.fixture(scope="module")
def filled_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filled")
    fill(Deployment(folder / "data"))
    return folder


@pytest.fixture
def deployment(filled_folder, tmp_path):
    """Return a copy of a data folder with a prompt in two epochs, its responses, labels and a demonstration, and dead letters."""
    shutil.copytree(filled_folder, tmp_path, dirs_exist_ok=True)
    return Deployment(tmp_path / "data")


def fill(deployment):
    folder = deployment.folder.parent
    (folder / "prompts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in [*OTHERS, SECRET, POISONED]))
    (folder / "shown.jsonl").write_text(json.dumps({"prompt": SECRET, "completion": DEMONSTRATION}) + "\n")
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": SECRET, "chosen": CHOSEN, "rejected": REJECTED}) + "\n")
    deployment.call("produce", folder / "prompts.jsonl")
    deployment.call("produce", folder / "prompts.jsonl", "--epoch", 1)
    deployment.call("produce", "--as", "demonstrations", folder / "shown.jsonl")
    deployment.call("produce", "--as", "preferences", folder / "pairs.jsonl")
    # Two epochs of six judged prompts and one pair of a person, and two dead letters.
    sql = (
        "SELECT (SELECT count(*) FROM preferences), (SELECT count(*) FROM demonstrations), (SELECT count(*) FROM dead_letters)"
    )
    settings = deployment.settings()
    bus = connect_bus(settings)
    with make_host(settings, bus, STAGES, sink=True) as host:
        wait_until(lambda: settings.folder.joinpath("charter.duckdb").exists() and deployment.sql(sql) == [(13, 1, 2)], host)
    bus.close()


def get_prompt_id(text, epoch=0):
    return ids.compute_prompt_id([ChatMessage(role="user", content=text)], epoch)


def find_files(folder, text):
    """Return the names of the files below a folder that contain the bytes of a text."""
    return {path.name for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()}


def find_texts(folder, texts):
    return {text: files for text in texts if (files := find_files(folder, text))}


def read_derived_texts(deployment):
    """Return all texts that were made from the secret prompt."""
    sql = f"""
        SELECT unnest(list_transform(completions, lambda c: c.text)) FROM responses WHERE prompt_id = '{get_prompt_id(SECRET)}'
        UNION ALL SELECT response FROM revisions WHERE prompt_id = '{get_prompt_id(SECRET)}'
        UNION ALL SELECT critique FROM critiques WHERE prompt_id = '{get_prompt_id(SECRET)}' AND critique <> ''"""
    texts = [text for (text,) in deployment.sql(sql)]
    assert len(texts) >= 2 and all(len(text) > 30 for text in texts)
    return texts


def count_rows(deployment, prompt_id):
    return sum(deployment.sql(f"SELECT count(*) FROM raw.{table} WHERE prompt_id = '{prompt_id}'")[0][0] for table in TABLES)


def test_erased_text_is_in_no_byte_of_the_data_folder(deployment):
    texts = [SECRET, "Ottoline", "heliotrope", DEMONSTRATION, CHOSEN, REJECTED, *read_derived_texts(deployment)]
    before = find_texts(deployment.folder, texts)
    assert set(before) == set(texts)  # the same search finds every text before the erasure
    assert {"log.sqlite", "charter.duckdb"} <= before[SECRET] & before["heliotrope"] & before[DEMONSTRATION] & before[CHOSEN]
    other_rows = deployment.sql("SELECT * FROM traces WHERE prompt LIKE 'What%' ORDER BY prompt_id")
    bus = connect_bus(deployment.settings())
    offsets = bus.end_offsets(["prompts", "responses", "preferences", "dead-letters"])

    output = deployment.call("erase", get_prompt_id(SECRET)[:13], get_prompt_id(POISONED, 1), stdin="y\n")

    assert SECRET in output and "heliotrope-77" in output and output.index(SECRET) < output.index("permanently delete")
    assert "erased 2 prompts" in output and "prompts 4, responses 2" in output and "dead-letters 2" in output
    assert find_texts(deployment.folder, texts) == {}
    assert bus.end_offsets(["prompts", "responses", "preferences", "dead-letters"]) == offsets
    assert sum(record.value is None for record in read_topic(bus, Prompt.topic)) == 4
    bus.close()
    deployment.fails(UsageError, "was erased", "show", get_prompt_id(SECRET))
    assert "erased 1 prompt from" in deployment.call("erase", get_prompt_id(SECRET), "--yes")  # it may be repeated
    assert deployment.sql("SELECT * FROM traces ORDER BY prompt_id") == other_rows and len(other_rows) == 10


def test_answer_no_erases_nothing(deployment):
    assert "nothing was deleted" in deployment.call("erase", get_prompt_id(SECRET), stdin="n\n", code=1)
    assert count_rows(deployment, get_prompt_id(SECRET)) and deployment.sql("SELECT count(*) FROM erasures") == [(0,)]


def test_remaining_copies_are_listed(deployment, tmp_path):
    deployment.call("backup", tmp_path / "kept")
    (deployment.folder / "damaged-20261124T100000Z").mkdir()
    deployment.publish(f"Somebody wrote: {SECRET} Is that true?")
    deployment.stream(13)
    output = deployment.call("erase", get_prompt_id(SECRET), "--yes")
    assert SECRET not in output and "Ottoline" not in output  # --yes is for scripts, whose output is stored
    remaining = output.partition("not erased:")[2]
    assert "files that charter repair moved away: damaged-20261124T100000Z" in remaining
    assert "models: no finished batch contains its records" in remaining and "prompts.jsonl:6" in remaining
    assert "shown.jsonl:1" in remaining and "pairs.jsonl:1" in remaining
    other = get_prompt_id(f"Somebody wrote: {SECRET} Is that true?")
    assert f"other prompts that contain the same text: {other}" in remaining and "erase --data BACKUP" in remaining
    # The advice for the backup works.
    backup = Deployment(tmp_path / "kept")
    assert {"log.sqlite", "charter.duckdb"} <= find_files(backup.folder, SECRET)
    backup.call("erase", get_prompt_id(SECRET), "--yes")
    assert find_files(backup.folder, SECRET) == set()


def test_models_that_learned_from_the_records_are_listed(tmp_path):
    """Policy 1 was trained on the record, policy 2 on another record but from policy 1, policy 3 from the base model."""
    database = RecordDatabase(tmp_path / "data" / "charter.duckdb")
    chain, other = make_chain_end("one", SECRET), make_chain_end("two", "another")
    batches = [make_batch(1, chain, 0), make_batch(2, other, 1), make_batch(3, other, 0)]
    database.add(chain, other, *batches, *(make_policy(number, batch) for number, batch in enumerate(batches, 1)))
    output = Deployment(tmp_path / "data").call("erase", chain.prompt_id, "--yes")
    assert "models trained on it: policy 1 (sft, policy-1), policy 2 (sft, policy-2)\n" in output


def make_batch(number, record, base_policy_version):
    return BatchManifest(
        record_id=ids.compute_id("batch", number),
        run_id="r",
        stage="train",
        phase="sft",
        batch_number=number,
        record_ids=[record.record_id],
        content_hash="",
        commit_seq_from=0,
        commit_seq_to=1,
        base_policy_version=base_policy_version,
    )


def make_policy(version, batch):
    return PolicyUpdate(
        record_id=ids.compute_id("policy", version),
        run_id="r",
        stage="train",
        kind=PolicyKind.POLICY,
        version=version,
        phase="sft",
        uri=f"/models/policy-{version}",
        content_hash="",
        base_version=batch.base_policy_version,
        batch_id=batch.record_id,
    )


def test_running_sink_finishes_the_erasure(deployment):
    settings = deployment.settings()
    bus = connect_bus(settings)
    with make_host(settings, bus, STAGES, sink=True):
        output = deployment.call("erase", get_prompt_id(SECRET), "--yes", stream="output")
        assert find_texts(deployment.folder, [SECRET, DEMONSTRATION, CHOSEN]) == {}
        deployment.publish("one more")
        wait_until(lambda: deployment.sql("SELECT count(*) FROM prompts WHERE messages[1].content = 'one more'") == [(1,)])
    bus.close()
    assert f"the sink of process {os.getpid()} writes to" in output


def test_record_that_a_stage_writes_after_the_erasure_has_no_value(deployment):
    """The stage read the prompt before the erasure. A dead letter of the prompt also has no value."""
    bus = connect_bus(deployment.settings())
    deployment.call("erase", get_prompt_id(SECRET), "--yes")
    (prompt,) = {
        record.key: record for record in read_topic(bus, "prompts") if record.key == get_prompt_id(SECRET).encode()
    }.values()
    prompt = prompt._replace(value=SECRET.encode())
    dead_letter = make_dead_letter(prompt, DeadLetterKind.EXHAUSTED, ValueError(SECRET), stage="respond", run_id="live")
    bus.open_writer("w").commit([to_producer_record(make_response(SECRET)), to_producer_record(dead_letter)])
    bus.close()
    assert find_files(deployment.folder, SECRET) == set()


def test_erasure_that_was_interrupted_is_finished_by_the_next_sink(deployment, monkeypatch, caplog):
    def fail(*_):
        raise StoreFull("the disk is full", "no space left", "free disk space")

    monkeypatch.setattr("consumers.sink.compute_backoff", lambda *_: 3600.0)
    with monkeypatch.context() as patch:
        patch.setattr("engine.store.Store.rewrite", fail)
        bus = connect_bus(deployment.settings())
        publish_erasures(bus, [get_prompt_id(SECRET)], "live", "")
        sink = Sink(bus, Store(deployment.folder / "charter.duckdb"), max_wait_s=0.05)
        while sink.step():
            pass
        sink.close()
    assert "the sink finishes an erasure in 3600 s: the disk is full: no space left" in caplog.text
    assert count_rows(deployment, get_prompt_id(SECRET)) == 0 and find_files(deployment.folder, CHOSEN) == {"charter.duckdb"}
    (deployment.folder / ".charter.duckdb.copy").write_text(CHOSEN)  # a copy of an attempt that was killed
    sink = Sink(bus, Store(deployment.folder / "charter.duckdb"), max_wait_s=0.05)
    assert sink.step() == 0
    sink.close()
    bus.close()
    assert find_files(deployment.folder, CHOSEN) == set()


def test_no_reader_of_the_log_brings_an_erased_prompt_back(deployment, caplog):
    prompt_id = get_prompt_id(SECRET)
    deployment.call("erase", prompt_id, "--yes")
    # A file with the text is produced again, in the same and in a new epoch.
    for epoch in (0, 1, 2):
        output = deployment.call("produce", deployment.folder.parent / "prompts.jsonl", "--run", "later", "--epoch", epoch)
        assert "1 skipped because their prompts were erased" in output
    # A stage starts again from the beginning of the log, as a new consumer group.
    settings = deployment.settings(budget__max_tokens="1000000")
    bus = connect_bus(settings)
    bus.set_committed("live.respond", bus.beginning_offsets(["prompts"]))
    with make_host(settings, bus, STAGES, sink=True) as host:
        respond = host.workers[0]
        wait_until(lambda: respond.num_erased == 2 and respond.num_dead_letters == 2, host)
    bus.close()
    assert "respond skips the records of erased prompts" in caplog.text
    assert "does not count the tokens of" in caplog.text
    # A replay counts the erased records.
    output = deployment.call("replay", "--stage", "judge", "--from", "run:live", "--as", "again", stream="stderr")
    assert re.search(r"replaying \d+ records of run live \(\d+ published by an earlier start, 2 erased\)", output)
    # The sink builds a deleted database again.
    shutil.rmtree(deployment.folder / "charter.lock")
    (deployment.folder / "charter.duckdb").unlink()
    settings = deployment.settings()
    bus, caplog_text = connect_bus(settings), caplog.text
    sink = Sink(bus, Store(settings.folder / "charter.duckdb"), max_wait_s=0.05)
    while sink.step():
        pass
    assert sink.num_erased > 4 and "the sink skips the records of erased prompts" in caplog.text[len(caplog_text) :]
    sink.close()
    bus.close()
    assert deployment.sql("SELECT DISTINCT stage FROM dead_letters") == [("respond",)]
    for epoch in (0, 1, 2):
        assert count_rows(deployment, get_prompt_id(SECRET, epoch)) == 0
    assert find_files(deployment.folder, "Ottoline Quarrington") == set()


@pytest.mark.kafka
def test_erased_prompt_on_kafka_stays_erased_until_retention_deletes_it(kafka_deployment, caplog):
    deployment = kafka_deployment
    assert "charter.duckdb" in find_files(deployment.folder, SECRET)
    output = deployment.call("erase", get_prompt_id(SECRET), "--yes")
    assert find_texts(deployment.folder, [SECRET, "Ottoline Q", DEMONSTRATION, CHOSEN]) == {}
    # The values stay in Kafka, and the command says until when.
    tomorrow = datetime.now(UTC) + timedelta(milliseconds=1_200_000_000)
    assert re.search(rf"prompts: 2 records, until about {tomorrow:%Y-%m-%d} .*retention.ms=1200000000", output)
    assert "demonstrations: 1 record, until about" in output and "Kafka cannot delete single records" in output
    assert f"the topic {Erasure.topic} has a retention time" not in output  # a rebuilt sink always finds the erasures
    # A producer, a stage that starts again, and a replay skip the prompt.
    again = deployment.call("produce", deployment.folder.parent / "prompts.jsonl", "--run", "later", "--epoch", 2)
    assert "1 skipped because their prompts were erased" in again
    settings = deployment.settings()
    bus = connect_bus(settings)
    bus.set_committed("live.respond", bus.beginning_offsets(["prompts"]))
    with make_host(settings, bus, STAGES, sink=True) as host:
        respond = host.workers[0]
        wait_until(lambda: respond.num_erased == 2 and respond.num_dead_letters == 2, host)
    output = deployment.call("replay", "--stage", "respond", "--from", "run:live", "--as", "again", stream="output", code=1)
    assert re.search(r"replaying 12 records of run live \(0 published by an earlier start, 2 erased\)", output)
    assert "selected 12, done 10, skipped 0, dead letters 2" in output
    # A sink with a new database reads the values from Kafka, and never writes them.
    store = Store(deployment.folder.parent / "rebuilt" / "charter.duckdb")
    sink = Sink(bus, store, max_rows=5, max_wait_s=0.2)
    ends = bus.end_offsets(list(TOPICS))
    while any(sink.reader.positions()[tp] < end for tp, end in ends.items()):
        sink.step()
        assert find_files(store.path.parent, "Ottoline Q") == set()
    assert sink.num_erased >= 6 and store.query("SELECT DISTINCT stage FROM dead_letters").rows == [("respond",)]
    sink.close()
    bus.close()
    rebuilt = Deployment(store.path.parent, deployment.flags["bus.address"], deployment.flags["bus.prefix"])
    for epoch in (0, 1, 2):
        assert count_rows(deployment, get_prompt_id(SECRET, epoch)) == count_rows(rebuilt, get_prompt_id(SECRET, epoch)) == 0
