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
from trainer.hf import StepCallback, ignore_step

_CALL_TIMEOUT = timedelta(days=3650)  # a batch may be days away
T = TypeVar("T")
# The group in which calls are handed out; not the GPUs' own, which gives up waiting after minutes.
_process_groups: list[Any] = []


@contextmanager
def join_processes() -> Iterator[bool]:
    """Meet the launcher's other processes; gives whether this is the first one. The others follow it until it leaves."""
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    _process_groups.append(distributed.new_group(backend="gloo", timeout=_CALL_TIMEOUT))
    try:
        if not state.is_main_process:
            _follow_main_process()
        yield bool(state.is_main_process)
    finally:
        if state.is_main_process:
            _broadcast_object(None)
        _process_groups.clear()
        state.destroy_process_group()


def get_world_size() -> int:
    return distributed.get_world_size() if _process_groups else 1


def get_rank() -> int:
    return distributed.get_rank() if _process_groups else 0


def call_learner(learner: Callable[..., Any], *arguments: Any, on_step: StepCallback = ignore_step, **named: Any) -> Any:
    """Call a learner here and in every other process; `on_step` is told here alone.

    An error of `on_step` (the log is away) is raised once the learner has ended: the others would wait for this process in the
    middle of a step.
    """
    if not _process_groups:
        return learner(*arguments, on_step=on_step, **named)
    failed: list[CharterError] = []

    def told(step: int, metrics: dict[str, float]) -> None:
        if failed:
            return
        try:
            on_step(step, metrics)
        except CharterError as error:
            failed.append(error)

    _broadcast_object((learner, arguments, named))
    made = learner(*arguments, on_step=told, **named)
    if failed:
        raise failed[0]
    return made


def _broadcast_object(value: Any) -> Any:
    """From the first process to all of them; returns what it was."""
    box = [value]
    distributed.broadcast_object_list(box, src=0, group=_process_groups[0])
    return box[0]


def _follow_main_process() -> None:
    """Make the calls that the first process hands out, until it dismisses the others."""
    logging.getLogger("charter").setLevel(logging.ERROR)  # the first process says it all
    while (wanted := _broadcast_object(None)) is not None:
        learner, arguments, named = wanted
        with suppress(CharterError):  # the first process raises it too, and tells the user
            learner(*arguments, **named)


def shard_rows(rows: Sequence[T]) -> list[T]:
    """This process's share of a minibatch."""
    return list(rows[get_rank() :: get_world_size()])


def all_reduce_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Make each parameter's gradient the sum of all processes' ones."""
    if not _process_groups:
        return
    for parameter in parameters:
        if parameter.grad is None:  # no row of this minibatch came here
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)


def sum_over_processes(values: dict[str, float]) -> dict[str, float]:
    """The sum of each number over all processes."""
    if not _process_groups:
        return values
    found: list[Any] = [None] * get_world_size()
    distributed.all_gather_object(found, values, group=_process_groups[0])
    return {name: sum(one.get(name, 0.0) for one in found) for name in dict.fromkeys(n for one in found for n in one)}


def max_over_processes(value: float) -> float:
    """The largest of all processes' values."""
    if not _process_groups:
        return value
    found: list[Any] = [None] * get_world_size()
    distributed.all_gather_object(found, value, group=_process_groups[0])
    return float(max(found))
