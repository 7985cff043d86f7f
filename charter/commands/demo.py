"""`charter demo`: run the whole training loop once with a small real model."""

from __future__ import annotations

import sys
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
    help="Number of prompts in the second iteration and in the evaluation; 2 to 24. The first iteration uses 2/3 of it.",
)
@accept_configuration_option
@partial(common_options, get_preset=_get_preset)
def demo(settings: Settings, prompts: int, accept_configuration: bool) -> None:
    """Run the whole training loop once with a small real model.

    The constitution is one sentence: "Answer in one short sentence." The stages process prompts that are shipped with Charter. Then
    SFT, PPO and self-distillation each train a policy. The demo ends with a table: how often each policy follows the constitution, on
    prompts that trained none of them. To continue after an interruption, run the same command. The exit code is 1 if a signal
    stopped the evaluation.

    \b
    Examples:
      charter demo
      charter demo --data /tmp/demo --prompts 6
    """
    from charter.demo import Demo

    sys.exit(0 if Demo(settings, prompts, accept_configuration=accept_configuration).run() else 1)


COMMAND = demo
