"""What trl's trainers need around them: quiet arguments, and each step's numbers passed on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from engine.errors import TrainingFailed
from trainer.weights import Hardware

StepCallback = Callable[[int, dict[str, float]], None]
_WARMUP_RATIO = 0.15  # of an update's steps: Adam starts afresh with each, and its first steps are as long as the rate allows


def ignore_step(step: int, metrics: dict[str, float]) -> None:
    """The default OnStep."""


def compute_micro_batch_size(batch_size: int, max_size: int) -> int:
    """Rows in one pass: the largest divisor of the batch size up to `most`, so that a step is exactly one batch."""
    return next(rows for rows in range(min(batch_size, max_size), 0, -1) if batch_size % rows == 0)


def build_training_arguments(
    output_dir: str,
    *,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    seed: int,
    max_length: int | None,
    hardware: Hardware,
    shuffle: bool = False,
    texts_per_row: int = 1,
) -> dict[str, Any]:
    """Arguments for trl's configurations: nothing is saved, uploaded or printed; weights stay fp32 under autocast.

    Rows are taken in their order, in which a batch has put those of similar length side by side; `shuffle` mixes them anew,
    still by length. `texts` is how many a row has: two in a pair, which counts for as many of `hardware.micro_rows`. Several
    processes under accelerate's launcher share a step: each takes its part of `batch_size`.
    """
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    share = max(1, batch_size // processes)
    rows = compute_micro_batch_size(share, max(1, hardware.micro_batch_size // texts_per_row))
    return {
        "output_dir": output_dir,
        "learning_rate": learning_rate,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": share // rows,
        "train_sampling_strategy": "group_by_length" if shuffle else "sequential",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "seed": seed,
        "data_seed": seed,
        "bf16": hardware.bf16,
        "activation_checkpointing": hardware.gradient_checkpointing,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": max_length,
        "dataloader_pin_memory": False,
    }


def require_finite(step: int, metrics: Mapping[str, float]) -> None:
    """Raise TrainingFailed when a number of this step is no number any more."""
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise TrainingFailed(
            f"{broken[0]} is {metrics[broken[0]]} at step {step}: training has run away",
            "nothing of this update was saved; the last policy stays in use",
            "lower the learning rate of this phase (charter config), then type: charter train",
        )


class _StepReporter(TrainerCallback):
    """Passes each logged step on, numbers only."""

    def __init__(self, on_step: StepCallback) -> None:
        self.on_step = on_step
        self.last_metrics: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        numbers = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
        if "loss" in numbers:
            require_finite(state.global_step, numbers)
            self.last_metrics = numbers
            self.on_step(state.global_step, numbers)


def compute_learning_rate_factor(step: int, num_steps: int, warmup_ratio: float = _WARMUP_RATIO) -> float:
    """The factor of the learning rate at a step (from 0) of an update of `steps`: a linear rise, then a linear fall to 0.

    No step is lost: transformers' own warm-up begins at 0, and an update of one step would learn nothing.
    """
    rise = math.ceil(warmup_ratio * num_steps)
    return min((step + 1) / (rise + 1), (num_steps - step) / max(1, num_steps - rise))


def run_trainer(trainer: Any, on_step: StepCallback) -> dict[str, float]:
    """Train quietly; returns the last step's numbers and the mean loss."""
    steps = _StepReporter(on_step)

    def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or trainer.optimizer, lambda done: compute_learning_rate_factor(done, num_training_steps)
        )
        return trainer.lr_scheduler

    trainer.create_scheduler = create_scheduler
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(steps)
    result = trainer.train()
    return steps.last_metrics | {"mean_loss": float(result.training_loss), "steps": float(result.global_step)}
