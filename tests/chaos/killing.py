"""Kill -9 over every part, and the broker under them, while prompts flow; then nothing may be lost, doubled or different."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.world import (
    LOOK_EVERY_S,
    World,
    check,
    check_exactly_once,
    differences,
    kafka_home,
    quiet,
    until,
    write_prompts,
)
from tests.support.kafka import Cluster

FLAGS = {"critique.rounds": "2", "respond.samples": "2", "models.max_rows": "16", "worker.drain_s": "20"}
PARTS = (
    ("respond", "run", "--stage", "respond"),
    ("chains-a", "run", "--stage", "critique", "--stage", "revise"),
    ("chains-b", "run", "--stage", "critique", "--stage", "revise"),
    ("judge", "run", "--stage", "judge"),
    ("sink", "run", "--stage", "sink"),
    ("trainer", "train", "--loop"),
)
REST_S = (0.3, 2.5)  # between two kills
DOWN_S = (0.5, 6.0)  # how long a broker stays away
FINISH_S = 1200.0


@dataclass(frozen=True)
class Sizes:
    prompts: int = 5000
    kills: int = 200
    broker_kills: int = 10
    seed: int = 0
    brokers: int = 3
    publish: bool = False  # policies are published; else the trainer trains reward models only, and policy 0 answers


def kill_everything(folder: Path, sizes: Sizes, *, on_kafka: bool) -> Iterator[str]:
    """Run it, yielding a line at each step of interest; raises Failed when a promise did not hold."""
    chance = random.Random(sizes.seed)
    files = write_prompts(folder / "prompts", sizes.prompts, max(4, sizes.kills // 10), sizes.seed)
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(kafka_home(), folder / "brokers", sizes.brokers)) if on_kafka else None
        address = f"kafka://{cluster.address}" if cluster else ""
        flags = FLAGS | training(sizes) | {"bus.replication": str(sizes.brokers)}
        world = stack.enter_context(World(folder / "chaos", address, flags))
        started = time.monotonic()
        yield from disturb(world, cluster, files, sizes, chance)
        until(lambda: finished(world, sizes), "every prompt is ended and judged", FINISH_S)
        until(lambda: revived(world) and world.so_far("SELECT count(*) FROM policies") > 0, "something is trained", FINISH_S)
        yield f"all {sizes.prompts} prompts are ended and judged after {time.monotonic() - started:.0f} s"
        codes = {"trainer": world.stop("trainer")}  # the rest finishes what it has made
        until(lambda: revived(world) and quiet(world), "everything is read")
        codes |= {name: world.stop(name) for name in [*world.processes]}
        begun = {name: code for name, code in codes.items() if code != -signal.SIGTERM}  # others had only just been started
        check(not any(begun.values()), f"they did not end well: {codes}")
        for line in world.endings:
            yield f"by itself: {line}"
        check_exactly_once(world, sizes.prompts)
        check_training(world)
        yield f"kills: {world.killed}; records: {made(world)}"
        if sizes.publish:
            yield from check_published(world)
            return
        yield from compare(world, folder, files, sizes)


def training(sizes: Sizes) -> dict[str, str]:
    never = str(10**9)
    few = str(min(100, sizes.prompts // 4))
    sft = few if sizes.publish else never
    return {"train.sft_rows": sft, "train.reward_rows": few, "train.ppo_rows": never, "train.max_rows": "200"}


def disturb(world: World, cluster: Cluster | None, files: list[Path], sizes: Sizes, chance: random.Random) -> Iterator[str]:
    """Start all parts and kill them, one after the other, while the files are published one by one."""
    for name, *arguments in PARTS:
        world.start(name, *arguments)
    broker_at = set(chance.sample(range(1, sizes.kills), sizes.broker_kills)) if cluster else set()
    waiting = files[:-1] if sizes.publish else list(files)
    for number in range(sizes.kills):
        feed(world, waiting, due=1 - number / sizes.kills, of=len(files))
        time.sleep(chance.uniform(*REST_S))  # kills come at moments that no part can know
        broker = chance.choice(cluster.brokers) if cluster and number in broker_at else None
        if cluster and broker:
            cluster.wait_until_in_sync()
            broker.kill()
            yield f"kill {number}: broker {broker.node} too; {world.ended()} prompts are ended"
        revived(world)
        victim = chance.choice([name for name, process in world.processes.items() if process.poll() is None])
        world.kill(victim)
        world.restart(victim)
        if broker:
            time.sleep(chance.uniform(*DOWN_S))  # the outage itself
            broker.start()
    if sizes.publish:  # and some prompts come when there surely is a second policy
        until(lambda: revived(world) and policies(world) > 0, "a policy is published", FINISH_S)
        waiting.append(files[-1])
    while waiting or "produce" in world.processes:
        feed(world, waiting, due=0.0, of=len(files))
        revived(world)
        time.sleep(LOOK_EVERY_S)


def feed(world: World, waiting: list[Path], *, due: float, of: int) -> None:
    """Publish the next file when the one before is done; `due` is the share of files that may still wait."""
    if "produce" in world.processes and world.revive("produce"):
        del world.processes["produce"]
    if "produce" not in world.processes and waiting and len(waiting) > due * of:
        world.start("produce", "produce", str(waiting.pop(0)))


def revived(world: World) -> bool:
    """Everything runs that should; what has ended by itself is started again."""
    for name in [*world.processes]:
        world.revive(name)
    return True


def finished(world: World, sizes: Sizes) -> bool:
    return revived(world) and world.ended() >= sizes.prompts


def made(world: World) -> dict[str, int]:
    return dict(world.rows("SELECT topic, records FROM pipeline_status WHERE records > 0"))


def policies(world: World) -> int:
    return world.so_far("SELECT count(*) FROM policies WHERE kind = 'POLICY'")


def check_training(world: World) -> None:
    """Versions without gaps, one update for each batch, and no row new to two batches of a phase."""
    for kind in ("POLICY", "REWARD"):
        rows = world.rows("SELECT version, batch_id FROM raw.policies WHERE kind = ? ORDER BY 1", [kind])
        check([version for version, _ in rows] == list(range(1, len(rows) + 1)), f"{kind} versions: {rows}")
        check(len({batch for _, batch in rows}) == len(rows), f"a batch made two {kind} versions")
    doubled = world.count(
        """SELECT count(*) FROM batch_rows WHERE NOT replayed GROUP BY phase, row_id HAVING count(*) > 1
           UNION ALL SELECT 0 ORDER BY 1 DESC LIMIT 1"""
    )
    check(doubled == 0, f"a row trained {doubled} times")
    check(world.count("SELECT count(*) FROM policies") > 0, "nothing was trained")


def check_published(world: World) -> Iterator[str]:
    """One response for each prompt, stamped by a policy that there is, and more than one policy answered."""
    unknown = world.count(
        """SELECT count(*) FROM responses WHERE policy_version > 0
           AND policy_version NOT IN (SELECT version FROM policies WHERE kind = 'POLICY')"""
    )
    check(unknown == 0, f"{unknown} responses by a policy that was never published")
    wrong = world.count(
        """SELECT count(*) FROM responses JOIN policies ON kind = 'POLICY' AND version = responses.policy_version
           WHERE responses.model.revision <> (batch_id::VARCHAR)[:8]"""
    )
    check(wrong == 0, f"{wrong} responses are stamped with another policy than the one that answered")
    versions = world.rows("SELECT policy_version, count(*) FROM responses GROUP BY 1 ORDER BY 1")
    check(len(versions) > 1, "no second policy answered")
    yield f"{policies(world)} policies; answers by version: {dict(versions)}"


def compare(world: World, folder: Path, files: list[Path], sizes: Sizes) -> Iterator[str]:
    """The same prompts through an undisturbed run on the embedded log: the same tables."""
    with World(folder / "calm", flags=FLAGS, batch_s=0.0) as calm:
        for path in files:
            calm.produce(path)
        calm.start("all", "run")
        until(lambda: calm.ended() >= sizes.prompts, "the undisturbed run is over", FINISH_S)
        check(calm.stop("all") == 0, "the undisturbed run did not end well")
        found = differences(world.store().path, calm.store().path)
        check(not found, f"the tables differ: {found}")
        yield "every table equals the undisturbed run's"
