"""`charter export`: write training data in the formats of TRL, `datasets` and OpenAI."""

from __future__ import annotations

from pathlib import Path

import click

from charter.connect import connect_bus, open_store
from charter.console import common_options
from charter.export.dataset import EXPORT_FORMATS, export_dataset, format_reasons
from charter.export.selection import UNCERTAIN_MARGIN, ExportSelection, SplitStats
from charter.lag import describe_unarchived
from charter.progress import show_progress
from charter.text import to_one_line
from engine.errors import DependencyUnreachable, UsageError
from engine.settings import Settings
from engine.store import Store
from engine.text import format_count

_FORMAT_NAMES = ("sft", "preference", "contrast", "kto", "prompts", "openai")


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
    "--limit",
    type=click.IntRange(1),
    help="Maximum number of records per split, including ties and labels below --min-margin. The oldest records are exported first.",
)
@click.option(
    "--min-margin",
    type=click.FloatRange(0.0, 0.5),
    help="Leave out labels p with |p - 0.5| below this value. Default: 0.1 for kto, whose labels are hard, and 0 for preference.",
)
@click.option("--no-flips", is_flag=True, help="Leave out labels that flip when the two responses change places.")
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
    min_margin: float | None,
    no_flips: bool,
    force: bool,
) -> None:
    """Write training data in the formats of TRL and OpenAI.

    The formats are prompts with final responses (sft), pairs with a soft label (preference, also for reward models), contrast pairs
    (contrast), single responses with a boolean label (kto), prompts alone (prompts), and the conversations of sft in OpenAI's chat
    form (openai). A kto label is hard, so pairs that are nearly ties are left out (--min-margin). Train and eval splits are separate
    files. A dataset card (README.md) describes the sources. Without --run, export the records of all runs.

    \b
    Examples:
      charter export sft exported/sft
      charter export preference exported/pairs --parquet --run live
      charter export kto exported/kto --source red-team --force
      charter export openai exported/chats --source helpful
    """
    default_margin = EXPORT_FORMATS[dataset_format].default_min_margin
    label_options = {"--min-margin": min_margin is not None, "--no-flips": no_flips}
    if default_margin is None and (used := [name for name, is_used in label_options.items() if is_used]):
        raise UsageError(f"{dataset_format} has no {used[0]}", "its rows have no label", f"remove {used[0]}")
    store = open_store(settings)
    _warn_about_unarchived_records(settings, store)
    margin = (default_margin or 0.0) if min_margin is None else min_margin
    selection = ExportSelection(settings.run.id if origins["run.id"] != "default" else None, sources, margin, no_flips)
    suffix = "parquet" if as_parquet else "jsonl"
    with show_progress(f"export {target}", "rows") as progress:
        splits, excluded = export_dataset(
            store, target, dataset_format, selection, suffix, limit, force, settings.label_quality, progress
        )
    for split, statistics in splits.items():
        location = f" in {target}/data/{split}.{suffix}" if statistics.num_rows else ""
        click.echo(f"{split}: {format_count(statistics.num_rows, 'rows')}{location}{_format_certainty(statistics, margin)}")
    if excluded:
        click.echo(f"records that are not training data: {format_reasons(excluded)}")


def _warn_about_unarchived_records(settings: Settings, store: Store) -> None:
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


def _format_certainty(statistics: SplitStats, min_margin: float) -> str:
    """Return how many labels were left out, and how many of the exported labels are nearly ties."""
    text = ""
    if statistics.num_below_margin:
        text += f"; {format_count(statistics.num_below_margin, 'labels')} left out, because their margin |p - 0.5| is below {min_margin:g}"
    if statistics.num_flips_left_out:
        text += f"; {format_count(statistics.num_flips_left_out, 'labels')} left out, because they flip with the order of the responses"
    if statistics.num_uncertain:
        text += f"; {statistics.num_uncertain} of {len(statistics.margins)} labels have a margin below {UNCERTAIN_MARGIN}"
        text += f" (to leave them out: --min-margin {UNCERTAIN_MARGIN})"
    return text


COMMAND = export
