"""Producers of different files that share prompts publish at the same time, and are killed, while respond works."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.delivery import check_delivery, read_topic
from tests.chaos.system import SystemUnderTest, is_caught_up, read_texts, require, wait_until, write_prompts
from tests.support.waiting import HANG_S

_SETTING_FLAGS = {"critique.rounds": "1", "respond.num_completions": "2", "models.max_batch_size": "8", "bus.partitions": "3"}
_FINISH_TIMEOUT_S = 6 * HANG_S  # a full-size run works for many minutes between two checks
_OWN_SHARE = 4  # each producer also has prompts that no other producer has: a quarter of its file


def run_concurrent_producers(
    folder: Path,
    address: str = "",
    *,
    prompts: int = 20_000,
    num_producers: int = 4,
    num_kills: int = 40,
    seed: int = 0,
    prefix: str = "",
) -> Iterator[str]:
    """Publish files that share most of their prompts, in another order each. Kill producers and start them again.

    A producer is killed when it has published more records since the last kill. Each prompt is finished exactly once.
    """
    rng = random.Random(seed)
    shared, *own = write_prompts(folder / "prompts", prompts, _OWN_SHARE, seed)
    texts, names = read_texts(shared), [f"produce-{number}" for number in range(num_producers)]
    own_lines = [line for path in own for line in path.read_text().splitlines()]
    with SystemUnderTest(folder / "system", address, dict(_SETTING_FLAGS), prefix, batch_delay_s=0.0) as system:
        system.start_pipeline()
        for number, name in enumerate(names):
            lines = [*shared.read_text().splitlines(), *own_lines[number::num_producers]]
            rng.shuffle(lines)
            path = folder / "prompts" / f"{name}.jsonl"
            path.write_text("\n".join(lines) + "\n")
            texts += read_texts(path)
            system.start_process(name, "produce", str(path))
        texts = sorted(set(texts))
        num_published = 0
        for _ in range(num_kills):
            running = [name for name in names if system.processes[name].poll() is None]
            if not running:
                break
            count = num_published
            wait_until(
                lambda count=count, running=running: (
                    _count_published(system) > count or any(system.processes[name].poll() is not None for name in running)
                ),
                "a producer publishes",
                interval_s=0.02,
            )
            num_published = _count_published(system)
            victim = rng.choice(running)
            if system.processes[victim].poll() is None:
                system.kill_process(victim)
                system.restart_process(victim)
        wait_until(lambda: all(system.revive_process(name) for name in names), "every producer has finished")
        require(not system.unexpected_exits, f"a producer failed: {system.unexpected_exits}")
        for name in names:
            del system.processes[name]
        wait_until(lambda: system.count_finished_prompts() >= len(texts), "every prompt is finished", _FINISH_TIMEOUT_S)
        wait_until(lambda: is_caught_up(system), "every consumer has caught up")
        require(system.stop_process("all") == 0, f"the process ended with an error: {system.read_log_tail('all')}")
        check_delivery(system, texts)
        num_records = len(read_topic(system, "prompts"))
        yield f"kills: {sum(system.kill_counts.values())}; {num_records} prompt records for {len(texts)} prompts"


def _count_published(system: SystemUnderTest) -> int:
    """Return the sum of the end offsets of the prompts, which grows with each transaction of a producer."""
    with system.connect_bus() as bus:
        return sum(bus.end_offsets(["prompts"]).values()) if bus.topic_ids(["prompts"]) else 0
