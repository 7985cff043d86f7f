"""Damage of the database: the sink is killed, and its files are cut, changed, deleted or exchanged before the next start."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.store import Store
from tests.chaos.delivery import check_delivery
from tests.chaos.system import SystemUnderTest, is_caught_up, read_texts, require, wait_until, write_prompts
from tests.support import damage

_SETTING_FLAGS = {"critique.rounds": "1", "respond.num_completions": "2", "models.max_batch_size": "4", "bus.partitions": "3"}
_SILENT_DAMAGES = (damage.cut_wal, damage.delete_database)  # the sink continues without a repair
_DAMAGES: tuple[Callable[[Store], None], ...] = (
    *_SILENT_DAMAGES,
    damage.flip_wal_byte,
    damage.delete_database_without_wal,
    damage.truncate_database,
    damage.replace_by_database_of_another_log,
)


def run_damaged_database(
    folder: Path, address: str = "", *, prompts: int = 240, num_damages: int = 12, seed: int = 0, prefix: str = ""
) -> Iterator[str]:
    """Kill the process while its database has a write-ahead log, damage the files, repair them and continue.

    Without a repair, the start is refused. In the end every prompt is in the raw tables exactly once.
    """
    rng = random.Random(seed)
    paths = write_prompts(folder / "prompts", prompts, num_damages, seed)
    damages = [_DAMAGES[number % len(_DAMAGES)] for number in range(num_damages)]
    rng.shuffle(damages)
    texts: list[str] = []
    with SystemUnderTest(folder / "system", address, dict(_SETTING_FLAGS), prefix, batch_delay_s=0.05) as system:
        store = system.open_store()
        for path, damage_files in zip(paths, damages, strict=True):
            system.publish_file(path)
            texts += read_texts(path)
            num_kills = _kill_with_wal(system, damage.get_wal_path(store))
            damage_files(store)
            if damage_files not in _SILENT_DAMAGES:
                code, output = system.run_command("run", "--stage", "sink", "--until-done")
                require(code != 0 and "charter repair" in output, f"{damage_files.__name__} was accepted: {output[-300:]}")
                code, output = system.run_command("repair")
                require(code == 0, output)
            yield f"{damage_files.__name__} after {num_kills} kills"
        system.start_pipeline()
        wait_until(lambda: system.count_finished_prompts() == len(texts), "every prompt is finished")
        wait_until(lambda: is_caught_up(system), "every consumer has caught up")
        require(system.stop_process("all") == 0, system.read_log_tail("all"))
        check_delivery(system, texts)
        yield f"{len(texts)} prompts are finished exactly once"


def _kill_with_wal(system: SystemUnderTest, wal_path: Path) -> int:
    """Kill the process until it leaves a write-ahead log. Return the number of kills."""
    for number in range(1, 100):
        system.start_pipeline()
        wait_until(lambda: wal_path.exists() and wal_path.stat().st_size > 0, "the sink writes", interval_s=0.001)
        system.kill_process("all")
        if wal_path.exists() and wal_path.stat().st_size > 0:
            return number
    require(False, "no kill has left a write-ahead log")
    return 0
