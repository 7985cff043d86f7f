"""Run the stages and `charter train --loop` together on the embedded log, for `--minutes` minutes (soak test).

    python -m benchmarks.soak --minutes 60 --data /tmp/soak

There are two processes. The stream process runs every stage, the sink, and a producer that keeps a constant number of questions
in flight. Its policy is the small language model of `benchmarks.learning`, and its critic and judge are programs. The trainer
process runs an unchanged `charter train --loop`. `--kills` is the number of times that the test kills the trainer with SIGKILL
at a random time and restarts it.

The results are counted from the records. If one of these numbers is not 0, the
exit code is 1:

* rollouts that were older than the settings allow when they were used for training
* responses that were not sampled with the weights of their policy version
* rows that a phase used twice for training
* missing versions
* batches that cannot be rebuilt

Further results are the lag of the sink and the number of finished chains. The test also reports DuckDB's share of the trainer's
time, and the memory growth of both processes. SIGTERM ends the test early and prints the results so far.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.learning.language import ToyQuestion, generate_questions
from charter.connect import open_bus_from_settings, open_store
from charter.lag import read_sink_offsets
from engine.bus.read import read_values
from engine.errors import CharterError, StoreBusy
from engine.settings import Settings, load_settings
from engine.stop_signals import stop_on_signals
from engine.store import Store
from schemas.codec import decode_record
from schemas.records import BatchManifest
from schemas.topics import TOPICS
from trainer.methods import get_rl_fraction

_ROOT = Path(__file__).parents[1]
_BASE_MODEL_STEPS = 300
_PUBLISH_BATCH_SIZE, _PUBLISH_INTERVAL_S = 32, 4.0  # number of questions published at once
_MAX_UNFINISHED = 96  # questions in flight
_QUESTIONS_PER_EPOCH = 2048
_POLL_INTERVAL_S = 5.0
_STALL_TIMEOUT_S = 120.0  # the test fails if there is no new response for this time
_RESUME_DELAY_S = 60.0  # a phase that the monitor paused is resumed after this time, as an operator would do
_STOP_TIMEOUT_S = 120.0
_CRITIC_ID, _JUDGE_ID = "programmatic-critic", "programmatic-judge"


def _make_setting_flags(folder: Path) -> dict[str, str]:
    """Return the settings. Batches are small, so that there are many policies. The staleness limits are the defaults."""
    return {
        "data.folder": str(folder / "data"), "run.constitution": str(_ROOT / "benchmarks/learning/constitution.toml"),
        "prompts.eval_fraction": "0", "models.policy": str(folder / "base"), "models.critic": _CRITIC_ID, "models.judge": _JUDGE_ID,
        "models.max_batch_size": "64", "models.threads": "1", "respond.max_tokens": "48", "respond.num_completions": "2",
        "critique.rounds": "1", "critique.few_shot": "false", "bus.partitions": "4",
        "train.sft_rows": "512", "train.reward_rows": "128", "train.ppo_rows": "64", "train.max_rows": "512",
        "train.micro_batch_size": "32", "train.precision": "fp32", "train.sft_mixture": "[]", "train.reward_mixture": "[]",
        "sft.learning_rate": "1e-4", "sft.batch_size": "16", "reward.learning_rate": "3e-4", "reward.batch_size": "16",
        "reward.require_above_chance": "false",  # this test does not measure what the updates learn
        "ppo.learning_rate": "5e-5", "ppo.batch_size": "32", "ppo.epochs": "1",
        # The programmatic judge runs in the stream's process; the monitor's other metrics do not need a judge.
        "monitor.prompts": "0",
    }  # fmt: skip


def _load_settings(folder: Path, changes: Mapping[str, str]) -> Settings:
    return load_settings(_make_setting_flags(folder) | dict(changes), environment={})[0]


# The stream's process


def _run_stream(folder: Path, changes: Mapping[str, str]) -> None:
    """Run every stage, the sink, and a producer that keeps questions in flight, until SIGTERM."""
    from benchmarks.learning.programmatic import LANGUAGE_RULE, ProgrammaticCritic, make_judge
    from charter.connect import connect_bus
    from charter.models import RoleModels
    from charter.pipeline import STAGES, make_pacing, make_stage
    from constitutions.loader import load_constitution as load_constitution
    from consumers.sink import Sink
    from engine.host import Host
    from engine.worker import ModelExecutor, Worker

    settings, stop = _load_settings(folder, changes), stop_on_signals()
    bus, store = connect_bus(settings), open_store(settings)
    models = RoleModels(
        settings, open_models={_CRITIC_ID: ProgrammaticCritic(LANGUAGE_RULE), _JUDGE_ID: make_judge("judge", LANGUAGE_RULE, 0)}
    )
    executor, constitution = ModelExecutor("local", downstream_wait_s=0.05), load_constitution(settings.run.constitution)
    stages = [make_stage(name, settings, models, constitution, bus) for name in STAGES]
    workers = [
        Worker(bus, stage, executor, run_id=settings.run.id, instance="0", pacing=make_pacing(stage.name, settings, bus))
        for stage in stages
    ]
    with Host(workers, {"sink": Sink(bus, store).run}, [models.close]) as host:
        for number, (epoch, questions) in enumerate(_generate_question_batches()):
            _publish_questions(settings, bus, number, epoch, questions)
            stop.wait(_PUBLISH_INTERVAL_S)
            num_published, max_unfinished = (number + 1) * _PUBLISH_BATCH_SIZE, _MAX_UNFINISHED - _PUBLISH_BATCH_SIZE
            while _count_unfinished(store, num_published) > max_unfinished and not stop.wait(0.5):
                host.raise_if_failed()
            if stop.is_set():
                break
    bus.close()


def _generate_question_batches() -> Iterator[tuple[int, list[ToyQuestion]]]:
    """Yield batches of questions without end. Yield the epoch with each batch.

    The language has only thousands of questions, so every epoch after the first one repeats the questions.
    """
    for epoch in range(10**9):
        questions = generate_questions(epoch)
        for _ in range(_QUESTIONS_PER_EPOCH // _PUBLISH_BATCH_SIZE):
            yield epoch, list(islice(questions, _PUBLISH_BATCH_SIZE))


def _publish_questions(settings: Settings, bus: Any, number: int, epoch: int, questions: Sequence[ToyQuestion]) -> None:
    from producers.files import FileProducer

    path = settings.folder / f"questions-{number:06d}.jsonl"
    path.write_text("".join(json.dumps({"prompt": q.text, "source": q.source}) + "\n" for q in questions))
    rl_fraction = get_rl_fraction(settings)
    FileProducer(bus, settings.run.id, epoch=epoch, eval_fraction=0.0, rl_fraction=rl_fraction).publish(str(path))
    path.unlink()


def _count_unfinished(store: Store, num_published: int) -> int:
    """Count the questions whose chain has not ended, and the questions whose responses are not judged yet."""
    sql = """SELECT count(*) FROM prompts WHERE prompt_id IN (SELECT prompt_id FROM revision_chains)
             AND prompt_id IN (SELECT prompt_id FROM preferences)"""
    return num_published - int(store.query(sql, limit_s=60.0).rows[0][0])


# Supervision


@dataclass
class _Snapshot:
    """This is the state of the test at one time. Memory is in MB."""

    at_s: float
    stream_mb: float
    trainer_mb: float
    sink_lag: int
    num_responses: int
    policy_version: int


@dataclass
class _SoakTest:
    """This class has the two processes of the test, and the snapshots of their state."""

    folder: Path
    changes: Mapping[str, str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    snapshots: list[_Snapshot] = field(default_factory=list)
    num_kills: int = 0
    num_resumed: int = 0
    started_at: float = field(default_factory=time.monotonic)

    @property
    def settings(self) -> Settings:
        return _load_settings(self.folder, self.changes)

    def build_command(self, *verbs: str) -> list[str]:
        flags = _make_setting_flags(self.folder) | dict(self.changes)
        options = [word for name, value in flags.items() for word in ("--set", f"{name}={value}")]
        return [sys.executable, "-m", "charter", *verbs, *options]

    def start_process(self, name: str) -> None:
        changes = [word for name, value in self.changes.items() for word in ("--set", f"{name}={value}")]
        commands = {
            "stream": [sys.executable, "-m", "benchmarks.soak", "--stream", "--data", str(self.folder), *changes],
            "trainer": self.build_command("train", "--loop", "--verbose"),
        }
        environment = os.environ | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(commands[name], env=environment, stdout=log, stderr=log)

    def check_progress(self) -> None:
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise SystemExit(f"{name} ended with exit code {process.returncode}; see {self.folder / name}.log")
        if self.snapshots and (now := self.snapshots[-1]).at_s - self.find_last_response_time() > _STALL_TIMEOUT_S:
            raise SystemExit(
                f"there is no new response from {self.find_last_response_time():.0f} s to {now.at_s:.0f} s of the test"
            )

    def find_last_response_time(self) -> float:
        """Return the time of the first snapshot with the current number of responses."""
        return next(s.at_s for s in self.snapshots if s.num_responses == self.snapshots[-1].num_responses)

    def kill_trainer(self) -> None:
        self.processes["trainer"].kill()
        self.processes["trainer"].wait()
        self.num_kills += 1
        self.start_process("trainer")

    def stop_processes(self) -> dict[str, int]:
        for name in ("trainer", "stream"):  # the trainer finishes its update while the stream still writes
            self.processes[name].send_signal(signal.SIGTERM)
            self.processes[name].wait(_STOP_TIMEOUT_S)
        return {name: process.returncode for name, process in self.processes.items()}

    def take_snapshot(self) -> _Snapshot:
        store = open_store(self.settings)
        rows = store.query("SELECT count(*), max(policy_version) FROM responses", limit_s=60.0).rows
        bus = open_bus_from_settings(self.settings)
        sink_offsets = read_sink_offsets(store, bus)
        lag = sum(max(0, end - sink_offsets.get(key, 0)) for key, end in bus.end_offsets(list(TOPICS)).items())
        bus.close()
        return _Snapshot(
            time.monotonic() - self.started_at,
            _read_resident_mb(self.processes["stream"].pid),
            _read_resident_mb(self.processes["trainer"].pid),
            lag,
            rows[0][0],
            rows[0][1] or 0,
        )

    def resume_if_paused(self) -> None:
        """Resume phases that the monitor paused more than `_RESUME_DELAY_S` ago."""
        sql = "SELECT max(epoch(?::TIMESTAMP - since)) FROM paused_phases"
        ((paused_s,),) = open_store(self.settings).query(sql, [datetime.now(UTC).replace(tzinfo=None)], limit_s=60.0).rows
        if paused_s is not None and paused_s > _RESUME_DELAY_S:
            subprocess.run(self.build_command("policy", "resume"), check=True, stdout=subprocess.DEVNULL)
            self.num_resumed += 1


def _read_resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _run_soak(folder: Path, minutes: float, num_kills: int, changes: Mapping[str, str]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        from benchmarks.learning.base_model import train_base_model

        print(f"base model: loss {train_base_model(folder / 'base', steps=_BASE_MODEL_STEPS):.2f}", flush=True)
    soak, stop = _SoakTest(folder, changes), stop_on_signals()
    deadline = soak.started_at + 60 * minutes
    kill_times = iter(sorted(random.Random(0).uniform(soak.started_at + 60, deadline - 60) for _ in range(num_kills)))
    next_kill = next(kill_times, deadline)
    soak.start_process("stream")
    _wait_for_database(soak)
    soak.start_process("trainer")
    try:
        while (now := time.monotonic()) < deadline:
            if stop.wait(min(_POLL_INTERVAL_S, max(0.1, min(deadline, next_kill) - now))):
                break
            soak.check_progress()
            if next_kill <= time.monotonic() < deadline:
                soak.kill_trainer()
                next_kill = next(kill_times, deadline)
            try:
                soak.resume_if_paused()
                soak.snapshots.append(soak.take_snapshot())
            except StoreBusy:
                continue
            print(f"{soak.snapshots[-1]}", flush=True)
        exit_codes = soak.stop_processes()
    finally:
        for process in soak.processes.values():
            process.kill()
    _drain_log(soak)
    return {"exit_codes": exit_codes} | _compute_result(soak)


def _wait_for_database(soak: _SoakTest) -> None:
    while not open_store(soak.settings).path.exists():
        soak.check_progress()
        threading.Event().wait(0.2)


def _drain_log(soak: _SoakTest) -> None:
    """Write the remaining records of the log to the database."""
    from consumers.sink import Sink

    bus = open_bus_from_settings(soak.settings)
    sink = Sink(bus, open_store(soak.settings), max_wait_s=0.1)
    while sink.step():
        pass
    sink.close()
    bus.close()


# Results

_INVARIANT_QUERIES = {
    "stale_rollouts": """
        SELECT count(*) FROM trained_rollouts WHERE policies_behind > $1 OR rewards_behind > $2 OR policies_behind < 0
        OR policy_version < reference_policy_version""",
    "responses_of_other_weights": """
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


