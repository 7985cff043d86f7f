"""Several processes under accelerate's launcher: one of them is the trainer, all of them learn.

    accelerate launch --multi_gpu --num_processes 4 --module charter train --loop

The first process draws batches, talks to the log and writes checkpoints, as the only one does without a launcher. The others
have neither log nor database: `follow` waits for the learner's calls that the first one hands out, makes the same calls, and
throws away what they return. Inside a call they share each step: trl's trainers by themselves, PPO by summing gradients.
A last batch that has not rows enough for all is filled up from the beginning by trl's; PPO's is shared as it is. All processes
read the same files, so the data folder and the models must lie where each of them can see them.

Tested with two processes on a processor. For want of GPUs it has not been run on several of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from engine.errors import CharterError
from trainer.hf import OnStep, ignore

FOREVER = timedelta(days=3650)  # a batch may be days away
T = TypeVar("T")
# The group in which calls are handed out; not the GPUs' own, which gives up waiting after minutes.
halls: list[Any] = []


@contextmanager
def together() -> Iterator[bool]:
    """Meet the launcher's other processes; gives whether this is the first one. The others follow it until it leaves."""
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    halls.append(distributed.new_group(backend="gloo", timeout=FOREVER))
    try:
        if not state.is_main_process:
            follow()
        yield bool(state.is_main_process)
    finally:
        if state.is_main_process:
            hand_out(None)
        halls.clear()
        state.destroy_process_group()


def count() -> int:
    return distributed.get_world_size() if halls else 1


def rank() -> int:
    return distributed.get_rank() if halls else 0


def call(learner: Callable[..., Any], *arguments: Any, on_step: OnStep = ignore, **named: Any) -> Any:
    """Call a learner here and in every other process; `on_step` is told here alone.

    An error of `on_step` (the log is away) is raised once the learner has ended: the others would wait for this process in the
    middle of a step.
    """
    if not halls:
        return learner(*arguments, on_step=on_step, **named)
    failed: list[CharterError] = []

    def told(step: int, metrics: dict[str, float]) -> None:
        if failed:
            return
        try:
            on_step(step, metrics)
        except CharterError as error:
            failed.append(error)

    hand_out((learner, arguments, named))
    made = learner(*arguments, on_step=told, **named)
    if failed:
        raise failed[0]
    return made


def hand_out(what: Any) -> Any:
    """From the first process to all of them; returns what it was."""
    box = [what]
    distributed.broadcast_object_list(box, src=0, group=halls[0])
    return box[0]


def follow() -> None:
    """Make the calls that the first process hands out, until it dismisses the others."""
    logging.getLogger("charter").setLevel(logging.ERROR)  # the first process says it all
    while (wanted := hand_out(None)) is not None:
        learner, arguments, named = wanted
        with suppress(CharterError):  # the first process raises it too, and tells the user
            learner(*arguments, **named)


def mine(rows: Sequence[T]) -> list[T]:
    """This process's share of a minibatch."""
    return list(rows[rank() :: count()])


def add_up(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Make each parameter's gradient the sum of all processes' ones."""
    if not halls:
        return
    for parameter in parameters:
        if parameter.grad is None:  # no row of this minibatch came here
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)


def total(sums: dict[str, float]) -> dict[str, float]:
    """The sum of each number over all processes."""
    if not halls:
        return sums
    found: list[Any] = [None] * count()
    distributed.all_gather_object(found, sums, group=halls[0])
    return {name: sum(one.get(name, 0.0) for one in found) for name in dict.fromkeys(n for one in found for n in one)}


def largest(value: float) -> float:
    """The largest of all processes' values."""
    if not halls:
        return value
    found: list[Any] = [None] * count()
    distributed.all_gather_object(found, value, group=halls[0])
    return float(max(found))
