"""The command line: one grammar for every verb, light to start, clear when something is wrong.

Exit codes: 0 ok, 1 failed, 2 wrong use, 3 a dependency is unreachable. Errors are three lines: what, why, what to type.
Nothing heavy is imported here; each verb imports what it needs.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

import charter
from charter.options import common_options, json_option, print_progress, print_rows, stop_on_signals
from charter.policies import PHASES

if TYPE_CHECKING:
    from engine.host import Host
    from engine.settings import Settings
    from engine.store import QueryResult
    from producers.files import InputKind

_REPORT_INTERVAL_POLLS = 25  # looks of 0.2 s
_DONE_CHECK_INTERVAL_POLLS = 5
_SIGNAL_POLL_INTERVAL_S = 0.2
STAGES = ("respond", "critique", "revise", "judge", "sink")
_INPUT_KINDS = ("prompts", "preferences", "demonstrations")
SECTIONS = {
    "Start": ("demo", "produce", "run", "train", "up", "down"),
    "Look": ("dashboard", "report", "status", "show", "sql", "tail", "doctor", "config"),
    "Policies": ("policy", "batches", "chat"),
    "Principles": ("constitution", "eval"),
    "Label": ("label", "export"),
    "Again": ("replay", "runs", "dlq"),
    "Keep": ("topics", "snapshot", "backup", "restore", "forget", "completion"),
}
VERBS = tuple(verb for verbs in SECTIONS.values() for verb in verbs)


class _StageParamType(click.Choice[str]):
    """A stage of Charter's, or the file of one's own."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value if value.endswith(".py") else super().convert(value, param, ctx)


class _SectionedGroup(click.Group):
    """Lists the verbs by what one wants to do, in the order in which one meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [verb for verb in VERBS if verb in self.commands]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        longest = max(len(verb) for verb in self.commands)
        limit = formatter.width - longest - 6
        for title, verbs in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(verb.ljust(longest), self.commands[verb].get_short_help_str(limit)) for verb in verbs])


@click.group(
    cls=_SectionedGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(charter.__version__, prog_name="charter")
@click.pass_context
def cli(context: click.Context) -> None:
    """Charter streams prompts through responses, critiques, revisions and judgements into DuckDB, and trains on them.

    Without a verb: the status of the run here, or how to start one.

    \b
    First steps:
      charter demo                   the whole loop once, with a small real model
      charter sql "select * from traces limit 1"
      charter produce prompts.jsonl && charter run
    """
    if context.invoked_subcommand is None:
        _print_status_or_first_steps(context)


def _print_status_or_first_steps(context: click.Context) -> None:
    """The status of the run in this folder, or the three commands to start with."""
    from charter.pipeline import open_store
    from engine.settings import load_settings

    if open_store(load_settings()[0]).path.exists():
        context.invoke(status)
        return
    click.echo(_FIRST_STEPS)


_FIRST_STEPS = """There is no run in this folder yet. To start one:

  charter demo                                        the whole loop once, with a small real model
  charter produce prompts.jsonl                       your own prompts, one JSON string or object a line
  charter run --until-done                            every stage and the sink, until nothing is left to do

charter --help lists everything; charter doctor looks for what is missing."""


@cli.command()
@click.option(
    "--prompts",
    type=click.IntRange(1),
    default=24,
    show_default=True,
    help="Prompts of the first act; the later ones have 2/3 and 1/3.",
)
@common_options
def demo(settings: Settings, prompts: int) -> None:
    """The whole loop once, with a real small model.

    Real prompts, every stage, SFT, reward model, PPO, new policies.

    Killed half way, it goes on where it was when started again.

    \b
    Examples:
      charter demo
      charter demo --data /tmp/demo --prompts 6
    """
    from charter.demo import Demo

    Demo(settings, prompts).run()


@cli.command()
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
    """Publish prompts or labelled data.

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
    from charter.pipeline import connect_bus
    from producers.files import SHIPPED_PROMPTS_PATH, FileProducer, format_report

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
    from charter.estimate import estimate_costs, format_costs
    from producers.parse import ROW_PARSERS, RowError
    from producers.rows import compute_content_hash, read_rows

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
    for text in format_costs(estimate_costs(settings, STAGES[:-1], prompts, chars)):
        click.echo(text)


