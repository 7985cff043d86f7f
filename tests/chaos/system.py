"""The system under test in all scenarios: an event log, processes that can be killed, prompts, and checks of the database."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
from click.testing import CliRunner

from charter.cli import cli
from engine.bus import open_bus
from engine.bus.port import Bus, TopicPartition
from engine.bus.read import read_values
from engine.errors import CharterError
from engine.settings import Settings, load_settings
from engine.store import Store
from tests.support.fork_server import CHARTER_MODULES, ForkedProcess, get_fork_server
from tests.support.kafka import DEFAULT_SETTINGS, Broker
from tests.support.waiting import HANG_S

_ROOT = Path(__file__).parents[2]
_RECORD_TABLES = ("prompts", "responses", "critiques", "revisions", "preferences")
# Columns that differ when the same work is done at another time, by another process or in another order.
_VOLATILE_COLUMNS = ("created_at", "latency_ms", "run_id", "commit_seq", "_partition", "_offset")
POLL_INTERVAL_S = 0.5
_WORDS = ["why", "how", "what", "tell", "write", "explain", "river", "bread", "garden", "winter", "music", "letter", "stone"]


class InvariantViolation(AssertionError):
    """A guarantee did not hold."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InvariantViolation(message)


def make_broker(folder: Path, settings: Mapping[str, object] | None = None) -> Broker:
    """Return a temporary broker from KAFKA_HOME, with the default settings of Kafka."""
    folder.mkdir(parents=True, exist_ok=True)
    return Broker(get_kafka_home(), folder, settings={**DEFAULT_SETTINGS, **(settings or {})})


def get_kafka_home() -> Path:
    home = os.environ.get("KAFKA_HOME")
    if not home:
        raise SystemExit("set KAFKA_HOME to a folder with libs/*.jar of Apache Kafka")
    return Path(home)


