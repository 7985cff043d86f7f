"""`charter restore`: create a data folder from a backup."""

from __future__ import annotations

from pathlib import Path

import click

from charter.console import common_options
from charter.progress import show_progress
from engine import backups
from engine.settings import Settings


@click.command()
@click.argument("source", metavar="FOLDER", type=click.Path(path_type=Path))
@common_options
def restore(settings: Settings, source: Path) -> None:
    """Create a data folder from a backup.

    FOLDER is a backup that charter backup wrote. The data folder (--data) must be empty or must not exist.

    \b
    Examples:
      charter restore backups/2026-11-24 --data restored
    """
    with show_progress(f"restore {source}", "MB") as progress:
        backups.restore_backup(source, settings.folder, click.echo, progress)
    click.echo(f"restored {settings.folder}; next: charter status --data {settings.folder}")


COMMAND = restore
