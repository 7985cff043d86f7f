"""The exactly-once hop of a stage as ratios, on Apache Kafka and on the embedded log; what copies and waiting records cost.

python -m benchmarks.hop [--records N] [--rounds N] [--waiting N] [--seed N] [--quix-venv DIR] [--profile] [--only WORD]

Needs KAFKA_HOME, a folder with libs/*.jar of Apache Kafka; it starts one broker of its own on loopback. A hop is: consume 1 KB
records, decode Avro, a stage that costs nothing, encode Avro, produce, with the offsets in the transaction. All contestants
are processes of their own; how fast they are is what the broker says: it stamps each record when it appends it. After each
run the outputs are read back, committed ones only, and counted: a contestant that loses or repeats one has not run a race.

With --profile it shows instead where the CPU time of Charter's hop goes, thread by thread.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import kafka
import psutil
from kafka.structs import OffsetAndMetadata

from benchmarks.hop_quixstreams import COMMIT_EVERY, answer
from engine.bus import open_bus
from engine.bus.kafka import reading, writing
from engine.bus.port import Bus, Offsets, Outgoing
from engine.host import Host
from engine.journal import Journal
from engine.worker import Lane, Limits, Stage, Worker, outgoing
from schemas.codec import decode, encode
from schemas.records import ChatMessage, Prompt, Record
from schemas.topics import PARTITIONS, TOPICS
from tests.support.kafka import Broker as TestBroker

RUN, SOURCE, TARGET = "bench", "prompts", "responses"
TEXT_BYTES = 800  # with its lineage such a record has 1 KB
MODEL_BATCH, MODEL_S = 32, 0.020  # a model on another machine: what one batch waits
IN_FLIGHT = 1000
UP_S, IDLE_S, QUIX_S = 60.0, 10.0, 180.0
QUIX = ("quixstreams>=3.20,<4", "fastavro>=1.13,<2", "pydantic>=2.11,<3")
GOALS = {"bare": 0.8, "quix": 1.0, "copies": 1.7, "memory": 1.1}


class Broker(TestBroker):
    """It stamps records when it appends them, so that one clock, not the contestants', times all of them."""

    def properties(self) -> str:
        return super().properties() + "\nlog.message.timestamp.type=LogAppendTime"


@dataclass(frozen=True)
class Job:
    """What one process of Charter's stage does."""

    bus: str
    prefix: str
    name: str
    slot: str = "a"
    copies: int = 1
    batch: int = 500
    wait_s: float = 0.0
    in_flight: int = IN_FLIGHT


@dataclass(frozen=True)
class Row:
    """A line of the table; a goal of None: a figure for its own sake."""

    name: str
    figure: str
    ratio: float | None = None
    goal: str = ""

    def __str__(self) -> str:
        return f"{self.name:62} {self.figure:>12} {'' if self.ratio is None else f'{self.ratio:.2f}':>6}  {self.goal}"


# Records


def prompts(count: int, seed: int) -> Iterator[Prompt]:
    """Records of 1 KB; random words, so that they compress about as prose does."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(5000)]
    for _ in range(count):
        text = " ".join(chance.choices(words, k=TEXT_BYTES // 5))[:TEXT_BYTES]
        name = str(uuid.UUID(int=chance.getrandbits(128)))
        messages = [ChatMessage(role="user", content=text)]
        yield Prompt(record_id=name, prompt_id=name, run_id=RUN, stage="produce", messages=messages, source="bench")


def fill(bus: Bus, count: int, seed: int) -> int:
    """Put prompts on the log; returns how many bytes the first of them has."""
    bus.create_topics(list(TOPICS.values()))
    batch: list[Outgoing] = []
    size = 0
    for prompt in prompts(count, seed):
        batch.append(outgoing(prompt))
        size = size or len(batch[0].value or b"")
        if len(batch) == 2000:
            bus.publish(batch)
            batch = []
    bus.publish(batch)
    return size


def speed(bus: Bus, marks: Offsets, count: int) -> float:
    """Records a second of the `count` outputs beyond `marks`, by the log's own clock; they must be there exactly once."""
    reader, stamps, keys = bus.reader(marks), [], set()
    deadline = time.monotonic() + IDLE_S
    while time.monotonic() < deadline:
        messages = reader.poll(0.5, 5000)
        stamps += [message.timestamp_ms for message in messages]
        keys |= {message.key for message in messages}
        if messages:
            deadline = time.monotonic() + (IDLE_S if len(stamps) < count else 0.5)
    reader.close()
    if len(stamps) != count or len(keys) != count:
        raise SystemExit(f"not exactly once: {len(stamps)} outputs with {len(keys)} keys, where {count} records were passed")
    first = min(stamps)
    return sum(stamp > first for stamp in stamps) / (max(stamps) - first) * 1000


