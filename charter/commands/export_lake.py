"""`charter export lake`: export all tables to a lake of Parquet files or Iceberg tables, and verify the lake."""

from __future__ import annotations

import sys

import click

from charter.connect import connect_bus, open_store
from charter.console import common_options
from charter.lag import describe_unarchived
from charter.lake.claims import LakeAddress, forget_lake, normalize_url
from charter.progress import show_progress
from charter.text import to_one_line
from engine.errors import DependencyUnreachable
from engine.settings import Settings
from engine.store import Store
from engine.text import format_count


@click.command("lake")
@click.argument("url", metavar="URL")
@click.option("--verify", is_flag=True, help="Compare every row of the lake with the database. Write nothing.")
@click.option(
    "--iceberg", is_flag=True, help="Write Apache Iceberg tables. In a local folder, the catalog is a file in the folder."
)
@click.option(
    "--catalog", metavar="NAME", default="", help="Write Iceberg tables to this catalog of PyIceberg's configuration."
)
@click.option(
    "--namespace", default=LakeAddress.namespace, show_default=True, metavar="NAME", help="Namespace of the Iceberg tables."
)
@click.option("--take-over", is_flag=True, help="Write even if the claim of an export from another data folder is in the lake.")
@click.option("--forget", is_flag=True, help="Only remove the lake from the list of lakes that `charter erase` rewrites.")
@common_options
def lake(
    settings: Settings, url: str, verify: bool, iceberg: bool, catalog: str, namespace: str, take_over: bool, forget: bool
) -> None:
    """Export all tables to a lake, incrementally.

    URL is a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER. The export adds the rows that the lake does not have, as Parquet files
    by table, run and day. It can run at any time, also while the sink runs. If it is killed, the next one continues.

    \b
    Examples:
      charter export lake lake
      charter export lake lake --verify
      charter export lake tables --iceberg
    """
    address = LakeAddress(normalize_url(url), iceberg or bool(catalog), catalog, namespace)
    if forget:
        is_known = forget_lake(settings.folder, address)
        click.echo(f"{address.url} is {'removed from' if is_known else 'not in'} the list of lakes of {settings.folder}")
        return
    store = open_store(settings)
    warn_about_unarchived_records(settings, store)
    if verify:
        _verify(store, address)
    else:
        _export(settings, store, address, take_over)


def _export(settings: Settings, store: Store, address: LakeAddress, take_over: bool) -> None:
    from charter.lake.export import export_lake  # imports Arrow

    with show_progress(f"export {address.url}", "rows") as progress:
        report = export_lake(store, settings.folder, address, progress, take_over=take_over)
    for table, count in report.num_rows.items():
        click.echo(f"{table}: {format_count(count, 'new rows')}")
    if report.num_erased_rows:
        click.echo(f"erased: {format_count(report.num_erased_rows, 'rows')}")
    for line in report.behind:
        click.echo(f"the sink reads the log again: {line}", err=True)
    total = sum(report.num_rows.values())
    click.echo(f"exported {format_count(total, 'rows')} in {format_count(report.num_files, 'files')} to {address.url}")


def _verify(store: Store, address: LakeAddress) -> None:
    from charter.lake.export import verify_lake

    with show_progress(f"verify {address.url}", "rows") as progress:
        result = verify_lake(store, address, progress)
    for table, count in result.num_rows.items():
        if count:
            click.echo(f"{table}: {format_count(count, 'rows')}")
    newer = f"; the database has {format_count(result.num_newer, 'newer rows')}" if result.num_newer else ""
    if result.problems:
        for problem in result.problems:
            click.echo(f"not equal: {problem}")
        click.echo(f"{address.url} differs from {store.path}{newer}")
        sys.exit(1)
    click.echo(f"{address.url} equals {store.path}: {format_count(sum(result.num_rows.values()), 'rows')}{newer}")


def warn_about_unarchived_records(settings: Settings, store: Store) -> None:
    """Print a line if the log has records that the database does not have, or if the log is unreachable."""
    store.query("SELECT 1")  # without a database, raise the error before the log is created
    try:
        bus = connect_bus(settings)
    except DependencyUnreachable as error:
        click.echo(to_one_line(f"records that are only on the log are not exported; {error.what}: {error.why}"), err=True)
        return
    try:
        line = describe_unarchived(bus, store, settings.folder)
    finally:
        bus.close()
    if line:
        click.echo(f"not exported: {line}", err=True)
