"""`charter export`: write training data in the formats of TRL, `datasets` and OpenAI, or all tables to a lake."""

from __future__ import annotations

from pathlib import Path

import click

from charter.commands.export_lake import lake, warn_about_unarchived_records
from charter.connect import open_store
from charter.console import common_options
from charter.export.dataset import EXPORT_FORMATS, export_dataset, format_reasons
from charter.export.selection import UNCERTAIN_MARGIN, ExportSelection, SplitStats
from charter.progress import show_progress
from engine.errors import UsageError
from engine.settings import Settings
from engine.text import format_count

# The help of each format.
_FORMAT_HELP = {
    "sft": "Write prompts with final responses, for SFT.",
    "preference": "Write pairs with a soft label, for DPO and reward models.",
    "contrast": "Write contrast pairs, for DPO.",
    "kto": "Write single responses with a boolean label, for KTO.\n\n"
    "A label of KTO is hard, so pairs that are nearly ties are left out (--min-margin).",
    "prompts": "Write prompts alone, for GRPO and RLOO.",
    "openai": "Write conversations in OpenAI's chat form.",
}


@click.group()
def export() -> None:
    """Write training data in the formats of TRL and OpenAI, or all tables to a data lake.

    Train and eval splits are separate files. A dataset card (README.md) describes the sources. Without --run, export the records of
    all runs.

    \b
    Examples:
      charter export sft exported/sft
      charter export preference exported/pairs --parquet --run live
      charter export kto exported/kto --source red-team --force
      charter export openai exported/chats --source helpful
      charter export lake lake
    """


def _make_dataset_command(dataset_format: str) -> click.Command:
    """Return the command that exports a format. Options that need labels are hidden if the rows have no label."""
    has_labels = EXPORT_FORMATS[dataset_format].default_min_margin is not None

    example = f"\b\nExamples:\n  charter export {dataset_format} exported/{dataset_format} --parquet"

    @click.command(dataset_format, help=f"{_FORMAT_HELP[dataset_format]}\n\n{example}")
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
        hidden=not has_labels,
        help="Leave out labels p with |p - 0.5| below this value. Default: 0.1 for kto, whose labels are hard, and 0 for preference.",
    )
    @click.option(
        "--no-flips",
        is_flag=True,
        hidden=not has_labels,
        help="Leave out labels that flip when the two responses change places.",
    )
    @click.option("--force", is_flag=True, help="Overwrite an earlier export.")
    @common_options
    def export_format(
        settings: Settings,
        origins: dict[str, str],
        target: Path,
        as_parquet: bool,
        sources: tuple[str, ...],
        limit: int | None,
        min_margin: float | None,
        no_flips: bool,
        force: bool,
    ) -> None:
        label_options = {"--min-margin": min_margin is not None, "--no-flips": no_flips}
        if not has_labels and (used := [name for name, is_used in label_options.items() if is_used]):
            raise UsageError(f"{dataset_format} has no {used[0]}", "its rows have no label", f"remove {used[0]}")
        run_id = settings.run.id if origins["run.id"] != "default" else None
        default_margin = EXPORT_FORMATS[dataset_format].default_min_margin
        margin = (default_margin or 0.0) if min_margin is None else min_margin
        selection = ExportSelection(run_id, sources, margin, no_flips)
        _export_dataset(settings, dataset_format, target, selection, "parquet" if as_parquet else "jsonl", limit, force)

    command: click.Command = export_format
    return command


def _export_dataset(
    settings: Settings,
    dataset_format: str,
    target: Path,
    selection: ExportSelection,
    suffix: str,
    limit: int | None,
    force: bool,
) -> None:
    store = open_store(settings)
    warn_about_unarchived_records(settings, store)
    with show_progress(f"export {target}", "rows") as progress:
        splits, excluded = export_dataset(
            store, target, dataset_format, selection, suffix, limit, force, settings.label_quality, progress
        )
    for split, statistics in splits.items():
        location = f" in {target}/data/{split}.{suffix}" if statistics.num_rows else ""
        certainty = _format_certainty(statistics, selection.min_margin)
        click.echo(f"{split}: {format_count(statistics.num_rows, 'rows')}{location}{certainty}")
    if excluded:
        click.echo(f"records that are not training data: {format_reasons(excluded)}")


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


for _name in _FORMAT_HELP:
    export.add_command(_make_dataset_command(_name))
export.add_command(lake)
COMMAND = export
