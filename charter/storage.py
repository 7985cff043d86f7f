"""The verbs that keep data over time: snapshot, backup, restore, forget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from charter.options import common_options

if TYPE_CHECKING:
    from engine.settings import Settings


def _get_log_folder(settings: Settings) -> Path | None:
    """The folder of the embedded log; None with Kafka."""
    from engine.bus import KAFKA_SCHEME

    return None if settings.bus_address.startswith(KAFKA_SCHEME) else Path(settings.bus_address)


@click.command()
@click.argument("target", metavar="FILE", type=click.Path(path_type=Path))
@common_options
def snapshot(settings: Settings, target: Path) -> None:
    """Copy the database to FILE while everything runs.

    Consistent; for a notebook, or a colleague.

    \b
    Examples:
      charter snapshot monday.duckdb
    """
    from charter.pipeline import open_store
    from engine import backups

    records = backups.create_snapshot(open_store(settings), target)
    click.echo(f"{target}: {records} records")


@click.command()
@click.argument("target", metavar="FOLDER", type=click.Path(path_type=Path))
@common_options
def backup(settings: Settings, target: Path) -> None:
    """Copy the whole data folder while everything runs.

    The database, the embedded log and the checkpoints, to a new FOLDER.

    A Kafka log is not in it: Kafka replicates its topics, and the archive in the database has what was read of them.

    \b
    Examples:
      charter backup backups/2026-11-24
    """
    from engine import backups

    for name, what in backups.create_backup(settings.folder, target, _get_log_folder(settings)).items():
        click.echo(f"{name}: {', '.join(what) if isinstance(what, list) else what}")


@click.command()
@click.argument("source", metavar="FOLDER", type=click.Path(path_type=Path))
@common_options
def restore(settings: Settings, source: Path) -> None:
    """Make a new data folder (--data) from a backup.

    \b
    Examples:
      charter restore backups/2026-11-24 --data restored
    """
    from engine import backups

    backups.restore_backup(source, settings.folder, click.echo)
    click.echo(f"{settings.folder} is whole again; type: charter status --data {settings.folder}")


@click.command()
@click.argument("identifiers", metavar="PROMPT_ID...", nargs=-1, required=True)
@click.option("--reason", default="", help="Why; it is kept.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common_options
def forget(settings: Settings, identifiers: tuple[str, ...], reason: str, yes: bool) -> None:
    """Delete everything that was made of a prompt, for good.

    From every database that is fed from this log.

    The deletion is a record on the log: each sink carries it out, future batches and replays respect it, and what still comes
    of the prompt is not written. The log itself keeps its messages for as long as the topics are kept (bus.retention_ms), and
    models that were trained on them stay as they are.

    \b
    Examples:
      charter forget 3f2a1c04-... --reason "asked by its author"
    """
    from charter.pipeline import connect_bus, find_prompt_ids, open_store
    from engine.errors import UsageError
    from engine.worker import to_producer_record
    from schemas import ids
    from schemas.records import Erasure

    prompts = []
    for identifier in identifiers:
        found = find_prompt_ids(open_store(settings), identifier)
        if len(found) != 1:
            raise UsageError(
                f"{identifier!r} is the beginning of {len(found) or 'no'} prompts",
                "it must name one prompt, for what is forgotten is gone",
                "type: charter sql 'select prompt_id, prompt from traces'    and give a whole prompt_id",
            )
        prompts += found
    if not yes:
        click.confirm(f"delete everything of {_format_prompt_count(len(prompts))} from the databases, for good?", abort=True)
    bus = connect_bus(settings)
    bus.publish(
        [
            to_producer_record(
                Erasure(
                    record_id=ids.compute_record_id("forget", [prompt], ""),
                    prompt_id=prompt,
                    run_id=settings.run.id,
                    stage="forget",
                    reason=reason,
                )
            )
            for prompt in prompts
        ]
    )
    bus.close()
    click.echo(f"to be forgotten as soon as the sink reads it (charter run): {_format_prompt_count(len(prompts))}")


def _format_prompt_count(prompts: int) -> str:
    return "1 prompt" if prompts == 1 else f"{prompts} prompts"


VERBS = (snapshot, backup, restore, forget)
