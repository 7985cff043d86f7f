"""Kill processes and brokers with SIGKILL while prompts are processed; then check for lost, duplicated or changed records."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.delivery import check_delivery
from tests.chaos.system import (
    POLL_INTERVAL_S,
    SystemUnderTest,
    check_exactly_once,
    find_differences,
    get_kafka_home,
    is_caught_up,
    read_texts,
    require,
    wait_until,
    write_prompts,
)
from tests.support.kafka import DEFAULT_SETTINGS, Cluster
from tests.support.waiting import HANG_S

_SETTING_FLAGS = {
    "critique.rounds": "2",
    "respond.num_completions": "2",
    "models.max_batch_size": "16",
    "worker.shutdown_timeout_s": "20",
    # The judge skips prompts for RL as soon as a training loop has started, so the labels would depend on time.
    "prompts.rl_fraction": "0",
}
_PROCESS_COMMANDS = (
    ("respond", "run", "--stage", "respond"),
    ("chains-a", "run", "--stage", "critique", "--stage", "revise"),
    ("chains-b", "run", "--stage", "critique", "--stage", "revise"),
    ("judge", "run", "--stage", "judge"),
    ("sink", "run", "--stage", "sink"),
    ("trainer", "train", "--loop"),
)
_OUTPUT_TABLES = ("responses", "critiques", "revisions", "preferences")
_MIN_OUTPUTS_PER_PROMPT = 4  # one record of each output table
_BROKER_OUTAGE_RANGE_S = (0.5, 6.0)  # how long a broker stays down
_FINISH_TIMEOUT_S = 6 * HANG_S  # a full-size run works for many minutes between two checks


@dataclass(frozen=True)
class KillScenario:
    num_prompts: int = 5000
    num_kills: int = 200
    num_broker_kills: int = 10
    seed: int = 0
    num_brokers: int = 3
    publish_policies: bool = False  # otherwise only reward models are trained, and policy 0 writes all responses

    @property
    def num_files(self) -> int:
        return max(4, self.num_kills // 10)

    @property
    def num_outputs_per_kill(self) -> float:
        return self.num_prompts * _MIN_OUTPUTS_PER_PROMPT / self.num_kills


def kill_everything(folder: Path, scenario: KillScenario, *, on_kafka: bool) -> Iterator[str]:
    """Run the scenario and yield progress lines; raise InvariantViolation if a guarantee does not hold."""
    rng = random.Random(scenario.seed)
    files = write_prompts(folder / "prompts", scenario.num_prompts, scenario.num_files, scenario.seed)
    with ExitStack() as stack:
        cluster = stack.enter_context(_make_cluster(folder / "brokers", scenario.num_brokers)) if on_kafka else None
        address = f"kafka://{cluster.address}" if cluster else ""
        flags = _SETTING_FLAGS | _make_training_flags(scenario) | {"bus.replication": str(scenario.num_brokers)}
        system = stack.enter_context(SystemUnderTest(folder / "chaos", address, flags))
        started = time.monotonic()
        yield from _run_kills(system, cluster, files, scenario, rng)
        wait_until(lambda: _is_finished(system, scenario), "every prompt is finished and judged", _FINISH_TIMEOUT_S)
        wait_until(
            lambda: _revive_processes(system) and system.query_count_or_zero("SELECT count(*) FROM policies") > 0,
            "a model is trained",
            _FINISH_TIMEOUT_S,
        )
        yield f"all {scenario.num_prompts} prompts are finished and judged after {time.monotonic() - started:.0f} s"
        codes = {"trainer": system.stop_process("trainer")}  # the other processes then finish their work
        wait_until(lambda: _revive_processes(system) and is_caught_up(system), "every consumer has caught up")
        codes |= {name: system.stop_process(name) for name in [*system.processes]}
        started_codes = {name: code for name, code in codes.items() if code != -signal.SIGTERM}  # -SIGTERM: still starting
        require(not any(started_codes.values()), f"processes ended with an error: {codes}")
        for line in system.unexpected_exits:
            yield f"unexpected exit: {line}"
        check_exactly_once(system, scenario.num_prompts)
        check_delivery(system, [text for path in files for text in read_texts(path)])
        _check_training(system)
        yield f"kills: {system.kill_counts}; records: {_count_records(system)}"
        if scenario.publish_policies:
            yield from _check_published(system)
            return
        yield from _compare_with_undisturbed_run(system, folder, files, scenario)


def _make_cluster(folder: Path, num_brokers: int) -> Cluster:
    return Cluster(get_kafka_home(), folder, num_brokers, DEFAULT_SETTINGS)


def _make_training_flags(scenario: KillScenario) -> dict[str, str]:
    never = str(10**9)
    num_rows = str(min(100, scenario.num_prompts // 4))
    sft_rows = num_rows if scenario.publish_policies else never
    return {"train.sft_rows": sft_rows, "train.reward_rows": num_rows, "train.ppo_rows": never, "train.max_rows": "200"}


def _run_kills(
    system: SystemUnderTest, cluster: Cluster | None, files: list[Path], scenario: KillScenario, rng: random.Random
) -> Iterator[str]:
    """Start all processes and kill random ones, while the files are published one by one.

    The kills are paced by progress: before each kill the system has written more outputs, on a slow machine as on a fast one.
    """
    for name, *arguments in _PROCESS_COMMANDS:
        system.start_process(name, *arguments)
    broker_kills = set(rng.sample(range(1, scenario.num_kills), scenario.num_broker_kills)) if cluster else set()
    selected_files = files[:-1] if scenario.publish_policies else files
    pending_files = list(selected_files)
    for number in range(scenario.num_kills):
        num_outputs = _count_outputs(system) + rng.uniform(0.2, 1.8) * scenario.num_outputs_per_kill
        wait_until(
            lambda number=number, num_outputs=num_outputs: _has_progressed(
                system, pending_files, selected_files, scenario, number / scenario.num_kills, num_outputs
            ),
            f"there is progress before kill {number}",
            _FINISH_TIMEOUT_S,
        )
        broker = rng.choice(cluster.brokers) if cluster and number in broker_kills else None
        if cluster and broker:
            cluster.wait_until_in_sync()
            broker.kill()
            yield f"kill {number}: broker {broker.node_id} too; {system.count_finished_prompts()} prompts are finished"
        victim = rng.choice([name for name, process in system.processes.items() if process.poll() is None])
        system.kill_process(victim)
        system.restart_process(victim)
        if broker:
            time.sleep(rng.uniform(*_BROKER_OUTAGE_RANGE_S))  # the outage itself
            broker.start()
    if scenario.publish_policies:  # the last prompts arrive once a second policy is certain
        wait_until(
            lambda: _revive_processes(system) and _count_policies(system) > 0, "a policy is published", _FINISH_TIMEOUT_S
        )
        pending_files.append(files[-1])
    while pending_files or "produce" in system.processes:
        _publish_next_file(system, pending_files, max_pending_share=0.0, num_files=len(files))
        _revive_processes(system)
        time.sleep(POLL_INTERVAL_S)


def _has_progressed(
    system: SystemUnderTest,
    pending_files: list[Path],
    files: list[Path],
    scenario: KillScenario,
    killed_share: float,
    num_outputs: float,
) -> bool:
    """Return whether the tables have this number of outputs, or no work is left. Restart processes and publish files."""
    _revive_processes(system)
    num_published = scenario.num_prompts * (len(files) - len(pending_files)) // scenario.num_files
    is_idle = "produce" not in system.processes and system.count_finished_prompts() >= num_published
    _publish_next_file(system, pending_files, max_pending_share=0.0 if is_idle else 1 - killed_share, num_files=len(files))
    return _count_outputs(system) >= num_outputs or (is_idle and not pending_files)


def _count_outputs(system: SystemUnderTest) -> int:
    counts = " + ".join(f"(SELECT count(*) FROM raw.{table})" for table in _OUTPUT_TABLES)
    return system.query_count_or_zero(f"SELECT {counts}")


def _publish_next_file(system: SystemUnderTest, pending_files: list[Path], *, max_pending_share: float, num_files: int) -> None:
    """Publish the next file once the previous one is published, unless at most `max_pending_share` of the files are pending."""
    if "produce" in system.processes and system.revive_process("produce"):
        del system.processes["produce"]
    if "produce" not in system.processes and pending_files and len(pending_files) > max_pending_share * num_files:
        system.start_process("produce", "produce", str(pending_files.pop(0)))


def _revive_processes(system: SystemUnderTest) -> bool:
    """Restart every process that has exited; always return True, for use in conditions."""
    for name in [*system.processes]:
        system.revive_process(name)
    return True


def _is_finished(system: SystemUnderTest, scenario: KillScenario) -> bool:
    return _revive_processes(system) and system.count_finished_prompts() >= scenario.num_prompts


def _count_records(system: SystemUnderTest) -> dict[str, int]:
    return dict(system.query_rows("SELECT topic, records FROM pipeline_status WHERE records > 0"))


def _count_policies(system: SystemUnderTest) -> int:
    return system.query_count_or_zero("SELECT count(*) FROM policies WHERE kind = 'POLICY'")


def _check_training(system: SystemUnderTest) -> None:
    """Check that versions have no gaps, each batch has one update, and no row is new in two batches of a phase."""
    for kind in ("POLICY", "REWARD"):
        rows = system.query_rows("SELECT version, batch_id FROM raw.policies WHERE kind = ? ORDER BY 1", [kind])
        require([version for version, _ in rows] == list(range(1, len(rows) + 1)), f"{kind} versions: {rows}")
        require(len({batch for _, batch in rows}) == len(rows), f"a batch has two {kind} versions")
    count = system.query_count(
        """SELECT count(*) FROM batch_rows WHERE NOT replayed GROUP BY phase, row_id HAVING count(*) > 1
           UNION ALL SELECT 0 ORDER BY 1 DESC LIMIT 1"""
    )
    require(count == 0, f"a row is in {count} batches of one phase")
    require(system.query_count("SELECT count(*) FROM policies") > 0, "no model was trained")


def _check_published(system: SystemUnderTest) -> Iterator[str]:
    """Check that responses name published policies with the right revision, and that several policies wrote responses."""
    unknown = system.query_count(
        """SELECT count(*) FROM responses WHERE policy_version > 0
           AND policy_version NOT IN (SELECT version FROM policies WHERE kind = 'POLICY')"""
    )
    require(unknown == 0, f"{unknown} responses by a policy that was never published")
    mislabeled = system.query_count(
        """SELECT count(*) FROM responses JOIN policies ON kind = 'POLICY' AND version = responses.policy_version
           WHERE responses.model.revision <> (batch_id::VARCHAR)[:8]"""
    )
    require(mislabeled == 0, f"{mislabeled} responses name another policy than the one that generated them")
    versions = system.query_rows("SELECT policy_version, count(*) FROM responses GROUP BY 1 ORDER BY 1")
    require(len(versions) > 1, "only one policy generated responses")
    yield f"{_count_policies(system)} policies; responses by version: {dict(versions)}"


def _compare_with_undisturbed_run(
    system: SystemUnderTest, folder: Path, files: list[Path], scenario: KillScenario
) -> Iterator[str]:
    """Process the same prompts without faults on the embedded log and require equal tables."""
    with SystemUnderTest(folder / "undisturbed", setting_overrides=_SETTING_FLAGS, batch_delay_s=0.0) as undisturbed:
        for path in files:
            undisturbed.publish_file(path)
        undisturbed.start_process("all", "run")
        wait_until(
            lambda: undisturbed.count_finished_prompts() >= scenario.num_prompts,
            "the undisturbed run is finished",
            _FINISH_TIMEOUT_S,
        )
        require(undisturbed.stop_process("all") == 0, "the undisturbed run ended with an error")
        differences = find_differences(system.open_store().path, undisturbed.open_store().path)
        require(not differences, f"the tables differ: {differences}")
        yield "every table equals that of the undisturbed run"
