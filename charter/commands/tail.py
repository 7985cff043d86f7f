"""`charter tail`: print the newest records of a topic as JSON lines."""

from __future__ import annotations

import click

from charter.connect import connect_bus, connect_existing_bus
from charter.console import common_options
from charter.startup import start_when_ready, wait_option
from charter.tail import tail_topic
from engine.settings import Settings
from engine.stop_signals import stop_on_signals


@click.command()
@click.argument("topic")
@click.option("-n", "count", type=click.IntRange(0), default=10, show_default=True, help="Number of records.")
@click.option("-f", "--follow", is_flag=True, help="Then print new records until stopped.")
@click.option("--raw", is_flag=True, help="Print the bytes in hexadecimal instead of the decoded record.")
@click.option("--json", is_flag=True, expose_value=False, help="No effect: the output is always JSON lines.")
@wait_option
@common_options
def tail(settings: Settings, topic: str, count: int, follow: bool, raw: bool, wait: bool) -> None:
    """Print the newest records of a topic as JSON lines.

    Each object has the topic, partition and offset of the record. TOPIC is the name of a topic without bus.prefix.

    \b
    Examples:
      charter tail responses -n 1
      charter tail preferences --follow
    """
    connect = connect_bus if follow else connect_existing_bus  # --follow waits for the first record
    bus = start_when_ready(lambda: connect(settings), wait=wait)
    stop = stop_on_signals() if follow else None
    num_lines = 0
    for line in tail_topic(bus, topic, count, stop, raw=raw):
        click.echo(line)
        num_lines += 1
    bus.close()
    if count and not num_lines:
        click.echo(f"there are no records in {topic}", err=True)


COMMAND = tail
