"""`charter backup`: copy the data folder while the pipeline runs."""

from __future__ import annotations

from pathlib import Path

import click

from charter.console import common_options
from charter.progress import show_progress
from engine import backups
from engine.bus import KAFKA_SCHEME
from engine.settings import Settings


def _get_log_folder(settings: Settings) -> Path | None:
    """Return the folder of the embedded log. Return None if the log is on Kafka."""
    return None if settings.bus_address.startswith(KAFKA_SCHEME) else Path(settings.bus_address)


@click.command()
@click.argument("target", metavar="FOLDER", type=click.Path(path_type=Path))
@common_options
def backup(settings: Settings, target: Path) -> None:
    """Copy the data folder while the pipeline runs.

    FOLDER must not exist. The backup contains the database, the embedded log and all complete checkpoints. The backup does not
    contain the topics of a Kafka cluster. Kafka replicates its topics, and the database has all records that the sink has read.

    \b
    Examples:
      charter backup backups/2026-11-24
    """
    with show_progress(f"backup {target}", "MB") as progress:
        manifest = backups.create_backup(settings.folder, target, _get_log_folder(settings), progress)
    for name, value in manifest.items():
        click.echo(f"{name}: {', '.join(value) if isinstance(value, list) else value}")


COMMAND = backup