# Charter's stage, in a process of its own


def stage_of(job: Job) -> Stage:
    def work(records: Sequence[Record]) -> list[list[Record]]:
        if job.wait_s:
            time.sleep(job.wait_s)
        return [[answer(record)] for record in records if isinstance(record, Prompt)]

    return Stage(job.name, (SOURCE,), (TARGET,), rank=1, batch=job.batch, work=work)


def worker_of(job: Job, bus: Bus, folder: Path, admits: Callable[[], bool] = lambda: True) -> Worker:
    limits, journal = Limits(in_flight=job.in_flight), Journal(folder / "journal", job.slot)
    return Worker(bus, stage_of(job), Lane("bench"), run_id=RUN, slot=job.slot, limits=limits, journal=journal, admits=admits)


def run_stage(job: Job) -> None:
    """Join the group, say so, begin when told, and say how far it has come, until the input ends."""
    go, stop = threading.Event(), threading.Event()

    def listen() -> None:
        go.set() if sys.stdin.readline() else None
        sys.stdin.read()
        stop.set()

    threading.Thread(target=listen, daemon=True).start()
    bus, process = open_bus(job.bus, prefix=job.prefix), psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        worker = worker_of(job, bus, Path(folder), go.is_set)
        with Host([worker]) as host:
            while not stop.wait(0.05):
                host.check()
                ready = len(worker.consumer.assignment()) == PARTITIONS // job.copies
                say(ready=ready, committed=worker.committed, rss=process.memory_info().rss)
    say(ready=True, committed=worker.committed, rss=process.memory_info().rss)


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


