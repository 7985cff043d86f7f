"""`charter doctor`: check the installation, the log, the database and the models."""

from __future__ import annotations

import sys

import click

from charter.console import common_options, output_options, print_rows
from charter.diagnostics import CheckResult, run_checks
from charter.text import escape_unprintable
from engine.settings import Settings

_STATE_LABELS = {"ok": "ok", "warn": "look", "fail": "FAIL"}


@click.command()
@output_options
@common_options
def doctor(settings: Settings, output: str) -> None:
    """Check the installation and print what to fix.

    Python and packages, disk, database, log, models and constitution. Exit code 1 if one fails.

    \b
    Examples:
      charter doctor
      charter doctor --bus kafka://localhost:9092 --json
    """
    findings = list(run_checks(settings))
    if output:
        print_rows(
            ["check", "state", "found", "fix"],
            [(finding.check, finding.state, finding.detail, finding.fix) for finding in findings],
            output,
        )
    else:
        _print_results(findings)
    sys.exit(any(finding.state == "fail" for finding in findings))


def _print_results(results: list[CheckResult]) -> None:

    longest = max(len(finding.check) for finding in results)
    for finding in results:
        click.echo(f"{_STATE_LABELS[finding.state]:<5} {finding.check:<{longest}}  {escape_unprintable(finding.detail)}")
        if finding.fix:
            click.echo(f"{'':<5} {'':<{longest}}  -> {escape_unprintable(finding.fix)}")


COMMAND = doctor
