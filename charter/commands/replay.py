"""`charter replay`: run earlier records through the stages again, as a new run."""

from __future__ import annotations

import sys
from typing import Any

import click

from charter.connect import connect_existing_bus
from charter.console import accept_configuration_option, common_options, replay_range_options
from charter.replay import ReplayRequest, make_replay_plan, run_replay
from charter.stages import STAGES
from charter.startup import start_when_ready, wait_option
from engine.settings import Settings


@click.command()
@click.option("--stage", type=click.Choice(STAGES), required=True, help="First stage to run. The later stages also run.")
@replay_range_options
@click.option("--as", "name", metavar="ID", help="ID of the new run [default: derived from the options].")
@click.option("--constitution", help="Constitution to use instead: a shipped name or a file.")
@click.option(
    "--exclude-principle",
    "excluded_principles",
    metavar="PRINCIPLE",
    multiple=True,
    help="Exclude this principle from the constitution; may be repeated.",
)
@click.option("--model", help="Model to use instead for the stage: smollm2, a folder, a hub id, or http://HOST:PORT/v1#MODEL.")
@click.option("--policy", type=int, help="Policy version for the respond stage [default: the version of the source run].")
@click.option("--only", is_flag=True, help="Do not run the stages after --stage.")
@accept_configuration_option
@wait_option
@common_options
def replay(settings: Settings, dry_run: bool, accept_configuration: bool, wait: bool, **options: Any) -> None:
    """Run earlier records through the stages again, as a new run.

    Read the records of one run (--run, or --from run:ID) that exist when the replay starts. Run the stages on these records. Exit
    when the stages have processed all resulting records and the sink has written them to the database.
    The exit code is 1 if a record became a dead letter, or if a signal stopped the replay.

    With the same configuration, the records get the same ids, so the views do not change. With another configuration, the replay
    generates new records with the run_id of the new run. To continue after an interruption, run the same command. If the settings
    of a stage have changed since then, the exit code is 2. With --accept-configuration, the changed settings become a further
    configuration of the run.

    \b
    Examples:
      charter replay --stage judge --constitution red-team --as rejudged
      charter replay --stage respond --from 2026-11-24T10:00 --dry-run
      charter replay --stage critique --from run:live --archive --model http://localhost:8000/v1#critic
      charter replay --stage judge --constitution customer-service --exclude-principle kinder
    """
    bus, exit_code = start_when_ready(lambda: connect_existing_bus(settings), wait=wait), 0
    try:
        plan = make_replay_plan(settings, bus, ReplayRequest(**options))
        if dry_run:
            for line in plan.describe():
                click.echo(line)
        else:
            exit_code = run_replay(plan, bus, accept_configuration=accept_configuration, wait=wait).exit_code
    finally:
        bus.close()
    sys.exit(exit_code)


COMMAND = replay