class Copy:
    """A process of Charter's stage, seen from outside: `facts` is what it said last."""

    def __init__(self, job: Job) -> None:
        command = [sys.executable, "-m", "benchmarks.hop", "--stage", json.dumps(asdict(job))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts: dict[str, Any] = {"ready": False, "committed": 0, "rss": 0}
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.facts = json.loads(line)

    def begin(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(UP_S)
        self.thread.join()

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def race(jobs: Sequence[Job], wanted: int, seen: Callable[[int, int], None] = lambda committed, rss: None) -> int:
    """Run copies of a stage until together they have passed `wanted` records; returns how many they passed in all."""
    with ExitStack() as stack:
        copies = [stack.enter_context(Copy(job)) for job in jobs]
        until(lambda: all(copy.facts["ready"] for copy in copies), copies, UP_S)
        for copy in copies:
            copy.begin()
        before, deadline = -1, time.monotonic() + UP_S
        while (committed := sum(copy.facts["committed"] for copy in copies)) < wanted:
            deadline = time.monotonic() + UP_S if committed > before else deadline
            until(lambda: True, copies, deadline - time.monotonic())
            seen(committed, copies[0].facts["rss"])
            before = committed
            time.sleep(0.05)
        for copy in copies:
            copy.end()
        seen(committed, copies[0].facts["rss"])
        return sum(copy.facts["committed"] for copy in copies)


def until(true: Callable[[], bool], copies: Sequence[Copy], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not true() or within_s <= 0:
        if time.monotonic() > deadline or any(copy.process.poll() is not None for copy in copies):
            raise SystemExit(f"a stage has ended or stands still: {[copy.facts for copy in copies]}")
        time.sleep(0.05)


def charter(address: str, prefix: str, wanted: int, *, copies: int = 1, **options: Any) -> float:
    """Charter's own hop: Worker, Lane, Stage, Host, journal and codec, as `charter run` puts them together."""
    name = f"hop{time.time_ns()}"
    bus = open_bus(address, prefix=prefix)
    marks = bus.end_offsets([TARGET])
    jobs = [Job(address, prefix, name, slot=str(n), copies=copies, **options) for n in range(copies)]
    passed = race(jobs, wanted)
    found = speed(bus, marks, passed)
    bus.close()
    return found


# The others


def run_bare(servers: str, source: str, target: str, group: str, count: int) -> None:
    """What kafka-python does at best: copies bytes, exactly once, in one thread. Every future is looked at here too."""
    client: dict[str, Any] = {"bootstrap_servers": servers}
    producer = kafka.KafkaProducer(**client, **writing(), transactional_id=group)
    producer.init_transactions()
    settings = reading() | {"auto_offset_reset": "earliest"}
    consumer = kafka.KafkaConsumer(source, **client, **settings, group_id=group)
    moved = 0
    while moved < count:
        polled = consumer.poll(timeout_ms=500, max_records=COMMIT_EVERY)
        if not polled:
            continue
        producer.begin_transaction()
        records = [record for records in polled.values() for record in records]
        sent = [producer.send(target, key=r.key, value=r.value, headers=r.headers) for r in records]
        producer.flush()
        for future in sent:
            future.get(timeout=0)
        offsets = {place: OffsetAndMetadata(records[-1].offset + 1, "", -1) for place, records in polled.items()}
        producer.send_offsets_to_transaction(offsets, consumer.group_metadata())
        producer.commit_transaction()
        moved += len(records)
    consumer.close()
    producer.close(timeout=5)


def other(command: Sequence[str], address: str, prefix: str, count: int) -> float:
    """The speed of a contestant that is no stage of ours: a process that is over when it has passed `count` records."""
    bus = open_bus(address, prefix=prefix)
    marks = bus.end_offsets([TARGET])
    task = {
        "servers": address.removeprefix("kafka://"),
        "source": prefix + SOURCE,
        "target": prefix + TARGET,
        "group": f"other{time.time_ns()}",
        "count": count,
    }
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [*command, json.dumps(task)], env=os.environ | {"PYTHONPATH": root}, cwd=root, timeout=QUIX_S, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command[-1]} ended with {done.returncode}")
    found = speed(bus, marks, count)
    bus.close()
    return found


def quix_python(folder: Path | None) -> Path | None:
    """The interpreter of a virtual environment with quixstreams, made if need be; None, and a message, if it cannot be."""
    if folder is None:
        print("quixstreams is left out: --quix-venv DIR says where it may be installed")
        return None
    python = folder / "bin" / "python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True)
        if subprocess.run([str(python), "-c", "import quixstreams"], capture_output=True, check=False).returncode:
            subprocess.run([str(python), "-m", "pip", "install", "-q", *QUIX], check=True, capture_output=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        print(f"quixstreams is left out: it cannot be installed in {folder}: {said[-1] if said else error}")
        return None
    return python


def bare_sqlite(folder: Path, count: int, seed: int) -> float:
    """The least that a durable hop in one SQLite file is: copy 500 rows, move the offset, commit (FULL, as ours)."""
    db = sqlite3.connect(folder / "bare.sqlite", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    for table in ("source", "target"):
        db.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, key BLOB, value BLOB)")
    db.execute("CREATE TABLE offsets (next INTEGER)")
    db.execute("INSERT INTO offsets VALUES (0)")
    db.execute("BEGIN")
    db.executemany("INSERT INTO source VALUES (?, ?, ?)", ((n, p.key, encode(p)) for n, p in enumerate(prompts(count, seed))))
    db.execute("COMMIT")
    started, at = time.monotonic(), 0
    while at < count:
        rows = db.execute("SELECT id, key, value FROM source WHERE id >= ? ORDER BY id LIMIT ?", (at, COMMIT_EVERY)).fetchall()
        at = rows[-1][0] + 1
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO target VALUES (?, ?, ?)", rows)
        db.execute("UPDATE offsets SET next = ?", (at,))
        db.execute("COMMIT")
    taken = time.monotonic() - started
    db.close()
    return count / taken


def codec_alone(seed: int) -> float:
    """Decode, answer and encode in one thread, no log: what no hop with this codec can exceed on one core."""
    sample = [encode(prompt) for prompt in prompts(4000, seed)]
    started = time.monotonic()
    for data in sample:
        encode(answer(decode(data, Prompt)))
    return len(sample) / (time.monotonic() - started)


# The measurements


@dataclass(frozen=True)
class Bench:
    """Where to measure, and how much."""

    address: str
    folder: Path
    records: int
    rounds: int
    waiting: int
    seed: int
    quix: Path | None

    def median(self, measure: Callable[[], float]) -> float:
        return statistics.median(measure() for _ in range(self.rounds))

    def hop(self) -> Iterator[Row]:
        """The contestants take turns, so that a machine that slows down meanwhile slows them all."""
        contestants = {
            "charter": lambda: charter(self.address, "hop.", self.records),
            "default": lambda: charter(self.address, "hop.", self.records, batch=64, in_flight=Limits().in_flight),
            "bare": lambda: other([sys.executable, "-m", "benchmarks.hop", "--bare"], self.address, "hop.", self.records),
        }
        if self.quix:
            script = str(Path(__file__).with_name("hop_quixstreams.py"))
            contestants["quix"] = lambda: other([str(self.quix), script], self.address, "hop.", self.records)
        rounds = [{name: measure() for name, measure in contestants.items()} for _ in range(self.rounds)]
        speeds = {name: statistics.median(each[name] for each in rounds) for name in contestants}
        ours = speeds["charter"]
        yield Row("the codec alone, one thread, no log", rate(codec_alone(self.seed)))
        yield Row(f"Charter's hop ({IN_FLIGHT} in flight)", rate(ours))
        yield Row(
            "Charter's hop (256 in flight, batches of 64: the defaults)", rate(speeds["default"]), speeds["default"] / ours
        )
        yield Row(
            "bare kafka-python, copies bytes; ratio: Charter to it", rate(speeds["bare"]), ours / speeds["bare"], goal("bare")
        )
        if "quix" in speeds:
            yield Row(
                "quixstreams, exactly once, same codec; ratio: Charter to it",
                rate(speeds["quix"]),
                ours / speeds["quix"],
                goal("quix"),
            )

    def copies(self) -> Iterator[Row]:
        model = {"batch": MODEL_BATCH, "wait_s": MODEL_S}
        waits = f"a stage that waits {MODEL_S * 1000:.0f} ms a batch of {MODEL_BATCH}"
        for name, wanted, options in (
            (waits, self.records // 4, model),
            ("a stage that costs nothing", self.records * 3 // 4, {}),
        ):
            one, two = (self.median(partial(charter, self.address, "hop.", wanted, copies=n, **options)) for n in (1, 2))
            yield Row(f"one copy of {name}", rate(one))
            yield Row("  two copies of it", rate(two), two / one, goal("copies"))

    def memory(self) -> Iterator[Row]:
        bus = open_bus(self.address, prefix="waiting.")
        fill(bus, self.waiting, self.seed)
        bus.close()
        seen: list[tuple[int, int]] = []
        race([Job(self.address, "waiting.", "memory")], self.waiting, lambda committed, rss: seen.append((committed, rss)))
        early = next(rss for committed, rss in seen if committed >= self.waiting // 10)
        late, most = seen[-1][1], max(rss for _, rss in seen)
        yield Row(f"resident memory after a tenth of {self.waiting} waiting records", mib(early))
        yield Row("  at the end", mib(late), late / early, f"<= {GOALS['memory']}")
        yield Row("  at most", mib(most), most / early)

    def embedded(self) -> Iterator[Row]:
        folder = str(self.folder / "embedded")
        bus = open_bus(folder, prefix="hop.")
        fill(bus, self.records, self.seed)
        bus.close()
        floor = bare_sqlite(self.folder, self.records, self.seed)
        ours = charter(folder, "hop.", self.records)
        yield Row("Charter's hop on the embedded log", rate(ours), ours / floor)
        yield Row("  a bare SQLite loop, copies bytes", rate(floor))


def rate(value: float) -> str:
    return f"{value:.0f}/s"


def mib(value: int) -> str:
    return f"{value / 2**20:.0f} MiB"


def goal(name: str) -> str:
    return f">= {GOALS[name]}"


# Where the time goes


def profile(address: str, wanted: int, top: int = 25) -> None:
    """CPU time (not waiting) by function, of all threads of a stage that runs as it always does, and of each by itself."""
    profiles: dict[str, cProfile.Profile] = {}

    def enrol(*_: object) -> None:
        sys.setprofile(None)
        known = profiles[f"{threading.current_thread().name}-{len(profiles)}"] = cProfile.Profile(time.thread_time)
        known.enable()

    threading.setprofile(enrol)  # each new thread gets a profile of its own: one sees only its own thread
    bus = open_bus(address, prefix="hop.")
    with tempfile.TemporaryDirectory() as folder:
        worker = worker_of(Job(address, "hop.", f"profile{time.time_ns()}"), bus, Path(folder))
        with Host([worker]) as host:
            while worker.committed < wanted:
                host.check()
                time.sleep(0.05)
    threading.setprofile(None)
    for each in profiles.values():
        each.create_stats()
    for name, each in profiles.items():
        stats = pstats.Stats(each)
        if stats.total_tt > 0.2:
            print(f"\n== thread {name}: {stats.total_tt / wanted * 1e6:.1f} us of CPU a record, profiled")
            stats.strip_dirs().sort_stats("tottime").print_stats(top)
    together = pstats.Stats(*profiles.values())
    print("\n== all threads")
    together.strip_dirs().sort_stats("tottime").print_stats(top)
    bus.close()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--waiting", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quix-venv", type=Path)
    parser.add_argument("--only", choices=("hop", "copies", "memory", "embedded"), action="append")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # what the processes that this script starts are to do
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    wanted = arguments()
    if wanted.stage:
        run_stage(Job(**json.loads(wanted.stage)))
        return 0
    if wanted.bare:
        run_bare(**json.loads(wanted.bare))
        return 0
    home = os.environ.get("KAFKA_HOME")
    if not home or not shutil.which("java"):
        print("set KAFKA_HOME to a folder with libs/*.jar of Apache Kafka, and have a Java runtime on the PATH")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "broker").mkdir()
        with Broker(Path(home), Path(folder) / "broker") as broker:
            measure(wanted, f"kafka://{broker.address}", Path(folder))
    return 0


def measure(wanted: argparse.Namespace, address: str, folder: Path) -> None:
    bus = open_bus(address, prefix="hop.")
    size = fill(bus, wanted.records, wanted.seed)
    bus.close()
    if wanted.profile:
        profile(address, wanted.records)
        return
    only = wanted.only or ("hop", "copies", "memory", "embedded")
    quix = quix_python(wanted.quix_venv) if "hop" in only else None
    bench = Bench(address, folder, wanted.records, wanted.rounds, wanted.waiting, wanted.seed, quix)
    print(
        f"{os.cpu_count()} cores, which the broker and the contestants share; {size} bytes a record; median of {wanted.rounds}"
    )
    print(f"{'':62} {'figure':>12} {'ratio':>6}  goal")
    for name in only:
        for row in getattr(bench, name)():
            print(row, flush=True)


if __name__ == "__main__":
    sys.exit(main())
