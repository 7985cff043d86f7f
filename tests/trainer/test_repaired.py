"""A database that loses rows and is restored from the log: each row trains exactly once, with real damaged files."""

import shutil
from collections import Counter

import pytest

from consumers.sink import Sink
from engine.backups import create_snapshot
from engine.commit_history import CommitHistory, read_commit_history
from engine.errors import CharterError, StoreDamaged, StoreIncomplete, TrainingFailed, UsageError, WalDamaged
from engine.progress import WorkProgress
from engine.repair import repair_database
from engine.worker import to_producer_record
from schemas.records import BatchManifest
from tests.support import damage
from tests.support.records import make_chain_end, make_preference, make_response
from tests.support.workspace import Workspace
from trainer.batches import rebuild_batch
from trainer.consumed import compute_consumed_rows
from trainer.state import find_unfinished_batches

MAX_ROWS = 6
NAMES = {"first": 5, "second": 9, "third": 6}


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    """A data folder whose trainer has trained on 5 rows of the database file and on 6 of 9 rows that are only in the WAL."""
    workspace = Workspace(tmp_path_factory.mktemp("template") / "data", max_rows=MAX_ROWS)
    workspace.add(*make_chains("first"))
    workspace.trainer.update("sft")
    publish(workspace, make_chains("second"))
    damage.kill_sink(workspace.bus.folder, workspace.store, NAMES["second"])
    workspace.trainer.update("sft")
    assert sorted(count_trained_rows(workspace).values()) == [1] * 11 and workspace.messages == []
    workspace.close()
    return workspace.settings.folder


@pytest.fixture
def workspace(tmp_path, trained_folder):
    shutil.copytree(trained_folder, tmp_path / "data")
    workspace = Workspace(tmp_path / "data", max_rows=MAX_ROWS)
    yield workspace
    workspace.close()


def make_chains(name):
    return [make_chain_end(f"{name}{n}", f"chain {name} {n}") for n in range(NAMES[name])]


def publish(workspace, records):
    workspace.bus.publish([to_producer_record(record) for record in records])


def count_trained_rows(workspace, phase="sft"):
    """Return how often each row was a new row of a batch that led to an update."""
    batches = [m for m in workspace.trainer.read_state().trained_batches if m.phase == phase]
    return Counter(row for m in batches for row in m.record_ids if row not in m.replayed_record_ids)


def train_all(workspace, phase="sft"):
    """Train a phase until it has no new rows."""
    while True:
        try:
            workspace.trainer.update(phase)
        except UsageError as error:
            assert "nothing new" in error.what
            return


def open_error(store):
    """Return the error of a query that reads every row."""
    with pytest.raises(CharterError) as caught:
        store.query("SELECT count(DISTINCT hash(record)) FROM raw.critiques AS record")
    return caught.value


