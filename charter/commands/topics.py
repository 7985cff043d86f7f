"""`charter topics`: list, create and describe topics, and show consumer lag."""

from __future__ import annotations

from typing import Any

import click

from charter.connect import get_topic_specs, open_bus_from_settings, open_store, require_log
from charter.console import common_options, output_options, print_rows
from charter.lag import compute_lag_rows, read_positions, read_sink_offsets
from charter.lookup import resolve_run_id
from charter.stages import get_stage_inputs
from engine.bus.port import Offsets
from engine.errors import UsageError
from engine.settings import Settings
from engine.text import format_count
from schemas.topics import TOPICS


@click.group(invoke_without_command=True)
@output_options
@common_options
def topics(settings: Settings, output: str) -> None:
    """List, create and describe topics, and show consumer lag.

    Without a verb, print the list.

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
    """List all topics with record type, partitions and offsets.

    The column offsets is the difference between end and beginning offsets. On Kafka, this number can be larger than the number of
    records, because it also counts transaction markers.

    \b
    Examples:
      charter topics list --json
    """
    _print_topics(settings, output)


def _print_topics(settings: Settings, output: str) -> None:
    require_log(settings)
    bus = open_bus_from_settings(settings)
    specs = [spec for spec in TOPICS.values() if spec.name in bus.topic_ids(list(TOPICS))]
    names = [spec.name for spec in specs]
    beginning_offsets, end_offsets = bus.beginning_offsets(names), bus.end_offsets(names)
    rows: list[tuple[Any, ...]] = []
    for spec in specs:
        num_offsets = sum(end - beginning_offsets[tp] for tp, end in end_offsets.items() if tp.topic == spec.name)
        cleanup_policy = "compact" if spec.is_compacted else "delete"
        rows.append((spec.name, spec.record_class.__name__, bus.count_partitions(spec.name), cleanup_policy, num_offsets))
    bus.close()
    print_rows(["topic", "record", "partitions", "cleanup_policy", "offsets"], rows, output)
    if not output and len(specs) < len(TOPICS):
        click.echo(f"{format_count(len(TOPICS) - len(specs), 'topics', 'are')} missing; type: charter topics create", err=True)


@topics.command()
@common_options
def create(settings: Settings) -> None:
    """Create the missing topics.

    The settings are bus.partitions, bus.replication, bus.retention_ms and bus.prefix. Existing topics do not change. The number
    of partitions cannot be changed later. It is the maximum number of instances of a stage that can read a topic in parallel.

    \b
    Examples:
      charter topics create --bus kafka://localhost:9092 --set bus.partitions=24
    """
    bus, specs = open_bus_from_settings(settings), get_topic_specs(settings)
    created = set(bus.create_topics(specs))
    bus.close()
    for spec in specs:
        state = f"created, {format_count(spec.num_partitions, 'partitions')}" if spec.name in created else "exists"
        click.echo(f"{settings.bus.prefix}{spec.name}: {state}")


@topics.command()
@click.argument("names", metavar="[TOPIC...]", nargs=-1)
@output_options
@common_options
def describe(settings: Settings, names: tuple[str, ...], output: str) -> None:
    """Show partitions, replicas, offsets and configuration of topics.

    The column max_instances is the number of instances of a stage that can read the topic in parallel. Offsets are listed in the
    order of the partitions.

    \b
    Examples:
      charter topics describe responses
    """
    require_log(settings)
    bus, requested = open_bus_from_settings(settings), list(names) or list(TOPICS)
    descriptions = bus.describe_topics(requested)
    if missing := sorted(set(requested) - {d.name for d in descriptions}):
        raise UsageError(
            f"there is no topic {missing[0]}",
            f"existing topics: {', '.join(bus.topic_ids(list(TOPICS))) or 'none'}",
            "type: charter topics",
        )
    beginning_offsets, end_offsets = bus.beginning_offsets(requested), bus.end_offsets(requested)
    bus.close()
    rows = [
        (
            d.name,
            d.topic_id,
            d.partitions,
            d.partitions,
            d.replicas,
            d.in_sync_replicas,
            *_format_offset_range(d.name, beginning_offsets, end_offsets),
            dict(d.configs),
        )
        for d in descriptions
    ]
    columns = [
        *("topic", "topic_id", "partitions", "max_instances", "replicas", "in_sync_replicas"),
        *("beginning_offsets", "end_offsets", "configs"),
    ]
    print_rows(columns, rows, output)


def _format_offset_range(topic: str, beginning_offsets: Offsets, end_offsets: Offsets) -> tuple[str, str]:
    """Return the beginning and end offsets of a topic, in partition order."""
    partitions = sorted(tp for tp in end_offsets if tp.topic == topic)
    return " ".join(str(beginning_offsets[tp]) for tp in partitions), " ".join(str(end_offsets[tp]) for tp in partitions)


@topics.command()
@output_options
@common_options
def lag(settings: Settings, origins: dict[str, str], output: str) -> None:
    """Show the lag of each stage of a run and of the sink.

    Print the number of unread records, and the age of the oldest unread record in seconds. Without --run, print the lag of the
    newest run.

    \b
    Examples:
      charter topics lag
      charter topics lag --run live --bus kafka://localhost:9092
    """
    require_log(settings)
    bus, store = open_bus_from_settings(settings), open_store(settings)
    run_id = resolve_run_id(settings, origins, store)
    rows: list[tuple[Any, ...]] = []
    for stage, names in get_stage_inputs(settings).items():
        rows += compute_lag_rows(bus, stage, names, read_positions(bus, run_id, stage, names), run_id)
    if store.path.exists():
        rows += compute_lag_rows(bus, "sink", list(TOPICS), read_sink_offsets(store, bus))
    bus.close()
    print_rows(["consumer", "topic", "committed", "end", "lag", "lag_seconds"], rows, output)


COMMAND = topics
