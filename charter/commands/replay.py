"""`charter replay`: run earlier records through the stages again, as a new run."""

from __future__ import annotations

import sys
from typing import Any

import click

from charter.connect import connect_bus
from charter.console import common_options
from charter.replay import ReplayRequest, make_replay_plan, run_replay
from charter.stages import STAGES
from engine.settings import Settings


@click.command()
@click.option("--stage", type=click.Choice(STAGES), required=True, help="First stage; the stages after it also run.")
@click.option("--from", "start", default="earliest", show_default=True, help="Start: earliest, an offset, a time, or run:ID.")
@click.option("--to", "end", default="latest", show_default=True, help="End (exclusive): latest, an offset, or a time.")
@click.option("--as", "name", metavar="ID", help="ID of the new run [default: derived from the options].")
@click.option("--constitution", help="Another constitution: a shipped name or a file.")
@click.option(
    "--exclude-principle",
    "excluded_principles",
    metavar="PRINCIPLE",
    multiple=True,
    help="Leave this principle out; may be repeated.",
)
@click.option("--model", help="Another model for the stage: smollm2, a folder, a hub id, or http://HOST:PORT/v1#MODEL.")
@click.option("--policy", type=int, help="Policy version for respond [default: that of the source run].")
@click.option("--archive", is_flag=True, help="Read records from the database, also those that the log no longer has.")
@click.option("--only", is_flag=True, help="Run only --stage, not the stages after it.")
@click.option("--dry-run", is_flag=True, help="Print the plan and the cost, and run nothing.")
@common_options
def replay(settings: Settings, dry_run: bool, **options: Any) -> None:
    """Run earlier records through the stages again, as a new run.

    Read the records of one run (--run, or --from run:ID) up to the end offsets at the start of the replay, run the stages on
    them, and exit when all resulting records are finished and in the database.

    The same configuration gives the same record ids, so the views do not change. Another configuration gives new records under
    the run_id of the new run. After an interruption, the same command continues.

    \b
    Examples:
      charter replay --stage judge --constitution red-team --as rejudged
      charter replay --stage respond --from 2026-11-24T10:00 --dry-run
      charter replay --stage critique --from run:live --archive --model http://localhost:8000/v1#critic
      charter replay --stage judge --constitution customer-service --exclude-principle kinder
    """
    bus, exit_code = connect_bus(settings), 0
    try:
        plan = make_replay_plan(settings, bus, ReplayRequest(**options))
        if dry_run:
            for line in plan.describe():
                click.echo(line)
        else:
            exit_code = run_replay(plan, bus).exit_code
    finally:
        bus.close()
    sys.exit(exit_code)


COMMAND = replay
