"""Steps of the wall clock: it is set back and forward by hours while instances work and are killed."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.delivery import check_delivery
from tests.chaos.system import SystemUnderTest, is_caught_up, read_texts, require, wait_until, write_prompts

_SETTING_FLAGS = {"critique.rounds": "1", "respond.num_completions": "2", "models.max_batch_size": "4", "bus.partitions": "3"}
_MAX_STEP_S = 2 * 3600.0
_NAMES = ("one", "other")


def run_clock_steps(
    folder: Path, address: str = "", *, prompts: int = 200, num_steps: int = 20, seed: int = 0, prefix: str = ""
) -> Iterator[str]:
    """Set the clock of all processes to another time, kill one of two instances and start it again, many times.

    The next step follows when more prompts are finished. Every prompt is finished exactly once.
    """
    rng = random.Random(seed)
    (path,) = write_prompts(folder / "prompts", prompts, 1, seed)
    clock_file = folder / "clock"
    clock_file.write_text("0")
    with SystemUnderTest(folder / "system", address, dict(_SETTING_FLAGS), prefix, 0.1, clock_file=clock_file) as system:
        system.publish_file(path)
        for name in _NAMES:
            system.start_process(name, "run")
        for number in range(num_steps):
            count = min(system.count_finished_prompts() + 1 + rng.randrange(prompts // num_steps), prompts)
            wait_until(
                lambda count=count: _is_running(system) and system.count_finished_prompts() >= count, "there is progress"
            )
            step_s = -_MAX_STEP_S if number == 0 else rng.uniform(-_MAX_STEP_S, _MAX_STEP_S)
            clock_file.write_text(str(step_s))
            victim = rng.choice(_NAMES)
            system.kill_process(victim)
            system.restart_process(victim)
        yield f"{num_steps} steps of the clock, each with a kill"
        wait_until(lambda: _is_running(system) and system.count_finished_prompts() == prompts, "every prompt is finished")
        wait_until(lambda: is_caught_up(system), "every consumer has caught up")
        for name in _NAMES:  # -SIGTERM: still starting after the last kill
            require(system.stop_process(name) in (0, -signal.SIGTERM), system.read_log_tail(name))
        check_delivery(system, read_texts(path))
        yield f"{prompts} prompts are finished exactly once"


def _is_running(system: SystemUnderTest) -> bool:
    """Return True. Raise an error if an instance has ended."""
    for name in _NAMES:
        require(system.processes[name].poll() is None, f"{name} has ended: {system.read_log_tail(name)}")
    return True
