"""`charter demo`: the whole loop once, with a small real model."""

from __future__ import annotations

import click

from charter.console import common_options
from engine.settings import Settings


@click.command()
@click.option(
    "--prompts",
    type=click.IntRange(1),
    default=24,
    show_default=True,
    help="Prompts of the first act; the later ones have 2/3 and 1/3.",
)
@common_options
def demo(settings: Settings, prompts: int) -> None:
    """Run the whole loop once with a small real model.

    Real prompts, every stage, SFT, reward model, PPO, new policies.

    Killed half way, it goes on where it was when started again.

    \b
    Examples:
      charter demo
      charter demo --data /tmp/demo --prompts 6
    """
    from charter.demo import Demo

    Demo(settings, prompts).run()


COMMAND = demo
