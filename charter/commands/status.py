"""`charter status`: show record counts, consumer lag and policies."""

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

  charter demo                      run the whole training loop once with a small real model
  charter produce prompts.jsonl     publish your own prompts, one JSON string or object per line
  charter run --until-done          run every stage and the sink until all work is done

charter --help lists all commands; charter doctor checks the installation."""


@click.command()
@output_options
@common_options
def status(settings: Settings, origins: dict[str, str], output: str) -> None:
    """Show record counts, consumer lag and policies.

    For each topic, print the number of records in the database and the lag of the stages of one run. Also print the newest
    policies. Without --run, print the lag of the newest run.

    \b
    Examples:
      charter status
      charter status --json
    """
    store = open_store(settings)
    counts = store.query("SELECT * FROM pipeline_status")
    run_id = resolve_run_id(settings, origins, store)
    bus = connect_bus(settings)
    lags = compute_lags(bus, run_id, settings.judge.pairing)
    bus.close()
    print_rows([*counts.columns, "lag"], [(*row, lags.get(row[0])) for row in counts.rows], output)
    if output:
        return
    note = f"(lag is the number of records that the stages of run {run_id} have not processed yet; - means that no stage reads the topic)"
    click.echo(escape_unprintable(note))
    policies = store.query("SELECT kind, version, phase, created_at, uri FROM policies ORDER BY commit_seq DESC LIMIT 10")
    if policies.rows:
        click.echo()
        rows = [(kind.lower(), *row, Path(uri).name) for kind, *row, uri in policies.rows]
        print_rows([*policies.columns[:-1], "weights"], rows, "")


@click.pass_context
def status_or_first_steps(context: click.Context) -> None:
    """Print the status of the run in this folder or, if there is no database, the commands that start a run."""
    if open_store(load_settings()[0]).path.exists():
        context.invoke(status)
    else:
        click.echo(_FIRST_STEPS)


COMMAND = status