@dataclass
class SystemUnderTest:
    """One data folder with its event log, settings and processes."""

    folder: Path
    bus_address: str = ""  # empty: the embedded log
    setting_overrides: dict[str, str] = field(default_factory=dict)
    bus_prefix: str = ""
    batch_delay_s: float = 0.02
    clock_file: Path | None = None  # the processes add the seconds in this file to their wall clock
    processes: dict[str, subprocess.Popen[bytes] | ForkedProcess] = field(default_factory=dict)
    commands: dict[str, list[str]] = field(default_factory=dict)
    kill_counts: dict[str, int] = field(default_factory=dict)
    unexpected_exits: list[str] = field(default_factory=list)  # processes that ended with an error without being killed

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    # Settings, database and log

    def build_settings(self) -> dict[str, str]:
        bus = {"bus.address": self.bus_address, "bus.prefix": self.bus_prefix} if self.bus_address else {}
        required = {"data.folder": str(self.folder / "data"), "models.policy": "scripted", "prompts.eval_fraction": "0"}
        return required | bus | {"worker.max_consecutive_dead_letters": "0"} | self.setting_overrides

    def _build_options(self) -> list[str]:
        return [option for key, value in self.build_settings().items() for option in ("--set", f"{key}={value}")]

    def load_settings(self) -> Settings:
        return load_settings(self.build_settings(), environment={})[0]

    def open_store(self) -> Store:
        return Store(self.load_settings().folder / "charter.duckdb")

    @contextmanager
    def connect_bus(self) -> Iterator[Bus]:
        opened = open_bus(self.load_settings().bus_address, prefix=self.bus_prefix)
        try:
            yield opened
        finally:
            opened.close()

    # Processes

    def start_process(self, name: str, *arguments: str, with_imports: bool = False) -> None:
        """Run a command of Charter as a process called `name`, with the settings of this moment.

        The process is a fork of one that has imported Charter, unless `with_imports` is true.
        """
        self.commands[name] = list(arguments)
        environment = os.environ | {
            "CHARTER_ALLOW_SCRIPTED": "1",
            "CHAOS_BATCH_S": str(self.batch_delay_s),
            "PYTHONPATH": str(_ROOT),
            "OMP_NUM_THREADS": "1",
        }
        if self.clock_file:
            environment["CHAOS_CLOCK_FILE"] = str(self.clock_file)
        log_path, words = self.folder / f"{name}.log", [*arguments, *self._build_options()]
        if not with_imports:
            self.processes[name] = get_fork_server(*CHARTER_MODULES).start(
                "tests.chaos.fake_process:main", words, folder=self.folder, environment=environment, output=log_path
            )
            return
        with log_path.open("ab") as log:
            command = [sys.executable, "-m", "tests.chaos.fake_process", *words]
            self.processes[name] = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def start_pipeline(self, *arguments: str) -> None:
        """Start `charter run` as the process "all". Wait until it has started: until then, SIGTERM ends it with an error."""
        num_chars = len(self.read_log("all")) if (self.folder / "all.log").exists() else 0
        self.start_process("all", "run", *arguments)
        wait_until(
            lambda: "running " in self.read_log("all")[num_chars:] or self.processes["all"].poll() is not None,
            "the process has started",
            interval_s=0.1,
        )

    def run_command(self, *arguments: str) -> tuple[int, str]:
        """Run a command of Charter in this process. Return its exit code and its output."""
        result = CliRunner(env={"CHARTER_ALLOW_SCRIPTED": "1"}).invoke(cli, [*arguments, *self._build_options()])
        return result.exit_code, result.output + (str(result.exception) if result.exception else "")

    def run_to_its_end(self, *arguments: str) -> tuple[int, str]:
        """Run a process that ends without a signal of the scenario. Return its exit code and its output."""
        name = "command"
        (self.folder / f"{name}.log").unlink(missing_ok=True)
        self.start_process(name, *arguments)
        return self.wait_for_exit(name), self.read_log(name)

    def wait_for_exit(self, name: str) -> int:
        """Return the exit code of a process that ends without a signal of the scenario."""
        return self.processes.pop(name).wait(HANG_S)

    def kill_process(self, name: str) -> None:
        """Kill a running process with SIGKILL."""
        self.processes[name].kill()
        self.processes[name].wait()
        self.kill_counts[name] = self.kill_counts.get(name, 0) + 1

    def restart_process(self, name: str) -> None:
        self.start_process(name, *self.commands[name])

    def revive_process(self, name: str) -> bool:
        """Restart a process that has exited with an error; return True if it has exited with code 0."""
        code = self.processes[name].poll()
        if code is None:
            return False
        if code == 0:
            return True
        self.unexpected_exits.append(f"{name} ended with {code}: {self.read_log_tail(name)}")
        self.restart_process(name)
        return False

    def read_log(self, name: str) -> str:
        """Return everything that the processes called `name` have printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def read_log_tail(self, name: str) -> str:
        lines = self.read_log(name).strip().splitlines()
        return " | ".join(lines[-3:])[:300]

    def stop_process(self, name: str, timeout_s: float = HANG_S) -> int:
        """Send SIGTERM and return the exit code."""
        process = self.processes.pop(name)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        return process.wait(timeout_s)

    def kill_all(self) -> None:
        """Kill every process."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        self.processes = {}

    def __enter__(self) -> SystemUnderTest:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()

    # Prompts and results

    def publish_file(self, path: Path) -> None:
        """Publish a file from this process."""
        code, output = self.run_command("produce", str(path))
        require(code == 0, f"produce ended with {code}: {output}")

    def count_finished_prompts(self) -> int:
        """Return the number of prompts with a finished revision chain and a preference."""
        return self.query_count_or_zero(
            """SELECT count(*) FROM prompts WHERE prompt_id IN (SELECT prompt_id FROM revision_chains)
               AND prompt_id IN (SELECT prompt_id FROM preferences)"""
        )

    def query_count_or_zero(self, sql: str) -> int:
        """Return a count, or 0 while the database is missing, incomplete after a kill, or locked, for callers that retry."""
        try:
            return self.query_count(sql)
        except CharterError:
            return 0

    def query_count(self, sql: str) -> int:
        return int(self.query_rows(sql)[0][0])

    def query_rows(self, sql: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        return self.open_store().query(sql, parameters, limit_s=HANG_S).rows

    def read_dead_letters(self) -> list[bytes]:
        with self.connect_bus() as bus:
            return read_values(bus, "dead-letters")


def wait_until(
    condition: Callable[[], bool], description: str, timeout_s: float = HANG_S, interval_s: float = POLL_INTERVAL_S
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        require(time.monotonic() < deadline, f"after {timeout_s:.0f} s it does not hold that {description}")
        time.sleep(interval_s)


def write_prompts(folder: Path, num_prompts: int, num_files: int, seed: int) -> list[Path]:
    """Write files of distinct prompts and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    paths = []
    for number in range(num_files):
        first, last = num_prompts * number // num_files, num_prompts * (number + 1) // num_files
        lines = [json.dumps({"prompt": " ".join([*rng.choices(_WORDS, k=8), str(n)])}) for n in range(first, last)]
        paths.append(folder / f"prompts-{number:03d}.jsonl")
        paths[-1].write_text("\n".join(lines) + "\n")
    return paths


def read_texts(path: Path) -> list[str]:
    """Return the texts of the prompts in a file of `write_prompts`."""
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


# Guarantees


def find_differences(one: Path, other: Path) -> list[str]:
    """Count, for each table, the rows that only one of two databases has; ignore _VOLATILE_COLUMNS."""
    differences = []
    with duckdb.connect(":memory:") as db:
        db.execute(f"ATTACH '{one}' AS one (READ_ONLY)")
        db.execute(f"ATTACH '{other}' AS other (READ_ONLY)")
        for table in _RECORD_TABLES:
            columns = f"SELECT * EXCLUDE ({', '.join(_VOLATILE_COLUMNS)}, is_duplicate, content_mismatch) FROM"
            for left, right in (("one", "other"), ("other", "one")):
                sql = f"{columns} {left}.raw.{table} EXCEPT ALL {columns} {right}.raw.{table}"
                count = db.execute(f"SELECT count(*) FROM ({sql})").fetchall()[0][0]
                if count:
                    differences.append(f"{table}: {count} rows only in {left}")
    return differences


def check_exactly_once(system: SystemUnderTest, num_prompts: int) -> None:
    """Require each prompt once, no duplicates, no dead letters, no missing parents and no unread records."""
    for table in _RECORD_TABLES:
        duplicates = system.query_count(f"SELECT count(*) FROM raw.{table} WHERE is_duplicate")
        require(duplicates == 0, f"raw.{table} holds {duplicates} duplicates")
    for table in ("prompts", "responses"):
        count = system.query_count(f"SELECT count(*) FROM {table}")
        require(count == num_prompts, f"{count} {table} for {num_prompts} prompts")
    finished = system.count_finished_prompts()
    require(finished == num_prompts, f"{finished} of {num_prompts} prompts are finished and judged")
    require(
        system.query_count("SELECT count(*) FROM raw.dead_letters") == 0 and not system.read_dead_letters(),
        "there are dead letters",
    )
    _check_lineage(system)
    _check_offsets(system)


def _check_lineage(system: SystemUnderTest) -> None:
    """Require that every parent of every record exists."""
    record_ids = " UNION ALL ".join(f"SELECT record_id::VARCHAR FROM {table}" for table in _RECORD_TABLES)
    for table in _RECORD_TABLES[1:]:
        sql = f"SELECT count(*) FROM (SELECT unnest(parent_ids)::VARCHAR AS parent FROM {table}) WHERE parent NOT IN ({record_ids})"
        orphans = system.query_count(sql)
        require(orphans == 0, f"{orphans} parents of {table} are missing")


def _check_offsets(system: SystemUnderTest) -> None:
    """Require that every consumer group and the sink have read every record."""
    from charter.lag import compute_lags, find_oldest_unread, read_sink_offsets
    from schemas.topics import TOPICS

    with system.connect_bus() as bus:
        lags = {topic: lag for topic, lag in compute_lags(bus, "live", system.load_settings()).items() if lag}
        require(not lags, f"stages have unread records: {lags}")
        unread: dict[TopicPartition, int] = find_oldest_unread(
            bus, read_sink_offsets(system.open_store(), bus), bus.end_offsets(list(TOPICS))
        )
        require(not unread, f"the sink has unread records: {unread}")


def is_caught_up(system: SystemUnderTest) -> bool:
    """Return whether everything is read; False also while the database is locked or the log is unreachable."""
    try:
        _check_offsets(system)
    except (InvariantViolation, CharterError):
        return False
    return True
