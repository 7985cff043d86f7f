"""`charter produce`: publish prompts, preferences or demonstrations."""

from __future__ import annotations

import sys
from functools import partial

import click

from charter.connect import connect_bus
from charter.console import common_options
from charter.estimate import estimate_costs, format_costs
from charter.pipeline import STAGES
from charter.text import to_one_line
from engine.settings import Settings
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer, InputKind, format_report
from producers.parse import ROW_PARSERS, RowError
from producers.rows import compute_content_hash, read_rows

_INPUT_KINDS = ("prompts", "preferences", "demonstrations")


@click.command()
@click.argument("files", nargs=-1, metavar="[FILE...]", type=click.Path())
@click.option("--as", "kind", type=click.Choice(_INPUT_KINDS), default="prompts", show_default=True, help="What the rows are.")
@click.option("--source", metavar="NAME", default="", help='The source of rows that name none [default: prompts or "human"].')
@click.option("--epoch", default=0, show_default=True, help="Another number samples the same prompts anew.")
@click.option("--strict", is_flag=True, help="Stop at the first bad line.")
@click.option("--answer", is_flag=True, help="Let the stages answer the prompts of comparisons and demonstrations too.")
@click.option("--shipped", is_flag=True, help="Publish the prompts that come with Charter.")
@click.option("--dry-run", is_flag=True, help="Say what it would publish and cost, and publish nothing.")
@common_options
def produce(
    settings: Settings,
    files: tuple[str, ...],
    kind: InputKind,
    source: str,
    epoch: int,
    strict: bool,
    answer: bool,
    shipped: bool,
    dry_run: bool,
) -> None:
    """Publish prompts or labeled data.

    Prompts, or people's comparisons and demonstrations, from files or from standard input (-).

    Files are JSON lines (also gzipped), Parquet, Arrow, or the folder of a data set saved to disk. A row is a JSON string, or
    has "prompt" or "messages" ([{"role": "user", "content": "..."}]), with "source" and "tags" if you like; a comparison has
    "chosen" and "rejected" too (or "response_a", "response_b" and "p_a"), a demonstration "completion". HH-RLHF's dialogues are understood.
    Bad rows are reported and skipped; the exit code is then 1.

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
        raise click.UsageError("give a file, - for standard input, or --shipped", context)
    if shipped and kind != "prompts":
        raise click.UsageError(f"--shipped are prompts, not {kind}", context)
    if dry_run:
        _print_dry_run(settings, paths, kind, answer)
        return
    bus, bad = connect_bus(settings), 0
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
            publish_prompts=answer,
        )
        report = producer.publish(path)
        bad += len(report.bad_rows)
        for line in format_report(report, path, kind):
            click.echo(line)
    bus.close()
    sys.exit(1 if bad else 0)


def _print_dry_run(settings: Settings, paths: list[str], kind: InputKind, answer: bool) -> None:
    """How many rows these inputs have, and what the answers, chains and judgements of their prompts cost at most."""

    prompts, chars, bad = 0, 0, 0
    for path in paths:
        if path != "-":
            compute_content_hash(path)  # says what is wrong with a file that cannot be read
        for number, row in read_rows(path):
            try:
                parsed = ROW_PARSERS[kind](row, source=kind, max_chars=settings.prompts.max_chars)
            except RowError as error:
                _report_bad_row(path, number, str(error))
                bad += 1
            else:
                prompts += 1
                chars += sum(len(message.content) for message in parsed.messages)
    click.echo(f"would publish {prompts} {kind}" + (f"; {bad} lines are no {kind}" if bad else ""))
    if kind != "prompts" and not answer:
        return
    for text in format_costs(estimate_costs(settings, STAGES, prompts, chars)):
        click.echo(text)


def _report_bad_row(path: str, line_number: int, reason: str) -> None:

    click.echo(to_one_line(f"{path} line {line_number}: {reason}"), err=True)


COMMAND = produce
