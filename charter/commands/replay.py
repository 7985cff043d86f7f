"""`charter replay`: run earlier records through the stages again, as a new run."""

from __future__ import annotations

from typing import Any

import click

from charter.connect import connect_bus
from charter.console import common_options
from charter.pipeline import STAGES
from charter.replay import make_replay_plan, run_replay
from engine.settings import Settings


@click.command()
@click.option("--stage", type=click.Choice(STAGES), required=True, help="Where to begin; what follows from it runs too.")
@click.option("--from", "start", default="earliest", show_default=True, help="earliest, an offset, a time, or run:NAME.")
@click.option("--to", "end", default="latest", show_default=True, help="latest (now), an offset, or a time; not included.")
@click.option("--as", "name", metavar="NAME", help="The new run's name; without it one that follows from what is replayed.")
@click.option("--constitution", help="Another constitution: a shipped one's name or a file.")
@click.option(
    "--exclude-principle",
    "excluded_principles",
    metavar="PRINCIPLE",
    multiple=True,
    help="Leave this principle out; may be repeated.",
)
@click.option("--model", help="Another model for the stage: smollm2, a folder, a hub id, or http://HOST:PORT/v1#MODEL.")
@click.option("--policy", type=int, help="The policy version that answers; without it the one that the source run used.")
@click.option("--archive", is_flag=True, help="Read from the database, which has what the log keeps no more.")
@click.option("--only", is_flag=True, help="Run this stage alone, nothing that follows from it.")
@click.option("--dry-run", is_flag=True, help="Say what it would do and cost, and do nothing.")
@common_options
def replay(settings: Settings, **how: Any) -> None:
    """Run earlier records through the stages again, as a new run.

    It reads the records of one run (--run, or --from run:NAME), up to the ends that the topics have when it starts, and is
    over when everything that follows from them has ended. With the same configuration it makes the same record ids and adds
    nothing to the views; with another it stands beside: select it by its run_id. Killed half way, the same command goes on.

    \b
    Examples:
      charter replay --stage judge --constitution red-team --as rejudged
      charter replay --stage respond --from 2026-11-24T10:00 --dry-run
      charter replay --stage critique --from run:live --archive --model http://localhost:8000/v1#critic
      charter replay --stage judge --constitution customer-service --exclude-principle kinder
    """

    bus = connect_bus(settings)
    try:
        plan = make_replay_plan(settings, bus, **{key: value for key, value in how.items() if key != "dry_run"})
        if how["dry_run"]:
            for line in plan.describe():
                click.echo(line)
        else:
            run_replay(plan, bus)
    finally:
        bus.close()


COMMAND = replay
