"""`charter doctor`: check the installation, the log, the database and the models."""

from __future__ import annotations

import sys

import click

from charter.console import common_options, output_options, print_rows
from charter.diagnostics import CheckResult, run_checks
from charter.text import escape_unprintable
from engine.settings import Settings

_STATE_LABELS = {"ok": "ok", "warn": "WARN", "fail": "FAIL"}


@click.command()
@output_options
@common_options
def doctor(settings: Settings, output: str) -> None:
    """Check the installation and print what to fix.

    The checks cover Python and its packages, disk space, the database, the log, the models and the constitution. The exit code is
    1 if a check fails.

    \b
    Examples:
      charter doctor
      charter doctor --bus kafka://localhost:9092 --json
    """
    results = list(run_checks(settings))
    if output:
        rows = [(result.check, result.state, result.detail, result.fix) for result in results]
        print_rows(["check", "state", "detail", "fix"], rows, output)
    else:
        _print_results(results)
    sys.exit(any(result.state == "fail" for result in results))


def _print_results(results: list[CheckResult]) -> None:
    longest = max(len(result.check) for result in results)
    for result in results:
        click.echo(f"{_STATE_LABELS[result.state]:<5} {result.check:<{longest}}  {escape_unprintable(result.detail)}")
        if result.fix:
            click.echo(f"{'':<5} {'':<{longest}}  -> {escape_unprintable(result.fix)}")


COMMAND = doctor
