"""Provide what all commands share: common options, loading of settings, logging, and printing of tables, JSON and CSV.

`charter --help` imports this file, so functions import pydantic and rich only when they need them.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any

import click

from charter.text import escape_unprintable, format_json, get_terminal_width

_PROGRESS_LOGGER = logging.getLogger("charter.progress")


def common_options(
    function: Callable[..., Any], *, get_preset: Callable[[], dict[str, dict[str, Any]]] | None = None
) -> Callable[..., Any]:
    """Add the options that every verb has. Pass `settings` to the command.

    Also pass `origins` if the command has a parameter of this name.

    `get_preset` returns default settings of this command. All other sources of settings override them.
    """
    options = [
        click.option(
            "--data",
            metavar="FOLDER",
            type=click.Path(),
            help="Data folder for the database, the embedded log and the checkpoints.",
        ),
        click.option("--bus", metavar="ADDRESS", help="kafka://HOST:PORT or a folder with an embedded log."),
        click.option("--run", "run_id", metavar="ID", help="ID of the run to read or write."),
        click.option("--config", metavar="FILE", type=click.Path(path_type=Path), help="Settings file."),
        click.option(
            "--set", "assignments", metavar="NAME=VALUE", multiple=True, help="Set any setting, e.g. respond.num_completions=4."
        ),
        click.option("-v", "--verbose", is_flag=True, help="Log at level INFO."),
        click.option("--log-json", is_flag=True, help="Log one JSON object per line."),
        click.option("--traceback", is_flag=True, help="Print the Python traceback of an error."),
    ]

    @wraps(function)
    def wrapper(
        data: str | None,
        bus: str | None,
        run_id: str | None,
        config: Path | None,
        assignments: tuple[str, ...],
        verbose: bool,
        log_json: bool,
        traceback: bool,
        **rest: Any,
    ) -> Any:
        configure_logging(verbose, log_json)
        flags = {"data.folder": data, "bus.address": bus, "run.id": run_id}
        overrides = {name: value for name, value in flags.items() if value is not None} | _parse_assignments(assignments)
        return function(**_load_settings(function, overrides, config, get_preset() if get_preset else None), **rest)

    for option in reversed(options):
        wrapper = option(wrapper)
    return wrapper


def configure_logging(verbose: bool, as_json: bool) -> None:
    """Log to standard error, as plain lines or as one JSON object per line."""
    from engine.logs import JsonFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else TerminalFormatter())
    _PROGRESS_LOGGER.setLevel(logging.INFO if as_json else logging.NOTSET)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    # The Kafka client logs every retry. Charter reports the final error, so these messages are hidden without --verbose.
    logging.getLogger("kafka").setLevel(logging.WARNING if verbose else logging.CRITICAL)


def is_logging_json() -> bool:
    """Return whether the command logs JSON objects instead of lines (--log-json)."""
    return _PROGRESS_LOGGER.level != logging.NOTSET


def print_progress(message: str, level: int = logging.INFO) -> None:
    """Print a progress message to standard error. With --log-json, log the message as JSON instead."""
    if not is_logging_json():
        click.echo(message, err=True)
    else:
        _PROGRESS_LOGGER.log(level, message)


class TerminalFormatter(logging.Formatter):
    """Formats a log record as a plain line. Control characters become escapes, so that a terminal does not execute them."""

    def __init__(self) -> None:
        from engine.logs import LOG_FORMAT

        super().__init__(LOG_FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        return escape_unprintable(super().format(record))


def _load_settings(function: Callable[..., Any], flags: dict[str, Any], file: Path | None, preset: Any) -> dict[str, Any]:
    """Return the argument `settings`. Also return `origins` if `function` has a parameter of this name."""
    from engine.settings import find_unused_settings_file, load_settings

    settings, origins = load_settings(flags, file, preset)
    if file is None and (unused := find_unused_settings_file(Path.cwd())):
        print_progress(
            f"{unused} is not used: a command uses only the charter.toml of the folder in which it runs, or --config FILE",
            logging.WARNING,
        )
    parameters = function.__code__.co_varnames[: function.__code__.co_argcount]
    return {"settings": settings} | ({"origins": origins} if "origins" in parameters else {})


def _parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    pairs = [assignment.partition("=") for assignment in assignments]
    for name, equals, _ in pairs:
        if not equals:
            raise click.UsageError(
                f"--set {name}: the setting must have the form NAME=VALUE, e.g. --set respond.num_completions=4",
                click.get_current_context(),
            )
    return {name: value for name, _, value in pairs}


accept_configuration_option = click.option(
    "--accept-configuration",
    is_flag=True,
    help="Add the changed settings of the stages to the run as a further configuration.",
)
_REPLAY_RANGE_OPTIONS = (
    click.option(
        "--from",
        "start",
        default="earliest",
        show_default=True,
        help="First record to read: earliest, an offset, a time, or run:ID.",
    ),
    click.option(
        "--to", "end", default="latest", show_default=True, help="End of the records (exclusive): latest, an offset, or a time."
    ),
    click.option(
        "--archive", is_flag=True, help="Read the records from the database, which also has records that the log has deleted."
    ),
    click.option("--dry-run", is_flag=True, help="Only print the plan and the cost."),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def replay_range_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of commands that replay records: --from, --to, --archive and --dry-run."""
    for option in reversed(_REPLAY_RANGE_OPTIONS):
        function = option(function)
    return function


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json and --csv. The command gets `output`: "json", "csv", or "" for a table."""
    json_flag = click.option("--json", "output", flag_value="json", default="", help="Print JSON.")
    csv_flag = click.option("--csv", "output", flag_value="csv", help="Print CSV with a header row.")
    return json_flag(csv_flag(function))


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]], output: str) -> None:
    """Print rows as a table, as a JSON list of objects, or as CSV."""
    if output == "json":
        click.echo(format_json([dict(zip(columns, row, strict=True)) for row in rows]))
    elif output == "csv":
        click.echo(format_csv(columns, rows), nl=False)
    elif columns:
        click.echo(format_rows(columns, rows))


def print_records(records: Mapping[str, Any] | Sequence[Mapping[str, Any]], output: str) -> None:
    """Print one object, or a list of objects, as JSON or as CSV. `output` must not be empty."""
    if output == "json":
        click.echo(format_json(records))
        return
    rows = [records] if isinstance(records, Mapping) else list(records)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    click.echo(format_csv(columns, [[row.get(name) for name in columns] for row in rows]), nl=False)


_MAX_CELL_CHARS = 60
_MAX_WIDTH = 100_000  # in columns; tables are narrower, so lines in files and pipes are not folded
_BOX = ["    ", "    ", " -  ", "    ", "    ", "    ", "    ", "    "]  # two spaces between columns, a line under the header


def format_cell(value: Any) -> str:
    """Return a value as one line of text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, datetime):
        return value.isoformat(" ", "seconds")
    if isinstance(value, list | dict | tuple):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return escape_unprintable(str(value)).replace("\n", "\\n")


