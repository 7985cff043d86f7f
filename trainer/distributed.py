"""Train in several processes under accelerate's launcher. The main process is the trainer, and all processes run the learners.

    accelerate launch --multi_gpu --num_processes 4 --module charter train --loop

The main process does what a single trainer process does: it samples batches, uses the log and writes checkpoints. The other
processes do not use the log or the database. The other processes wait in `join_processes` for the learner calls that the main
process broadcasts. These processes make the same calls and discard the results. Within a call, the weights are sharded over
the processes (`sharding.py`), and the rows of each step are divided among the processes. trl's trainers divide the rows
themselves. They fill an incomplete last batch with rows from the beginning. Charter's own loops split an incomplete batch without
filling it. All processes read the same files, so each process needs access to the data folder and to the models.

The number of processes is not part of a batch. After a crash, another number of processes can train the same batch.

This module was run with two and with four processes on a CPU (gloo). It has not been run on several GPUs.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import distributed

from engine.errors import CharterError, ProcessLost, UsageError

logger = logging.getLogger("charter.trainer")
_CALL_TIMEOUT = timedelta(days=3650)  # the next batch may arrive days after the last batch
_OTHER_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
T = TypeVar("T")
# The process group that broadcasts calls. The group of the GPUs is not suitable, because it times out after minutes.
_process_groups: list[Any] = []
_calls: list[dict[str, Any]] = []  # the named arguments of the learner that runs in this process, if any


@contextmanager
def join_processes() -> Iterator[bool]:
    """Connect to the other processes of the launcher. Yield True in the main process and False in the others.

    The other processes follow the main process until it leaves the block. The launcher sends SIGTERM and SIGINT to all processes.
    Only the main process handles them: it finishes its work with the others, or ends, and the others end with it.

    Raise ProcessLost if another process ended too early.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    _process_groups.append(distributed.new_group(backend="gloo", timeout=_CALL_TIMEOUT))
    try:
        with _report_lost_process(state.process_index, state.num_processes):
            try:
                if not state.is_main_process:
                    _follow_main_process()
                yield bool(state.is_main_process)
            finally:
                # With an open call, an error has ended it in this process alone, and the launcher stops the other processes.
                if not _calls:
                    if state.is_main_process:
                        _broadcast_object(None)
                    state.destroy_process_group()
    finally:
        _process_groups.clear()
        _calls.clear()


@contextmanager
def _report_lost_process(rank: int, num_processes: int) -> Iterator[None]:
    """Raise ProcessLost instead of the error that a backend raises when another process has ended.

    It is no CharterError inside a learner call, because the loop of the trainer would void the batch and continue.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo/transport" not in str(error):
            raise
        raise ProcessLost(
            f"process {rank} of {num_processes} stops, because another process of this training has ended",
            "an error or a signal ended the other process; the launcher prints its rank below (Root Cause)",
            "type the same command again; an unfinished batch is resumed, also with another number of processes",
        ) from error


def call_learner(
    learner: Callable[..., Any], *arguments: Any, on_step: Callable[[int, dict[str, float]], None] | None = None, **named: Any
) -> Any:
    """Call a learner in this process and in all other processes. Only this process calls `on_step`.

    The named argument `hardware` is required. A function without steps can be called without `on_step`.

    `on_step` can raise an error, for example when the log is unreachable. This error is raised only after the learner has
    returned. An error that is raised within a step would make the other processes wait for this process forever.
    """
    if not _process_groups:
        return learner(*arguments, **named, **({"on_step": on_step} if on_step else {}))
    errors: list[CharterError] = []

    def call_on_step(step: int, metrics: dict[str, float]) -> None:
        if errors or on_step is None:
            return
        try:
            on_step(step, metrics)
        except CharterError as error:
            errors.append(error)

    _broadcast_object((learner, arguments, named))
    with _sharded_call(named):
        result = learner(*arguments, **named, **({"on_step": call_on_step} if on_step else {}))
    if errors:
        raise errors[0]
    return result


@cache
def report_single_process(what: str) -> None:
    """Log once that this process alone does something with complete models, if other processes wait for it meanwhile.

    They wait in the process group of the calls, so no collective times out.
    """
    if _process_groups:
        logger.warning(
            "%s runs in one process, which loads complete models (not sharded); the other processes wait (%d)",
            what,
            distributed.get_world_size() - 1,
        )


def _broadcast_object(value: Any) -> Any:
    """Broadcast an object from the main process to all other processes. Return the object."""
    box = [value]
    distributed.broadcast_object_list(box, src=0, group=_process_groups[0])
    return box[0]


def _follow_main_process() -> None:
    """Run each learner call that the main process broadcasts. Stop when it broadcasts None."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the main process decides when to stop, and the others end with it
    logging.getLogger("charter").setLevel(logging.ERROR)  # only the main process logs messages
    while (call := _broadcast_object(None)) is not None:
        learner, arguments, named = call
        with suppress(CharterError), _sharded_call(named):  # the main process raises the same error
            learner(*arguments, **named)


