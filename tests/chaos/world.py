"""What all scenarios need: a log, processes that can be killed, prompts, and the comparison of databases."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb

from engine.bus import open_bus
from engine.bus.port import Bus, TopicPartition
from engine.bus.read import read_values
from engine.errors import CharterError
from engine.settings import Settings, load
from engine.store import Store
from tests.support.kafka import Broker

ROOT = Path(__file__).parents[2]
MADE = ("prompts", "responses", "critiques", "revisions", "preferences")
# What differs when the same work is done at another time, by another process, in another order.
ELSEWHERE = ("created_at", "latency_ms", "run_id", "commit_seq", "_partition", "_offset")
LOOK_EVERY_S = 0.5
# Limits of patience, not of speed: whoever waits, waits for a condition. A busy machine takes ten times as long as a quiet one.
SETTLE_S = 600.0
QUERY_S = 60.0
WORDS = ["why", "how", "what", "tell", "write", "explain", "river", "bread", "garden", "winter", "music", "letter", "stone"]


class Failed(AssertionError):
    """Something that was promised did not hold."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise Failed(what)


def kafka(folder: Path) -> Broker:
    """A throw-away broker from KAFKA_HOME."""
    folder.mkdir(parents=True, exist_ok=True)
    return Broker(kafka_home(), folder)


def kafka_home() -> Path:
    home = os.environ.get("KAFKA_HOME")
    if not home:
        raise SystemExit("set KAFKA_HOME to a folder with libs/*.jar of Apache Kafka")
    return Path(home)


@dataclass
class World:
    """One data folder with its log, its settings and its processes."""

    folder: Path
    address: str = ""  # empty: the embedded log
    flags: dict[str, str] = field(default_factory=dict)
    prefix: str = ""
    batch_s: float = 0.02
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    commands: dict[str, list[str]] = field(default_factory=dict)
    killed: dict[str, int] = field(default_factory=dict)
    endings: list[str] = field(default_factory=list)  # processes that ended by themselves, and not well

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    # What it is made of

    def values(self) -> dict[str, str]:
        bus = {"bus.address": self.address, "bus.prefix": self.prefix} if self.address else {}
        fixed = {"data.folder": str(self.folder / "data"), "models.policy": "scripted", "prompts.eval_share": "0"}
        return fixed | bus | {"worker.dead_in_a_row": "0"} | self.flags

    def settings(self) -> Settings:
        return load(self.values(), environment={})[0]

    def store(self) -> Store:
        return Store(self.settings().folder / "charter.duckdb")

    @contextmanager
    def bus(self) -> Iterator[Bus]:
        opened = open_bus(self.settings().bus_address, prefix=self.prefix)
        try:
            yield opened
        finally:
            opened.close()

    # Processes

    def start(self, name: str, *arguments: str) -> None:
        """Run a verb of Charter as a process called `name`."""
        self.commands[name] = list(arguments)
        flags = [word for key, value in self.values().items() for word in ("--set", f"{key}={value}")]
        environment = os.environ | {
            "CHARTER_ALLOW_SCRIPTED": "1",
            "CHAOS_BATCH_S": str(self.batch_s),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", "tests.chaos.node", *arguments, *flags]
            self.processes[name] = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def kill(self, name: str) -> None:
        """SIGKILL; it was running."""
        self.processes[name].kill()
        self.processes[name].wait()
        self.killed[name] = self.killed.get(name, 0) + 1

    def restart(self, name: str) -> None:
        self.start(name, *self.commands[name])

    def revive(self, name: str) -> bool:
        """Start a process again if it has ended by itself; True when it had done its work (exit code 0)."""
        code = self.processes[name].poll()
        if code is None:
            return False
        if code == 0:
            return True
        self.endings.append(f"{name} ended with {code}: {self.last_words(name)}")
        self.restart(name)
        return False

    def last_words(self, name: str) -> str:
        lines = (self.folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])[:300]

    def stop(self, name: str, within_s: float = SETTLE_S) -> int:
        """SIGTERM, and how it ended."""
        process = self.processes.pop(name)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        return process.wait(within_s)

    def end(self) -> None:
        """Leave nothing running."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        self.processes = {}

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    # What it has done

    def produce(self, path: Path) -> None:
        """Publish a file, and wait until that is done."""
        self.start("produce", "produce", str(path))
        code = self.processes.pop("produce").wait(SETTLE_S)
        check(code == 0, f"produce ended with {code}: {self.last_words('produce')}")

    def ended(self) -> int:
        """How many prompts have been answered, criticised to the end and judged."""
        return self.so_far(
            """SELECT count(*) FROM prompts WHERE prompt_id IN (SELECT prompt_id FROM revision_chains)
               AND prompt_id IN (SELECT prompt_id FROM preferences)"""
        )

    def so_far(self, sql: str) -> int:
        """A count for whoever waits and asks again: 0 while the database is not there, half made by a killed sink, or busy."""
        try:
            return self.count(sql)
        except CharterError:
            return 0

    def count(self, sql: str) -> int:
        return int(self.rows(sql)[0][0])

    def rows(self, sql: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        return self.store().query(sql, parameters, limit_s=QUERY_S).rows

    def letters(self) -> list[bytes]:
        with self.bus() as bus:
            return read_values(bus, "dead-letters")


def until(true: Callable[[], bool], what: str, within_s: float = SETTLE_S, every_s: float = LOOK_EVERY_S) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        check(time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}")
        time.sleep(every_s)


def write_prompts(folder: Path, count: int, files: int, seed: int) -> list[Path]:
    """Files of different prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    paths = []
    for number in range(files):
        first, last = count * number // files, count * (number + 1) // files
        lines = [json.dumps({"prompt": " ".join([*chance.choices(WORDS, k=8), str(n)])}) for n in range(first, last)]
        paths.append(folder / f"prompts-{number:03d}.jsonl")
        paths[-1].write_text("\n".join(lines) + "\n")
    return paths


