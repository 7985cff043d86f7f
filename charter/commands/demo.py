"""`charter demo`: run the whole training loop once with a small real model."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from charter.console import accept_configuration_option, common_options
from engine.settings import Settings


def _get_preset() -> dict[str, dict[str, Any]]:
    from charter.demo import DEMO_PRESET

    return DEMO_PRESET


@click.command()
@click.option(
    "--prompts",
    type=click.IntRange(1),
    default=24,
    show_default=True,
    help="Number of prompts in the first iteration. The next two iterations use 2/3 and 1/3 of this number.",
)
@accept_configuration_option
@partial(common_options, get_preset=_get_preset)
def demo(settings: Settings, prompts: int, accept_configuration: bool) -> None:
    """Run the whole training loop once with a small real model.

    The stages process prompts that are shipped with Charter. Then SFT trains a policy, a reward model is trained, and PPO trains
    the next policy. To continue after an interruption, run the same command.

    \b
    Examples:
      charter demo
      charter demo --data /tmp/demo --prompts 6
    """
    from charter.demo import Demo

    Demo(settings, prompts, accept_configuration=accept_configuration).run()


COMMAND = demo
