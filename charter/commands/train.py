"""`charter train`: train the policy or the reward model, once or in a loop."""

from __future__ import annotations

import os

import click

from charter.console import common_options
from charter.startup import wait_option
from engine.settings import Settings
from trainer.methods import PHASES, TRL_PHASES, list_enabled_phases


@click.command()
@click.option("--phase", type=click.Choice(PHASES), help="Train this phase now, without waiting for more rows.")
@click.option("--loop", is_flag=True, help="Train each phase when it has enough new rows, until stopped.")
@click.option(
    "--force", is_flag=True, help="Train RL even if the labels or grades are not good enough (label_quality.*, train.rewards)."
)
@click.option("--estimate-memory", is_flag=True, help="Print the memory that an update needs on each card, and do not train.")
@wait_option
@common_options
def train(settings: Settings, phase: str | None, loop: bool, force: bool, estimate_memory: bool, wait: bool) -> None:
    """Train on the available rows, once or in a loop.

    Without options, train the next phase that has enough new rows (train.*_rows). If no phase has enough rows, nothing is
    trained. The result is a new version of the policy or the reward model. The checkpoint is written to the data folder, and a
    record is published to the log.

    If the log, a model or the disk is unavailable at the start, the exit code is 3. With --wait, the command waits.

    The command first prints whether the labels are good enough to train on. If they are not, RL that uses them needs --force:
    --phase ppo exits with code 2, and --loop skips RL and trains the other phases. If train.rewards names the grader principles,
    the command first measures how well it ranks the cases of the constitution and pairs of people.

    Self-distillation (train.rl_method distill) needs no labels.

    With accelerate launch, all started processes train one model together, and each process holds a part of its weights.
    --estimate-memory prints the memory of an update for models.policy and for models with 1B, 8B and 70B parameters, on 1 to 64
    cards, with the settings train.* and respond.max_tokens.

    \b
    Examples:
      charter train
      charter train --phase sft
      charter train --loop
      charter train --estimate-memory --set train.lora_rank=16 --set train.base_dtype=bf16
      accelerate launch --multi_gpu --num_processes 4 --module charter train --loop
    """
    from charter.training import print_memory_estimates, run_training

    if estimate_memory:
        print_memory_estimates(settings)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        run_training(settings, phase, loop, wait=wait, force=force)
        return
    from trainer import distributed

    with distributed.join_processes() as is_main_process:
        if is_main_process:
            phases = [phase] if phase else list_enabled_phases(settings.train)
            sizes = {f"{name}.batch_size": getattr(settings, name).batch_size for name in phases if name in TRL_PHASES}
            distributed.require_supported_launch(sizes)
            run_training(settings, phase, loop, wait=wait, force=force)


COMMAND = train
