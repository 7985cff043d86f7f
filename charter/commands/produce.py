"""`charter produce`: publish prompts, preferences or demonstrations."""

from __future__ import annotations

import sys
from functools import partial

import click

from charter.connect import connect_bus
from charter.console import common_options
from charter.estimate import estimate_costs, format_costs
from charter.stages import STAGES
from charter.text import to_one_line
from engine.settings import Settings
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer, InputKind, format_report
from producers.parse import ROW_PARSERS, RowError
from producers.rows import compute_content_hash, read_rows

_INPUT_KINDS = ("prompts", "preferences", "demonstrations")


@click.command()
@click.argument("files", nargs=-1, metavar="[FILE...]", type=click.Path())
@click.option("--as", "kind", type=click.Choice(_INPUT_KINDS), default="prompts", show_default=True, help="Type of the rows.")
@click.option("--source", metavar="NAME", default="", help='Source of rows without "source" [default: prompts or human].')
@click.option(
    "--epoch", default=0, show_default=True, help="Epoch number. A new number generates new responses to the same prompts."
)
@click.option("--strict", is_flag=True, help="Stop at the first invalid row.")
@click.option("--publish-prompts", is_flag=True, help="Also publish the prompts of preferences and demonstrations.")
@click.option("--shipped", is_flag=True, help="Publish the prompts shipped with Charter.")
@click.option("--dry-run", is_flag=True, help="Only print the number of rows and the cost.")
@common_options
def produce(
    settings: Settings,
    files: tuple[str, ...],
    kind: InputKind,
    source: str,
    epoch: int,
    strict: bool,
    publish_prompts: bool,
    shipped: bool,
    dry_run: bool,
) -> None:
    """Publish prompts or labeled data.

    Read prompts, human preferences or human demonstrations from files or standard input (-). A file is JSON lines (plain or
    gzip), Parquet, Arrow, or a folder written by datasets.save_to_disk.

    A prompt is a JSON string or an object with "prompt" or "messages" ([{"role": "user", "content": "..."}]), and optionally
    "source" and "tags". A preference also has "chosen" and "rejected", or "response_a", "response_b" and "p_a". A demonstration
    also has "completion". Rows in the format of HH-RLHF are accepted.

    Invalid rows are reported and skipped, and the exit code is then 1. Rows that were published earlier are not added again.

    \b
    Examples:
      charter produce prompts.jsonl
      echo '{"prompt": "Why is the sky blue?"}' | charter produce -
      charter produce prompts.jsonl --dry-run
      charter produce --as demonstrations --source helpful helpful.parquet
      charter produce --as preferences harmless.jsonl.gz
    """
    paths, context = [*files, *([str(SHIPPED_PROMPTS_PATH)] if shipped else [])], click.get_current_context()
    if not paths:
        raise click.UsageError("give FILE, - for standard input, or --shipped", context)
    if shipped and kind != "prompts":
        raise click.UsageError(f"--shipped publishes prompts, so it cannot be used with --as {kind}", context)
    if dry_run:
        _print_dry_run(settings, paths, kind, publish_prompts)
        return
    bus, num_invalid = connect_bus(settings), 0
    for path in paths:
        producer = FileProducer(
            bus,
            settings.run.id,
            source=source,
            epoch=epoch,
            max_chars=settings.prompts.max_chars,
            eval_fraction=settings.prompts.eval_fraction,
            strict=strict,
            on_bad_row=partial(_report_bad_row, path),
            kind=kind,
            publish_prompts=publish_prompts,
        )
        report = producer.publish(path)
        num_invalid += len(report.bad_rows)
        for line in format_report(report, path, kind):
            click.echo(line)
    bus.close()
    sys.exit(1 if num_invalid else 0)


def _print_dry_run(settings: Settings, paths: list[str], kind: InputKind, publish_prompts: bool) -> None:
    """Print the number of valid rows, and the maximum cost of processing their prompts."""
    num_rows, num_chars, num_invalid = 0, 0, 0
    for path in paths:
        if path != "-":
            compute_content_hash(path)  # if the file is unreadable, this call raises the same error as `publish`
        for number, row in read_rows(path):
            try:
                parsed = ROW_PARSERS[kind](row, source=kind, max_chars=settings.prompts.max_chars)
            except RowError as error:
                _report_bad_row(path, number, str(error))
                num_invalid += 1
            else:
                num_rows += 1
                num_chars += sum(len(message.content) for message in parsed.messages)
    click.echo(f"would publish {num_rows} {kind}" + (f"; {num_invalid} rows are invalid" if num_invalid else ""))
    if kind != "prompts" and not publish_prompts:
        return
    for line in format_costs(estimate_costs(settings, STAGES, num_rows, num_chars)):
        click.echo(line)


def _report_bad_row(path: str, line_number: int, reason: str) -> None:
    click.echo(to_one_line(f"{path} line {line_number}: {reason}"), err=True)


COMMAND = produce
