"""`charter runs`: list and compare runs."""

from __future__ import annotations

import json
from typing import Any

import click

from charter.connect import open_store
from charter.console import common_options, output_options, print_rows
from charter.runs import RUNS_SQL, SHARED_LABELS_SQL, SHARED_RECORDS_SQL, flatten_settings
from engine.errors import UsageError
from engine.settings import Settings

# Runs


@click.group(invoke_without_command=True)
@output_options
@common_options
def runs(settings: Settings, output: str) -> None:
    """List and compare runs.

    Without a verb: the list.

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
    """Every run: what it is made of, and its records.

    Records that it shares with another run are counted too.

    \b
    Examples:
      charter runs list --json
    """
    _print_runs(settings, output)


def _print_runs(settings: Settings, output: str) -> None:

    found = open_store(settings).query(RUNS_SQL, limit_s=30.0)
    if output or found.rows:
        print_rows(found.columns, found.rows, output)
    else:
        click.echo("no run has begun yet")


@runs.command()
@click.argument("first", metavar="RUN")
@click.argument("second", metavar="RUN")
@output_options
@common_options
def compare(settings: Settings, first: str, second: str, output: str) -> None:
    """What two runs differ in.

    Settings, records that only one has, and labels of the same pair of answers.

    \b
    Examples:
      charter runs compare live rejudged
    """

    store = open_store(settings)
    rows: list[tuple[Any, ...]] = [*_diff_settings(store, first, second)]
    for topic, shared, one, other in store.query(SHARED_RECORDS_SQL, [first, second], limit_s=30.0).rows:
        rows.append((f"{topic} that both have", shared, shared))
        rows.append((f"{topic} of its own", one, other))
    labels = store.query_dicts(SHARED_LABELS_SQL, [first, second], limit_s=30.0)
    for label in labels:
        head = f"labels by {label['principle']}"
        rows.append((f"{head}: pairs that both judged", label["pairs"], label["pairs"]))
        rows.append((f"{head}: mean p(a)", label["mean_first"], label["mean_second"]))
        rows.append((f"{head}: another answer is better", "", label["flips"]))
    print_rows(["what", first, second], rows, output)


def _diff_settings(store: Any, first: str, second: str) -> list[tuple[str, str, str]]:
    """(setting, value in the first run, value in the second) where they differ."""

    trees = []
    for run in (first, second):
        sql = (
            "SELECT settings, constitution.name || ' ' || constitution.version AS name, constitution.hash AS hash FROM raw.runs"
        )
        found = store.query_dicts(f"{sql} WHERE run_id = ? ORDER BY commit_seq DESC LIMIT 1", [run])
        if not found:
            raise UsageError(f"there is no run {run}", f"{store.path} has no manifest of it", "type: charter runs")
        tree = flatten_settings(json.loads(found[0]["settings"])) | {
            "constitution": found[0]["name"],
            "constitution hash": found[0]["hash"],
        }
        trees.append({key: value for key, value in tree.items() if not key.startswith("replay.") and key != "run.id"})
    return [
        (key, str(trees[0].get(key, "")), str(trees[1].get(key, "")))
        for key in sorted({*trees[0], *trees[1]})
        if trees[0].get(key) != trees[1].get(key)
    ]


COMMAND = runs
