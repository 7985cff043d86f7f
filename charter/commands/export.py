"""`charter export`: training data out, in the forms that trainers read."""

from __future__ import annotations

from pathlib import Path

import click

from charter.connect import open_store
from charter.console import common_options
from charter.export.dataset import export_dataset as write
from charter.export.selection import ExportSelection
from engine.settings import Settings

_FORMAT_NAMES = ("sft", "preference", "kto")


@click.command()
@click.argument("form", type=click.Choice(_FORMAT_NAMES))
@click.argument("target", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option("--parquet", "as_parquet", is_flag=True, help="Parquet instead of JSON lines.")
@click.option("--source", "sources", metavar="NAME", multiple=True, help="Only prompts of this source; may be repeated.")
@click.option("--limit", type=click.IntRange(1), help="At most so many records of each split, the oldest first.")
@click.option("--force", is_flag=True, help="Take the place of an earlier export.")
@common_options
def export(
    settings: Settings,
    origins: dict[str, str],
    form: str,
    target: Path,
    as_parquet: bool,
    sources: tuple[str, ...],
    limit: int | None,
    force: bool,
) -> None:
    """Write training data to a folder that trainers read.

    For TRL, `datasets` and the hub: prompts with final texts (sft), pairs with their soft label (preference), or single answers
    that are wanted or not (kto). Train and eval are files of their own, and a data card says where every row came from. Of all
    runs, or what one has with --run, made by it or by an earlier one.

    \b
    Examples:
      charter export sft exported/sft
      charter export preference exported/pairs --parquet --run live
      charter export kto exported/kto --source red-team --force
    """

    store = open_store(settings)
    choice = ExportSelection(settings.run.id if origins["run.id"] != "default" else None, sources)
    suffix = "parquet" if as_parquet else "jsonl"
    for split, counted in write(store, target, form, choice, suffix, limit, force).items():
        where = f" in {target}/data/{split}.{suffix}" if counted.num_rows else ""
        click.echo(f"{split}: {counted.num_rows} rows{where}")


COMMAND = export
