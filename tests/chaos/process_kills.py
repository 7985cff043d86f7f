"""Kill -9 over every part, and the broker under them, while prompts flow; then nothing may be lost, doubled or different."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.system import (
    POLL_INTERVAL_S,
    SystemUnderTest,
    check_exactly_once,
    find_differences,
    get_kafka_home,
    is_caught_up,
    require,
    wait_until,
    write_prompts,
)
from tests.support.kafka import Cluster

_SETTING_FLAGS = {
    "critique.rounds": "2",
    "respond.num_completions": "2",
    "models.max_batch_size": "16",
    "worker.shutdown_timeout_s": "20",
}
_PROCESS_COMMANDS = (
    ("respond", "run", "--stage", "respond"),
    ("chains-a", "run", "--stage", "critique", "--stage", "revise"),
    ("chains-b", "run", "--stage", "critique", "--stage", "revise"),
    ("judge", "run", "--stage", "judge"),
    ("sink", "run", "--stage", "sink"),
    ("trainer", "train", "--loop"),
)
_KILL_PAUSE_RANGE_S = (0.3, 2.5)  # between two kills
_BROKER_OUTAGE_RANGE_S = (0.5, 6.0)  # how long a broker stays away
_FINISH_TIMEOUT_S = 1200.0


@dataclass(frozen=True)
class KillScenario:
    num_prompts: int = 5000
    num_kills: int = 200
    num_broker_kills: int = 10
    seed: int = 0
    num_brokers: int = 3
    publish_policies: bool = False  # policies are published; else the trainer trains reward models only, and policy 0 answers


def kill_everything(folder: Path, scenario: KillScenario, *, on_kafka: bool) -> Iterator[str]:
    """Run it, yielding a line at each step of interest; raises Failed when a promise did not hold."""
    chance = random.Random(scenario.seed)
    files = write_prompts(folder / "prompts", scenario.num_prompts, max(4, scenario.num_kills // 10), scenario.seed)
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(get_kafka_home(), folder / "brokers", scenario.num_brokers)) if on_kafka else None
        address = f"kafka://{cluster.address}" if cluster else ""
        flags = _SETTING_FLAGS | _make_training_flags(scenario) | {"bus.replication": str(scenario.num_brokers)}
        world = stack.enter_context(SystemUnderTest(folder / "chaos", address, flags))
        started = time.monotonic()
        yield from _run_kills(world, cluster, files, scenario, chance)
        wait_until(lambda: _is_finished(world, scenario), "every prompt is ended and judged", _FINISH_TIMEOUT_S)
        wait_until(
            lambda: _revive_processes(world) and world.query_count_or_zero("SELECT count(*) FROM policies") > 0,
            "something is trained",
            _FINISH_TIMEOUT_S,
        )
        yield f"all {scenario.num_prompts} prompts are ended and judged after {time.monotonic() - started:.0f} s"
        codes = {"trainer": world.stop_process("trainer")}  # the rest finishes what it has made
        wait_until(lambda: _revive_processes(world) and is_caught_up(world), "everything is read")
        codes |= {name: world.stop_process(name) for name in [*world.processes]}
        begun = {name: code for name, code in codes.items() if code != -signal.SIGTERM}  # others had only just been started
        require(not any(begun.values()), f"they did not end well: {codes}")
        for line in world.unexpected_exits:
            yield f"by itself: {line}"
        check_exactly_once(world, scenario.num_prompts)
        _check_training(world)
        yield f"kills: {world.kill_counts}; records: {_count_records(world)}"
        if scenario.publish_policies:
            yield from _check_published(world)
            return
        yield from _compare_with_calm_run(world, folder, files, scenario)


def _make_training_flags(scenario: KillScenario) -> dict[str, str]:
    never = str(10**9)
    few = str(min(100, scenario.num_prompts // 4))
    sft = few if scenario.publish_policies else never
    return {"train.sft_rows": sft, "train.reward_rows": few, "train.ppo_rows": never, "train.max_rows": "200"}


def _run_kills(
    system: SystemUnderTest, cluster: Cluster | None, files: list[Path], scenario: KillScenario, chance: random.Random
) -> Iterator[str]:
    """Start all parts and kill them, one after the other, while the files are published one by one."""
    for name, *arguments in _PROCESS_COMMANDS:
        system.start_process(name, *arguments)
    broker_at = set(chance.sample(range(1, scenario.num_kills), scenario.num_broker_kills)) if cluster else set()
    waiting = files[:-1] if scenario.publish_policies else list(files)
    for number in range(scenario.num_kills):
        _publish_next_file(system, waiting, max_pending_share=1 - number / scenario.num_kills, num_files=len(files))
        time.sleep(chance.uniform(*_KILL_PAUSE_RANGE_S))  # kills come at moments that no part can know
        broker = chance.choice(cluster.brokers) if cluster and number in broker_at else None
        if cluster and broker:
            cluster.wait_until_in_sync()
            broker.kill()
            yield f"kill {number}: broker {broker.node_id} too; {system.count_finished_prompts()} prompts are ended"
        _revive_processes(system)
        victim = chance.choice([name for name, process in system.processes.items() if process.poll() is None])
        system.kill_process(victim)
        system.restart_process(victim)
        if broker:
            time.sleep(chance.uniform(*_BROKER_OUTAGE_RANGE_S))  # the outage itself
            broker.start()
    if scenario.publish_policies:  # and some prompts come when there surely is a second policy
        wait_until(
            lambda: _revive_processes(system) and _count_policies(system) > 0, "a policy is published", _FINISH_TIMEOUT_S
        )
        waiting.append(files[-1])
    while waiting or "produce" in system.processes:
        _publish_next_file(system, waiting, max_pending_share=0.0, num_files=len(files))
        _revive_processes(system)
        time.sleep(POLL_INTERVAL_S)


def _publish_next_file(system: SystemUnderTest, pending_files: list[Path], *, max_pending_share: float, num_files: int) -> None:
    """Publish the next file when the one before is done; `due` is the share of files that may still wait."""
    if "produce" in system.processes and system.revive_process("produce"):
        del system.processes["produce"]
    if "produce" not in system.processes and pending_files and len(pending_files) > max_pending_share * num_files:
        system.start_process("produce", "produce", str(pending_files.pop(0)))


def _revive_processes(system: SystemUnderTest) -> bool:
    """Everything runs that should; what has ended by itself is started again."""
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
    """Versions without gaps, one update for each batch, and no row new to two batches of a phase."""
    for kind in ("POLICY", "REWARD"):
        rows = system.query_rows("SELECT version, batch_id FROM raw.policies WHERE kind = ? ORDER BY 1", [kind])
        require([version for version, _ in rows] == list(range(1, len(rows) + 1)), f"{kind} versions: {rows}")
        require(len({batch for _, batch in rows}) == len(rows), f"a batch made two {kind} versions")
    doubled = system.query_count(
        """SELECT count(*) FROM batch_rows WHERE NOT replayed GROUP BY phase, row_id HAVING count(*) > 1
           UNION ALL SELECT 0 ORDER BY 1 DESC LIMIT 1"""
    )
    require(doubled == 0, f"a row trained {doubled} times")
    require(system.query_count("SELECT count(*) FROM policies") > 0, "nothing was trained")


def _check_published(system: SystemUnderTest) -> Iterator[str]:
    """One response for each prompt, stamped by a policy that there is, and more than one policy answered."""
    unknown = system.query_count(
        """SELECT count(*) FROM responses WHERE policy_version > 0
           AND policy_version NOT IN (SELECT version FROM policies WHERE kind = 'POLICY')"""
    )
    require(unknown == 0, f"{unknown} responses by a policy that was never published")
    wrong = system.query_count(
        """SELECT count(*) FROM responses JOIN policies ON kind = 'POLICY' AND version = responses.policy_version
           WHERE responses.model.revision <> (batch_id::VARCHAR)[:8]"""
    )
    require(wrong == 0, f"{wrong} responses are stamped with another policy than the one that answered")
    versions = system.query_rows("SELECT policy_version, count(*) FROM responses GROUP BY 1 ORDER BY 1")
    require(len(versions) > 1, "no second policy answered")
    yield f"{_count_policies(system)} policies; answers by version: {dict(versions)}"


def _compare_with_calm_run(system: SystemUnderTest, folder: Path, files: list[Path], scenario: KillScenario) -> Iterator[str]:
    """The same prompts through an undisturbed run on the embedded log: the same tables."""
    with SystemUnderTest(folder / "calm", setting_overrides=_SETTING_FLAGS, batch_delay_s=0.0) as calm:
        for path in files:
            calm.publish_file(path)
        calm.start_process("all", "run")
        wait_until(
            lambda: calm.count_finished_prompts() >= scenario.num_prompts, "the undisturbed run is over", _FINISH_TIMEOUT_S
        )
        require(calm.stop_process("all") == 0, "the undisturbed run did not end well")
        found = find_differences(system.open_store().path, calm.open_store().path)
        require(not found, f"the tables differ: {found}")
        yield "every table equals the undisturbed run's"