def _report_bad_row(path: str, line_number: int, reason: str) -> None:
    from charter.text import to_one_line

    click.echo(to_one_line(f"{path} line {line_number}: {reason}"), err=True)


@cli.command()
@click.option("--stage", "stages", multiple=True, type=_StageParamType(STAGES), help="Only this one, or a FILE.py; repeatable.")
@click.option("--slot", metavar="NAME", help="This copy's fixed name, e.g. a pod's ordinal.")
@click.option("--until-done", is_flag=True, help="Stop when nothing on the log is left to do for them.")
@common_options
def run(settings: Settings, stages: tuple[str, ...], slot: str | None, until_done: bool) -> None:
    """Run the stages and the sink until stopped.

    All of them in one process, or those that --stage names: also one of your own in a Python file (docs/extending.md).

    \b
    Examples:
      charter run
      charter run --until-done
      charter run --bus kafka://localhost:9092 --stage respond
      charter run --bus kafka://localhost:9092 --stage sink
    """
    from charter import custom_stage
    from charter.pipeline import STAGE_ROLES, connect_bus, is_all_work_done, make_host, open_store

    chosen = stages or STAGES
    named = [name for name in chosen if name in STAGES]
    own = [custom_stage.load_custom_stage(name, tuple(STAGE_ROLES.values())) for name in chosen if name not in STAGES]
    bus, stop = connect_bus(settings), stop_on_signals()
    host = make_host(settings, bus, [n for n in named if n != "sink"], sink="sink" in named, custom_stages=own, instance=slot)
    end = "until nothing is left to do" if until_done else "stop with Ctrl-C"
    print_progress(f"running {', '.join(chosen)} for run {settings.run.id}; {end}")
    written = open_store(settings) if "sink" in named else None
    last, looks = "", 0
    with host:
        while not stop.wait(0.2) and not host.failure_event.is_set():
            looks += 1
            if looks % _REPORT_INTERVAL_POLLS == 0 and (line := _format_committed(host)) != last:
                print_progress(line)
                last = line
            if until_done and looks % _DONE_CHECK_INTERVAL_POLLS == 0 and is_all_work_done(bus, host.workers, written):
                print_progress(f"nothing is left to do; finished now: {_format_committed(host)}")
                break
    if host.abandoned_threads:
        print_progress(f"stopped without waiting longer for {', '.join(host.abandoned_threads)}; its work is done again")
        sys.stderr.flush()
        os._exit(0 if host.failure is None else getattr(host.failure, "exit_code", 1))  # a thread is still at work
    bus.close()
    host.raise_if_failed()


def _format_committed(host: Host) -> str:
    """How many records each stage has finished since the start."""
    return " ".join(f"{worker.stage.name}={worker.num_committed}" for worker in host.workers)


@cli.command()
@click.option("--phase", type=click.Choice(PHASES), help="Update this now, with whatever rows are new.")
@click.option("--loop", is_flag=True, help="Keep updating whenever there are enough new rows, until stopped.")
@common_options
def train(settings: Settings, phase: str | None, loop: bool) -> None:
    """Train on what has arrived, once or in a loop.

    The phase that is due, one named phase, or with --loop one after the other.

    \b
    Examples:
      charter train
      charter train --phase sft
      charter train --loop
      accelerate launch --multi_gpu --num_processes 4 --module charter train --loop
    """
    from charter.training import run_training

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        run_training(settings, phase, loop)
        return
    from trainer import distributed

    with distributed.join_processes() as first:
        if first:
            run_training(settings, phase, loop)


