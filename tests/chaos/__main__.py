"""python -m tests.chaos SCENARIO [--bus kafka|embedded] [--seed N] [--folder DIR] [sizes]: see --help.

kill           SIGKILL stages, sink, producer, trainer and brokers under load; then compare with an undisturbed run
silent-commit  a broker is killed in mid-transaction, for longer than the producer's delivery timeout
zombie         an instance is stopped (SIGSTOP), loses its partitions, and continues
storm          instances join and leave continuously
disk-full      the disks of the database, of the embedded log and of a broker fill up (requires permission to mount a tmpfs)
held-file      another program locks the database for a minute
server-down    the judge's model server is unreachable for ten minutes under load
hostile-bytes  bytes that do not decode to records
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.chaos import faults
from tests.chaos.process_kills import KillScenario, kill_everything
from tests.chaos.system import InvariantViolation, make_broker

_SINGLE_BROKER_SCENARIOS = ("zombie", "storm", "disk-full", "held-file", "server-down", "hostile-bytes")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", choices=("kill", "silent-commit", *_SINGLE_BROKER_SCENARIOS))
    parser.add_argument("--bus", choices=("kafka", "embedded"), default="kafka")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="folder for all data (default: a temporary folder)")
    parser.add_argument("--prompts", type=int, help="number of prompts (default: the scenario's own; 5000 for kill)")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--broker-kills", type=int, default=10)
    parser.add_argument("--brokers", type=int, default=3, help="number of brokers for kill; also the replication factor")
    parser.add_argument("--publish", action="store_true", help="publish policies during the kills")
    parser.add_argument("--times", type=int, default=50, help="number of outages for silent-commit")
    parser.add_argument("--changes", type=int, default=100, help="number of membership changes for storm")
    parser.add_argument("--down-s", type=float, default=600.0, help="duration of the outage for server-down, in seconds")
    parser.add_argument("--messages", type=int, default=10_000, help="number of messages for hostile-bytes")
    return parser.parse_args()


def _run_scenario(options: argparse.Namespace, folder: Path, stack: ExitStack) -> Iterator[str]:
    if options.scenario == "kill":
        prompts = options.prompts or 5000
        sizes = KillScenario(prompts, options.kills, options.broker_kills, options.seed, options.brokers, options.publish)
        yield from kill_everything(folder, sizes, on_kafka=options.bus == "kafka")
        return
    if options.scenario == "silent-commit":
        yield from faults.run_silent_commit(stack.enter_context(make_broker(folder / "broker")), options.times)
        return
    broker = stack.enter_context(make_broker(folder / "broker")) if options.bus == "kafka" else None
    address = f"kafka://{broker.address}" if broker else ""
    size = {"prompts": options.prompts} if options.prompts else {}
    if options.scenario == "zombie":
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
    else:
        yield from faults.run_hostile_bytes(folder, address, num_messages=options.messages, seed=options.seed, **size)


def main() -> int:
    options = _parse_arguments()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
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
