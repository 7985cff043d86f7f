"""Measure the throughput of the sink. Compare it with DuckDB's appender. Repeat this with a large table and busy readers.

python -m benchmarks.sink [--records N] [--rows N] [--readers N] [--rounds N] [--profile]

The sink reads records of 1 KB from an embedded log, decodes and validates them, marks duplicates, and commits rows and offsets.
The appender inserts the same rows in transactions of the same size. The rows of the appender are built before the measurement.
The appender does not check for duplicates. With --profile, the benchmark only prints the CPU time of the sink, by function.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import multiprocessing
import pstats
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pyarrow as pa

from benchmarks.hop import make_prompts
from benchmarks.hop_quixstreams import make_response
from consumers.sink import Sink
from engine.bus import open_bus
from engine.errors import StoreBusy
from engine.settings import Settings
from engine.store import Store
from engine.tables import get_arrow_schema
from engine.worker import to_producer_record
from schemas.records import Response
from schemas.topics import TOPICS

_GOALS = {"appender": 0.5, "many": 0.9}
_MAX_ROWS = Settings().sink.max_rows
_READER_QUERY = "SELECT stage, count(*), avg(completion_tokens) FROM responses GROUP BY 1"


def _publish_responses(folder: Path, count: int, seed: int) -> list[Response]:
    """Create a log with `count` responses. Return the responses."""
    bus = open_bus(str(folder / "log"))
    bus.create_topics(list(TOPICS.values()))
    records = [make_response(prompt) for prompt in make_prompts(count, seed)]
    for first in range(0, count, 2000):
        bus.publish([to_producer_record(record) for record in records[first : first + 2000]])
    bus.close()
    return records


def _measure_sink_rate(folder: Path, store: Store, count: int) -> float:
    """Return the rows per second of a new sink with `count` records in the log. The setup (the first step) is not timed."""
    bus = open_bus(str(folder / "log"))
    sink = Sink(bus, store, max_rows=_MAX_ROWS, max_wait_s=0.05)
    num_rows = num_untimed = sink.step()
    started = time.monotonic()
    while num_rows < count:
        num_rows += sink.step()
    elapsed = time.monotonic() - started
    sink.close()
    bus.close()
    return (count - num_untimed) / elapsed


def _measure_appender_rate(folder: Path, records: list[Response]) -> float:
    """Return the rate of DuckDB's appender on the same table. The rows are built before the measurement."""
    store = Store(folder / "appended" / "charter.duckdb")
    store.create_schema()
    with duckdb.connect(str(store.path)) as db:
        columns = [name for (name,) in db.execute("SELECT column_name FROM (DESCRIBE raw.responses)").fetchall()]
        rows = [[_make_row(record, number).get(name) for name in columns] for number, record in enumerate(records)]
        gc.freeze()
        started = time.monotonic()
        for first in range(0, len(rows), _MAX_ROWS):
            db.begin()
            appender = db.appender("raw.responses")
            appender.append_rows(rows[first : first + _MAX_ROWS])
            appender.flush()
            db.commit()
        elapsed = time.monotonic() - started
        assert db.execute("SELECT count(*) FROM raw.responses").fetchall() == [(len(rows),)]
    shutil.rmtree(store.path.parent)
    return len(rows) / elapsed


def _make_row(record: Response, offset: int) -> dict[str, Any]:
    extra = {"_partition": 0, "_offset": offset, "commit_seq": offset, "content_hash": offset}
    marks = {"is_duplicate": False, "content_mismatch": False}
    return record.model_dump() | {"created_at": record.created_at.replace(tzinfo=None)} | extra | marks


def _insert_rows(store: Store, num_rows: int, template: Response) -> None:
    """Insert copies of one record with random ids, so that the duplicate check has to search a large table."""
    store.create_schema()
    table = pa.Table.from_pylist([_make_row(template, 0)], get_arrow_schema(Response))
    with duckdb.connect(str(store.path)) as db:
        db.register("template", table)
        db.execute(
            f"""INSERT INTO raw.responses BY NAME
                SELECT template.* REPLACE (uuid() AS record_id, -1 - range AS commit_seq), false AS is_duplicate, false AS content_mismatch
                FROM template, range({num_rows})"""
        )
        db.execute("CHECKPOINT")


