"""Measure the latency of the dashboard, `charter status` and `charter --help` on a database with a million rows.

python -m benchmarks.dashboard [--rows N] [--rounds N] [--keep FOLDER]

The benchmark runs the scripted model on the shipped prompts. It copies the rows of this run with new ids and times, until the
database has the requested number of rows. The latency of a view is the time from the request to the complete page. Results are
not cached. The first view is the first request to a new server. The reported latency is the median over the rounds. Each
latency has a limit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import duckdb
import httpx

from charter.connect import connect_bus, open_store
from charter.pipeline import STAGES, make_host
from engine.settings import Settings, load_settings
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer
from schemas.topics import TOPICS

_HELP_COMMAND = "charter --help"
_DEFAULT_LIMIT_S, _LIMITS_S = 1.0, {_HELP_COMMAND: 0.3}
_NUM_PROMPTS = 40
_COPIED_TABLES = ("prompts", "responses", "critiques", "revisions", "preferences", "scores")


def _run_pipeline(settings: Settings) -> None:
    """Run the scripted model on the shipped prompts."""
    bus = connect_bus(settings)
    FileProducer(bus, settings.run.id, eval_fraction=0.1).publish(str(SHIPPED_PROMPTS_PATH), first_row=1, last_row=_NUM_PROMPTS)
    sql = "SELECT (SELECT count(*) FROM revision_chains), (SELECT count(*) FROM preferences)"
    with make_host(settings, bus, STAGES, sink=True) as host:
        store, expected = open_store(settings), [(_NUM_PROMPTS, _NUM_PROMPTS)]
        while not store.path.exists() or store.query(sql).rows != expected:
            host.failure_event.wait(0.1)
            host.raise_if_failed()
    bus.close()


def _copy_rows(path: Path, num_rows: int) -> int:
    """Copy the rows of the run until the database has `num_rows` rows. Return the number of rows.

    Each copy has new ids. The times of a copy are one minute later than the times of the previous copy.
    """
    with duckdb.connect(str(path)) as db:
        rows_per_run = sum(db.execute(f"SELECT count(*) FROM raw.{table}").fetchall()[0][0] for table in _COPIED_TABLES)
        next_seq = db.execute("SELECT next_seq FROM raw.sink_state").fetchall()[0][0]
        num_copies = -(-num_rows // rows_per_run)  # rounded up
        for table in _COPIED_TABLES:
            columns = {column for column, *_ in db.execute(f"DESCRIBE raw.{table}").fetchall()}
            new_id = "md5({0}::VARCHAR || n)::UUID AS {0}"
            ids = [new_id.format(name) for name in ("record_id", "prompt_id", "response_id") if name in columns]
            ids.append("list_transform(parent_ids, lambda id: md5(id::VARCHAR || n)::UUID) AS parent_ids")
            shifted = [f"commit_seq + n * {next_seq} AS commit_seq", "created_at + to_minutes(n) AS created_at"]
            db.execute(
                f"""INSERT INTO raw.{table} SELECT old.* REPLACE ({", ".join([*ids, *shifted])})
                    FROM raw.{table} old, (SELECT range AS n FROM range(1, {num_copies})) ORDER BY n"""
            )
        db.execute("UPDATE raw.sink_state SET next_seq = ?", [next_seq * num_copies])
        db.execute("CHECKPOINT")
        return int(sum(db.execute(f"SELECT count(*) FROM raw.{spec.table}").fetchall()[0][0] for spec in TOPICS.values()))


def _build_command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "charter", *words, "--data", str(folder)]


def _time_command(arguments: list[str]) -> float:
    started = time.monotonic()
    subprocess.run(arguments, check=True, capture_output=True)
    return time.monotonic() - started


def _find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _start_server(folder: Path) -> tuple[subprocess.Popen[str], httpx.Client]:
    """Start a dashboard server and wait until it accepts requests. Return the server process and a client."""
    port = _find_free_port()
    command = _build_command(folder, "dashboard", "--port", str(port))
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout and str(port) in server.stdout.readline()
    return server, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)


def _time_request(client: httpx.Client, address: str) -> float:
    started = time.monotonic()
    page = client.get(address)
    elapsed = time.monotonic() - started
    assert page.status_code == 200 and "notice bad" not in page.text, (address, page.text[-2000:])
    return elapsed


def _time_views(client: httpx.Client, round_index: int) -> Iterator[tuple[str, float]]:
    """Yield the name and the latency of each view. Search terms contain `round_index` to avoid cached results."""
    traces = client.get("/api/traces").json()["data"]["traces"]
    views = {
        "pipeline": "/?run=live",
        "traces": "/traces?run=live",
        "one trace": f"/traces/{traces[round_index]['prompt_id']}",
        "trace search, words in prompts": f"/traces?q=how+{round_index}",
        "trace search, words without a match": f"/traces?q=zebra{round_index}",
        "trace search, words in everything": f"/traces?scope=everything&q=river+{round_index}",
        "trace search, prefix of an id": f"/traces?q={traces[round_index]['prompt_id'][:8]}",
        "trace filter, end reason": f"/traces?end_reason=SATISFIED&q={round_index}",
        "preferences": "/preferences?run=live",
        "training": "/training?run=live",
        "dead letters": "/dead-letters?run=live",
        "runs": "/runs",
        "one run": "/runs/live",
    }
    for name, address in views.items():
        yield name, _time_request(client, address)


def _measure_latencies(folder: Path, num_rounds: int) -> dict[str, list[float]]:
    """Return the latency in seconds in each round, by name."""
    latencies: dict[str, list[float]] = defaultdict(list)
    for number in range(num_rounds):
        latencies[_HELP_COMMAND].append(_time_command([sys.executable, "-m", "charter", "--help"]))
        latencies["charter status"].append(_time_command(_build_command(folder, "status")))
        server, client = _start_server(folder)
        try:
            latencies["first view"].append(_time_request(client, "/"))
            for name, seconds in _time_views(client, number):
                latencies[name].append(seconds)
        finally:
            client.close()
            server.terminate()
            server.wait()
    return latencies


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="keep the database in this folder, and use an existing database in it")
    options = parser.parse_args()
    os.environ["CHARTER_ALLOW_SCRIPTED"] = "1"
    folder = options.keep or Path(tempfile.mkdtemp())
    if not (folder / "charter.duckdb").exists():
        settings = load_settings({"data.folder": str(folder), "models.policy": "scripted"}, environment={})[0]
        _run_pipeline(settings)
        print(f"{_copy_rows(folder / 'charter.duckdb', options.rows):,} rows")
    all_met = True
    for name, seconds in _measure_latencies(folder, options.rounds).items():
        median, limit = statistics.median(seconds), _LIMITS_S.get(name, _DEFAULT_LIMIT_S)
        all_met &= median < limit
        print(f"{name:40} {median:6.2f} s of {limit:.1f} s, worst {max(seconds):.2f} s{'' if median < limit else '  missed'}")
    if not options.keep:
        shutil.rmtree(folder)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
