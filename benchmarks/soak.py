"""`charter train --loop` beside a running stream, for an hour or as long as asked, on the embedded log.

    python -m benchmarks.soak --minutes 60 --data /tmp/soak

Two processes run: the stream (every stage and the sink on the small language model of `benchmarks.learning`, with its
PROGRAMMATIC critic and judge; a producer that keeps some questions waiting), and the trainer, which is `charter train --loop`
as it is. `--kills` kills the trainer that often with SIGKILL, at moments that it cannot know, and starts it again.

What is counted comes from the records: batches, policies, rollouts that were staler than the settings allow when they were
trained on (must be 0), answers that were not of the weights that they name (0), rows that a phase trained on twice (0), batches
that cannot be rebuilt (0). Beside that: how far the sink and the chains are behind, DuckDB's share of the trainer's time, and
how the memory of both processes grows. The exit code is 1 when one of those that must be 0 is not. SIGTERM ends it early,
with the figures so far.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.learning.language import Question, questions
from charter.options import stop_on_signals
from charter.pipeline import open_settings, sink_offsets, store_of
from engine.bus.read import read_values
from engine.errors import CharterError, StoreBusy
from engine.settings import Settings, load
from engine.store import Store
from schemas.codec import decode
from schemas.records import BatchManifest
from schemas.topics import TOPICS

ROOT = Path(__file__).parents[1]
BASE_STEPS = 300
AT_ONCE, EVERY_S, WAITING = 32, 4.0, 96  # questions published at once, how often, and how many may be on their way
EPOCH = 2048  # questions of one epoch
LOOK_EVERY_S = 5.0
STALLED_S = 120.0  # without a new answer: something is wrong
RESUME_AFTER_S = 60.0  # what the watch has paused goes on after that, as if someone had looked
STOP_WITHIN_S = 120.0
CRITIC, JUDGE = "programmatic-critic", "programmatic-judge"


def flags(folder: Path) -> dict[str, str]:
    """The settings: small batches, so that many policies come about, and the staleness bounds as they are by default."""
    return {
        "data.folder": str(folder / "data"), "run.constitution": str(ROOT / "benchmarks/learning/constitution.toml"),
        "prompts.eval_share": "0", "models.policy": str(folder / "base"), "models.critic": CRITIC, "models.judge": JUDGE,
        "models.max_rows": "64", "models.threads": "1", "respond.max_tokens": "48", "respond.samples": "2",
        "critique.rounds": "1", "critique.few_shot": "false", "bus.partitions": "4",
        "train.sft_rows": "512", "train.reward_rows": "128", "train.ppo_rows": "64", "train.max_rows": "512",
        "train.micro_rows": "32", "train.precision": "fp32", "train.sft_mix": "[]", "train.reward_mix": "[]",
        "sft.learning_rate": "1e-4", "sft.batch_size": "16", "reward.learning_rate": "3e-4", "reward.batch_size": "16",
        "reward.require_above_chance": "false",  # updates are counted here, not what they learn
        "ppo.learning_rate": "5e-5", "ppo.batch_size": "32", "ppo.epochs": "1",
        # The programmatic judge lives in the stream's process; the watch's other figures need none.
        "watch.prompts": "0",
    }  # fmt: skip


def settings_of(folder: Path) -> Settings:
    return load(flags(folder), environment={})[0]


# The stream's process


def stream(folder: Path) -> None:
    """Every stage and the sink, and a producer that keeps questions waiting, until SIGTERM."""
    from benchmarks.learning.programmatic import LANGUAGE, ProgrammaticCritic, judge_of
    from charter.pipeline import STAGES, Models, connect, make_stage
    from constitutions.loader import load as load_constitution
    from consumers.sink import Sink
    from engine.host import Host
    from engine.worker import Lane, Worker

    settings, stop = settings_of(folder), stop_on_signals()
    bus, store = connect(settings), store_of(settings)
    models = Models(settings, opened={CRITIC: ProgrammaticCritic(LANGUAGE), JUDGE: judge_of("judge", LANGUAGE, 0)})
    lane, constitution = Lane("local", linger_s=0.05), load_constitution(settings.run.constitution)
    stages = [make_stage(name, settings, models, constitution, bus) for name in STAGES]
    workers = [Worker(bus, stage, lane, run_id=settings.run.id, slot="0") for stage in stages]
    with Host(workers, {"sink": Sink(bus, store).run}, [models.close]) as host:
        for number, (epoch, asked) in enumerate(supply()):
            produce(settings, bus, number, epoch, asked)
            stop.wait(EVERY_S)
            while unfinished(store, (number + 1) * AT_ONCE) > WAITING - AT_ONCE and not stop.wait(0.5):
                host.check()
            if stop.is_set():
                break
    bus.close()


def supply() -> Iterator[tuple[int, list[Question]]]:
    """Questions without end, and the epoch that they are sampled in: the language has only some thousands of them."""
    for epoch in range(10**9):
        asked = questions(epoch)
        for _ in range(EPOCH // AT_ONCE):
            yield epoch, list(islice(asked, AT_ONCE))


def produce(settings: Settings, bus: Any, number: int, epoch: int, asked: Sequence[Question]) -> None:
    from producers.files import Producer

    path = settings.folder / f"questions-{number:06d}.jsonl"
    path.write_text("".join(json.dumps({"prompt": q.text, "source": q.source}) + "\n" for q in asked))
    Producer(bus, settings.run.id, epoch=epoch, eval_share=0.0).publish(str(path))
    path.unlink()


def unfinished(store: Store, published: int) -> int:
    """Questions whose chains have not ended or whose answers are not judged yet."""
    sql = """SELECT count(*) FROM prompts WHERE prompt_id IN (SELECT prompt_id FROM revision_chains)
             AND prompt_id IN (SELECT prompt_id FROM preferences)"""
    return published - int(store.query(sql, limit_s=60.0).rows[0][0])


# Looking from outside


@dataclass
class Look:
    """What was seen at one moment; sizes in MB."""

    at_s: float
    stream_mb: float
    trainer_mb: float
    sink_behind: int
    answers: int
    policy: int


@dataclass
class Soak:
    """The two processes, and what was seen of them."""

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    looks: list[Look] = field(default_factory=list)
    kills: int = 0
    resumed: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def settings(self) -> Settings:
        return settings_of(self.folder)

    def command(self, *verbs: str) -> list[str]:
        chosen = [word for name, value in flags(self.folder).items() for word in ("--set", f"{name}={value}")]
        return [sys.executable, "-m", "charter", *verbs, *chosen]

    def start(self, name: str) -> None:
        commands = {
            "stream": [sys.executable, "-m", "benchmarks.soak", "--stream", "--data", str(self.folder)],
            "trainer": self.command("train", "--loop", "--verbose"),
        }
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(commands[name], env=environment, stdout=log, stderr=log)

    def check(self) -> None:
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise SystemExit(f"{name} has ended with {process.returncode}; see {self.folder / name}.log")
        if self.looks and (now := self.looks[-1]).at_s - self.answered_at() > STALLED_S:
            raise SystemExit(f"no answer since {self.answered_at():.0f} s, at {now.at_s:.0f} s")

    def answered_at(self) -> float:
        """When the newest answers were first seen."""
        return next(look.at_s for look in self.looks if look.answers == self.looks[-1].answers)

    def kill_trainer(self) -> None:
        self.processes["trainer"].kill()
        self.processes["trainer"].wait()
        self.kills += 1
        self.start("trainer")

    def stop(self) -> dict[str, int]:
        for name in ("trainer", "stream"):  # the trainer finishes its update while the stream still writes
            self.processes[name].send_signal(signal.SIGTERM)
            self.processes[name].wait(STOP_WITHIN_S)
        return {name: process.returncode for name, process in self.processes.items()}

    def look(self) -> Look:
        store = store_of(self.settings)
        rows = store.query("SELECT count(*), max(policy_version) FROM responses", limit_s=60.0).rows
        bus = open_settings(self.settings)
        sunk = sink_offsets(store, bus.cluster_id)
        behind = sum(max(0, end - sunk.get(place, 0)) for place, end in bus.end_offsets(list(TOPICS)).items())
        bus.close()
        return Look(
            time.monotonic() - self.started,
            resident_mb(self.processes["stream"].pid),
            resident_mb(self.processes["trainer"].pid),
            behind,
            rows[0][0],
            rows[0][1] or 0,
        )

    def resume_if_paused(self) -> None:
        """What the watch has paused goes on after a while."""
        sql = "SELECT max(epoch(?::TIMESTAMP - since)) FROM paused_phases"
        ((for_s,),) = store_of(self.settings).query(sql, [datetime.now(UTC).replace(tzinfo=None)], limit_s=60.0).rows
        if for_s is not None and for_s > RESUME_AFTER_S:
            subprocess.run(self.command("policy", "resume"), check=True, stdout=subprocess.DEVNULL)
            self.resumed += 1


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def run(folder: Path, minutes: float, kills: int) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        from benchmarks.learning.base import train_base

        print(f"base model: loss {train_base(folder / 'base', steps=BASE_STEPS):.2f}", flush=True)
    soak, stop = Soak(folder), stop_on_signals()
    ends = soak.started + 60 * minutes
    kill_at = iter(sorted(random.Random(0).uniform(soak.started + 60, ends - 60) for _ in range(kills)))
    following = next(kill_at, ends)
    soak.start("stream")
    wait_for_database(soak)
    soak.start("trainer")
    try:
        while time.monotonic() < ends and not stop.wait(min(LOOK_EVERY_S, max(0.1, min(ends, following) - time.monotonic()))):
            soak.check()
            if following <= time.monotonic() < ends:
                soak.kill_trainer()
                following = next(kill_at, ends)
            try:
                soak.resume_if_paused()
                soak.looks.append(soak.look())
            except StoreBusy:
                continue
            print(f"{soak.looks[-1]}", flush=True)
        codes = soak.stop()
    finally:
        for process in soak.processes.values():
            process.kill()
    settle(soak)
    return {"exit_codes": codes} | result(soak)


def wait_for_database(soak: Soak) -> None:
    while not store_of(soak.settings).path.exists():
        soak.check()
        threading.Event().wait(0.2)


def settle(soak: Soak) -> None:
    """Bring what the last moments left on the log into the database."""
    from consumers.sink import Sink

    bus = open_settings(soak.settings)
    sink = Sink(bus, store_of(soak.settings), max_wait_s=0.1)
    while sink.step():
        pass
    sink.close()
    bus.close()


# What came of it

MUST_BE_ZERO = {
    "stale_rollouts": """
        SELECT count(*) FROM trained_rollouts WHERE policies_behind > $1 OR rewards_behind > $2 OR policies_behind < 0
        OR policy_version < reference_policy_version""",
    "answers_of_other_weights": """
        SELECT count(*) FROM responses r JOIN policy_versions p ON p.kind = 'POLICY' AND p.version = r.policy_version
        JOIN policies w ON w.kind = 'POLICY' AND w.version = p.weights_of WHERE w.model.revision <> r.model.revision
        AND $1 >= 0 AND $2 >= 0""",
    "rows_trained_twice": """
        SELECT count(*) FROM (SELECT phase, row_id FROM batch_rows WHERE trained AND NOT replayed AND $1 >= 0 AND $2 >= 0
                              GROUP BY ALL HAVING count(*) > 1)""",
    "missing_versions": """
        SELECT coalesce(sum(newest - versions), 0) FROM (SELECT kind, max(version) AS newest, count(*) AS versions
        FROM policy_versions WHERE $1 >= 0 AND $2 >= 0 GROUP BY kind)""",
}


def result(soak: Soak) -> dict[str, Any]:
    store, train = store_of(soak.settings), soak.settings.train
    bounds = [train.max_staleness, train.max_reward_staleness]
    zeros = {name: int(store.query(sql, bounds, limit_s=120.0).rows[0][0]) for name, sql in MUST_BE_ZERO.items()}
    counts = {
        "answers": "SELECT count(*) FROM responses",
        "finished_prompts": "SELECT count(DISTINCT prompt_id) FROM revision_chains",
        "batches": "SELECT count(*) FROM batches",
        "policies": "SELECT count(*) FROM policy_versions WHERE kind = 'POLICY'",
        "reward_models": "SELECT count(*) FROM policy_versions WHERE kind = 'REWARD'",
        "policies_that_answered": "SELECT count(DISTINCT policy_version) FROM responses",
        "ppo_rollouts": "SELECT count(*) FROM trained_rollouts WHERE trained",
        "given_up": "SELECT count(DISTINCT voided_batch_id) FROM incidents WHERE voided_batch_id IS NOT NULL",
        "trips": "SELECT count(*) FROM pauses WHERE paused",
        "dead_letters": "SELECT count(*) FROM dead_letters",
        "most_policies_behind": "SELECT max(policies_behind) FROM trained_rollouts",
        "most_rewards_behind": "SELECT max(rewards_behind) FROM trained_rollouts",
    }
    told = {name: store.query(sql, limit_s=120.0).rows[0][0] for name, sql in counts.items()}
    drops = dict(store.query("SELECT reason, sum(rollouts)::INT FROM dropped_rollout_stats GROUP BY 1", limit_s=60.0).rows)
    return {
        "minutes": round((time.monotonic() - soak.started) / 60, 1),
        "kills": soak.kills,
        "resumed": soak.resumed,
        **zeros,
        "not_rebuilt": not_rebuilt(soak),
        **told,
        "drops": drops,
        **waits(store),
        **{f"{name}_mb": growth([getattr(look, f"{name}_mb") for look in soak.looks]) for name in ("stream", "trainer")},
        "sink_behind": {"median": median(seen), "most": max(seen)} if (seen := [x.sink_behind for x in soak.looks]) else {},
    }


def not_rebuilt(soak: Soak) -> int:
    """Batches whose rows the database does not give back exactly."""
    from trainer.batches import rebuild

    bus, store, failed = open_settings(soak.settings), store_of(soak.settings), 0
    for value in read_values(bus, BatchManifest.topic):
        try:
            rebuild(store, decode(value, BatchManifest))
        except CharterError as error:
            print(error, file=sys.stderr)
            failed += 1
    bus.close()
    return failed


def waits(store: Store) -> dict[str, float]:
    """DuckDB's share of the updates' time, and of all the trainer's time, looking for new rows included."""
    sql = """SELECT sum(metrics['duckdb_s']) / sum(metrics['wall_s']), arg_max(metrics['alive_duckdb_share'], commit_seq)
             FROM metrics WHERE phase = 'loop'"""
    ((in_updates, alive),) = store.query(sql, limit_s=60.0).rows
    return {"duckdb_share_of_updates": in_updates, "duckdb_share_of_all_time": alive}


def growth(seen: Sequence[float]) -> dict[str, float]:
    """Resident memory after the first quarter, at the end (medians of a tenth of the looks), and at most; in MB."""
    tenth = max(1, len(seen) // 10)
    early, late = list(islice(seen, len(seen) // 4, len(seen) // 4 + tenth)), list(seen[-tenth:])
    return {name: round(value, 1) for name, value in zip(("early", "late", "most"), ends_of(early, late, seen), strict=True)}


def ends_of(early: Sequence[float], late: Sequence[float], seen: Sequence[float]) -> Iterator[float]:
    yield median(early or [0.0])
    yield median(late or [0.0])
    yield max(seen, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--data", type=Path, required=True, help="an empty folder")
    parser.add_argument("--kills", type=int, default=0, help="how often the trainer is killed")
    parser.add_argument("--stream", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.stream:
        stream(chosen.data)
        return
    found = run(chosen.data, chosen.minutes, chosen.kills)
    (chosen.data / "soak.json").write_text(json.dumps(found, indent=2))
    print(json.dumps(found, indent=2))
    wrong = [name for name in (*MUST_BE_ZERO, "not_rebuilt") if found[name]]
    sys.exit(f"not 0: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
