"""`charter produce`: publish prompts, preferences or demonstrations."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import click
from click.core import ParameterSource

from charter.connect import connect_bus
from charter.console import common_options
from charter.estimate import estimate_costs, format_costs
from charter.generation import generate_prompts, open_log_or_empty, read_evaluation_texts, show_sample
from charter.installation import get_install_command
from charter.progress import show_progress
from charter.stages import STAGES
from charter.startup import start_when_ready, wait_option
from charter.text import format_json, to_one_line
from engine.bus.port import Bus
from engine.notices import NOTICES
from engine.settings import Settings
from engine.text import format_count
from producers.files import (
    SHIPPED_PROMPTS_PATH,
    FileProducer,
    InputKind,
    format_conflicts,
    format_report,
    make_human_record,
    make_prompt_record,
    make_row_metadata,
    parse_row,
)
from producers.near_duplicates import Conflict, KnownPrompt, PromptHistory, require_minhash
from producers.parse import COLUMN_NAMES, PROMPT_PART_COLUMNS, PromptRow, RowError, is_prompt_part
from producers.rows import compute_content_hash, read_rows
from schemas.records import Prompt, Record
from trainer.methods import get_rl_fraction

_INPUT_KINDS = ("prompts", "preferences", "demonstrations")
_NUM_SHOWN_ROWS = 3  # rows that --dry-run shows
_MAX_REPORTED_ROWS = 20  # rows of a file that are reported with the same reason; further rows are counted
_SHOWN_FIELDS = (
    "prompt_id", "messages", "response_a", "response_b", "p_a", "completion", "finish_reason", "source", "tags", "split", "epoch",
)  # fmt: skip


def _parse_columns(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Return the mapping of --column from Charter's names to names in the file."""
    columns: dict[str, str] = {}
    for value in values:
        name, equals, source = value.partition("=")
        # A column that is only checked can be ignored (question=), but it has no meaning that another column could have.
        is_known = name in COLUMN_NAMES - PROMPT_PART_COLUMNS if source else name in COLUMN_NAMES or is_prompt_part(name)
        if not equals or not is_known:
            names = ", ".join(sorted(COLUMN_NAMES - PROMPT_PART_COLUMNS))
            raise click.BadParameter(f"{value!r} is not NAME=COLUMN, where NAME is one of {names}", context, parameter)
        if name in columns:
            raise click.BadParameter(f"{name} is given twice", context, parameter)
        columns[name] = source
    return columns


column_option = click.option(
    "--column",
    "columns",
    metavar="NAME=COLUMN",
    multiple=True,
    callback=_parse_columns,
    help="Read NAME, such as prompt, from this column of the file. NAME= ignores the column NAME.",
)