def _compute_result(soak: _SoakTest) -> dict[str, Any]:
    store, train = open_store(soak.settings), soak.settings.train
    bounds = [train.max_staleness, train.max_reward_staleness]
    zeros = {name: int(store.query(sql, bounds, limit_s=120.0).rows[0][0]) for name, sql in _INVARIANT_QUERIES.items()}
    counts = {
        "responses": "SELECT count(*) FROM responses",
        "finished_prompts": "SELECT count(DISTINCT prompt_id) FROM revision_chains",
        "batches": "SELECT count(*) FROM batches",
        "policies": "SELECT count(*) FROM policy_versions WHERE kind = 'POLICY'",
        "reward_models": "SELECT count(*) FROM policy_versions WHERE kind = 'REWARD'",
        "responding_policies": "SELECT count(DISTINCT policy_version) FROM responses",
        "ppo_rollouts": "SELECT count(*) FROM trained_rollouts WHERE trained",
        "voided_batches": "SELECT count(DISTINCT voided_batch_id) FROM incidents WHERE voided_batch_id IS NOT NULL",
        "pauses": "SELECT count(*) FROM pauses WHERE paused",
        "dead_letters": "SELECT count(*) FROM dead_letters",
        "max_policies_behind": "SELECT max(policies_behind) FROM trained_rollouts",
        "max_rewards_behind": "SELECT max(rewards_behind) FROM trained_rollouts",
    }
    values = {name: store.query(sql, limit_s=120.0).rows[0][0] for name, sql in counts.items()}
    dropped = dict(store.query("SELECT reason, sum(rollouts)::INT FROM dropped_rollout_stats GROUP BY 1", limit_s=60.0).rows)
    lags = [snapshot.sink_lag for snapshot in soak.snapshots]
    return {
        "minutes": round((time.monotonic() - soak.started_at) / 60, 1),
        "kills": soak.num_kills,
        "resumed": soak.num_resumed,
        **zeros,
        "unreproducible_batches": _count_unreproducible_batches(soak),
        **values,
        "dropped_rollouts": dropped,
        **_compute_rollout_shares(store),
        **_compute_duckdb_shares(store),
        **{
            f"{name}_mb": _summarize_memory([getattr(snapshot, f"{name}_mb") for snapshot in soak.snapshots])
            for name in ("stream", "trainer")
        },
        "sink_lag": {"median": median(lags), "max": max(lags)} if lags else {},
    }


