"""Run trl's trainers without saving or printing, and pass the metrics of each step to a callback."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from engine.errors import TrainingFailed
from trainer.distributed import get_num_shards, require_equal_shares
from trainer.weights import Hardware

StepCallback = Callable[[int, dict[str, float]], None]
IGNORE_INDEX = -100  # the label of tokens that the loss ignores (PyTorch's default)
# The learning rate rises during this share of an update's steps. Adam starts without state in each update. Without the rise,
# its first steps would have the full length of the learning rate.
_WARMUP_RATIO = 0.15


def ignore_step(step: int, metrics: dict[str, float]) -> None:
    """Do nothing. This function is the default of `on_step`."""


def make_dataset(rows: Sequence[dict[str, Any]]) -> Any:
    """Return a data set for trl's trainers. It shows no progress bars.

    The learners with their own loops run without the library `datasets`.
    """
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(list(rows))


def compute_micro_batch_size(batch_size: int, max_size: int) -> int:
    """Return the number of rows per pass, which is the largest divisor of `batch_size` up to `max_size`.

    A step is then exactly one batch.
    """
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
    """Build the arguments of trl's configurations. With them, trl does not save, upload or print anything.

    Weights stay in fp32 under autocast. The given rows are sorted so that rows of similar length are next to each other. They
    are read in this order. If `shuffle` is true, they are shuffled again but stay grouped by length. `texts_per_row` is the
    number of sequences in a row. A pair has two sequences and counts as two rows of `hardware.micro_batch_size`. Under
    accelerate's launcher, each process takes an equal part of `batch_size`.
    """
    require_equal_shares("batch_size", batch_size, get_num_shards())
    share = batch_size // get_num_shards()
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
        "use_cache": True,  # the saved configuration then does not change. The learners disable the cache in their forward passes
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "log_level_replica": "error",
        "disable_tqdm": True,
        "max_length": max_length,
        "dataloader_pin_memory": False,
    }


def require_finite(step: int, metrics: Mapping[str, float]) -> None:
    """Raise TrainingFailed when a metric of this step is NaN or infinite."""
    name = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
    if name is not None:
        raise TrainingFailed(
            f"{name} is {metrics[name]} at step {step}: training has diverged",
            "this update was not saved, and the last policy stays in use",
            "lower the learning rate of this phase (charter config), then type: charter train",
        )


class _StepReporter(TrainerCallback):
    """This callback passes the numeric metrics of each logged step to `on_step`."""

    def __init__(self, on_step: StepCallback) -> None:
        self.on_step = on_step
        self.last_metrics: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        metrics = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
        if "loss" in metrics:
            require_finite(state.global_step, metrics)
            self.last_metrics = metrics
            self.on_step(state.global_step, metrics)


def compute_learning_rate_factor(step: int, num_steps: int, warmup_ratio: float = _WARMUP_RATIO) -> float:
    """Return the factor of the learning rate at a step. Steps are counted from 0.

    The factor rises linearly, then falls linearly towards 0. The factor is above 0 at every step. The warm-up of transformers
    starts at 0. With that warm-up, an update of one step would learn nothing.
    """
    rise = math.ceil(warmup_ratio * num_steps)
    return min((step + 1) / (rise + 1), (num_steps - step) / max(1, num_steps - rise))


def run_trainer(trainer: Any, on_step: StepCallback) -> dict[str, float]:
    """Train without output. Return the metrics of the last step, the mean loss and the number of steps."""
    reporter = _StepReporter(on_step)

    def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or trainer.optimizer, lambda done: compute_learning_rate_factor(done, num_training_steps)
        )
        return trainer.lr_scheduler

    trainer.create_scheduler = create_scheduler
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(reporter)
    result = trainer.train()
    return reporter.last_metrics | {"mean_loss": float(result.training_loss), "steps": float(result.global_step)}
