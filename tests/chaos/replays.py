"""Replays: killed and started again, started twice at once, at the same time as live stages, and replays of a replay."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.delivery import check_delivery, read_topic
from tests.chaos.system import SystemUnderTest, is_caught_up, read_texts, require, wait_until, write_prompts

_SETTING_FLAGS = {"critique.rounds": "1", "respond.num_completions": "2", "models.max_batch_size": "4", "bus.partitions": "3"}


def run_replays(
    folder: Path, address: str = "", *, prompts: int = 120, num_kills: int = 20, seed: int = 0, prefix: str = ""
) -> Iterator[str]:
    """Replay all prompts several times. Each replay finishes every prompt exactly once, and so does the live run.

    Half of the kills come as soon as the replay has published its prompts, while its groups join. The others come after progress.
    """
    rng = random.Random(seed)
    first, second = write_prompts(folder / "prompts", prompts, 2, seed)
    texts = read_texts(first) + read_texts(second)
    with SystemUnderTest(folder / "system", address, dict(_SETTING_FLAGS), prefix, batch_delay_s=0.1) as system:
        system.publish_file(first)
        system.start_pipeline()
        wait_until(lambda: system.count_finished_prompts() > 0, "the live run has begun")
        system.publish_file(second)
        _replay(system, "concurrent", "live")
        yield "a replay at the same time as live stages has ended"
        wait_until(lambda: system.count_finished_prompts() == len(texts), "the live run is finished")
        wait_until(lambda: is_caught_up(system), "every consumer has caught up")
        require(system.stop_process("all") == 0, system.read_log_tail("all"))
        for number in range(num_kills):
            _start(system, "killed", "killed", "live")
            count = _count_judged(system, "killed") + (1 + rng.randrange(len(texts) // num_kills + 1) if number % 2 else 0)
            wait_until(
                lambda count=count: (
                    system.processes["killed"].poll() is not None
                    or ("replaying" in system.read_log("killed") and _count_judged(system, "killed") >= count)
                ),
                "the replay has made progress",
            )
            if system.processes["killed"].poll() is not None:
                break
            system.kill_process("killed")
            (system.folder / "killed.log").unlink()
        num_ends = system.kill_counts.get("killed", 0)
        yield f"{num_ends} kills of a replay; {_count_judged(system, 'killed')} of {len(texts)} prompts are judged"
        _replay(system, "killed", "live")
        for name in ("one", "other"):
            _start(system, name, "twice", "live")
        codes = {name: system.wait_for_exit(name) for name in ("one", "other")}
        yield f"one replay started twice at once: exit codes {codes}"
        _replay(system, "twice", "live")
        _replay(system, "of-a-replay", "killed")
        for run_id in ("live", "concurrent", "killed", "twice", "of-a-replay"):
            check_delivery(system, texts, run_id=run_id)
        yield f"every replay has finished {len(texts)} prompts exactly once"


def _start(system: SystemUnderTest, name: str, run_id: str, source: str) -> None:
    system.start_process(name, "replay", "--stage", "respond", "--from", f"run:{source}", "--as", run_id)


def _replay(system: SystemUnderTest, run_id: str, source: str) -> None:
    """Run a replay to its end. Require that it reports the end."""
    code, output = system.run_command("replay", "--stage", "respond", "--from", f"run:{source}", "--as", run_id)
    require(code == 0 and "finished; selected" in output, f"the replay {run_id} ended with {code}: {output[-300:]}")


def _count_judged(system: SystemUnderTest, run_id: str) -> int:
    return sum(record.belongs_to(run_id) for record in read_topic(system, "preferences"))