# What must hold


def differences(one: Path, other: Path) -> list[str]:
    """Rows that only one of two databases has, by table, in all columns that do not say when and where."""
    found = []
    with duckdb.connect(":memory:") as db:
        db.execute(f"ATTACH '{one}' AS one (READ_ONLY)")
        db.execute(f"ATTACH '{other}' AS other (READ_ONLY)")
        for table in MADE:
            columns = f"SELECT * EXCLUDE ({', '.join(ELSEWHERE)}, is_duplicate, content_mismatch) FROM"
            for left, right in (("one", "other"), ("other", "one")):
                sql = f"{columns} {left}.raw.{table} EXCEPT ALL {columns} {right}.raw.{table}"
                count = db.execute(f"SELECT count(*) FROM ({sql})").fetchall()[0][0]
                if count:
                    found.append(f"{table}: {count} rows that only {left} has")
    return found


def check_exactly_once(world: World, prompts: int) -> None:
    """Every prompt once, no raw row twice, no dead letter, every parent there, and nothing left to read."""
    for table in MADE:
        doubled = world.count(f"SELECT count(*) FROM raw.{table} WHERE is_duplicate")
        check(doubled == 0, f"raw.{table} holds {doubled} duplicates")
    for table in ("prompts", "responses"):
        found = world.count(f"SELECT count(*) FROM {table}")
        check(found == prompts, f"{found} {table} for {prompts} prompts")
    ended = world.ended()
    check(ended == prompts, f"{ended} of {prompts} prompts are ended and judged")
    check(world.count("SELECT count(*) FROM raw.dead_letters") == 0 and not world.letters(), "there are dead letters")
    check_lineage(world)
    check_offsets(world)


def check_lineage(world: World) -> None:
    """Every parent of every record is there."""
    known = " UNION ALL ".join(f"SELECT record_id::VARCHAR FROM {table}" for table in MADE)
    for table in MADE[1:]:
        sql = f"SELECT count(*) FROM (SELECT unnest(parent_ids)::VARCHAR AS parent FROM {table}) WHERE parent NOT IN ({known})"
        orphans = world.count(sql)
        check(orphans == 0, f"{orphans} parents of {table} are nowhere")


def check_offsets(world: World) -> None:
    """Every group and the sink have passed everything."""
    from charter.pipeline import lags, sink_offsets, waiting
    from schemas.topics import TOPICS

    with world.bus() as bus:
        behind = {topic: lag for topic, lag in lags(bus, "live", world.settings().judge.pairing).items() if lag}
        check(not behind, f"messages wait at the stages: {behind}")
        left: dict[TopicPartition, int] = waiting(
            bus, sink_offsets(world.store(), bus.cluster_id), bus.end_offsets(list(TOPICS))
        )
        check(not left, f"messages wait at the sink: {left}")


def quiet(world: World) -> bool:
    """Whether everything is read; False too while the database is busy or the log is away, for whoever waits and asks again."""
    try:
        check_offsets(world)
    except (Failed, CharterError):
        return False
    return True
