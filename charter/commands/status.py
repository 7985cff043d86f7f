"""`charter status`: show record counts, consumer lag, running workers and policies."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from charter.activity import list_held_stages, list_incidents, list_paused_phases, list_policies, list_workers
from charter.connect import connect_bus, open_store
from charter.console import common_options, format_rows, format_table, output_options, print_records, print_rows
from charter.contrast_agreement import format_contrast_agreement, read_contrast_agreement
from charter.label_quality import read_verdict
from charter.lag import compute_lags
from charter.lookup import resolve_run_id
from charter.text import escape_unprintable
from engine.pacing import PacedAdmission
from engine.server_waits import list_server_waits
from engine.settings import Settings, load_settings

_FIRST_STEPS = """There is no run in this folder yet. To start one:

  charter demo                      run the whole training loop once with a small real model
  charter init NAME                 create a folder with settings, a constitution and prompts
  charter produce prompts.jsonl     publish your own prompts, one JSON string or object per line
  charter run --until-done          run every stage and the sink until all work is done

charter --help lists all commands; charter doctor checks the installation."""


_MAX_LISTED = 10  # policies and incidents in the tables; --json has all of them


@click.command()
@output_options
@common_options
def status(settings: Settings, origins: dict[str, str], output: str) -> None:
    """Show record counts, consumer lag, running workers and policies.

    For each topic, print the number of records in the database and the lag of the stages of one run. Without --run, print the lag
    of the newest run. Then print whether the labels are good enough to train on, how often the judge and graders agree with
    contrast pairs, the stages, sinks and trainers that run now, the paused training phases, what a training loop holds, the model
    servers that stages wait for, and the newest policies and incidents (rollbacks, voided batches). With --json, print all of this
    as one object. With --csv, print the topics.

    \b
    Examples:
      charter status
      charter status --json
    """
    store = open_store(settings)
    counts = store.query("SELECT * FROM pipeline_status")
    run_id = resolve_run_id(settings, origins, store)
    bus = connect_bus(settings)
    lags = compute_lags(bus, run_id, settings)
    columns, topics = [*counts.columns, "lag"], [(*row, lags.get(row[0])) for row in counts.rows]
    with closing(PacedAdmission(bus, settings.respond.num_completions)) as admission:
        held = list_held_stages(admission)
    sections = {
        "workers": list_workers(bus, settings, run_id),
        "paused": list_paused_phases(bus),
        "held": held,
        "waiting": list_server_waits(settings.folder),
        "policies": list_policies(bus),
        "incidents": list_incidents(bus),
    }
    bus.close()
    verdict = read_verdict(store, settings.label_quality)
    contrast = read_contrast_agreement(store, run_id)
    if output == "json":
        labels = {"labels": asdict(verdict), "contrast": contrast}
        print_records(
            {"run": run_id, "topics": [dict(zip(columns, row, strict=True)) for row in topics], **labels, **sections}, output
        )
        return
    print_rows(columns, topics, output)
    if output:
        return
    note = f"(lag is the number of records that the stages of run {run_id} have not processed yet; - means that no stage reads the topic)"
    click.echo(escape_unprintable(note))
    click.echo(str(verdict))
    for line in format_contrast_agreement(contrast):
        click.echo(escape_unprintable(line))
    _print_sections(**sections)


def _print_sections(
    workers: list[dict[str, Any]],
    paused: list[dict[str, Any]],
    held: list[dict[str, Any]],
    waiting: list[dict[str, Any]],
    policies: list[dict[str, Any]],
    incidents: list[dict[str, Any]],
) -> None:
    rows = [(row["worker"], row["run"], row["running"], "; ".join(row["instances"]) or None) for row in workers]
    click.echo(f"\n{format_table(['worker', 'run', 'running', 'instances'], rows)}")
    if not any(row["running"] for row in workers):
        click.echo("(nothing runs; to process records, type: charter run)")
    if paused:
        click.echo()
    for row in paused:
        reason = escape_unprintable(row["reason"] or "no reason given")
        click.echo(f"{row['phase']} is paused ({reason}); to resume: charter policy resume {row['phase']}")
    for row in held:
        click.echo(f"\n{row['stage']} holds new prompts: {escape_unprintable(row['reason'])}")
    if waiting:
        click.echo()
    for row in waiting:
        click.echo(escape_unprintable(f"{row['message']} ({row['process']})"))
    if policies:
        policy_rows = [
            (
                row["kind"],
                row["version"],
                row["phase"],
                row["weights_of"],
                _format_time(row["created_at"]),
                Path(row["uri"]).name,
            )
            for row in _get_newest(policies)
        ]
        click.echo(f"\n{format_table(['kind', 'version', 'phase', 'weights_of', 'created_at', 'weights'], policy_rows)}")
    if incidents:
        incident_rows = [
            (_format_time(row["created_at"]), row["phase"], row["title"], row["detail"]) for row in _get_newest(incidents)
        ]
        click.echo(f"\n{format_rows(['created_at', 'phase', 'incident', 'detail'], incident_rows)}")


def _format_time(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S}"


def _get_newest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows[: -_MAX_LISTED - 1 : -1]


@click.pass_context
def status_or_first_steps(context: click.Context) -> None:
    """Print the status of the run in this folder or, if there is no database, the commands that start a run."""
    if open_store(load_settings()[0]).path.exists():
        context.invoke(status)
    else:
        click.echo(_FIRST_STEPS)


COMMAND = status
