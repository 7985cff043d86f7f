"""`charter train`: update the policy or the reward model, once or in a loop."""

from __future__ import annotations

import os

import click

from charter.console import common_options
from charter.policies import PHASES
from engine.settings import Settings


@click.command()
@click.option("--phase", type=click.Choice(PHASES), help="Update this now, with whatever rows are new.")
@click.option("--loop", is_flag=True, help="Keep updating whenever there are enough new rows, until stopped.")
@common_options
def train(settings: Settings, phase: str | None, loop: bool) -> None:
    """Train on the rows that have arrived, once or in a loop.

    The phase that is due, one named phase, or with --loop one after the other.

    \b
    Examples:
      charter train
      charter train --phase sft
      charter train --loop
      accelerate launch --multi_gpu --num_processes 4 --module charter train --loop
    """
    from charter.training import run_training

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        run_training(settings, phase, loop)
        return
    from trainer import distributed

    with distributed.join_processes() as first:
        if first:
            run_training(settings, phase, loop)


COMMAND = train