@cli.command()
@json_option
@common_options
def status(settings: Settings, origins: dict[str, str], as_json: bool) -> None:
    """What there is, what waits, and which policies answer.

    What is in the database, what waits at the stages of a run (the newest, or --run), and which policies there are.

    \b
    Examples:
      charter status
      charter status --json
    """
    from charter.pipeline import compute_lags, connect_bus, open_store, resolve_run_id
    from charter.text import escape_unprintable

    store = open_store(settings)
    found = store.query("SELECT * FROM pipeline_status")
    run_id = resolve_run_id(settings, origins, store)
    bus = connect_bus(settings)
    waiting = compute_lags(bus, run_id, settings.judge.pairing)
    bus.close()
    print_rows([*found.columns, "waiting"], [(*row, waiting.get(row[0])) for row in found.rows], as_json)
    if as_json:
        return
    click.echo(escape_unprintable(f"(waiting: what the stages of run {run_id} have not done yet; - where none of them reads)"))
    newest = store.query("SELECT kind, version, phase, created_at, uri FROM policies ORDER BY commit_seq DESC LIMIT 10")
    if newest.rows:
        click.echo()
        rows = [(kind.lower(), *row, Path(uri).name) for kind, *row, uri in newest.rows]
        print_rows([*newest.columns[:-1], "weights"], rows, False)


@cli.command()
@click.argument("identifier", metavar="ID")
@json_option
@common_options
def show(settings: Settings, identifier: str, as_json: bool) -> None:
    """The story of one prompt.

    ID is a prompt's or any record's id, or the beginning of one.

    \b
    Examples:
      charter show 3f2a
      charter show 3f2a --json
    """
    from charter.pipeline import find_prompt_ids, open_store
    from charter.text import format_json, format_trace
    from engine.errors import UsageError

    store = open_store(settings)
    found = find_prompt_ids(store, identifier)
    if len(found) != 1:
        raise UsageError(
            f"{identifier!r} is the beginning of {len(found) or 'no'} ids",
            "it must name one prompt or one record",
            "type: charter sql 'select prompt_id, prompt from traces limit 10'",
        )
    rows = store.query_dicts("SELECT * FROM traces WHERE prompt_id = ?", found)
    click.echo(format_json(rows) if as_json else format_trace(rows[0]))


@cli.command()
@click.argument("statement", metavar="[SQL]", required=False)
@click.option(
    "--limit-s",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Cut a query that takes longer, in seconds.",
)
@click.option("--tables", is_flag=True, help="List the tables and views with their columns.")
@json_option
@common_options
def sql(settings: Settings, statement: str | None, limit_s: float, tables: bool, as_json: bool) -> None:
    """Ask the database, read-only. SQL may be - to read it from standard input.

    \b
    Examples:
      charter sql "select * from traces limit 1"
      charter sql "select policy_version, count(*) from responses group by 1"
      charter sql --tables
    """
    from charter.pipeline import open_store

    if tables:
        statement = TABLES_SQL
    elif statement == "-":
        statement = sys.stdin.read()
    if not statement:
        raise click.UsageError('give a query, e.g. "select * from traces limit 1"', click.get_current_context())
    found = _run_interruptible(lambda: open_store(settings).query(statement, limit_s=limit_s))
    print_rows(found.columns, found.rows, as_json)


def _run_interruptible(run_query: Callable[[], QueryResult]) -> QueryResult:
    """What `ask` answers, from a thread of its own: DuckDB does not always hear of a Ctrl-C while it is at work."""

    def stop(*_: object) -> None:
        os.write(2, b"\n")
        os._exit(130)  # what only reads leaves nothing behind

    before = signal.signal(signal.SIGINT, stop)
    try:
        answer = ThreadPoolExecutor(1).submit(run_query)
        while not wait(
            [answer], _SIGNAL_POLL_INTERVAL_S
        ).done:  # a signal that comes just before a wait without end is heard after it
            pass
        return answer.result()
    finally:
        signal.signal(signal.SIGINT, before)


TABLES_SQL = """SELECT table_name AS name, string_agg(column_name, ', ' ORDER BY ordinal_position) AS columns
            FROM information_schema.columns WHERE table_schema = 'main' GROUP BY 1 ORDER BY 1"""


@cli.command()
@click.argument("topic")
@click.option("-n", "count", type=click.IntRange(0), default=10, show_default=True, help="How many of the newest records.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what arrives, until stopped.")
@click.option("--raw", is_flag=True, help="Do not decode; show the bytes.")
@click.option("--json", is_flag=True, expose_value=False, help="As JSON, which it is anyway: an object a line.")
@common_options
def tail(settings: Settings, topic: str, count: int, follow: bool, raw: bool) -> None:
    """The newest records of a topic, one JSON object a line.

    \b
    Examples:
      charter tail responses -n 1
      charter tail preferences --follow
    """
    from charter.pipeline import connect_bus
    from charter.tail import tail_topic

    bus = connect_bus(settings)
    stop = stop_on_signals() if follow else None
    for line in tail_topic(bus, topic, count, stop, raw=raw):
        click.echo(line)
    bus.close()


