"""`charter runs`: list and compare runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from charter.connect import open_store
from charter.console import common_options, output_options, print_rows
from charter.runs import RUN_COLUMNS, SHARED_LABELS_SQL, SHARED_RECORDS_SQL, load_runs, parse_settings
from charter.text import escape_unprintable
from engine.errors import UsageError
from engine.settings import Settings


@click.group(invoke_without_command=True)
@output_options
@common_options
def runs(settings: Settings, output: str) -> None:
    """List and compare runs.

    Without a verb, print the list.

    \b
    Examples:
      charter runs
      charter runs compare live rejudged
    """
    if click.get_current_context().invoked_subcommand is None:
        _print_runs(settings, output)


@runs.command("list")
@output_options
@common_options
def list_runs(settings: Settings, output: str) -> None:
    """List all runs with their configurations and record counts.

    There is one row for each configuration of a run. The number of prompts is that of the whole run. The other numbers count the
    records that were made under the configuration. If two runs or configurations have the same record, it is counted for both.
    The changes are the settings that differ from the previous configuration.

    \b
    Examples:
      charter runs list --json
    """
    _print_runs(settings, output)


def _print_runs(settings: Settings, output: str) -> None:
    rows = load_runs(partial(open_store(settings).query_dicts, limit_s=30.0))
    if output:
        print_rows(RUN_COLUMNS, [[row[name] for name in RUN_COLUMNS] for row in rows], output)
    elif rows:
        columns = [name for name in RUN_COLUMNS if name != "changes"]  # this column is too wide for a table
        print_rows(columns, [[row[name] for name in columns] for row in rows], output)
        for row in rows:
            if row["changes"]:
                click.echo(escape_unprintable(f"run {row['run']}, configuration {row['configuration']}: {row['changes']}"))
    else:
        click.echo("there are no runs yet")


@runs.command()
@click.argument("first", metavar="RUN")
@click.argument("second", metavar="RUN")
@output_options
@common_options
def compare(settings: Settings, first: str, second: str, output: str) -> None:
    """Compare two runs.

    Print the settings that differ, the number of records in both runs and in only one run, and how the labels of the same pairs
    differ.

    \b
    Examples:
      charter runs compare live rejudged
    """
    store = open_store(settings)
    rows: list[tuple[Any, ...]] = [*_diff_settings(store, first, second)]
    for topic, shared, only_first, only_second in store.query(SHARED_RECORDS_SQL, [first, second], limit_s=30.0).rows:
        rows.append((f"{topic} in both runs", shared, shared))
        rows.append((f"{topic} only in this run", only_first, only_second))
    labels = store.query_dicts(SHARED_LABELS_SQL, [first, second], limit_s=30.0)
    for label in labels:
        prefix = f"labels by {label['principle']}"
        rows.append((f"{prefix}: pairs in both runs", label["pairs"], label["pairs"]))
        rows.append((f"{prefix}: mean p_a", label["mean_first"], label["mean_second"]))
        rows.append((f"{prefix}: flips", "", label["flips"]))
    print_rows(["item", first, second], rows, output)


def _diff_settings(store: Any, first: str, second: str) -> list[tuple[str, str, str]]:
    """Return (setting, value in the first run, value in the second run) for each setting that differs."""
    run_settings = []
    for run in (first, second):
        sql = (
            "SELECT settings, constitution.name || ' ' || constitution.version AS name, constitution.hash AS hash FROM raw.runs"
        )
        rows = store.query_dicts(f"{sql} WHERE run_id = ? ORDER BY commit_seq DESC LIMIT 1", [run])
        if not rows:
            raise UsageError(f"there is no run {run}", f"{store.path} has no manifest of this run", "type: charter runs")
        values = parse_settings(rows[0]["settings"]) | {
            "constitution": rows[0]["name"],
            "constitution hash": rows[0]["hash"],
        }
        run_settings.append({key: value for key, value in values.items() if key != "run.id"})
    a, b = run_settings
    return [(key, str(a.get(key, "")), str(b.get(key, ""))) for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


COMMAND = runs