@click.command()
@click.argument("files", nargs=-1, metavar="[FILE...]", type=click.Path())
@click.option("--as", "kind", type=click.Choice(_INPUT_KINDS), default="prompts", show_default=True, help="Type of the rows.")
@click.option("--source", metavar="NAME", default="", help='Source of rows without "source" [default: prompts or human].')
@click.option(
    "--epoch", default=0, show_default=True, help="Epoch number. A new number generates new responses to the same prompts."
)
@column_option
@click.option("--strict", is_flag=True, help="Stop at the first invalid row.")
@click.option("--publish-prompts", is_flag=True, help="Also publish the prompts of preferences and demonstrations.")
@click.option("--shipped", is_flag=True, help="Publish the prompts shipped with Charter.")
@click.option("--generate", is_flag=True, help="Sample new prompts from models.generator and a recipe, until stopped.")
@click.option("--recipe", metavar="NAME", help="With --generate: a shipped recipe or a TOML file [default: generate.recipe].")
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(min=1),
    help="With --generate: stop when the run has N prompts of this recipe and seed.",
)
@click.option("--drop-near-duplicates", is_flag=True, help="Do not publish prompts that are near an earlier prompt.")
@click.option(
    "--avoid-suite",
    "avoided_suites",
    metavar="SUITE",
    multiple=True,
    help="Do not publish prompts near a prompt of this evaluation suite: NAME, FILE or NAME=FILE. May be repeated.",
)
@click.option(
    "--dry-run", is_flag=True, help="Only print the first rows as they would be published, the number of rows and the cost."
)
@wait_option
@common_options
def produce(
    settings: Settings,
    files: tuple[str, ...],
    kind: InputKind,
    source: str,
    epoch: int,
    columns: dict[str, str],
    strict: bool,
    publish_prompts: bool,
    shipped: bool,
    generate: bool,
    recipe: str | None,
    limit: int | None,
    drop_near_duplicates: bool,
    avoided_suites: tuple[str, ...],
    dry_run: bool,
    wait: bool,
) -> None:
    """Publish prompts or labeled data.

    Read prompts, human preferences or human demonstrations from files or standard input (-). A file is JSON lines, a JSON array
    or CSV with a header (each plain or gzip), Parquet, Arrow, or a folder written by datasets.save_to_disk.

    A prompt is a JSON string or an object with "prompt" or "messages" ([{"role": "user", "content": "..."}]), and optionally
    "system", "source" and "tags". A preference also has "chosen" and "rejected", or "response_a", "response_b" and "p_a". A
    demonstration also has "completion". Rows in the formats of TRL, axolotl, LLaMA-Factory, ShareGPT, OpenAI and HH-RLHF are
    accepted (docs/sources.md). --column names a column that has another name in the file.

    Rows that are invalid or ambiguous are reported and skipped, and the exit code is then 1. Columns without effect are
    reported. Rows that were published earlier are not added again.

    --generate samples prompts without end (docs/sources.md). It waits while enough prompts of the run wait for a response, or
    while a training loop needs no further prompts. A killed generator continues at its position. The texts that are not
    published are counted by reason: no request, a near-duplicate, near an evaluation prompt, too long, another language, and others.

    --drop-near-duplicates compares each prompt of a file with the prompts of the run and with the prompts that training or
    evaluation keeps apart, and prints and counts the rows that it drops.

    \b
    Examples:
      charter produce prompts.jsonl
      echo '{"prompt": "Why is the sky blue?"}' | charter produce -
      charter produce prompts.jsonl --dry-run
      charter produce --as preferences --column prompt=question pairs.csv
      charter produce --as demonstrations --source helpful helpful.parquet
      charter produce --as preferences harmless.jsonl.gz
      charter produce --drop-near-duplicates --avoid-suite xstest=xstest.csv prompts.jsonl
      charter produce --generate --limit 100
      charter produce --generate --recipe my.toml --dry-run
    """
    context = click.get_current_context()
    if generate:
        _require_generate_options(context)
        settings = settings.model_copy(
            update={"generate": settings.generate.model_copy(update={"recipe": recipe or settings.generate.recipe})}
        )
        if dry_run:
            show_sample(settings, avoided_suites)
        else:
            generate_prompts(settings, limit or 0, avoided_suites, wait=wait)
        return
    if recipe or limit:
        raise click.UsageError("--recipe and --limit need --generate", context)
    if avoided_suites and not drop_near_duplicates:
        raise click.UsageError("--avoid-suite needs --drop-near-duplicates or --generate", context)
    if drop_near_duplicates and kind != "prompts":
        raise click.UsageError(f"--drop-near-duplicates compares prompts, so it cannot be used with --as {kind}", context)
    paths = [*files, *([str(SHIPPED_PROMPTS_PATH)] if shipped else [])]
    if not paths:
        raise click.UsageError("give FILE, - for standard input, --shipped or --generate", context)
    if shipped and kind != "prompts":
        raise click.UsageError(f"--shipped publishes prompts, so it cannot be used with --as {kind}", context)
    evaluation_texts = read_evaluation_texts(settings, avoided_suites)
    if dry_run:
        with ExitStack() as resources:
            history = (
                _open_history(settings, open_log_or_empty(settings, resources), evaluation_texts)
                if drop_near_duplicates
                else None
            )
            num_invalid = _print_dry_run(settings, paths, kind, source, epoch, columns, publish_prompts, history)
        sys.exit(1 if num_invalid else 0)
    bus, num_invalid = start_when_ready(lambda: connect_bus(settings), wait=wait), 0
    history = _open_history(settings, bus, evaluation_texts) if drop_near_duplicates else None
    for path in paths:
        bad_rows = _BadRowReporter(path)
        with show_progress(f"produce {to_one_line(path)}", "rows") as progress:
            producer = FileProducer(
                bus,
                settings.run.id,
                source=source,
                epoch=epoch,
                max_chars=settings.prompts.max_chars,
                eval_fraction=settings.prompts.eval_fraction,
                rl_fraction=get_rl_fraction(settings),
                strict=strict,
                on_bad_row=bad_rows.report,
                on_unread_columns=partial(_report_unread_columns, path, kind),
                kind=kind,
                publish_prompts=publish_prompts,
                columns=columns,
                progress=progress,
                history=history,
                on_conflict=partial(_report_conflict, path),
            )
            report = producer.publish(path)
        bad_rows.print_counts()
        num_invalid += len(report.bad_rows)
        for line in format_report(report, path, kind):
            click.echo(line)
    bus.close()
    sys.exit(1 if num_invalid else 0)


_GENERATE_OPTIONS = ("generate", "recipe", "limit", "avoided_suites", "dry_run", "wait")


def _require_generate_options(context: click.Context) -> None:
    """Raise click.UsageError if the command has an option that only matters for files."""
    for parameter in produce.params[: [p.name for p in produce.params].index("wait")]:
        name = parameter.name or ""
        if name not in _GENERATE_OPTIONS and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            shown = parameter.opts[0] if isinstance(parameter, click.Option) else "FILE"
            raise click.UsageError(f"--generate reads no file, so it cannot be used with {shown}", context)


def _open_history(settings: Settings, bus: Bus, evaluation_texts: list[tuple[str, str]]) -> PromptHistory:
    """Return the prompts of the log and of evaluation suites, for the check of near-duplicates."""
    require_minhash(f"type: {get_install_command('generate')}")
    history = PromptHistory(bus, settings.run.id, settings.prompts.duplicate_threshold)
    for origin, text in evaluation_texts:
        history.add_evaluation_text(text, origin)
    return history


