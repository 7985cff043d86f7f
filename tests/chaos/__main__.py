"""python -m tests.chaos SCENARIO [--bus kafka|embedded] [--seed N] [--folder DIR] [sizes]: see --help.

kill           SIGKILL stages, sink, producer, trainer and brokers under load; then compare with an undisturbed run
silent-commit  a broker is killed in mid-transaction, for longer than the producer's delivery timeout
zombie         an instance is stopped (SIGSTOP), loses its partitions, and continues
storm          instances join and leave continuously
disk-full      the disks of the database, of the embedded log and of a broker fill up (requires permission to mount a tmpfs)
held-file      another program locks the database for a minute
server-down    the judge's model server is unreachable for ten minutes under load
hostile-bytes  bytes that do not decode to records
offset-expiry  the broker deletes the offsets of idle groups (offsets.retention.minutes=1), and the temperature changes
offset-resets  another program sets the offsets to the beginning, to the end and beyond the end
delete-records an operator deletes records that a stage and the sink have not read
retention      the broker deletes prompts after a few seconds, while respond is slower
recreate       topics are deleted and created again under a running, a stopped and a paused process
partitions     partitions are added to the topics of a running pipeline
producers      producers of files that share prompts publish at the same time and are killed
signals        pairs of stop signals at random moments of `charter run`
slow-kills     kills and stop signals during slow generations
replays        replays that are killed, started twice at once, with live stages, and of a replay
wal-damage     the database and its write-ahead log are cut, changed, deleted or exchanged after kills
clock-steps    the wall clock is set back and forward by hours while instances are killed
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.chaos import faults, log_changes, signals
from tests.chaos.clock_steps import run_clock_steps
from tests.chaos.concurrent_producers import run_concurrent_producers
from tests.chaos.damaged_database import run_damaged_database
from tests.chaos.process_kills import KillScenario, kill_everything
from tests.chaos.replays import run_replays
from tests.chaos.system import InvariantViolation, make_broker
from tests.support.shared import create_shared_folder, remove_shared_folder

# Scenarios for both logs, and scenarios for Kafka only with the settings of their broker.
_COMMON_SCENARIOS = (
    "zombie", "storm", "disk-full", "held-file", "server-down", "hostile-bytes", "producers", "signals", "slow-kills",
    "replays", "wal-damage", "clock-steps",
)  # fmt: skip
_KAFKA_SCENARIOS: dict[str, dict[str, object]] = {
    "offset-expiry": log_changes.EXPIRY_SETTINGS,
    "offset-resets": {},
    "delete-records": {},
    "retention": log_changes.RETENTION_SETTINGS,
    "recreate": {},
    "partitions": {},
}


_LONG_PAUSE_S = 20.0  # longer than the session of a consumer


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", choices=("kill", "silent-commit", *_COMMON_SCENARIOS, *_KAFKA_SCENARIOS))
    parser.add_argument("--bus", choices=("kafka", "embedded"), default="kafka")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="folder for all data (default: a temporary folder)")
    parser.add_argument("--prompts", type=int, help="number of prompts (default: the scenario's own; 5000 for kill)")
    parser.add_argument(
        "--kills", type=int, help="number of kills (default: 200 for kill, 40 for producers, 20 for replays, 3 for slow-kills)"
    )
    parser.add_argument("--broker-kills", type=int, default=10)
    parser.add_argument("--brokers", type=int, default=3, help="number of brokers for kill; also the replication factor")
    parser.add_argument("--publish", action="store_true", help="publish policies during the kills")
    parser.add_argument("--times", type=int, default=50, help="number of outages for silent-commit")
    parser.add_argument("--changes", type=int, default=100, help="number of membership changes for storm")
    parser.add_argument("--down-s", type=float, default=600.0, help="duration of the outage for server-down, in seconds")
    parser.add_argument("--messages", type=int, default=10_000, help="number of messages for hostile-bytes")
    parser.add_argument("--pairs", type=int, default=1000, help="number of pairs of stop signals for signals")
    options = parser.parse_args()
    if options.bus == "embedded" and options.scenario in ("silent-commit", *_KAFKA_SCENARIOS):
        parser.error(f"{options.scenario} needs Kafka")
    return options


def _run_scenario(options: argparse.Namespace, folder: Path, stack: ExitStack) -> Iterator[str]:
    if options.scenario == "kill":
        prompts = options.prompts or 5000
        sizes = KillScenario(
            prompts, options.kills or 200, options.broker_kills, options.seed, options.brokers, options.publish
        )
        yield from kill_everything(folder, sizes, on_kafka=options.bus == "kafka")
        return
    if options.scenario == "silent-commit":
        yield from faults.run_silent_commit(stack.enter_context(make_broker(folder / "broker")), options.times)
        return
    broker_settings = _KAFKA_SCENARIOS.get(options.scenario, {})
    broker = stack.enter_context(make_broker(folder / "broker", broker_settings)) if options.bus == "kafka" else None
    address = f"kafka://{broker.address}" if broker else ""
    size = {"prompts": options.prompts} if options.prompts else {}
    if options.scenario in _KAFKA_SCENARIOS:
        yield from _run_kafka_scenario(options, folder, address, size)
    elif options.scenario == "zombie":
        yield from faults.run_zombie(folder, address, seed=options.seed, **size)
    elif options.scenario == "storm":
        yield from faults.run_membership_storm(
            folder, address, num_changes=options.changes, seed=options.seed, **{"prompts": 2000} | size
        )
    elif options.scenario == "disk-full":
        yield from faults.run_full_sink_disk(folder / "sink", address, seed=options.seed, **size)
        yield from faults.run_full_log_disk(folder / "embedded", seed=options.seed, **size)
        if broker:
            yield from faults.run_full_broker_disk(folder / "full", seed=options.seed, **size)
    elif options.scenario == "held-file":
        yield from faults.run_locked_database(folder, address, **size)
    elif options.scenario == "server-down":
        yield from faults.run_server_outage(folder, address, outage_s=options.down_s, seed=options.seed, **size)
    elif options.scenario == "producers":
        kills = {"num_kills": options.kills} if options.kills else {}
        yield from run_concurrent_producers(folder, address, seed=options.seed, **size, **kills)
    elif options.scenario == "signals":
        yield from signals.run_signal_storm(folder, address, num_pairs=options.pairs, seed=options.seed)
    elif options.scenario == "slow-kills":
        yield from signals.run_slow_generation_kills(
            folder, address, num_kills=options.kills or 3, num_stops=10, generation_s=10.0
        )
    elif options.scenario == "replays":
        kills = {"num_kills": options.kills} if options.kills else {}
        yield from run_replays(folder, address, seed=options.seed, **size, **kills)
    elif options.scenario == "wal-damage":
        yield from run_damaged_database(folder, address, seed=options.seed, **size)
    elif options.scenario == "clock-steps":
        yield from run_clock_steps(folder, address, seed=options.seed, **size)
    else:
        yield from faults.run_hostile_bytes(folder, address, num_messages=options.messages, seed=options.seed, **size)


def _run_kafka_scenario(options: argparse.Namespace, folder: Path, address: str, size: dict[str, int]) -> Iterator[str]:
    scenarios = {
        "offset-expiry": log_changes.run_offset_expiry,
        "offset-resets": log_changes.run_offset_resets,
        "delete-records": log_changes.run_deleted_records,
        "retention": log_changes.run_retention,
        "partitions": log_changes.run_added_partitions,
    }
    if options.scenario != "recreate":
        yield from scenarios[options.scenario](folder, address, seed=options.seed, **size)
        return
    cases = [("running", 0.0), ("stopped", 0.0), ("paused", 0.0), ("paused", _LONG_PAUSE_S)]
    for number, topics in enumerate((*((topic,) for topic in log_changes.WORK_TOPICS), log_changes.WORK_TOPICS)):
        for state, pause_s in cases:
            name = f"{number}-{state}-{pause_s:.0f}"
            yield from log_changes.run_recreated_topics(
                folder / name,
                address,
                state=state,
                topics=topics,
                pause_s=pause_s,
                seed=options.seed,
                prefix=f"{name}.",
                **size,
            )


def main() -> int:
    options = _parse_arguments()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        create_shared_folder()
        stack.callback(remove_shared_folder)
        try:
            for line in _run_scenario(options, (options.folder or Path(temporary)).resolve(), stack):
                print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)
        except InvariantViolation as error:
            print(f"{time.monotonic() - started:6.0f} s  FAILED: {error}")
            return 1
    print(f"{time.monotonic() - started:6.0f} s  passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