# Each entry: the damage, the error of a query (None if a query finds nothing), and whether the repair keeps the database file.
DAMAGES = {
    "WAL cut": (damage.cut_wal, None, True),
    "WAL with a flipped byte": (damage.flip_wal_byte, WalDamaged, True),
    "WAL of another database": (damage.replace_wal, WalDamaged, True),
    "database deleted": (damage.delete_database, UsageError, False),
    "database deleted without its WAL": (damage.delete_database_without_wal, UsageError, False),
    "database of another log": (damage.replace_by_database_of_another_log, None, False),
    "page overwritten": (damage.overwrite_page, StoreDamaged, False),
    "every data page overwritten": (damage.overwrite_every_data_page, StoreDamaged, False),
    "database truncated": (damage.truncate_database, StoreDamaged, False),
    "database empty": (damage.empty_database, StoreDamaged, False),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_row_trains_once_after_the_repair(workspace, name):
    """The sink restores the lost rows in another order than before, mixed with new rows."""
    inflict, error_class, keeps_database = DAMAGES[name]
    inflict(workspace.store)
    if error_class:
        error = open_error(workspace.store)
        assert type(error) is error_class and error.why and error.fix
        assert "charter repair" in error.fix or error_class is UsageError
    before = {path.name: path.read_bytes() for path in workspace.store.path.parent.glob("charter.duckdb*")}
    repair = repair_database(workspace.store, workspace.bus)
    assert {path.name: path.read_bytes() for path in repair.moved}.items() <= before.items()
    assert workspace.store.path.exists() == keeps_database
    assert repair.missing == {}

    publish(workspace, make_chains("third"))
    if not keeps_database:
        database_is_rebuilt(workspace)
    workspace.add()
    assert workspace.store.query("SELECT records, duplicates FROM pipeline_status WHERE topic = 'critiques'").rows == [(20, 0)]
    train_all(workspace)
    assert count_trained_rows(workspace) == Counter(chain.record_id for name in NAMES for chain in make_chains(name))
    assert len([message for message in workspace.messages if "numbered" in message]) == 1
    for manifest in workspace.read_records(BatchManifest):
        assert rebuild_batch(workspace.store, manifest).manifest == manifest
    assert list(repair_database(workspace.store, workspace.bus).problems) == []


def database_is_rebuilt(workspace):
    """While the sink reads the log again, the trainer waits."""
    sink = Sink(workspace.bus, workspace.store, max_rows=3, max_wait_s=0.05)
    assert sink.step() == 3
    sink.close()
    for train in (lambda: workspace.trainer.update("sft"), workspace.trainer.run_tick):
        with pytest.raises(StoreIncomplete, match="does not have all records"):
            train()


def test_older_copy_of_the_database_does_not_hide_or_repeat_rows(workspace):
    """The sink continues from the offsets of the copy and reuses numbers that the trainer has already consumed."""
    workspace.add(*make_chains("third"))
    create_snapshot(workspace.store, workspace.settings.folder / "copy.duckdb", WorkProgress())
    workspace.add(*(make_chain_end(f"late{n}", f"late {n}") for n in range(8)))
    train_all(workspace)
    (workspace.settings.folder / "copy.duckdb").replace(workspace.store.path)
    with pytest.raises(StoreIncomplete):
        workspace.trainer.update("sft")
    workspace.add(*(make_chain_end(f"new{n}", f"new {n}") for n in range(8)))
    train_all(workspace)
    assert sorted(count_trained_rows(workspace).values()) == [1] * (20 + 16)


def test_unfinished_batch_is_resumed_with_the_restored_rows(workspace, monkeypatch):
    """The trainer was killed in a batch; the batch waits until the database has its rows again."""

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(workspace.trainer.updater, "train_and_publish", die)
    with pytest.raises(KeyboardInterrupt):
        workspace.trainer.update("sft")
    (unfinished,) = find_unfinished_batches(workspace.trainer.read_state())
    workspace.reopen()
    damage.delete_database(workspace.store)
    sink = Sink(workspace.bus, workspace.store, max_rows=2, max_wait_s=0.05)
    assert sink.step() == 2
    sink.close()
    with pytest.raises(StoreIncomplete):
        workspace.trainer.resume()
    workspace.add()
    assert workspace.trainer.resume().batch_id == unfinished.record_id
    train_all(workspace)
    assert sorted(count_trained_rows(workspace).values()) == [1] * 14


def test_voided_batch_is_not_retried_after_the_repair(workspace):
    """The same rows are not tried again in a loop, although they have new numbers."""
    workspace.reopen(learners={"sft": fail_update})
    workspace.add()  # 3 rows are left; a batch needs 4
    workspace.add(*make_chains("third")[:3])
    with pytest.raises(TrainingFailed):
        workspace.trainer.update("sft")
    assert workspace.trainer.next_phase() is None
    damage.delete_database(workspace.store)
    workspace.add()
    assert workspace.trainer.next_phase() is None
    workspace.add(*(make_chain_end(f"late{n}", f"late {n}") for n in range(8)))
    assert workspace.trainer.next_phase() == "sft"


def fail_update(context, batch):
    raise TrainingFailed("the loss is NaN", "a test", "")


def test_reward_model_and_ppo_recognize_their_rows_after_the_repair(tmp_path):
    """Labels train the reward model once, it replays only trained labels, and PPO skips the prompts of these labels."""
    workspace = Workspace(tmp_path / "data", allow_overlap=False)
    workspace.settings = workspace.settings.model_copy(
        update={"reward": workspace.settings.reward.model_copy(update={"replay_ratio": 1.0})}
    )
    workspace.reopen()
    workspace.add_labels("first")
    workspace.trainer.update("reward")
    workspace.add_responses("first")
    workspace.trainer.update("ppo")
    trained = {phase: count_trained_rows(workspace, phase) for phase in ("reward", "ppo")}
    damage.delete_database(workspace.store)
    overlap = make_response("pair first 0")
    assert overlap.prompt_id == make_preference("first0", "pair first 0", 0.7).prompt_id
    workspace.add(overlap, *(make_preference(f"second{n}", f"pair second {n}", 0.7) for n in range(4)))
    workspace.add_responses("second")
    for phase in ("reward", "ppo"):
        workspace.trainer.update(phase)
        again = count_trained_rows(workspace, phase)
        assert set(again.values()) == {1} and len(again) == 8 and trained[phase].keys() < again.keys()
    last_reward_batch = [m for m in workspace.read_records(BatchManifest) if m.phase == "reward"][-1]
    assert set(last_reward_batch.replayed_record_ids) == trained["reward"].keys()
    workspace.close()


def test_manifest_of_an_earlier_version_is_recognized_by_ids(workspace):
    """A manifest without a session of the sink, e.g. of an earlier version, has no valid cursor."""
    state = workspace.trainer.read_state()
    batches = [manifest.model_copy(update={"sink_session": None}) for manifest in state.trained_batches]
    workspace.add()
    history = read_commit_history(workspace.store)
    consumed = compute_consumed_rows(history, batches)
    assert consumed.get_cursor("test") == -1 and consumed.moved_batch_ids == [manifest.record_id for manifest in batches]


@pytest.mark.parametrize(
    ("session", "commit_seq", "is_valid"),
    [
        ("a", 9, True),
        ("a", 10, False),  # session b reused this number
        ("b", 19, True),
        ("b", 9, True),  # a batch of session b with rows of session a
        ("c", 24, True),
        ("c", 25, False),  # these rows are lost, and no session has begun since then
        ("d", 0, False),
        (None, 0, False),
    ],
)
def test_cursor_is_valid_while_no_later_session_reused_its_numbers(session, commit_seq, is_valid):
    history = CommitHistory({"a": 0, "b": 10, "c": 20}, 25, 25, frozenset())
    assert history.is_valid(session, commit_seq) == is_valid
