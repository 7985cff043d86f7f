"""`charter topics`: what is on the log, how it is kept, and how far everyone has read."""

from __future__ import annotations

from typing import Any

import click

from charter.connect import get_topic_specs, open_bus_from_settings, open_store
from charter.console import common_options, output_options, print_rows
from charter.lag import compute_lag_rows, get_stage_inputs, read_sink_offsets
from charter.lookup import resolve_run_id
from engine.bus.port import Offsets
from engine.errors import UsageError
from engine.settings import Settings
from schemas.topics import TOPICS


@click.group(invoke_without_command=True)
@output_options
@common_options
def topics(settings: Settings, output: str) -> None:
    """List, create and describe topics, and show consumer lag.

    Without a verb: the list.

    \b
    Examples:
      charter topics
      charter topics create --set bus.partitions=24 --set bus.replication=3
      charter topics describe responses
      charter topics lag --bus kafka://localhost:9092 --json
    """
    if click.get_current_context().invoked_subcommand is None:
        _print_topics(settings, output)


@topics.command("list")
@output_options
@common_options
def list_topics(settings: Settings, output: str) -> None:
    """Every topic: its record, partitions and offsets.

    A transaction takes an offset too.

    \b
    Examples:
      charter topics list --json
    """
    _print_topics(settings, output)


def _print_topics(settings: Settings, output: str) -> None:

    bus = open_bus_from_settings(settings)
    there = [spec for spec in TOPICS.values() if spec.name in bus.topic_ids(list(TOPICS))]
    names = [spec.name for spec in there]
    begins, ends = bus.beginning_offsets(names), bus.end_offsets(names)
    rows: list[tuple[Any, ...]] = []
    for spec in there:
        messages = sum(end - begins[place] for place, end in ends.items() if place.topic == spec.name)
        kept = "compacted" if spec.is_compacted else "all"
        rows.append((spec.name, spec.record_class.__name__, bus.count_partitions(spec.name), kept, messages))
    bus.close()
    print_rows(["topic", "record", "partitions", "kept", "offsets"], rows, output)
    if not output and len(there) < len(TOPICS):
        click.echo(f"{len(TOPICS) - len(there)} topics are not there; type: charter topics create", err=True)


@topics.command()
@common_options
def create(settings: Settings) -> None:
    """Create the topics that are missing.

    As bus.partitions, bus.replication, bus.retention_ms and bus.prefix say.

    The number of partitions stays as it is then; it bounds the useful copies of a stage.

    \b
    Examples:
      charter topics create --bus kafka://localhost:9092 --set bus.partitions=24
    """

    bus, specs = open_bus_from_settings(settings), get_topic_specs(settings)
    made = set(bus.create_topics(specs))
    bus.close()
    for spec in specs:
        state = "created" if spec.name in made else "was there"
        click.echo(
            f"{settings.bus.prefix}{spec.name}: {state}" + (f", {spec.num_partitions} partitions" if state == "created" else "")
        )


@topics.command()
@click.argument("names", metavar="[TOPIC...]", nargs=-1)
@output_options
@common_options
def describe(settings: Settings, names: tuple[str, ...], output: str) -> None:
    """How topics are kept.

    Partitions (as many copies of a stage can share the work), replicas, settings, offsets.

    \b
    Examples:
      charter topics describe responses
    """

    bus, wanted = open_bus_from_settings(settings), list(names) or list(TOPICS)
    described = bus.describe_topics(wanted)
    if absent := sorted(set(wanted) - {d.name for d in described}):
        raise UsageError(
            f"there is no topic {absent[0]}",
            f"those here are {', '.join(bus.topic_ids(list(TOPICS))) or 'none'}",
            "type: charter topics",
        )
    begins, ends = bus.beginning_offsets(wanted), bus.end_offsets(wanted)
    bus.close()
    rows = [
        (
            d.name,
            d.topic_id,
            d.partitions,
            d.partitions,
            d.replicas,
            d.in_sync_replicas,
            *_format_offset_range(d.name, begins, ends),
            dict(d.configs),
        )
        for d in described
    ]
    columns = ["topic", "id", "partitions", "most_useful_copies", "replicas", "in_sync", "first", "next", "settings"]
    print_rows(columns, rows, output)


def _format_offset_range(topic: str, beginning_offsets: Offsets, end_offsets: Offsets) -> tuple[str, str]:
    """First and next offsets, partition by partition."""
    places = sorted(place for place in end_offsets if place.topic == topic)
    return " ".join(str(beginning_offsets[place]) for place in places), " ".join(str(end_offsets[place]) for place in places)


@topics.command()
@output_options
@common_options
def lag(settings: Settings, origins: dict[str, str], output: str) -> None:
    """How far each stage of a run and the sink are behind.

    In messages, and in seconds since the oldest that waits; of the newest run, or --run.

    \b
    Examples:
      charter topics lag
      charter topics lag --run live --bus kafka://localhost:9092
    """

    bus, store = open_bus_from_settings(settings), open_store(settings)
    run_id = resolve_run_id(settings, origins, store)
    rows: list[tuple[Any, ...]] = []
    for stage, names in get_stage_inputs(settings.judge.pairing).items():
        rows += compute_lag_rows(bus, stage, names, bus.committed(f"{run_id}.{stage}", names))
    if store.path.exists():
        rows += compute_lag_rows(bus, "sink", list(TOPICS), read_sink_offsets(store, bus.cluster_id))
    bus.close()
    print_rows(["reader", "topic", "committed", "end", "behind", "seconds"], rows, output)


COMMAND = topics
