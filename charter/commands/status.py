"""`charter status`: the number of records, the lag of each stage and the policies."""

from __future__ import annotations

from pathlib import Path

import click

from charter.connect import connect_bus, open_store
from charter.console import common_options, output_options, print_rows
from charter.lag import compute_lags
from charter.lookup import resolve_run_id
from charter.text import escape_unprintable
from engine.settings import Settings, load_settings

_FIRST_STEPS = """There is no run in this folder yet. To start one:

  charter demo                      run the whole loop once with a small real model
  charter produce prompts.jsonl     publish your own prompts, one JSON string or object per line
  charter run --until-done          run every stage and the sink until no work is left

charter --help lists all commands; charter doctor checks the installation."""


@click.command()
@output_options
@common_options
def status(settings: Settings, origins: dict[str, str], output: str) -> None:
    """Show record counts, consumer lag and policies.

    What is in the database, what waits at the stages of a run (the newest, or --run), and which policies there are.

    \b
    Examples:
      charter status
      charter status --json
    """

    store = open_store(settings)
    found = store.query("SELECT * FROM pipeline_status")
    run_id = resolve_run_id(settings, origins, store)
    bus = connect_bus(settings)
    waiting = compute_lags(bus, run_id, settings.judge.pairing)
    bus.close()
    print_rows([*found.columns, "waiting"], [(*row, waiting.get(row[0])) for row in found.rows], output)
    if output:
        return
    click.echo(escape_unprintable(f"(waiting: what the stages of run {run_id} have not done yet; - where none of them reads)"))
    newest = store.query("SELECT kind, version, phase, created_at, uri FROM policies ORDER BY commit_seq DESC LIMIT 10")
    if newest.rows:
        click.echo()
        rows = [(kind.lower(), *row, Path(uri).name) for kind, *row, uri in newest.rows]
        print_rows([*newest.columns[:-1], "weights"], rows, "")


@click.pass_context
def status_or_first_steps(context: click.Context) -> None:
    """Print the status of the run in this folder, or the first commands to type if there is none."""
    if open_store(load_settings()[0]).path.exists():
        context.invoke(status)
    else:
        click.echo(_FIRST_STEPS)


COMMAND = status
