"""Run the command of a verb, list the verbs by section, and print all errors in the same form.

Exit codes: 0 ok, 1 failed, 2 usage error, 3 a dependency is unreachable, 130 stopped with Ctrl-C, 141 the reader of the output
has closed it (`| head`), as for other tools.
An error has three lines on standard error: what happened, why, and what to type.

`charter/commands/` has one file for each verb. `charter` imports only the file of the verb that is called, so `charter --help`
does not load torch, DuckDB or the Kafka client.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import click

import charter
from charter.console import print_progress
from charter.installation import get_install_command
from charter.progress import show_progress
from charter.standard_streams import (
    BROKEN_PIPE_EXIT_CODE,
    ReaderClosed,
    detect_closed_reader,
    discard_output,
    prepare_standard_streams,
)
from charter.text import to_one_line
from engine.errors import DependencyUnreachable, is_disk_full
from engine.progress import set_display
from engine.stop_signals import interrupt_once, is_interrupted_query

# Maps each section to its verbs, and each verb to the first sentence of its help. The sentences are copied here because reading
# them from the commands would import all commands. A test compares the copies with the commands.
SECTIONS: dict[str, dict[str, str]] = {
    "Start": {
        "demo": "Run the whole training loop once with a small real model.",
        "init": "Create a folder with settings, a constitution and prompts.",
        "produce": "Publish prompts or labeled data.",
        "run": "Run the stages and the sink until stopped.",
        "train": "Train on the available rows, once or in a loop.",
    },
    "Inspect": {
        "dashboard": "Serve a live dashboard for the browser.",
        "report": "Write a report of a run to one HTML file.",
        "status": "Show record counts, consumer lag, running workers and policies.",
        "show": "Show the trace of one prompt.",
        "sql": "Query the database, read-only.",
        "tail": "Print the newest records of a topic as JSON lines.",
        "doctor": "Check the installation and print what to fix.",
        "config": "Print every setting, its value and its origin.",
    },
    "Policies": {
        "policy": "List, restore, pause and export policies.",
        "batches": "List, show and rebuild training batches.",
        "chat": "Chat with a policy.",
    },
    "Principles": {
        "constitution": "List, show, lint, compare, test and ablate constitutions.",
        "eval": "Evaluate policies on suites, and measure judges and graders.",
    },
    "Labels": {
        "label": "Label pairs by hand.",
        "export": "Write training data in the formats of TRL and OpenAI, or all tables to a data lake.",
    },
    "Replay": {
        "replay": "Run earlier records through the stages again, as a new run.",
        "runs": "List and compare runs.",
        "dlq": "List, show and retry dead letters.",
    },
    "Maintenance": {
        "topics": "List, create and describe topics, and show consumer lag.",
        "offsets": "Accept, restore or set the committed offsets of a stage.",
        "snapshot": "Copy the database to a file while the pipeline runs.",
        "backup": "Copy the data folder while the pipeline runs.",
        "restore": "Create a data folder from a backup.",
        "repair": "Move a damaged database away, to restore it from the log.",
        "erase": "Delete a prompt and all records made from it.",
    },
}


VERBS = tuple(verb for verbs in SECTIONS.values() for verb in verbs)


def load_command(verb: str) -> click.Command:
    """Import the file of a verb and return its click command."""
    command: click.Command = importlib.import_module(f"charter.commands.{verb}").COMMAND
    return command


class _LazyGroup(click.Group):
    """Imports the file of a verb only when the verb is called, and lists the verbs by section."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return load_command(cmd_name) if cmd_name in VERBS else None

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with detect_closed_reader():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with detect_closed_reader():
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        longest = max(map(len, VERBS))
        for title, verbs in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(verb.ljust(longest), text) for verb, text in verbs.items()])


@click.group(
    cls=_LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(charter.__version__, prog_name="charter")
@click.pass_context
def cli(context: click.Context) -> None:
    """Stream prompts through responses, critiques, revisions and preference labels into DuckDB, and train on them.

    Without a verb, print the status of the newest run in this folder. If there is no run, print the commands that start a run.

    \b
    First steps:
      charter demo         run the whole training loop once with a small model
      charter init NAME    create a folder for your own constitution and prompts
      charter sql "select * from traces limit 1"
      charter produce prompts.jsonl && charter run
    """
    if context.invoked_subcommand is None:
        importlib.import_module("charter.commands.status").status_or_first_steps()


_WRONG_PATH_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_TRAINING_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "huggingface_hub", "gguf")
_LAKE_PACKAGES = ("pyiceberg", "pyiceberg_core", "sqlalchemy")


def main() -> None:
    """Run the command line. On an error, print three lines and exit with the exit code of the error.

    If the reader of the output has closed it (`| head`), exit without a message.
    """
    # OpenMP reads this variable when torch is loaded. By default, waiting OpenMP threads spin, which slows down a busy machine by
    # an order of magnitude.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    prepare_standard_streams()
    set_display(show_progress)  # for work that a command does not display itself, such as the loading of a model
    try:
        with detect_closed_reader():
            _run_command()
    except ReaderClosed:
        discard_output()
        sys.exit(BROKEN_PIPE_EXIT_CODE)


def _run_command() -> None:
    try:
        interrupt_once()
        cli(prog_name="charter", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__context__, EOFError):  # click raises Abort when standard input ends before the answer
            print_progress("stopped: standard input ended before the question was answered", logging.ERROR)
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except ReaderClosed:
        raise
    except Exception as error:
        if is_interrupted_query(error):
            sys.exit(130)
        if "--traceback" in sys.argv and not isinstance(error, click.ClickException):
            raise
        what, why, fix = describe_error(error)
        print_progress("\n".join(to_one_line(part) for part in (f"error: {what}", why, fix) if part), logging.ERROR)
        sys.exit(_get_exit_code(error))


def _get_exit_code(error: Exception) -> int:
    if is_disk_full(error):
        return DependencyUnreachable.exit_code
    return 2 if isinstance(error, _WRONG_PATH_ERRORS) else getattr(error, "exit_code", 1)


def describe_error(error: Exception) -> tuple[str, str, str]:
    """Return the three lines of an error: what happened, why, and what to type."""
    if hasattr(error, "what"):
        return error.what, getattr(error, "why", ""), getattr(error, "fix", "")
    if isinstance(error, click.ClickException):
        return _describe_usage_error(error)
    if isinstance(error, ModuleNotFoundError) and error.name in _TRAINING_PACKAGES:
        why = "local models and training need the packages of an optional extra"
        return f"this command needs {error.name}, which is not installed", why, f"type: {get_install_command('train')}"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _LAKE_PACKAGES:
        why = "Iceberg tables need the packages of an optional extra; without --iceberg, the lake is Parquet files"
        return f"this command needs {error.name}, which is not installed", why, f"type: {get_install_command('lake')}"
    if isinstance(error, OSError):
        return (
            f"cannot use {error.filename or 'a file or the output'}",
            str(error.strerror),
            "use another file or folder, free disk space, or change its permissions",
        )
    frame = traceback.extract_tb(error.__traceback__)[-1]
    why = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
    return "this is a bug in Charter", why, "type the same command with --traceback to see the traceback"


def _describe_usage_error(error: click.ClickException) -> tuple[str, str, str]:
    """Return the three error lines for an unknown verb, option or value. The second line is the usage of the command."""
    context = getattr(error, "ctx", None) or click.Context(cli, info_name="charter")
    usage = context.command.get_usage(context).removeprefix("Usage: ")
    return error.format_message(), f"usage: {usage}", f"type: {context.command_path} --help"


if __name__ == "__main__":
    main()
