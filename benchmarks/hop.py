"""Measure the throughput, the scaling and the memory of a stage's exactly-once hop on Apache Kafka and the embedded log.

python -m benchmarks.hop [--records N] [--rounds N] [--waiting N] [--seed N] [--quix-venv DIR] [--profile] [--only WORD]

The environment variable KAFKA_HOME must be a folder with libs/*.jar of Apache Kafka. The benchmark starts a broker on loopback.
A hop consumes records of 1 KB and decodes them. It runs a stage without computation and encodes the results. It publishes the
results and the offsets in one transaction. Each client runs in a separate process. The broker sets a timestamp when it appends
a record. The rate of a client is computed from these timestamps. After each run, the committed outputs are counted. A lost or
repeated record is an error.

The number of records in a transaction decides about the rate, so the other clients commit as many records at once as Charter did in the
same round. The latency is measured with few records per second: the time from the publication of a record until a reader of committed
records has its output.

With --profile, the benchmark only prints the CPU time of Charter's hop, by function and thread.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import kafka
import psutil
from kafka.structs import OffsetAndMetadata

from benchmarks.hop_quixstreams import make_response
from engine.bus import open_bus
from engine.bus.kafka import make_consumer_options, make_producer_options
from engine.bus.port import Bus, Offsets, ProducerRecord
from engine.crash_journal import CrashJournal
from engine.host import Host, reduce_garbage_collection
from engine.worker import ModelExecutor, Stage, Worker, WorkerLimits, to_producer_record
from schemas.codec import decode_record, encode_record
from schemas.records import ChatMessage, Prompt, Record
from schemas.topics import DEFAULT_PARTITIONS, TOPICS
from tests.support.kafka import Broker as TestBroker

_RUN_ID, _SOURCE_TOPIC, _TARGET_TOPIC = "bench", "prompts", "responses"
_TEXT_BYTES = 800  # a record with a prompt of this size has 1 KB
_MODEL_BATCH_SIZE, _MODEL_LATENCY_S = 32, 0.020  # the batch size and the latency per batch of a simulated remote model
_MAX_IN_FLIGHT = 1000
_SQLITE_BATCH_SIZE = 500
_LATENCY_BATCHES, _LATENCY_BATCH_SIZE, _LATENCY_INTERVAL_S = 60, 20, 0.1  # 200 records per second for 6 seconds
_PROGRESS_TIMEOUT_S, _READ_IDLE_TIMEOUT_S, _CONTESTANT_TIMEOUT_S = 60.0, 10.0, 180.0
_QUIXSTREAMS_REQUIREMENTS = ("quixstreams>=3.20,<4", "fastavro>=1.13,<2", "pydantic>=2.11,<3")
_MEASUREMENTS = ("codec", "hop", "latency", "copies", "memory", "embedded")
_DEFAULT_OPTIONS: Mapping[str, Any] = {"batch": 64, "in_flight": WorkerLimits().max_in_flight}
_CLIENT_TITLES = {"bare": "bare kafka-python, copies bytes", "quix": "quixstreams, exactly once, same codec"}
_GOALS = {"bare": 0.8, "quix": 1.0, "copies": 1.7, "memory": 1.1}


class _LogAppendTimeBroker(TestBroker):
    """This broker sets the timestamp of a record when it appends the record. One clock therefore measures all clients."""

    JAVA_OPTIONS = ("-Xmx512m", "-XX:+UseSerialGC")

    def build_properties(self) -> str:
        return super().build_properties() + "\nlog.message.timestamp.type=LogAppendTime"


@dataclass(frozen=True)
class _StageJob:
    """This is the configuration of one process that runs Charter's stage."""

    bus_address: str
    prefix: str
    stage_name: str
    instance: str = "a"
    copies: int = 1
    batch: int = 500
    wait_s: float = 0.0
    in_flight: int = _MAX_IN_FLIGHT
    reports_memory: bool = False  # reading the memory takes some of the interpreter's time


@dataclass(frozen=True)
class _ResultRow:
    """This is a row of the results table. If the goal is empty, the value is only for information."""

    name: str
    value: str
    ratio: float | None = None
    goal: str = ""

    def __str__(self) -> str:
        return f"{self.name:62} {self.value:>12} {'' if self.ratio is None else f'{self.ratio:.2f}':>6}  {self.goal}"