@cli.command()
@click.option("--defaults", is_flag=True, help="Print a charter.toml with every key, its default and its meaning.")
@json_option
@common_options
def config(settings: Settings, origins: dict[str, str], defaults: bool, as_json: bool) -> None:
    """Every setting: its value here, and where that came from.

    \b
    Examples:
      charter config
      charter config --defaults > charter.toml
      CHARTER_RESPOND__NUM_COMPLETIONS=4 charter config --json
    """
    from engine.settings import format_settings_file, iter_settings

    if defaults:
        click.echo(format_settings_file(), nl=False)
        return
    rows = [(f"{s}.{k}", getattr(getattr(settings, s), k), origins[f"{s}.{k}"], f.description) for s, k, f in iter_settings()]
    columns = ["setting", "value", "from", "meaning"]
    if as_json:
        print_rows(columns, rows, True)
    else:
        from charter.text import fits_terminal, format_table

        text = format_table(columns, rows)
        if sys.stdout.isatty() and not fits_terminal(text):  # in a pipe a setting stays on one line
            text = "\n".join(f"{name} = {value}  ({origin})\n    {meaning}" for name, value, origin, meaning in rows)
        click.echo(text)


def _register_commands() -> None:
    """The verbs that live in files of their own."""
    from charter import (
        batches,
        chat,
        completion,
        constitution,
        dead_letters,
        doctor,
        evaluate,
        export,
        label,
        policies,
        replay,
        report,
        storage,
        topics,
        up,
    )
    from charter.dashboard import command as dashboard

    looking, training, labels = (dashboard, doctor, report, topics), (batches, chat, policies), (export, label)
    for module in (*looking, *training, *labels, completion, constitution, dead_letters, evaluate, replay, storage, up):
        for verb in module.VERBS:
            cli.add_command(verb)


_register_commands()

_WRONG_PATH_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_TRAINING_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "huggingface_hub", "gguf")


def main() -> None:
    """Run the command line; every error is three lines and an exit code."""
    # Before torch is loaded: threads that spin while they wait make a busy machine slower by an order of magnitude.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 shows what it cannot write as escapes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        cli(prog_name="charter", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if "--traceback" in sys.argv and not isinstance(error, click.ClickException):
            raise
        from charter.text import to_one_line

        what, why, fix = describe_error(error)
        print_progress("\n".join(to_one_line(part) for part in (f"error: {what}", why, fix) if part), logging.ERROR)
        sys.exit(2 if isinstance(error, _WRONG_PATH_ERRORS) else getattr(error, "exit_code", 1))


def describe_error(error: Exception) -> tuple[str, str, str]:
    """What happened, why, and what to type."""
    if hasattr(error, "what"):
        return error.what, getattr(error, "why", ""), getattr(error, "fix", "")
    if isinstance(error, click.ClickException):
        return _describe_usage_error(error)
    if isinstance(error, ModuleNotFoundError) and error.name in _TRAINING_PACKAGES:
        why = "local models and training are an extra, so that other workers stay small"
        return f"this needs {error.name}, which is not installed", why, "type: pip install -e '.[train]'"
    if isinstance(error, OSError):
        return (
            f"{error.filename or 'the output, or a file,'} cannot be used",
            str(error.strerror),
            "give another file or folder, make room, or mend its permissions",
        )
    place = traceback.extract_tb(error.__traceback__)[-1]
    why = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    return "this is a fault of Charter's own", why, "type the same with --traceback to see where it comes from"


def _describe_usage_error(error: click.ClickException) -> tuple[str, str, str]:
    """Of a verb, an option or a value that does not exist: what is accepted instead."""
    context = getattr(error, "ctx", None) or click.Context(cli, info_name="charter")
    usage = context.command.get_usage(context).removeprefix("Usage: ")
    return error.format_message(), f"it is used so: {usage}", f"type: {context.command_path} --help"


if __name__ == "__main__":
    main()
