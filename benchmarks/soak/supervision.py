"""Start the processes of the soak test, kill them at random times, restart them, and take snapshots of their state."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.soak.processes import ROOT, load_soak_settings, make_setting_flags
from charter.connect import open_bus_from_settings, open_store
from charter.lag import read_sink_offsets
from engine.errors import DependencyUnreachable
from engine.settings import Settings
from schemas.topics import TOPICS

SERVICES = ("stream", "trainer", "generator")
EXPORT = "export"
_POLL_INTERVAL_S = 5.0
_CLAIM_POLL_INTERVAL_S = 0.02
_EXPORT_INTERVAL_S = 20.0  # from the end of an export to the start of the next one
_MAX_FAILED_EXPORTS = 3  # consecutive failures after which the test ends
_MAX_EXPORT_KILL_DELAY_S = 2.0
_MAX_KILL_ATTEMPTS = 20
_STALL_TIMEOUT_S = 600.0  # the test fails if there is no new response for this time
_RESUME_DELAY_S = 60.0  # a phase that the monitor paused is resumed after this time, as an operator would do
_STOP_TIMEOUT_S = 300.0
_DRAIN_POLL_INTERVAL_S = 2.0


def plan_kills(num_kills: int, start_s: float, end_s: float, seed: int = 0) -> list[tuple[float, str]]:
    """Return the times and the processes of the kills, in order of time. Each process is killed about equally often."""
    rng = random.Random(seed)
    names = [(*SERVICES, EXPORT)[number % 4] for number in range(num_kills)]
    rng.shuffle(names)
    return list(zip(sorted(rng.uniform(start_s, end_s) for _ in names), names, strict=True))


@dataclass
class Snapshot:
    """This is the state of the test at one time. Memory is in MB."""

    at_s: float
    stream_mb: float
    trainer_mb: float
    generator_mb: float
    sink_lag: int
    num_responses: int
    policy_version: int


@dataclass
class SoakTest:
    """This class has the processes of the test, and the snapshots of their state."""

    folder: Path
    changes: Mapping[str, str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    snapshots: list[Snapshot] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    num_resumed: int = 0
    num_exports: int = 0
    num_failed_exports: int = 0
    num_consecutive_failures: int = 0
    num_unfinished_lakes: int = 0  # kills after which the manifest of the lake named an export that had not finished
    export_ended_at: float = 0.0
    max_kill_delay_s: float = _MAX_EXPORT_KILL_DELAY_S
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    started_at: float = field(default_factory=time.monotonic)

    @property
    def settings(self) -> Settings:
        return load_soak_settings(self.folder, self.changes)

    @property
    def lake(self) -> Path:
        return self.folder / "lake"

    def get_elapsed_s(self) -> float:
        return time.monotonic() - self.started_at

    # Processes

    def build_command(self, *verbs: str) -> list[str]:
        flags = make_setting_flags(self.folder) | dict(self.changes)
        return [sys.executable, "-m", "charter", *verbs, *_build_set_options(flags)]

    def start_process(self, name: str) -> None:
        own = [sys.executable, "-m", "benchmarks.soak", "--data", str(self.folder), *_build_set_options(self.changes)]
        commands = {
            "stream": [*own, "--process", "stream"],
            "generator": [*own, "--process", "generator"],
            # The labels of this test may be too bad to learn from (many responses are equal), but it needs RL updates.
            "trainer": self.build_command("train", "--loop", "--force", "--verbose"),
            EXPORT: self.build_command("export", "lake", str(self.lake)),
        }
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(commands[name], env=environment, stdout=log, stderr=log)

    def check_progress(self) -> None:
        for name in SERVICES:
            if (process := self.processes.get(name)) and process.poll() is not None:
                raise SystemExit(f"{name} ended with exit code {process.returncode}; see {self.folder / name}.log")
        if self.snapshots and (now := self.snapshots[-1]).at_s - self.find_last_response_time() > _STALL_TIMEOUT_S:
            raise SystemExit(
                f"there is no new response from {self.find_last_response_time():.0f} s to {now.at_s:.0f} s of the test"
            )

    def find_last_response_time(self) -> float:
        """Return the time of the first snapshot with the current number of responses."""
        newest = self.snapshots[-1].num_responses
        return next(s.at_s for s in reversed(self.snapshots) if s.num_responses < newest or s is self.snapshots[0])

    def kill(self, name: str, stop: threading.Event) -> None:
        """Kill a process with SIGKILL, and start it again at once."""
        if name == EXPORT and not self.wait_until_export_writes(stop):
            return
        self.processes[name].kill()
        self.processes[name].wait()
        if name == EXPORT:
            self.num_unfinished_lakes += not is_lake_complete(self.lake)
        self.kills[name] += 1
        print(f"{self.get_elapsed_s():.0f} s: killed {name}", flush=True)
        self.start_process(name)

    # The export

    def advance_export(self) -> None:
        """Note the end of an export, and start the next one when it is time."""
        process = self.processes.get(EXPORT)
        if process is None:
            self.start_process(EXPORT)
        elif process.poll() is not None and not self.export_ended_at:
            self.export_ended_at = time.monotonic()
            self.note_export_end(process.returncode)
        elif self.export_ended_at and time.monotonic() - self.export_ended_at > _EXPORT_INTERVAL_S:
            self.start_next_export()

    def start_next_export(self) -> None:
        self.export_ended_at = 0.0
        self.start_process(EXPORT)

    def note_export_end(self, exit_code: int) -> None:
        if exit_code == 0:
            self.num_exports += 1
            self.num_consecutive_failures = 0
            return
        self.num_failed_exports += 1
        self.num_consecutive_failures += 1
        path = self.folder / f"{EXPORT}.log"
        print(f"an export ended with exit code {exit_code}; see {path}", flush=True)
        if self.num_consecutive_failures >= _MAX_FAILED_EXPORTS:
            raise SystemExit(f"{self.num_consecutive_failures} exports in a row failed; see {path}")

    def wait_until_export_writes(self, stop: threading.Event) -> bool:
        """Wait until an export has claimed the lake, and for a random time after that. Return whether it still runs.

        If an export ends before that time, wait for the next one. Return False if the test is stopped meanwhile.
        """
        for _ in range(_MAX_KILL_ATTEMPTS):
            self.advance_export()
            if self.export_ended_at:
                self.start_next_export()
            process = self.processes[EXPORT]
            while process.poll() is None and not has_claim(self.lake, process.pid):
                if stop.wait(_CLAIM_POLL_INTERVAL_S):
                    return False
            if stop.wait(self.rng.uniform(0.0, self.max_kill_delay_s)):
                return False
            if process.poll() is None:
                return True
            self.max_kill_delay_s /= 2
        raise SystemExit(f"{_MAX_KILL_ATTEMPTS} exports ended before they could be killed")

    def wait_for_export(self) -> None:
        """Wait until the export that runs has ended."""
        if (process := self.processes.get(EXPORT)) and not self.export_ended_at:
            self.export_ended_at = time.monotonic()
            self.note_export_end(process.wait(_STOP_TIMEOUT_S))

    # The end of the test

    def stop_process(self, name: str) -> int:
        self.processes[name].send_signal(signal.SIGTERM)
        return self.processes[name].wait(_STOP_TIMEOUT_S)

    def stop_processes(self) -> dict[str, int]:
        """Stop the processes in an order in which every prompt gets its response, chain and judgment. Return their exit codes.

        While a training loop runs, the stage respond holds prompts. So the trainer stops before the stream, which then finishes
        all prompts.
        """
        exit_codes = {"generator": self.stop_process("generator")}
        self.wait_for_export()
        exit_codes["trainer"] = self.stop_process("trainer")
        self.wait_for_stages()
        return exit_codes | {"stream": self.stop_process("stream")}

    def wait_for_stages(self) -> None:
        """Wait until every prompt is finished, or until the number of finished prompts has not changed for a long time."""
        num_unfinished, changed_at = -1, time.monotonic()
        while num_unfinished and time.monotonic() - changed_at < _STOP_TIMEOUT_S:
            self.check_progress_of_stream()
            if num_unfinished > 0:
                threading.Event().wait(_DRAIN_POLL_INTERVAL_S)
            try:
                now = self.count_unfinished()
            except DependencyUnreachable as error:
                print(f"{self.get_elapsed_s():.0f} s: prompts are not counted: {error.what}: {error.why}", flush=True)
                continue
            if now != num_unfinished:
                print(f"{self.get_elapsed_s():.0f} s: {now} prompts are not finished", flush=True)
                num_unfinished, changed_at = now, time.monotonic()

    def check_progress_of_stream(self) -> None:
        if (exit_code := self.processes["stream"].poll()) is not None:
            raise SystemExit(f"stream ended with exit code {exit_code}; see {self.folder / 'stream.log'}")

    def count_unfinished(self) -> int:
        """Count the prompts on the log whose chain has not ended, or whose responses are not judged."""
        sql = """SELECT count(*) FROM prompts WHERE prompt_id IN (SELECT prompt_id FROM revision_chains)
                 AND prompt_id IN (SELECT prompt_id FROM preferences)"""
        ((num_finished,),) = open_store(self.settings).query(sql, limit_s=60.0).rows
        bus = open_bus_from_settings(self.settings)
        num_prompts = sum(bus.end_offsets(["prompts"]).values())
        bus.close()
        return num_prompts - int(num_finished)

    # State

    def take_snapshot(self) -> Snapshot:
        store = open_store(self.settings)
        rows = store.query("SELECT count(*), max(policy_version) FROM raw.responses", limit_s=60.0).rows
        bus = open_bus_from_settings(self.settings)
        sink_offsets = read_sink_offsets(store, bus)
        lag = sum(max(0, end - sink_offsets.get(key, 0)) for key, end in bus.end_offsets(list(TOPICS)).items())
        bus.close()
        memory = {f"{name}_mb": _read_resident_mb(self.processes[name].pid) for name in SERVICES}
        return Snapshot(
            at_s=self.get_elapsed_s(), **memory, sink_lag=lag, num_responses=rows[0][0], policy_version=rows[0][1] or 0
        )

    def resume_if_paused(self) -> None:
        """Resume phases that the monitor paused more than `_RESUME_DELAY_S` ago."""
        sql = "SELECT max(epoch(?::TIMESTAMP - since)) FROM paused_phases"
        ((paused_s,),) = open_store(self.settings).query(sql, [datetime.now(UTC).replace(tzinfo=None)], limit_s=60.0).rows
        if paused_s is not None and paused_s > _RESUME_DELAY_S:
            exit_code = subprocess.run(
                self.build_command("policy", "resume"), check=False, stdout=subprocess.DEVNULL
            ).returncode
            self.num_resumed += exit_code == 0  # otherwise the command has printed why, and the next poll tries again


def run_processes(soak: SoakTest, minutes: float, num_kills: int, stop: threading.Event) -> dict[str, int]:
    """Run all processes for some minutes, or until `stop`. Return the exit codes of the last ones."""
    deadline_s = 60 * minutes
    kills = iter(plan_kills(num_kills, min(60.0, deadline_s / 4), deadline_s - min(60.0, deadline_s / 4)))
    next_kill = next(kills, None)
    try:
        soak.start_process("stream")
        _wait_for_database(soak)
        for name in ("trainer", "generator"):
            soak.start_process(name)
        for _ in _poll(soak, deadline_s, stop):
            soak.check_progress()
            soak.advance_export()
            while next_kill and next_kill[0] <= soak.get_elapsed_s() and not stop.is_set():
                soak.kill(next_kill[1], stop)
                next_kill = next(kills, None)
            try:
                soak.resume_if_paused()
                soak.snapshots.append(soak.take_snapshot())
            except DependencyUnreachable as error:
                print(f"{soak.get_elapsed_s():.0f} s: no snapshot: {error.what}: {error.why}", flush=True)
                continue
            print(f"{soak.snapshots[-1]}", flush=True)
        return soak.stop_processes()
    finally:
        for process in soak.processes.values():
            process.kill()


def _poll(soak: SoakTest, deadline_s: float, stop: threading.Event) -> Iterator[None]:
    """Yield every few seconds until the deadline or until `stop`."""
    while (left_s := deadline_s - soak.get_elapsed_s()) > 0:
        if stop.wait(min(_POLL_INTERVAL_S, left_s)):
            return
        yield


def _wait_for_database(soak: SoakTest) -> None:
    while not open_store(soak.settings).path.exists():
        soak.check_progress()
        threading.Event().wait(0.2)


def has_claim(lake: Path, pid: int) -> bool:
    """Return whether a process has claimed the lake (charter/lake/claims.py)."""
    for path in (lake / "_charter/claims").glob("[!_]*.json"):
        with suppress(FileNotFoundError):  # the export has ended meanwhile, and has deleted its claim
            if json.loads(path.read_text())["pid"] == pid:
                return True
    return False


def is_lake_complete(lake: Path) -> bool:
    """Return whether the newest manifest says that the last export has finished. Without a manifest, nothing was written."""
    manifests = sorted((lake / "_charter").glob("manifest-*.json"))
    return not manifests or bool(json.loads(manifests[-1].read_text())["is_complete"])


def _build_set_options(flags: Mapping[str, str]) -> list[str]:
    return [word for name, value in flags.items() for word in ("--set", f"{name}={value}")]


def _read_resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0