@contextmanager
def _sharded_call(named: dict[str, Any]) -> Iterator[None]:
    """Shard the models that are loaded inside the block, because all processes are inside this block.

    `named` are the named arguments of the learner.
    """
    _calls.append(named)
    try:
        yield
    except CharterError:
        _calls.clear()  # the other processes raise the same error
        raise
    _calls.clear()


def require_supported_launch(batch_sizes: Mapping[str, int]) -> None:
    """Raise UsageError if the launcher shards models itself, or if the processes cannot divide the steps of trl's trainers.

    `batch_sizes` has the number of rows of a step for each setting.
    """
    for variable, title in _OTHER_SHARDING.items():
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise UsageError(
                f"accelerate was started with {title} ({variable}={os.environ[variable]})",
                "Charter shards the models itself, with FSDP2. Two kinds of sharding exclude each other",
                "accelerate launch --multi_gpu --num_processes N --module charter train",
            )
    num_processes = distributed.get_world_size()
    for setting, size in batch_sizes.items():
        require_equal_shares(setting, size, num_processes)


def require_equal_shares(setting: str, size: int, num_processes: int) -> None:
    """Raise UsageError if the processes cannot divide the rows of a step equally. trl's trainers need equal shares."""
    if size % num_processes:
        raise UsageError(
            f"{num_processes} processes cannot divide the {size} rows of a step equally ({setting})",
            "each process takes the same number of rows, so a step would have fewer rows than with one process",
            f"set {setting} to a multiple of {num_processes}, or start another number of processes (--num_processes)",
        )


def get_num_shards() -> int:
    """Return the number of processes that run this learner call together. Return 1 outside a learner call."""
    return distributed.get_world_size() if _calls else 1


def multiplies_in_bf16() -> bool:
    """Return whether the learner of this call multiplies matrices in bf16 (`Hardware.bf16`)."""
    return bool(_calls and _calls[0]["hardware"].bf16)


def get_rank() -> int:
    """Return the index of this process in a learner call. Return 0 outside a learner call."""
    return distributed.get_rank() if _calls else 0


def shard_rows(rows: Sequence[T]) -> list[T]:
    """Return this process's share of a minibatch."""
    return list(rows[get_rank() :: get_num_shards()])


def all_reduce_sum(tensor: torch.Tensor) -> None:
    """Replace a tensor with its sum over all processes."""
    if get_num_shards() > 1:
        distributed.all_reduce(tensor)


def sum_over_processes(values: dict[str, float]) -> dict[str, float]:
    """Return the sum of each value over all processes. If a process has no value for a name, the value counts as 0."""
    if get_num_shards() == 1:
        return values
    gathered: list[Any] = [None] * get_num_shards()
    distributed.all_gather_object(gathered, values, group=_process_groups[0])
    names = dict.fromkeys(name for process_values in gathered for name in process_values)
    return {name: sum(process_values.get(name, 0.0) for process_values in gathered) for name in names}


def broadcast_from_main(value: T) -> T:
    """Return the value of the main process in all processes, so that all of them make the same decision."""
    return value if get_num_shards() == 1 else _broadcast_object(value)


def max_over_processes(value: float) -> float:
    """Return the largest value of all processes."""
    if get_num_shards() == 1:
        return value
    gathered: list[Any] = [None] * get_num_shards()
    distributed.all_gather_object(gathered, value, group=_process_groups[0])
    return float(max(gathered))
