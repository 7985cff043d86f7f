"""`charter repair`: what each command says about a damaged database, and a pipeline that continues after the repair."""

import os
import uuid

import pytest

from charter.connect import connect_bus, open_store
from consumers.sink import Sink
from engine.errors import StoreDamaged, StoreMismatch, UsageError, WalDamaged
from engine.instances import FileLock
from engine.repair import repair_database
from engine.worker import to_producer_record
from schemas.topics import TOPICS
from tests.support import damage
from tests.support.deployment import Deployment
from tests.support.records import make_prompt


@pytest.fixture
def deployment(tmp_path):
    """A deployment with 9 prompts. The sink was killed, so the database has a WAL."""
    deployment = Deployment(tmp_path / "data")
    bus = connect_bus(deployment.settings())
    bus.publish([to_producer_record(make_prompt(f"prompt {n}")) for n in range(9)])
    bus.close()
    damage.kill_sink(deployment.folder, open_store(deployment.settings()), 9)
    return deployment


def get_store(deployment):
    return open_store(deployment.settings())


def count_prompts(deployment):
    ((records, duplicates),) = deployment.sql("SELECT records, duplicates FROM pipeline_status WHERE topic = 'prompts'")
    return records, duplicates


READERS = (["status"], ["sql", "select 1"], ["report", "report.html"], ["snapshot", "copy.duckdb"], ["backup", "backup"])


@pytest.mark.parametrize("command", [*READERS, ["run", "--stage", "sink", "--until-done"]], ids=lambda words: words[0])
def test_commands_name_the_damaged_wal_and_the_repair(deployment, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage.flip_wal_byte(get_store(deployment))
    with pytest.raises(WalDamaged, match="WAL") as caught:
        deployment.call(*command)
    assert "checksum" in caught.value.why and f"charter repair --data {deployment.folder}" in caught.value.fix
    assert damage.get_wal_path(get_store(deployment)).exists()


def test_doctor_reports_the_damage(deployment):
    damage.flip_wal_byte(get_store(deployment))
    output = deployment.call("doctor", code=1)
    assert "damaged" in output and "charter repair" in output


def test_repair_moves_a_damaged_wal_and_the_sink_restores_the_rows(deployment):
    damage.flip_wal_byte(get_store(deployment))
    damaged = damage.get_wal_path(get_store(deployment)).read_bytes()
    output = deployment.call("repair")
    assert "is damaged: " in output and "moved charter.duckdb.wal to" in output and "next: charter run" in output
    (moved,) = deployment.folder.glob("damaged-*/*")
    assert moved.name == "charter.duckdb.wal" and moved.read_bytes() == damaged
    deployment.call("run", "--stage", "sink", "--until-done")
    assert count_prompts(deployment) == (9, 0)
    assert "has no damage" in deployment.call("repair")
    assert list(deployment.folder.glob("damaged-*/*")) == [moved]


def test_second_repair_in_the_same_second_has_another_folder(deployment):
    for number in range(1, 3):
        damage.empty_database(get_store(deployment))
        deployment.call("repair")
        get_store(deployment).create_schema()
        assert len(list(deployment.folder.glob("damaged-*"))) == number


def test_repair_is_refused_while_a_sink_runs(deployment):
    lock = FileLock(deployment.folder / "sink.lock")
    assert lock.try_acquire()
    deployment.fails(UsageError, f"the sink of process {os.getpid()} writes to", "repair")
    lock.close()
    assert "no damage" in deployment.call("repair")


def test_repair_without_a_database_changes_nothing(tmp_path):
    output = Deployment(tmp_path / "none").call("repair")
    assert "there is no database" in output and not (tmp_path / "none").exists()


def test_database_of_another_log_is_moved_or_kept(deployment):
    damage.replace_by_database_of_another_log(get_store(deployment))
    deployment.fails(StoreMismatch, "records of another log", "run", "--stage", "sink", "--until-done")
    assert "records of another log" in deployment.call("repair", "--keep-rows")
    assert not list(deployment.folder.glob("damaged-*"))
    deployment.call("run", "--stage", "sink", "--until-done")
    assert count_prompts(deployment) == (10, 0)

    damage.replace_by_database_of_another_log(get_store(deployment))
    assert "moved charter.duckdb to" in deployment.call("repair")
    deployment.call("run", "--stage", "sink", "--until-done")
    assert count_prompts(deployment) == (9, 0)


def test_trainer_refuses_a_database_of_another_log(deployment):
    from trainer.consumed import read_complete_history
    from trainer.state import TrainingState

    damage.replace_by_database_of_another_log(get_store(deployment))
    with pytest.raises(StoreMismatch, match="records of another log"):
        read_complete_history(get_store(deployment), TrainingState(cluster_id="this log"))


def test_repair_counts_the_records_that_the_log_no_longer_has(deployment, monkeypatch):
    store, bus = get_store(deployment), connect_bus(deployment.settings())
    damage.delete_database_without_wal(store)
    beginnings = bus.beginning_offsets(list(TOPICS))
    (first, *_) = [key for key in beginnings if key.topic == "prompts"]
    monkeypatch.setattr(bus, "beginning_offsets", lambda topics: beginnings | {first: 7})
    repair = repair_database(store, bus)
    assert repair.missing == {first: 7} and [path.name for path in repair.moved] == ["charter.duckdb.wal"]
    bus.close()


def test_sink_names_the_damage_that_it_finds_while_it_writes(deployment):
    settings = deployment.settings()
    bus, store = connect_bus(settings), open_store(settings)
    sink = Sink(bus, store, max_wait_s=0.05)
    sink.step()
    bus.publish([to_producer_record(make_prompt("prompt 1"))])  # the sink looks for its id in the damaged block
    damage.overwrite_page(store, "prompts")
    with pytest.raises(StoreDamaged, match="is damaged"):
        sink.step()
    sink.close()
    bus.close()


@pytest.mark.kafka
def test_database_is_restored_from_kafka(tmp_path, kafka_address):
    """Transaction markers occupy offsets; the sink still notes that it has read the whole log."""
    deployment = Deployment(tmp_path / "data", kafka_address, f"w{uuid.uuid4().hex[:8]}.")
    deployment.publish(*(f"Question {n}?" for n in range(5)))
    deployment.call("run", "--until-done")
    counts = deployment.sql("SELECT topic, records, duplicates FROM pipeline_status")
    damage.overwrite_every_data_page(get_store(deployment))
    assert "is damaged" in deployment.call("repair")
    deployment.call("run", "--stage", "sink", "--until-done")
    assert deployment.sql("SELECT topic, records, duplicates FROM pipeline_status") == counts
    assert deployment.sql("SELECT complete_seq = next_seq FROM raw.sink_state") == [(True,)]