def format_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table with one line per row. Numbers are aligned to the right.

    Wide characters (CJK, emoji) are measured in terminal cells. On a terminal that is too narrow, cells are folded inside their
    columns. In a file or a pipe, the result does not depend on the terminal width.
    """
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    table = Table(box=Box("\n".join(_BOX) + "\n", ascii=True), show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(columns):
        is_numeric = bool(rows) and all(isinstance(row[i], int | float | None) for row in rows)
        table.add_column(Text(name), justify="right" if is_numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(format_cell(value)) for value in row))
    width = get_terminal_width() if sys.stdout.isatty() else _MAX_WIDTH
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _format_row_blocks(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return one block per row, with one line per column. This format is for rows with long cells."""
    parts = []
    for number, row in enumerate(rows, 1):
        parts.append(f"--- row {number}")
        parts += [f"{name}: {_format_nested(value)}" for name, value in zip(columns, row, strict=True)]
    return "\n".join(parts)


def _format_nested(value: Any) -> str:
    if isinstance(value, list | dict):
        return escape_unprintable(json.dumps(value, ensure_ascii=False, indent=2, default=str))
    return escape_unprintable(value) if isinstance(value, str) else format_cell(value)


def format_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table, or one block per row if a cell has more than 60 characters. The choice does not depend on the terminal width."""
    is_short = all(len(format_cell(value)) <= _MAX_CELL_CHARS for row in rows for value in row)
    return format_table(columns, rows) if is_short else _format_row_blocks(columns, rows)


def format_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as CSV (RFC 4180) with a header row. Null is an empty field. Lists and objects are JSON."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([format_json(value, indent=None) if isinstance(value, list | dict | tuple) else value for value in row])
    return buffer.getvalue()
