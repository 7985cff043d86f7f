"""`charter backup`: copy the data folder while everything runs."""

from __future__ import annotations

from pathlib import Path

import click

from charter.console import common_options
from engine import backups
from engine.bus import KAFKA_SCHEME
from engine.settings import Settings


def _get_log_folder(settings: Settings) -> Path | None:
    """Return the folder of the embedded log, or None with Kafka."""
    return None if settings.bus_address.startswith(KAFKA_SCHEME) else Path(settings.bus_address)


@click.command()
@click.argument("target", metavar="FOLDER", type=click.Path(path_type=Path))
@common_options
def backup(settings: Settings, target: Path) -> None:
    """Copy the data folder while everything runs.

    FOLDER must not exist. The backup contains the database, the embedded log and all complete checkpoints. It does not contain a
    Kafka log: Kafka replicates its topics, and the database has every record that the sink has read from them.

    \b
    Examples:
      charter backup backups/2026-11-24
    """
    for name, value in backups.create_backup(settings.folder, target, _get_log_folder(settings)).items():
        click.echo(f"{name}: {', '.join(value) if isinstance(value, list) else value}")


COMMAND = backup
