"""What every verb of the command line shares: its options, its settings, and how it prints."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import click

_PROGRESS_LOGGER = logging.getLogger("charter.progress")


def common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every verb has; the verb gets `settings` (and `origins`, if it names it)."""
    options = [
        click.option("--data", metavar="FOLDER", type=click.Path(), help="Data folder: database, embedded log, checkpoints."),
        click.option("--bus", metavar="ADDRESS", help="kafka://HOST:PORT or a folder with an embedded log."),
        click.option("--run", "run_id", metavar="ID", help="The run that records belong to."),
        click.option("--config", metavar="FILE", type=click.Path(path_type=Path), help="Settings file."),
        click.option(
            "--set", "assignments", metavar="NAME=VALUE", multiple=True, help="Any setting, e.g. respond.num_completions=4."
        ),
        click.option("-v", "--verbose", is_flag=True, help="Log what happens."),
        click.option("--log-json", is_flag=True, help="Log as one JSON object a line."),
        click.option("--traceback", is_flag=True, help="Show where an error came from."),
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
        chosen = {name: value for name, value in flags.items() if value is not None} | _parse_assignments(assignments)
        preset = _PRESETS_BY_COMMAND.get(function.__name__)
        return function(**_load_settings(function, chosen, config, preset), **rest)

    for option in reversed(options):
        wrapper = option(wrapper)
    return wrapper


def configure_logging(verbose: bool, as_json: bool) -> None:
    """To standard error: for a person, or one JSON object a line."""
    from engine.logs import JsonFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else TerminalFormatter())
    _PROGRESS_LOGGER.setLevel(logging.INFO if as_json else logging.NOTSET)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    # The client's own log tells of every retry; our errors say what it comes to.
    logging.getLogger("kafka").setLevel(logging.WARNING if verbose else logging.CRITICAL)


def print_progress(text: str, level: int = logging.INFO) -> None:
    """How it goes, on standard error; with --log-json a line of the log, so that all of it can be parsed."""
    if _PROGRESS_LOGGER.level == logging.NOTSET:
        click.echo(text, err=True)
    else:
        _PROGRESS_LOGGER.log(level, text)


class TerminalFormatter(logging.Formatter):
    """A log record for a person; what a terminal would obey is shown as escapes."""

    def __init__(self) -> None:
        from engine.logs import LOG_FORMAT

        super().__init__(LOG_FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        from charter.text import escape_unprintable

        return escape_unprintable(super().format(record))


def _load_settings(function: Callable[..., Any], flags: dict[str, Any], file: Path | None, preset: Any) -> dict[str, Any]:
    from engine.settings import load_settings

    settings, origins = load_settings(flags, file, preset() if preset else None)
    named = function.__code__.co_varnames[: function.__code__.co_argcount]
    return {"settings": settings} | ({"origins": origins} if "origins" in named else {})


def _get_demo_preset() -> dict[str, dict[str, Any]]:
    from charter.demo import DEMO_PRESET

    return DEMO_PRESET


_PRESETS_BY_COMMAND = {"demo": _get_demo_preset}


def _parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in assignments]
    for name, equals, _ in pairs:
        if not equals:
            raise click.UsageError(
                f"--set {name}: write it as NAME=VALUE, e.g. --set respond.num_completions=4", click.get_current_context()
            )
    return {name: value for name, _, value in pairs}


json_option = click.option("--json", "as_json", is_flag=True, help="As JSON, for other programs.")


def print_rows(columns: list[str], rows: list[tuple[Any, ...]], as_json: bool) -> None:
    from charter.text import format_json, format_rows

    if as_json:
        click.echo(format_json([dict(zip(columns, row, strict=True)) for row in rows]))
    elif columns:
        click.echo(format_rows(columns, rows))


def stop_on_signals() -> threading.Event:
    """An event that SIGINT and SIGTERM set; a second signal kills as usual."""
    stop = threading.Event()

    def handle(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop
