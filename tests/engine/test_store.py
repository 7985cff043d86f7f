"""The store and its access lock: queries cannot write, a busy file raises StoreBusy, and a waiting writer goes first."""

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import duckdb
import pytest

from engine.errors import DataFolderVersionMismatch, StoreBusy, StoreDamaged, UsageError
from engine.store import FORMAT_VERSION, Store
from engine.tables import build_create_statements
from schemas.topics import TOPICS
from tests.support.records import RecordDatabase, make_prompt
from tests.support.waiting import HANG_S


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "charter.duckdb")
    store.create_schema()
    return store


def test_new_database_has_every_table_and_view(store):
    status = store.query("SELECT topic, records FROM pipeline_status").rows
    assert status == [(topic, 0) for topic in TOPICS]
    for view in ("sft_examples", "preference_pairs", "traces", "revision_chains", "rollouts"):
        assert store.query(f"SELECT * FROM {view}").rows == []
    store.create_schema()  # the second call has no effect


def test_missing_and_changed_views_are_created_again(store, monkeypatch):
    with store.open_write_session() as connection:
        connection.execute("DROP VIEW sft_examples")
    store.create_schema()
    assert store.query("SELECT * FROM sft_examples").rows == []
    statements = [*build_create_statements(), "CREATE OR REPLACE VIEW sft_examples AS SELECT 7 AS seven"]
    monkeypatch.setattr("engine.tables.build_create_statements", lambda: statements)
    store.create_schema()
    assert store.query("SELECT * FROM sft_examples").rows == [(7,)]


READER = """
import os, sys
from pathlib import Path
from engine.store import Store
store = Store(Path(sys.argv[1], "charter.duckdb"))
if os.getuid() == 0:  # root can write everywhere
    os.setuid(65534)
try:
    Path(sys.argv[1], "charter.lock", "turn").open("a")
    sys.exit("this user can write to the folder")
except PermissionError:
    print(store.query("SELECT count(*) FROM traces").rows)
"""


def test_user_with_read_access_only_can_query():
    with tempfile.TemporaryDirectory() as name:  # pytest's folders are not readable by other users
        folder = Path(name)
        Store(folder / "charter.duckdb").create_schema()
        Store(folder / "charter.duckdb").query("SELECT 1")  # creates the files of the access lock
        paths = (folder, *folder.rglob("*"))
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        completed = subprocess.run([sys.executable, "-c", READER, name], capture_output=True, text=True, check=False)
        for path in paths:
            path.chmod(0o755)
    assert completed.stdout.strip() == "[(0,)]", completed.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM raw.prompts",
        "CREATE TABLE x (a INTEGER)",
        "SELECT * FROM read_text('/etc/hostname')",
        "COPY (SELECT 1) TO '/tmp/charter-should-not-exist.csv'",
        "ATTACH '/tmp/charter-other.duckdb'",
        "SET enable_external_access = true",
        "INSTALL httpfs",
        "SELECT nothing FROM nowhere",
    ],
)
def test_queries_can_only_read_the_tables(store, statement):
    with pytest.raises(UsageError, match="failed"):
        store.query(statement)


def test_readers_of_one_process_can_overlap(store):
    with store.open_read_session() as first, store.open_read_session() as second:
        assert first("SELECT 1").rows == second("SELECT 1").rows == [(1,)]
        with pytest.raises(UsageError, match="failed"):
            second("SET enable_external_access = true")


def test_long_query_is_interrupted(store):
    started = time.monotonic()
    with pytest.raises(UsageError, match=r"longer than 0\.3 s"):
        store.query("SELECT count(*) FROM range(100000000) a, range(100000) b WHERE a.range % 7 = b.range % 11", limit_s=0.3)
    assert time.monotonic() - started < HANG_S  # the whole query would take days


def test_error_for_a_missing_database_names_a_command(tmp_path):
    with pytest.raises(UsageError, match="charter demo"):
        Store(tmp_path / "none.duckdb").query("SELECT 1")
    duckdb.connect(tmp_path / "none.duckdb").close()  # as a process leaves it that was stopped before it created the tables
    with pytest.raises(UsageError, match="charter demo"):
        Store(tmp_path / "none.duckdb").query("SELECT 1")


def test_database_of_another_version_is_rejected(store):
    with store.open_write_session() as connection:
        connection.execute("UPDATE raw.sink_state SET version = 99")
    for function in (store.create_schema, lambda: store.query("SELECT 1")):
        with pytest.raises(DataFolderVersionMismatch, match=rf"99, expected {FORMAT_VERSION}"):
            function()