def _report_conflict(path: str, row_number: int, conflict: Conflict, known: KnownPrompt) -> None:
    NOTICES.report(
        "dropped_row",
        conflict.value,
        to_one_line(
            f"{path} row {row_number} is not published, reason {conflict.value}: it is near {known.origin or known.prompt_id}"
        ),
    )


def _print_dry_run(
    settings: Settings,
    paths: list[str],
    kind: InputKind,
    source: str,
    epoch: int,
    columns: dict[str, str],
    publish_prompts: bool,
    history: PromptHistory | None,
) -> int:
    """Print the first records of each input, the number of valid rows and the maximum cost. Return the number of invalid rows."""
    num_rows, num_chars, num_invalid, num_duplicates, known_ids = 0, 0, 0, 0, set[str]()
    conflicts = Counter[Conflict]()
    if history:
        history.refresh()
    for path in paths:
        num_shown, unread_columns, bad_rows = 0, set[str](), _BadRowReporter(path)
        with show_progress(f"read {to_one_line(path)}", "rows") as progress:
            if path != "-":
                compute_content_hash(path)  # if the file is unreadable, this call raises the same error as `publish`
            for number, row in read_rows(path, columns=columns, progress=progress):
                try:
                    parsed = parse_row(row, kind, source=source, max_chars=settings.prompts.max_chars, columns=columns)
                except RowError as error:
                    bad_rows.report(number, str(error))
                    continue
                if names := [name for name in parsed.unread_columns if name not in unread_columns]:
                    unread_columns.update(names)
                    _report_unread_columns(path, kind, number, names)
                record = _make_record(settings, parsed, epoch, f"{Path(path).name}:{number}")
                if record.record_id in known_ids:
                    num_duplicates += 1
                    continue
                known_ids.add(record.record_id)
                if history and isinstance(record, Prompt):
                    if history.has_prompt(str(record.prompt_id)):
                        num_duplicates += 1
                        continue
                    if found := history.find_conflict(record.messages, record.split, epoch):
                        conflicts[found[0]] += 1
                        _report_conflict(path, number, *found)
                        continue
                    history.add_prompt(record)
                if num_shown < _NUM_SHOWN_ROWS:
                    num_shown += 1
                    shown = record.model_dump(mode="json", include=set(_SHOWN_FIELDS))
                    shown = {name: shown[name] for name in _SHOWN_FIELDS if name in shown}
                    click.echo(f"{to_one_line(path)} row {number} would be published as {format_json(shown)}")
                num_rows += 1
                num_chars += sum(len(message.content) for message in parsed.messages)
        bad_rows.print_counts()
        num_invalid += bad_rows.counts.total()
    invalid = f"; {format_count(num_invalid, 'rows', 'are')} invalid" if num_invalid else ""
    duplicates = f", {format_count(num_duplicates, 'duplicates')} skipped" if num_duplicates else ""
    dropped = "".join(f", {format_conflicts(conflict, count)}" for conflict, count in sorted(conflicts.items()))
    click.echo(f"would publish {format_count(num_rows, kind)}{duplicates}{dropped}{invalid}")
    if num_rows and (kind == "prompts" or publish_prompts):
        for line in format_costs(estimate_costs(settings, STAGES, num_rows, num_chars)):
            click.echo(line)
    return num_invalid


def _make_record(settings: Settings, parsed: PromptRow, epoch: int, origin: str) -> Record:
    """Return the record of a row."""
    metadata = make_row_metadata(
        parsed,
        settings.run.id,
        epoch=epoch,
        eval_fraction=settings.prompts.eval_fraction,
        rl_fraction=get_rl_fraction(settings),
        origin=origin,
    )
    return make_human_record(parsed, metadata) or make_prompt_record(metadata)


class _BadRowReporter:
    """Reports the invalid rows of one file on standard error, and counts them by their reasons."""

    def __init__(self, path: str) -> None:
        self.path, self.counts = path, Counter[str]()

    def report(self, row_number: int, reason: str) -> None:
        """Report one row. Only count the row if many rows have the same reason."""
        self.counts[reason] += 1
        if self.counts[reason] <= _MAX_REPORTED_ROWS:
            click.echo(to_one_line(f"{self.path} row {row_number}: {reason}"), err=True)
        if self.counts[reason] == _MAX_REPORTED_ROWS:
            click.echo("  further rows with this reason are not printed; they are counted below", err=True)

    def print_counts(self) -> None:
        """Print the counts of the reasons of which some rows were not printed."""
        for reason, count in self.counts.items():
            if count > _MAX_REPORTED_ROWS:
                click.echo(to_one_line(f"{self.path}: {format_count(count, 'rows')}: {reason}"), err=True)


def _report_unread_columns(path: str, kind: str, row_number: int, names: Sequence[str]) -> None:
    line = f"{path} row {row_number}: columns without effect on {kind}: {', '.join(names)}"
    click.echo(to_one_line(line), err=True)


COMMAND = produce
