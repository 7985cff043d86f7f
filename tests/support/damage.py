"""Damage the files of a database, as a crash, a bad disk or an operator does."""

import os
import shutil
import subprocess
import sys
import textwrap

import duckdb

from engine.bus import open_bus
from engine.store import Store
from engine.worker import to_producer_record
from schemas.topics import TOPICS
from tests.support.records import RecordDatabase, make_prompt

# The sink is killed while it has the database open, so its last transactions are only in the write-ahead log (WAL).
_KILLED_SINK = """
    import os, signal, sys
    from pathlib import Path
    from consumers.sink import Sink
    from engine.bus import open_bus
    from engine.store import Store
    sink = Sink(open_bus(sys.argv[1]), Store(Path(sys.argv[2])), max_rows=1, max_wait_s=0.05)
    for _ in range(int(sys.argv[3])):
        assert sink.step() == 1
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_sink(log_folder, store, num_records):
    """Write records to the database one by one, in a sink that is then killed. Leave a WAL with these transactions."""
    command = [sys.executable, "-c", textwrap.dedent(_KILLED_SINK), str(log_folder), str(store.path), str(num_records)]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == -9, completed.stderr
    assert get_wal_path(store).stat().st_size > 0


def get_wal_path(store):
    return store.path.with_name(store.path.name + ".wal")


def flip_byte(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def flip_wal_byte(store):
    flip_byte(get_wal_path(store), get_wal_path(store).stat().st_size // 2)


def cut_wal(store):
    """Remove the last transactions. DuckDB takes this for a crash and opens the database without them."""
    os.truncate(get_wal_path(store), get_wal_path(store).stat().st_size // 2)


def replace_wal(store):
    """Replace the WAL by the WAL of another database."""
    other = store.path.with_name("other")
    other.mkdir()
    bus = open_bus(str(other))
    bus.create_topics(list(TOPICS.values()))
    bus.publish([to_producer_record(make_prompt("of another log"))])
    bus.close()
    kill_sink(other, Store(other / "charter.duckdb"), 1)
    shutil.copyfile(get_wal_path(Store(other / "charter.duckdb")), get_wal_path(store))


def delete_database(store):
    """Delete the database with its WAL."""
    store.path.unlink()
    get_wal_path(store).unlink(missing_ok=True)


def delete_database_without_wal(store):
    store.path.unlink()


def overwrite_page(store, table="critiques"):
    """Overwrite 4 KiB of the first block with rows of a table. DuckDB finds the damage only when a query reads the block."""
    sql = f"SELECT min(block_id) FROM pragma_storage_info('raw.{table}') WHERE persistent AND block_id >= 0"
    with duckdb.connect(str(store.path), read_only=True) as connection:
        ((block_id,),) = connection.execute(sql).fetchall()
    with store.path.open("r+b") as file:
        file.seek(3 * 4096 + block_id * 256 * 1024)  # the file begins with three headers
        file.write(os.urandom(4096))


def overwrite_every_data_page(store):
    """Keep the headers, which DuckDB reads when it opens the file. Queries find the damage."""
    with store.path.open("r+b") as file:
        file.seek(3 * 4096)
        file.write(os.urandom(store.path.stat().st_size - 3 * 4096))


def truncate_database(store):
    os.truncate(store.path, store.path.stat().st_size // 2)


def empty_database(store):
    os.truncate(store.path, 0)


def replace_by_database_of_another_log(store):
    """Replace the database by one with the records of another log."""
    delete_database(store)
    database = RecordDatabase(store.path)
    database.add(make_prompt("of another log"))
    with store.open_write_session() as connection:
        connection.execute("INSERT INTO raw.sink_offsets VALUES ('another', 't', 'prompts', 0, 1, 0)")