def _query_repeatedly(path: Path, stop: Event, num_queries: Synchronized[int], longest_query_s: Synchronized[float]) -> None:
    """Repeat a query of the dashboard without pauses until `stop` is set."""
    store = Store(path)
    while not stop.is_set():
        started = time.monotonic()
        try:
            store.query(_READER_QUERY, limit_s=30.0)
        except StoreBusy:
            continue
        with num_queries.get_lock():
            num_queries.value += 1
            longest_query_s.value = max(longest_query_s.value, time.monotonic() - started)


def _measure_with_readers(folder: Path, store: Store, count: int, num_readers: int) -> tuple[float, float, float]:
    """Return the sink's rate, the total queries per second of all readers, and the duration of the longest query in seconds."""
    context = multiprocessing.get_context("spawn")
    stop, num_queries, longest_s = context.Event(), context.Value("i", 0), context.Value("d", 0.0)
    processes = [
        context.Process(target=_query_repeatedly, args=(store.path, stop, num_queries, longest_s)) for _ in range(num_readers)
    ]
    for process in processes:
        process.start()
    while num_queries.value < num_readers:
        time.sleep(0.05)
    before, started = num_queries.value, time.monotonic()
    rate = _measure_sink_rate(folder, store, count)
    query_rate = (num_queries.value - before) / (time.monotonic() - started)
    stop.set()
    for process in processes:
        process.join()
    return rate, query_rate, longest_s.value


def _run_benchmarks(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, str, float | None, str]]:
    records = _publish_responses(folder, options.records, options.seed)
    gc.freeze()  # the garbage collector then does not scan the appender's rows while the sink runs

    def make_store(name: str) -> Store:
        shutil.rmtree(folder / name, ignore_errors=True)
        return Store(folder / name / "charter.duckdb")

    rounds = [
        (_measure_sink_rate(folder, make_store("empty"), options.records), _measure_appender_rate(folder, records))
        for _ in range(options.rounds)
    ]
    sink_rate, appender_rate = (statistics.median(rates[n] for rates in rounds) for n in (0, 1))
    yield "DuckDB's appender alone, rows already built", f"{appender_rate:.0f}/s", None, ""
    yield "the sink, from the log to the rows", f"{sink_rate:.0f}/s", sink_rate / appender_rate, f">= {_GOALS['appender']}"

    large = make_store("many")
    _insert_rows(large, options.rows, records[0])
    large_rate = _measure_sink_rate(folder, large, options.records)
    yield (
        f"the sink at {options.rows} rows (ratio: this / empty table)",
        f"{large_rate:.0f}/s",
        large_rate / sink_rate,
        f">= {_GOALS['many']}",
    )
    shutil.rmtree(large.path.parent)

    store = make_store("read")
    _insert_rows(store, options.rows // 2, records[0])
    rate_alone = _measure_sink_rate(folder, store, options.records)
    store = make_store("read")
    _insert_rows(store, options.rows // 2, records[0])
    rate, query_rate, longest_s = _measure_with_readers(folder, store, options.records, options.readers)
    yield f"the sink at {options.rows // 2} rows", f"{rate_alone:.0f}/s", None, ""
    yield f"  with {options.readers} readers without pauses (ratio: this / no readers)", f"{rate:.0f}/s", rate / rate_alone, ""
    yield "  queries of all readers", f"{query_rate:.1f}/s", None, ""
    yield "  the longest query, including waiting time", f"{longest_s:.1f} s", None, ""
    yield "resident memory of this process", f"{psutil.Process().memory_info().rss / 2**20:.0f} MiB", None, ""


def _profile_sink(folder: Path, options: argparse.Namespace) -> None:
    _publish_responses(folder, options.records, options.seed)
    profile = cProfile.Profile()
    profile.enable()
    _measure_sink_rate(folder, Store(folder / "profile" / "charter.duckdb"), options.records)
    profile.disable()
    pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=40_000)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.profile:
            _profile_sink(Path(folder), options)
            return
        print(f"{'':62} {'value':>12} {'ratio':>6}  goal")
        for name, value, ratio, goal in _run_benchmarks(Path(folder), options):
            print(f"{name:62} {value:>12} {'' if ratio is None else f'{ratio:.2f}':>6}  {goal}", flush=True)


if __name__ == "__main__":
    main()
