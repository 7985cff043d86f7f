"""`charter repair`: move a damaged database away, so that the sink restores it from the log."""

from __future__ import annotations

import click

from charter.connect import connect_bus, open_sink_lock, open_store
from charter.console import common_options
from engine import repair as database_repair
from engine.errors import UsageError
from engine.settings import Settings
from engine.text import format_count


@click.command()
@click.option(
    "--keep-rows",
    is_flag=True,
    help="If the database does not belong to this log, keep its rows, and let the sink add the records of this log.",
)
@common_options
def repair(settings: Settings, keep_rows: bool) -> None:
    """Move a damaged database away, to restore it from the log.

    The command reads the whole database. If only the write-ahead log (WAL) is damaged, only the WAL is moved, and the sink
    restores the rows since the last checkpoint. Otherwise the database is moved, and the sink restores all rows. A database of
    another log or of another version is also moved. The files are moved to a new folder in the data folder. Nothing is deleted.

    Stop charter run before the repair. Trained rows are recognized by their ids, so no row is trained twice.

    \b
    Examples:
      charter repair
      charter repair --data restored --keep-rows
    """
    store = open_store(settings)
    if not store.path.exists() and not store.list_wal_paths():
        click.echo(f"there is no database at {store.path}; the sink creates it from the log: charter run")
        return
    lock = open_sink_lock(settings)
    if not lock.try_acquire():
        raise UsageError(
            f"the sink of process {lock.get_holder_pid()} writes to {store.path}",
            "a repair moves the files of the database, so no sink may be running",
            "stop charter run, then type: charter repair",
        )
    bus = connect_bus(settings)
    try:
        _print_repair(str(store.path), database_repair.repair_database(store, bus, keep_rows=keep_rows))
    finally:
        bus.close()
        lock.close()


def _print_repair(path: str, repair: database_repair.Repair) -> None:
    if not repair.problems:
        click.echo(f"{path} has no damage; nothing was moved")
        return
    for problem in repair.problems:
        click.echo(f"{problem.what}: {problem.why}")
    for moved in repair.moved:
        click.echo(f"moved {moved.name} to {moved.parent}")
    for (topic, partition), number in repair.missing.items():
        click.echo(
            f"the log no longer has {format_count(number, 'records')} of {topic}[{partition}]; they are only in the moved files"
        )
    click.echo("next: charter run    (the sink restores the rows from the log, and the trainer waits until then)")


COMMAND = repair