# Records


def make_prompts(count: int, seed: int) -> Iterator[Prompt]:
    """Yield prompts of 1 KB with random words. They compress about as well as prose."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    for _ in range(count):
        text = " ".join(rng.choices(words, k=_TEXT_BYTES // 5))[:_TEXT_BYTES]
        prompt_id = str(uuid.UUID(int=rng.getrandbits(128)))
        messages = [ChatMessage(role="user", content=text)]
        yield Prompt(
            record_id=prompt_id, prompt_id=prompt_id, run_id=_RUN_ID, stage="produce", messages=messages, source="bench"
        )


def _publish_prompts(bus: Bus, count: int, seed: int) -> int:
    """Publish prompts to the log. Return the size of the first record in bytes."""
    bus.create_topics(list(TOPICS.values()))
    batch: list[ProducerRecord] = []
    size = 0
    for prompt in make_prompts(count, seed):
        batch.append(to_producer_record(prompt))
        size = size or len(batch[0].value or b"")
        if len(batch) == 2000:
            bus.publish(batch)
            batch = []
    bus.publish(batch)
    return size


def _measure_throughput(bus: Bus, start_offsets: Offsets, count: int) -> float:
    """Return the records per second of the outputs after `start_offsets`, computed from the log's timestamps.

    Exit with an error if the outputs are not exactly `count` distinct records.
    """
    reader, timestamps, keys = bus.open_reader(start_offsets), [], set()
    deadline = time.monotonic() + _READ_IDLE_TIMEOUT_S
    while time.monotonic() < deadline:
        records = reader.poll(0.5, 5000)
        timestamps += [record.timestamp_ms for record in records]
        keys |= {record.key for record in records}
        if records:
            deadline = time.monotonic() + (_READ_IDLE_TIMEOUT_S if len(timestamps) < count else 0.5)
    reader.close()
    if len(timestamps) != count or len(keys) != count:
        raise SystemExit(f"not exactly once: {len(timestamps)} outputs with {len(keys)} keys for {count} inputs")
    first = min(timestamps)
    return sum(timestamp > first for timestamp in timestamps) / (max(timestamps) - first) * 1000


# Charter's stage, in a separate process


def _build_stage(job: _StageJob) -> Stage:
    def work(records: Sequence[Record]) -> list[list[Record]]:
        if job.wait_s:
            time.sleep(job.wait_s)
        return [[make_response(record)] for record in records if isinstance(record, Prompt)]

    return Stage(job.stage_name, (_SOURCE_TOPIC,), (_TARGET_TOPIC,), priority=1, max_batch_size=job.batch, process=work)


def _build_worker(job: _StageJob, bus: Bus, folder: Path, can_admit: Callable[[], bool] = lambda: True) -> Worker:
    limits, journal = (
        WorkerLimits(max_in_flight=job.in_flight),
        CrashJournal(folder / "journal", job.instance, topic_ids=bus.topic_ids([_SOURCE_TOPIC])),
    )
    return Worker(
        bus,
        _build_stage(job),
        ModelExecutor("bench"),
        run_id=_RUN_ID,
        instance=job.instance,
        limits=limits,
        journal=journal,
        can_admit=can_admit,
    )


def _run_stage(job: _StageJob) -> None:
    """Join the group, start when a line arrives on standard input, and print the progress until standard input ends."""
    start, stop = threading.Event(), threading.Event()

    def read_commands() -> None:
        if sys.stdin.readline():
            start.set()
        sys.stdin.read()
        stop.set()

    threading.Thread(target=read_commands, daemon=True).start()
    bus, process = open_bus(job.bus_address, prefix=job.prefix), psutil.Process() if job.reports_memory else None
    reduce_garbage_collection()
    with tempfile.TemporaryDirectory() as folder:
        worker = _build_worker(job, bus, Path(folder), start.is_set)
        with Host([worker]) as host:
            while not stop.wait(0.05):
                host.raise_if_failed()
                ready = len(worker.consumer.assignment()) == DEFAULT_PARTITIONS // job.copies
                _report_worker(worker, process, ready=ready)
    _report_worker(worker, process, ready=True)


def _report_worker(worker: Worker, process: psutil.Process | None, *, ready: bool) -> None:
    state = {"ready": ready, "committed": worker.num_committed, "transactions": worker.num_transactions}
    print(json.dumps(state | {"rss": process.memory_info().rss if process else 0}), flush=True)


class _StageProcess:
    """This process runs Charter's stage. `state` is the last state that the process printed."""

    def __init__(self, job: _StageJob) -> None:
        command = [sys.executable, "-m", "benchmarks.hop", "--stage", json.dumps(asdict(job))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.state: dict[str, Any] = {"ready": False, "committed": 0, "transactions": 0, "rss": 0}
        self.thread = threading.Thread(target=self.read_states, daemon=True)
        self.thread.start()

    def read_states(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.state = json.loads(line)

    def start(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(_PROGRESS_TIMEOUT_S)
        self.thread.join()

    def __enter__(self) -> _StageProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _run_copies(
    jobs: Sequence[_StageJob], num_records: int, on_progress: Callable[[int, int], None] = lambda committed, rss: None
) -> tuple[int, int]:
    """Run copies of a stage until they have committed `num_records` records in total.

    Return the numbers of committed records and of transactions.
    """
    with ExitStack() as stack:
        copies = [stack.enter_context(_StageProcess(job)) for job in jobs]
        _wait_until(lambda: all(copy.state["ready"] for copy in copies), copies, _PROGRESS_TIMEOUT_S)
        for copy in copies:
            copy.start()
        previous, deadline = -1, time.monotonic() + _PROGRESS_TIMEOUT_S
        while (committed := sum(copy.state["committed"] for copy in copies)) < num_records:
            deadline = time.monotonic() + _PROGRESS_TIMEOUT_S if committed > previous else deadline
            _wait_until(lambda: True, copies, deadline - time.monotonic())
            on_progress(committed, copies[0].state["rss"])
            previous = committed
            time.sleep(0.05)
        for copy in copies:
            copy.stop()
        on_progress(committed, copies[0].state["rss"])
        return sum(copy.state["committed"] for copy in copies), sum(copy.state["transactions"] for copy in copies)


def _wait_until(condition: Callable[[], bool], copies: Sequence[_StageProcess], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() or timeout_s <= 0:
        if time.monotonic() > deadline or any(copy.process.poll() is not None for copy in copies):
            raise SystemExit(f"a stage has ended or makes no progress: {[copy.state for copy in copies]}")
        time.sleep(0.05)


def _measure_charter(address: str, prefix: str, num_records: int, *, copies: int = 1, **options: Any) -> tuple[float, int]:
    """Return the rate of Charter's hop, and the mean number of records of a transaction.

    The hop has the same Host, Worker, ModelExecutor, journal and codec as in `charter run`.
    """
    name = f"hop{time.time_ns()}"
    bus = open_bus(address, prefix=prefix)
    start_offsets = bus.end_offsets([_TARGET_TOPIC])
    jobs = [_StageJob(address, prefix, name, instance=str(n), copies=copies, **options) for n in range(copies)]
    num_committed, num_transactions = _run_copies(jobs, num_records)
    rate = _measure_throughput(bus, start_offsets, num_committed)
    bus.close()
    return rate, round(num_committed / num_transactions)


# Other clients


def _run_bare_client(servers: str, source: str, target: str, group: str, count: int, batch: int, interval_s: float) -> None:
    """Copy bytes exactly once with kafka-python in one thread. Check every future, as Charter does.

    A client that uses kafka-python in one thread cannot be faster than this function. It commits after each poll, so it needs no
    `interval_s`.
    """
    client: dict[str, Any] = {"bootstrap_servers": servers}
    producer = kafka.KafkaProducer(**client, **make_producer_options(), transactional_id=group)
    producer.init_transactions()
    settings = make_consumer_options() | {"auto_offset_reset": "earliest"}
    consumer = kafka.KafkaConsumer(source, **client, **settings, group_id=group)
    num_moved = 0
    while num_moved < count:
        polled = consumer.poll(timeout_ms=500, max_records=batch)
        if not polled:
            continue
        producer.begin_transaction()
        records = [record for partition_records in polled.values() for record in partition_records]
        futures = [producer.send(target, key=r.key, value=r.value, headers=r.headers) for r in records]
        producer.flush()
        for future in futures:
            future.get(timeout=0)
        offsets = {key: OffsetAndMetadata(fetched[-1].offset + 1, "", -1) for key, fetched in polled.items()}
        producer.send_offsets_to_transaction(offsets, consumer.group_metadata())
        producer.commit_transaction()
        num_moved += len(records)
    consumer.close()
    producer.close(timeout=5)


def _start_client(
    command: Sequence[str], address: str, prefix: str, count: int, batch: int, interval_s: float
) -> subprocess.Popen[bytes]:
    """Start another client. It ends after it has copied `count` records.

    It commits at the latest after `batch` records, or `interval_s` after the last commit.
    """
    task = {
        "servers": address.removeprefix("kafka://"),
        "source": prefix + _SOURCE_TOPIC,
        "target": prefix + _TARGET_TOPIC,
        "group": f"other{time.time_ns()}",
        "count": count,
        "batch": batch,
        "interval_s": interval_s,
    }
    root = str(Path(__file__).parents[1])
    return subprocess.Popen([*command, json.dumps(task)], env=os.environ | {"PYTHONPATH": root}, cwd=root)


def _wait_for_client(client: subprocess.Popen[bytes]) -> None:
    try:
        if client.wait(_CONTESTANT_TIMEOUT_S):
            raise SystemExit(f"{client.args} ended with exit code {client.returncode}")
    finally:
        client.kill()


def _measure_client(command: Sequence[str], address: str, prefix: str, count: int, batch: int) -> float:
    """Return the rate of another client."""
    bus = open_bus(address, prefix=prefix)
    start_offsets = bus.end_offsets([_TARGET_TOPIC])
    _wait_for_client(_start_client(command, address, prefix, count, batch, _CONTESTANT_TIMEOUT_S))
    rate = _measure_throughput(bus, start_offsets, count)
    bus.close()
    return rate


# Latency


@contextmanager
def _run_client(command: Sequence[str], address: str, prefix: str, count: int, batch: int) -> Iterator[None]:
    client = _start_client(command, address, prefix, count, batch, _LATENCY_INTERVAL_S)
    try:
        yield
        _wait_for_client(client)
    finally:
        client.kill()


@contextmanager
def _run_charter(job: _StageJob) -> Iterator[None]:
    with _StageProcess(job) as stage:
        stage.start()
        yield
        stage.stop()


def _measure_latency(address: str, prefix: str, seed: int, run: Callable[[], AbstractContextManager[None]]) -> list[float]:
    """Return the sorted latencies of the records in seconds. The topics of `prefix` must be empty."""
    bus = open_bus(address, prefix=prefix)
    bus.create_topics(list(TOPICS.values()))
    reader = bus.open_reader(bus.end_offsets([_TARGET_TOPIC]))
    published: dict[bytes, float] = {}
    received: dict[bytes, float] = {}

    def publish(prompts: Sequence[Prompt]) -> None:
        bus.publish([to_producer_record(prompt) for prompt in prompts])
        published.update(dict.fromkeys((prompt.key for prompt in prompts), time.monotonic()))

    def receive_until(deadline: float) -> None:
        while len(received) < len(published) and time.monotonic() < deadline:
            received.update(dict.fromkeys((record.key or b"" for record in reader.poll(0.005, 5000)), time.monotonic()))

    prompts = list(make_prompts(1 + _LATENCY_BATCHES * _LATENCY_BATCH_SIZE, seed))
    publish(prompts[:1])
    with run():
        receive_until(time.monotonic() + _PROGRESS_TIMEOUT_S)  # the client has joined its group when it has copied this record
        for start in range(1, len(prompts), _LATENCY_BATCH_SIZE):
            next_at = time.monotonic() + _LATENCY_INTERVAL_S
            publish(prompts[start : start + _LATENCY_BATCH_SIZE])
            receive_until(next_at)
            time.sleep(max(0.0, next_at - time.monotonic()))  # the records arrive at a constant rate
        receive_until(time.monotonic() + _READ_IDLE_TIMEOUT_S)
    reader.close()
    bus.close()
    if len(received) < len(published):
        raise SystemExit(f"only {len(received)} of {len(published)} records have arrived")
    return sorted(received[prompt.key] - published[prompt.key] for prompt in prompts[1:])


def _prepare_quixstreams(folder: Path | None) -> Path | None:
    """Return the Python interpreter of a virtual environment with quixstreams. Create the environment if necessary.

    If quixstreams cannot be installed, print the reason and return None.
    """
    if folder is None:
        print("quixstreams is skipped: give --quix-venv DIR, a folder to install it in")
        return None
    python = folder / "bin" / "python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True)
        if subprocess.run([str(python), "-c", "import quixstreams"], capture_output=True, check=False).returncode:
            subprocess.run(
                [str(python), "-m", "pip", "install", "-q", *_QUIXSTREAMS_REQUIREMENTS],
                check=True,
                capture_output=True,
                timeout=600,
            )
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        print(f"quixstreams is skipped: it cannot be installed in {folder}: {lines[-1] if lines else error}")
        return None
    return python


def _measure_sqlite_hop(folder: Path, count: int, seed: int) -> float:
    """Return the rate of a minimal durable hop in one SQLite file.

    Each transaction copies 500 rows and updates the offset. The database is in the mode "synchronous FULL".
    """
    db = sqlite3.connect(folder / "bare.sqlite", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    for table in ("source", "target"):
        db.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, key BLOB, value BLOB)")
    db.execute("CREATE TABLE offsets (next INTEGER)")
    db.execute("INSERT INTO offsets VALUES (0)")
    db.execute("BEGIN")
    db.executemany(
        "INSERT INTO source VALUES (?, ?, ?)", ((n, p.key, encode_record(p)) for n, p in enumerate(make_prompts(count, seed)))
    )
    db.execute("COMMIT")
    started, next_id = time.monotonic(), 0
    while next_id < count:
        rows = db.execute(
            "SELECT id, key, value FROM source WHERE id >= ? ORDER BY id LIMIT ?", (next_id, _SQLITE_BATCH_SIZE)
        ).fetchall()
        next_id = rows[-1][0] + 1
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO target VALUES (?, ?, ?)", rows)
        db.execute("UPDATE offsets SET next = ?", (next_id,))
        db.execute("COMMIT")
    elapsed = time.monotonic() - started
    db.close()
    return count / elapsed


def _measure_codec(seed: int) -> float:
    """Return the rate of decoding and encoding in one thread without a log. A hop on one core cannot be faster."""
    sample = [encode_record(prompt) for prompt in make_prompts(4000, seed)]
    started = time.monotonic()
    for data in sample:
        encode_record(make_response(decode_record(data, Prompt)))
    return len(sample) / (time.monotonic() - started)


# Measurements


@dataclass(frozen=True)
class _HopBenchmark:
    """This class has the measurements and their settings."""

    address: str
    folder: Path
    num_records: int
    num_rounds: int
    num_waiting: int
    seed: int
    quixstreams_python: Path | None

    def measure_copies(self, num_records: int, copies: int, options: Mapping[str, Any]) -> float:
        """Return the median rate of copies of a stage."""
        rounds = (_measure_charter(self.address, "hop.", num_records, copies=copies, **options) for _ in range(self.num_rounds))
        return statistics.median(rate for rate, _ in rounds)

    def codec(self) -> Iterator[_ResultRow]:
        yield _ResultRow("the codec alone, one thread, no log", _format_rate(_measure_codec(self.seed)))

    def hop(self) -> Iterator[_ResultRow]:
        """Compare the clients. Each round measures all clients, so a temporarily slower machine affects all clients."""
        for title, options, goals in (
            ("Charter's hop with the default limits", _DEFAULT_OPTIONS, _GOALS),
            (f"Charter's hop, {_MAX_IN_FLIGHT} in flight, batches of 500", {}, {}),
        ):
            rounds = [self.measure_round(options) for _ in range(self.num_rounds)]
            medians = {name: statistics.median(measured[name] for measured in rounds) for name in rounds[0]}
            yield _ResultRow(f"{title}, {medians['batch']:.0f} in a transaction", _format_rate(medians["charter"]))
            for name in self.clients:
                ratio = statistics.median(measured["charter"] / measured[name] for measured in rounds)
                goal = _format_goal(name) if name in goals else ""
                yield _ResultRow(f"  {_CLIENT_TITLES[name]} (ratio: Charter / this)", _format_rate(medians[name]), ratio, goal)

    def measure_round(self, options: Mapping[str, Any]) -> dict[str, float]:
        """Return the rate of each client. `batch` is the mean number of records in a transaction of Charter."""
        rate, batch = _measure_charter(self.address, "hop.", self.num_records, **options)
        rates = {
            name: _measure_client(command, self.address, "hop.", self.num_records, batch)
            for name, command in self.clients.items()
        }
        return {"charter": rate, "batch": batch, **rates}

    @property
    def clients(self) -> dict[str, list[str]]:
        """Return the commands of the other clients."""
        clients = {"bare": [sys.executable, "-m", "benchmarks.hop", "--bare"]}
        if self.quixstreams_python:
            clients["quix"] = [str(self.quixstreams_python), str(Path(__file__).with_name("hop_quixstreams.py"))]
        return clients

    def latency(self) -> Iterator[_ResultRow]:
        """Measure the latency of each client with few records, so that no records wait."""
        count, batch = 1 + _LATENCY_BATCHES * _LATENCY_BATCH_SIZE, WorkerLimits().max_in_flight
        contestants: dict[str, Callable[[str], AbstractContextManager[None]]] = {
            "Charter's hop with the default limits": lambda prefix: _run_charter(
                _StageJob(self.address, prefix, "latency", **_DEFAULT_OPTIONS)
            )
        }
        for name, command in self.clients.items():
            contestants[_CLIENT_TITLES[name]] = partial(_run_client, command, self.address, count=count, batch=batch)
        for title, run in contestants.items():
            prefix = f"latency{time.time_ns()}."
            latencies = _measure_latency(self.address, prefix, self.seed, partial(run, prefix))
            for share, label in ((0.5, "median"), (0.99, "99th percentile")):
                yield _ResultRow(f"latency, {label}: {title}", f"{latencies[int(share * len(latencies))] * 1000:.0f} ms")

    def copies(self) -> Iterator[_ResultRow]:
        """Compare one and two copies of a stage, with and without model latency."""
        model = {"batch": _MODEL_BATCH_SIZE, "wait_s": _MODEL_LATENCY_S}
        waiting_stage = f"a stage that waits {_MODEL_LATENCY_S * 1000:.0f} ms per batch of {_MODEL_BATCH_SIZE}"
        for name, num_records, options in (
            (waiting_stage, self.num_records // 4, model),
            ("a stage without computation", self.num_records * 3 // 4, {}),
        ):
            one, two = (self.measure_copies(num_records, n, options) for n in (1, 2))
            yield _ResultRow(f"one copy of {name}", _format_rate(one))
            yield _ResultRow("  two copies", _format_rate(two), two / one, _format_goal("copies"))

    def memory(self) -> Iterator[_ResultRow]:
        """Measure the resident memory of a stage with a long backlog. Measure at an early time and at the end."""
        bus = open_bus(self.address, prefix="waiting.")
        _publish_prompts(bus, self.num_waiting, self.seed)
        bus.close()
        samples: list[tuple[int, int]] = []
        _run_copies(
            [_StageJob(self.address, "waiting.", "memory", reports_memory=True)],
            self.num_waiting,
            lambda committed, rss: samples.append((committed, rss)),
        )
        early = next(rss for committed, rss in samples if committed >= self.num_waiting // 10)
        late, peak = samples[-1][1], max(rss for _, rss in samples)
        yield _ResultRow(f"resident memory after a tenth of {self.num_waiting} waiting records", _format_mib(early))
        yield _ResultRow("  at the end", _format_mib(late), late / early, f"<= {_GOALS['memory']}")
        yield _ResultRow("  peak", _format_mib(peak), peak / early)

    def embedded(self) -> Iterator[_ResultRow]:
        """Compare Charter's hop on the embedded log with a minimal SQLite loop."""
        folder = str(self.folder / "embedded")
        bus = open_bus(folder, prefix="hop.")
        _publish_prompts(bus, self.num_records, self.seed)
        bus.close()
        sqlite_rate = _measure_sqlite_hop(self.folder, self.num_records, self.seed)
        charter_rate, _ = _measure_charter(folder, "hop.", self.num_records)
        yield _ResultRow("Charter's hop on the embedded log", _format_rate(charter_rate), charter_rate / sqlite_rate)
        yield _ResultRow("  a bare SQLite loop, copies bytes", _format_rate(sqlite_rate))


def _format_rate(value: float) -> str:
    return f"{value:.0f}/s"


def _format_mib(value: int) -> str:
    return f"{value / 2**20:.0f} MiB"


def _format_goal(name: str) -> str:
    return f">= {_GOALS[name]}"


# Profile


def _profile_stage(address: str, num_records: int, num_functions: int = 25) -> None:
    """Print the CPU time by function for each thread of a stage and for all threads together. Omit waiting time."""
    profiles: dict[str, cProfile.Profile] = {}

    def enable_profile(*_: object) -> None:
        sys.setprofile(None)
        profile = profiles[f"{threading.current_thread().name}-{len(profiles)}"] = cProfile.Profile(time.thread_time)
        profile.enable()

    threading.setprofile(enable_profile)  # a profile measures only the thread that enabled it
    bus = open_bus(address, prefix="hop.")
    with tempfile.TemporaryDirectory() as folder:
        worker = _build_worker(_StageJob(address, "hop.", f"profile{time.time_ns()}"), bus, Path(folder))
        with Host([worker]) as host:
            while worker.num_committed < num_records:
                host.raise_if_failed()
                time.sleep(0.05)
    threading.setprofile(None)
    for profile in profiles.values():
        profile.create_stats()
    for name, profile in profiles.items():
        stats = pstats.Stats(profile)
        if stats.total_tt > 0.2:
            print(f"\n== thread {name}: {stats.total_tt / num_records * 1e6:.1f} us of CPU per record, profiled")
            stats.strip_dirs().sort_stats("tottime").print_stats(num_functions)
    total = pstats.Stats(*profiles.values())
    print("\n== all threads")
    total.strip_dirs().sort_stats("tottime").print_stats(num_functions)
    bus.close()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--waiting", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quix-venv", type=Path)
    parser.add_argument("--only", choices=_MEASUREMENTS, action="append")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # this script starts processes with these two options
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = _parse_arguments()
    if options.stage:
        _run_stage(_StageJob(**json.loads(options.stage)))
        return 0
    if options.bare:
        _run_bare_client(**json.loads(options.bare))
        return 0
    home = os.environ.get("KAFKA_HOME")
    if not home or not shutil.which("java"):
        print("set KAFKA_HOME to a folder with libs/*.jar of Apache Kafka, and install a Java runtime on the PATH")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "broker").mkdir()
        with _LogAppendTimeBroker(Path(home), Path(folder) / "broker") as broker:
            _run_benchmarks(options, f"kafka://{broker.address}", Path(folder))
    return 0


def _run_benchmarks(options: argparse.Namespace, address: str, folder: Path) -> None:
    bus = open_bus(address, prefix="hop.")
    size = _publish_prompts(bus, options.records, options.seed)
    bus.close()
    if options.profile:
        _profile_stage(address, options.records)
        return
    names = options.only or _MEASUREMENTS
    quix = _prepare_quixstreams(options.quix_venv) if {"hop", "latency"} & set(names) else None
    bench = _HopBenchmark(address, folder, options.records, options.rounds, options.waiting, options.seed, quix)
    print(
        f"{os.cpu_count()} cores, shared by the broker and the clients; {size} bytes per record; median of {options.rounds} rounds"
    )
    print(f"{'':62} {'value':>12} {'ratio':>6}  goal")
    for name in names:
        for row in getattr(bench, name)():
            print(row, flush=True)


if __name__ == "__main__":
    sys.exit(main())
