"""`charter export`: write training data in the formats of TRL and `datasets`."""

from __future__ import annotations

from pathlib import Path

import click

from charter.connect import open_store
from charter.console import common_options
from charter.export.dataset import export_dataset
from charter.export.selection import ExportSelection
from engine.settings import Settings

_FORMAT_NAMES = ("sft", "preference", "kto")


@click.command()
@click.argument("dataset_format", type=click.Choice(_FORMAT_NAMES))
@click.argument("target", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option("--parquet", "as_parquet", is_flag=True, help="Write Parquet instead of JSON lines.")
@click.option(
    "--source",
    "sources",
    metavar="NAME",
    multiple=True,
    help="Export only records whose prompt has this source; may be repeated.",
)
@click.option(
    "--limit", type=click.IntRange(1), help="Maximum number of records per split. The oldest records are exported first."
)
@click.option("--force", is_flag=True, help="Overwrite an earlier export.")
@common_options
def export(
    settings: Settings,
    origins: dict[str, str],
    dataset_format: str,
    target: Path,
    as_parquet: bool,
    sources: tuple[str, ...],
    limit: int | None,
    force: bool,
) -> None:
    """Write training data to a folder in the formats of TRL.

    The formats are prompts with final responses (sft), pairs with a soft label (preference), and single responses with a boolean
    label (kto). Train and eval splits are separate files. A dataset card (README.md) describes the sources. Without
    --run, export the records of all runs.

    \b
    Examples:
      charter export sft exported/sft
      charter export preference exported/pairs --parquet --run live
      charter export kto exported/kto --source red-team --force
    """
    store = open_store(settings)
    selection = ExportSelection(settings.run.id if origins["run.id"] != "default" else None, sources)
    suffix = "parquet" if as_parquet else "jsonl"
    splits = export_dataset(store, target, dataset_format, selection, suffix, limit, force)
    for split, statistics in splits.items():
        location = f" in {target}/data/{split}.{suffix}" if statistics.num_rows else ""
        click.echo(f"{split}: {statistics.num_rows} rows{location}")


COMMAND = export
