"""`charter snapshot`: copy the database to a file while the sink writes to it."""

from __future__ import annotations

from pathlib import Path

import click

from charter.connect import open_store
from charter.console import common_options
from charter.progress import show_progress
from engine import backups
from engine.settings import Settings
from engine.text import format_count


@click.command()
@click.argument("target", metavar="FILE", type=click.Path(path_type=Path))
@common_options
def snapshot(settings: Settings, target: Path) -> None:
    """Copy the database to a file while the pipeline runs.

    The copy is consistent. FILE must not exist. Use a copy for notebooks, because a notebook that opens the database blocks the
    sink.

    \b
    Examples:
      charter snapshot monday.duckdb
    """
    with show_progress(f"snapshot {target}", "MB") as progress:
        num_records = backups.create_snapshot(open_store(settings), target, progress)
    click.echo(f"{target}: {format_count(num_records, 'records')}")


COMMAND = snapshot