def test_foreign_database_is_rejected(tmp_path):
    path = tmp_path / "charter.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE mine (a INTEGER)")
    with pytest.raises(DataFolderVersionMismatch):
        Store(path).create_schema()


def test_file_that_is_not_a_database_is_rejected(tmp_path):
    path = tmp_path / "charter.duckdb"
    path.write_bytes(b"something else" * 1000)
    with pytest.raises(StoreDamaged, match="charter repair"):
        Store(path).query("SELECT 1")


HOLD = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


def test_error_for_a_locked_file_names_the_process(store):
    command = [sys.executable, "-c", HOLD, str(store.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreBusy, match=str(holder.pid)):
            store.query("SELECT 1")
        holder.communicate("")
    assert store.query("SELECT 1").rows == [(1,)]


def test_busy_access_lock_raises_store_busy_after_the_timeout(store):
    with store.access_lock.write_lock(1), pytest.raises(StoreBusy, match="busy"):
        store.query("SELECT 1", lock_timeout_s=0.1)


def test_waiting_writer_goes_before_later_readers(store):
    order, reading, release = [], threading.Event(), threading.Event()

    def first_reader():
        with store.access_lock.read_lock(HANG_S):
            reading.set()
            release.wait(HANG_S)

    def writer():
        with store.access_lock.write_lock(HANG_S):
            order.append("writer")

    def late_reader():
        with store.access_lock.read_lock(HANG_S):
            order.append("reader")

    threads = [threading.Thread(target=first_reader), threading.Thread(target=writer), threading.Thread(target=late_reader)]
    threads[0].start()
    assert reading.wait(HANG_S)
    threads[1].start()
    while not is_write_lock_requested(store):  # the writer has requested the lock and waits for the first reader
        pass
    threads[2].start()
    while not store.access_lock.has_waiting_readers():
        pass
    release.set()
    for thread in threads:
        thread.join()
    assert order == ["writer", "reader"]


def is_write_lock_requested(store):
    try:
        with store.access_lock.read_lock(0):
            return False
    except StoreBusy:
        return True


def test_rewrite_keeps_all_rows_in_order_and_drops_the_bytes_of_deleted_rows(tmp_path):
    """The path is a link, as on machines that keep data on another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "charter.duckdb").symlink_to(tmp_path / "disk" / "data.duckdb")
    database = RecordDatabase(tmp_path / "charter.duckdb")
    store, path = database.store, tmp_path / "disk" / "data.duckdb"
    database.add(make_prompt("the erased secret"), *(make_prompt(f"prompt {number}") for number in range(3000)))
    with store.open_write_session() as connection:
        connection.execute("DELETE FROM raw.prompts WHERE messages[1].content = 'the erased secret'")
        connection.execute("INSERT INTO raw.unfinished_erasures VALUES (uuid())")
        connection.execute("CREATE TABLE notes (text VARCHAR)")  # of a user
    path.chmod(0o640)
    views = "SELECT view_name FROM duckdb_views() WHERE NOT internal ORDER BY 1"
    before = store.query("SELECT * FROM raw.prompts").rows, store.query("SELECT * FROM traces ORDER BY prompt_id").rows
    all_views = store.query(views).rows
    assert b"the erased secret" in path.read_bytes() and len(all_views) > 20
    store.rewrite()
    assert (
        store.query("SELECT * FROM raw.prompts").rows,
        store.query("SELECT * FROM traces ORDER BY prompt_id").rows,
    ) == before
    assert store.query(views).rows == all_views and store.query("SELECT count(*) FROM notes").rows == [(0,)]
    assert store.query("SELECT count(*) FROM raw.unfinished_erasures").rows == [(0,)]
    assert b"the erased secret" not in path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o640 and (tmp_path / "charter.duckdb").is_symlink()
    assert [file.name for file in (tmp_path / "disk").iterdir()] == ["data.duckdb"]


def test_rewrite_waits_for_readers_and_leaves_the_file_if_they_do_not_end(tmp_path):
    database = RecordDatabase(tmp_path / "charter.duckdb")
    database.add(make_prompt("one"))
    with database.store.open_read_session(), pytest.raises(StoreBusy):
        database.store.rewrite(0.05)
    database.store.rewrite(0.05)
    assert database.query_rows("SELECT count(*) FROM prompts") == [(1,)]