def _compute_rollout_shares(store: Store) -> dict[str, Any]:
    """Return which share of the completions RL trained on, dropped, left to the reward model, or could still use at the end.

    Before the first reward model, RL cannot train. So the shares of the completions since then are also returned.
    """
    sql = """
        WITH fates AS (
            SELECT CASE WHEN response_id IN (SELECT response_id FROM trained_rollouts WHERE trained) THEN 'trained'
                        WHEN response_id IN (SELECT dropped_id FROM dropped_rollouts) THEN 'dropped'
                        WHEN purpose = 'REWARD' THEN 'for_reward_model' ELSE 'unused' END AS fate FROM rollouts
            WHERE created_at > coalesce((SELECT min(created_at) FROM policies WHERE kind = 'REWARD' AND $since), '1970-01-01'))
        SELECT fate, count(*) / (SELECT count(*) FROM fates) FROM fates GROUP BY 1 ORDER BY 1"""
    all_shares, shares_since = (
        {fate: round(share, 3) for fate, share in store.query(sql, {"since": since}, limit_s=60.0).rows}
        for since in (False, True)
    )
    held = "SELECT count(*) FROM allowances WHERE num_completions = 0"
    shares = {"completion_shares": all_shares, "completion_shares_since_the_first_reward_model": shares_since}
    return shares | {"allowances_of_zero": store.query(held, limit_s=60.0).rows[0][0]}


