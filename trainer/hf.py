"""What trl's trainers need around them: quiet arguments, and each step's numbers passed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

MICRO_ROWS = 4  # rows in one pass; a step adds several up, which bounds the memory of activations
OnStep = Callable[[int, dict[str, float]], None]


def ignore(step: int, measures: dict[str, float]) -> None:
    """The default OnStep."""


def arguments(output: str, *, learning_rate: float, epochs: int, batch_size: int, seed: int, max_length: int) -> dict[str, Any]:
    """Arguments for SFTConfig and RewardConfig: nothing is saved, uploaded or printed; weights stay fp32 under autocast."""
    return {
        "output_dir": output,
        "learning_rate": learning_rate,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": min(batch_size, MICRO_ROWS),
        "gradient_accumulation_steps": max(1, batch_size // MICRO_ROWS),
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "seed": seed,
        "data_seed": seed,
        "bf16": True,
        "activation_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": max_length,
        "dataloader_pin_memory": False,
    }


class Steps(TrainerCallback):
    """Passes each logged step on, numbers only."""

    def __init__(self, on_step: OnStep) -> None:
        self.on_step = on_step
        self.last: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        numbers = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
        if "loss" in numbers:
            self.last = numbers
            self.on_step(state.global_step, numbers)


def run(trainer: Any, on_step: OnStep) -> dict[str, float]:
    """Train quietly; returns the last step's numbers and the mean loss."""
    steps = Steps(on_step)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(steps)
    result = trainer.train()
    return steps.last | {"mean_loss": float(result.training_loss), "steps": float(result.global_step)}
