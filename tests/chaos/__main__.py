"""python -m tests.chaos SCENARIO [--bus kafka|embedded] [--seed N] [--folder DIR] [sizes]: see --help.

kill           kill -9 over stages, sink, producer, trainer and brokers while prompts flow; then compare with a calm run
silent-commit  a broker dies in mid-transaction, for longer than the client tries to deliver
zombie         a copy is stopped, loses its partitions, and wakes
storm          copies join and leave all the time
disk-full      the disks of the database, of the embedded log and of a broker fill up (needs the right to mount a tmpfs)
held-file      another program holds the database for a minute
server-down    the judge's model server is away for ten minutes under load
hostile-bytes  messages that are no records
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.chaos import broken
from tests.chaos.killing import Sizes, kill_everything
from tests.chaos.world import Failed, kafka

ON_ONE_BROKER = ("zombie", "storm", "disk-full", "held-file", "server-down", "hostile-bytes")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", choices=("kill", "silent-commit", *ON_ONE_BROKER))
    parser.add_argument("--bus", choices=("kafka", "embedded"), default="kafka")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where everything is kept; without it a temporary one")
    parser.add_argument("--prompts", type=int, help="without it the scenario's own number, 5000 to kill")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--broker-kills", type=int, default=10)
    parser.add_argument("--brokers", type=int, default=3, help="of the Kafka that is killed; each topic has as many replicas")
    parser.add_argument("--publish", action="store_true", help="policies are published while everything is killed")
    parser.add_argument("--times", type=int, default=50, help="outages of silent-commit")
    parser.add_argument("--changes", type=int, default=100, help="of membership, in storm")
    parser.add_argument("--down-s", type=float, default=600.0, help="how long the server of server-down is away")
    parser.add_argument("--messages", type=int, default=10_000, help="of hostile-bytes")
    return parser.parse_args()


def scenario(wanted: argparse.Namespace, folder: Path, stack: ExitStack) -> Iterator[str]:
    if wanted.scenario == "kill":
        prompts = wanted.prompts or 5000
        sizes = Sizes(prompts, wanted.kills, wanted.broker_kills, wanted.seed, wanted.brokers, wanted.publish)
        yield from kill_everything(folder, sizes, on_kafka=wanted.bus == "kafka")
        return
    if wanted.scenario == "silent-commit":
        yield from broken.silent_commit(stack.enter_context(kafka(folder / "broker")), wanted.times)
        return
    broker = stack.enter_context(kafka(folder / "broker")) if wanted.bus == "kafka" else None
    address = f"kafka://{broker.address}" if broker else ""
    size = {"prompts": wanted.prompts} if wanted.prompts else {}
    if wanted.scenario == "zombie":
        yield from broken.zombie(folder, address, seed=wanted.seed, **size)
    elif wanted.scenario == "storm":
        yield from broken.storm(folder, address, changes=wanted.changes, seed=wanted.seed, **{"prompts": 2000} | size)
    elif wanted.scenario == "disk-full":
        yield from broken.full_disk_of_the_sink(folder / "sink", address, seed=wanted.seed, **size)
        yield from broken.full_disk_of_the_log(folder / "embedded", seed=wanted.seed, **size)
        if broker:
            yield from broken.full_disk_of_a_broker(folder / "full", seed=wanted.seed, **size)
    elif wanted.scenario == "held-file":
        yield from broken.held_file(folder, address, **size)
    elif wanted.scenario == "server-down":
        yield from broken.server_down(folder, address, down_s=wanted.down_s, seed=wanted.seed, **size)
    else:
        yield from broken.hostile_bytes(folder, address, count=wanted.messages, seed=wanted.seed, **size)


def main() -> int:
    wanted = arguments()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        try:
            for line in scenario(wanted, (wanted.folder or Path(temporary)).resolve(), stack):
                print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)
        except Failed as error:
            print(f"{time.monotonic() - started:6.0f} s  FAILED: {error}")
            return 1
    print(f"{time.monotonic() - started:6.0f} s  held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