def _count_unreproducible_batches(soak: _SoakTest) -> int:
    """Return the number of batches that cannot be rebuilt exactly from the database."""
    from trainer.batches import rebuild_batch

    bus, store, failed = open_bus_from_settings(soak.settings), open_store(soak.settings), 0
    for value in read_values(bus, BatchManifest.topic):
        try:
            rebuild_batch(store, decode_record(value, BatchManifest))
        except CharterError as error:
            print(error, file=sys.stderr)
            failed += 1
    bus.close()
    return failed


def _compute_duckdb_shares(store: Store) -> dict[str, float]:
    """Return DuckDB's share of the update time, and its share of the total time, which includes polling for new rows."""
    sql = """SELECT sum(metrics['duckdb_s']) / sum(metrics['wall_s']), arg_max(metrics['alive_duckdb_share'], commit_seq)
             FROM metrics WHERE phase = 'loop'"""
    ((update_share, total_share),) = store.query(sql, limit_s=60.0).rows
    return {"duckdb_share_of_updates": update_share, "duckdb_share_of_total": total_share}


def _summarize_memory(sizes_mb: Sequence[float]) -> dict[str, float]:
    """Return the resident memory in MB after the first quarter, at the end, and at the peak.

    The first two numbers are medians over a tenth of the snapshots.
    """
    tenth, quarter = max(1, len(sizes_mb) // 10), len(sizes_mb) // 4
    early, late = sizes_mb[quarter : quarter + tenth], sizes_mb[-tenth:]
    sizes = {"early": median(early or [0.0]), "late": median(late or [0.0]), "max": max(sizes_mb, default=0.0)}
    return {name: round(size, 1) for name, size in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--data", type=Path, required=True, help="an empty folder")
    parser.add_argument("--kills", type=int, default=0, help="number of times that the trainer is killed")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting")
    parser.add_argument("--stream", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    changes = dict(text.split("=", 1) for text in options.set)
    if options.stream:
        _run_stream(options.data, changes)
        return
    result = _run_soak(options.data, options.minutes, options.kills, changes)
    (options.data / "soak.json").write_text(json.dumps(result, indent=2))
    print(json.dumps(result, indent=2))
    failed = [name for name in (*_INVARIANT_QUERIES, "unreproducible_batches") if result[name]]
    sys.exit(f"these results must be 0, but are not: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
