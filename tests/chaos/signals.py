"""Signals: pairs of stop signals at random moments, and kills during slow generations."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.delivery import check_delivery
from tests.chaos.system import SystemUnderTest, is_caught_up, read_texts, require, wait_until, write_prompts

_SETTING_FLAGS = {"critique.rounds": "1", "respond.num_completions": "2", "models.max_batch_size": "4", "bus.partitions": "3"}
_SHUTDOWN_TIMEOUT_S = 5.0
_EXIT_MARGIN_S = 30.0  # the end of the interpreter on a busy machine
_MAX_GAP_S = 0.05  # between the two signals of a pair; signals within one second count as one
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FIRST_LINE = "the process has started"  # printed by `fake_process` before the imports
_RUNNING_LINE = "running "  # printed by `charter run` after it has installed its handlers
# Exit codes of a process that was stopped before it had installed its handlers: by the signal, or by KeyboardInterrupt.
_EARLY_EXIT_CODES = (-signal.SIGTERM, -signal.SIGINT, 130)


def run_signal_storm(
    folder: Path, address: str = "", *, num_pairs: int = 1000, num_parallel: int = 4, seed: int = 0, prefix: str = ""
) -> Iterator[str]:
    """Start `charter run` again and again, and send it two stop signals at random moments.

    Half of the signals arrive during the start of the process. Each process ends within `worker.shutdown_timeout_s`, without a
    traceback. Afterwards all prompts are finished exactly once.
    """
    rng = random.Random(seed)
    num_prompts = 40 + num_pairs // 10
    (path,) = write_prompts(folder / "prompts", num_prompts, 1, seed)
    flags = _SETTING_FLAGS | {"worker.shutdown_timeout_s": str(_SHUTDOWN_TIMEOUT_S)}
    with SystemUnderTest(folder / "system", address, flags, prefix, batch_delay_s=0.3) as system:
        system.publish_file(path)
        longest_s, num_early, number = 0.0, 0, 0
        while number < num_pairs:
            names = [f"run-{number + n}" for n in range(min(num_parallel, num_pairs - number))]
            number += len(names)
            for name in names:
                system.start_process(name, "run", with_imports=True)
            for name in names:
                # Python itself prints a traceback if Ctrl-C arrives before the first line of Charter.
                line = rng.choice((_FIRST_LINE, _RUNNING_LINE))
                wait_until(lambda name=name, line=line: line in system.read_log(name), f"{name} has started", interval_s=0.02)
                time.sleep(rng.uniform(0, 1))  # a random moment
                elapsed_s, code = _send_pair(system, name, rng)
                longest_s = max(longest_s, elapsed_s)
                num_early += code in _EARLY_EXIT_CODES
            (system.folder / "run-all.log").open("a").writelines(_take_log(system, name) for name in names)
            if number % 100 < num_parallel:
                yield f"{number} pairs; the slowest process took {longest_s:.1f} s to end"
        system.start_pipeline()
        wait_until(lambda: system.count_finished_prompts() == num_prompts, "every prompt is finished")
        wait_until(lambda: is_caught_up(system), "every consumer has caught up")
        require(system.stop_process("all") == 0, system.read_log_tail("all"))
        check_delivery(system, read_texts(path))
        yield f"{num_pairs} pairs, {num_early} before the handlers were installed; slowest end {longest_s:.1f} s"


def _send_pair(system: SystemUnderTest, name: str, rng: random.Random) -> tuple[float, int]:
    """Send two stop signals. Return the seconds until the process has ended, and its exit code."""
    process = system.processes.pop(name)
    started = time.monotonic()
    process.send_signal(rng.choice(_STOP_SIGNALS))
    time.sleep(rng.uniform(0, _MAX_GAP_S))  # the random gap
    process.send_signal(rng.choice(_STOP_SIGNALS))  # without effect if the process has ended
    try:
        code = process.wait(_SHUTDOWN_TIMEOUT_S + _EXIT_MARGIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        require(False, f"{name} did not end after two stop signals: {system.read_log_tail(name)}")
    require(code in (0, *_EARLY_EXIT_CODES), f"{name} ended with {code}: {system.read_log_tail(name)}")
    require("Traceback" not in system.read_log(name), f"{name} printed a traceback: {system.read_log(name)[-800:]}")
    return time.monotonic() - started, code


def _take_log(system: SystemUnderTest, name: str) -> str:
    text = system.read_log(name)
    (system.folder / f"{name}.log").unlink()
    return text


def run_slow_generation_kills(
    folder: Path,
    address: str = "",
    *,
    num_kills: int = 3,
    num_stops: int = 3,
    generation_s: float = 2.0,
    seed: int = 0,
    prefix: str = "",
) -> Iterator[str]:
    """End a process again and again while it generates: with SIGKILL, and with stop signals that it has no time to obey.

    All ends hit the same record. It is innocent, so it must not become a dead letter of kind CRASH, and it is finished exactly once.
    """
    rng = random.Random(seed)
    (path,) = write_prompts(folder / "prompts", 1, 1, seed)
    flags = _SETTING_FLAGS | {"worker.shutdown_timeout_s": "0.2", "models.max_batch_size": "1"}
    with SystemUnderTest(folder / "system", address, flags, prefix, batch_delay_s=generation_s) as system:
        system.publish_file(path)
        endings = ["kill"] * num_kills + ["stop"] * num_stops
        rng.shuffle(endings)
        for ending in endings:
            started_at = time.time()
            system.start_process("all", "run")
            wait_until(
                lambda started_at=started_at: _is_generating(system, started_at), "a generation is in progress", interval_s=0.02
            )
            if ending == "kill":
                system.kill_process("all")
            else:
                _stop_twice(system)
        yield f"{num_kills} kills and {num_stops} pairs of stop signals during generations"
        system.start_pipeline()
        wait_until(lambda: system.count_finished_prompts() == 1, "the prompt is finished")
        wait_until(lambda: is_caught_up(system), "every consumer has caught up")
        system.stop_process("all")
        check_delivery(system, read_texts(path))


def _is_generating(system: SystemUnderTest, started_at: float) -> bool:
    """Return whether a process that was started at `started_at` (seconds since 1970) has named a record in its crash journal."""
    files = [path.stat() for path in (system.folder / "data" / "journal" / "live.respond").glob("*.working")]
    return any(file.st_size and file.st_mtime > started_at for file in files)


def _stop_twice(system: SystemUnderTest) -> None:
    process = system.processes.pop("all")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    code = process.wait(_SHUTDOWN_TIMEOUT_S + _EXIT_MARGIN_S)
    require(code == 0, f"the process ended with {code}: {system.read_log_tail('all')}")
