"""`charter train`: the trainer of the settings, what watches and gates it, and where its numbers go."""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from charter.connect import connect_bus, open_store
from charter.console import print_progress
from charter.evaluation.held_out_judge import make_reward_hacking_monitor
from charter.telemetry import make_trainer_collector, start_metrics_server
from engine.errors import UsageError
from engine.models import resolve_model_folder
from engine.settings import Settings
from engine.stop_signals import stop_on_signals
from schemas.records import PolicyUpdate

if TYPE_CHECKING:
    from trainer.loop import Trainer

_TRACKING_LIBRARIES = ("trackio", "wandb")


def run_training(settings: Settings, phase: str | None, loop: bool) -> None:
    """Train in this process, and in those that a launcher has put beside it."""
    from trainer.loop import Trainer
    from trainer.promotion import make_promotion_gate

    numbers = MetricsReporter(settings)
    bus = connect_bus(settings)
    trainer = Trainer(
        bus,
        open_store(settings),
        settings,
        _get_base_model_folder(settings),
        on_step=numbers.report_step,
        on_update=numbers.report_update,
        notify=print_progress,
        monitor=make_reward_hacking_monitor(settings) if loop and settings.monitor.min_responses else None,
        promotion_gate=make_promotion_gate(settings.promotion),
    )
    closing = start_metrics_server(settings, make_trainer_collector(numbers.latest_metrics, numbers.step_counts))
    try:
        if loop:
            trainer.run_loop(stop_on_signals())
        else:
            _train_once(trainer, phase)
    finally:
        trainer.close()
        for close in (*closing, numbers.close, bus.close):
            close()


def _get_base_model_folder(settings: Settings) -> Path:
    """The weights of policy version 0."""
    return resolve_model_folder(settings.train.base_model or settings.models.policy)


def _train_once(trainer: Trainer, phase: str | None) -> None:
    """Finish what is unfinished, then the phase that is named, or the one that is due."""
    update = trainer.resume()
    chosen = phase or (None if update else trainer.next_phase())
    if chosen:
        update = trainer.update(chosen)
    if update is None:
        held = ", ".join(sorted(trainer.get_paused_phases()))
        why = f"{held} is paused (charter policy resume)" if held else "no phase has enough new rows"
        click.echo(f"{why}; name one to train now: charter train --phase sft")


class MetricsReporter:
    """The numbers of steps and updates: lines on the terminal, the log, Prometheus, and trackio or wandb if so set."""

    def __init__(self, settings: Settings) -> None:
        self.latest_metrics: dict[str, dict[str, float]] = {}
        self.step_counts: Counter[str] = Counter()
        self.tracker_run = _start_tracker_run(settings.train.report_to, settings.run.id) if settings.train.report_to else None

    def report_step(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        self.latest_metrics[phase] = metrics
        self.step_counts[phase] += 1
        click.echo(f"phase={phase} step={step} {_format_metrics(metrics)}")
        about = {"phase": phase, "step": step, "metrics": metrics}
        logging.getLogger("charter.trainer").info("%s step %d", phase, step, extra=about)
        self.log_to_tracker(phase, metrics)

    def report_update(self, update: PolicyUpdate) -> None:
        """What an update has made, and its own numbers: those that no step has."""
        own = {name: value for name, value in update.metrics.items() if name not in self.latest_metrics.get(update.phase, {})}
        click.echo(f"{update.kind.value.lower()} {update.version} from {update.phase}: {update.uri}")
        click.echo(f"phase={update.phase} version={update.version} {_format_metrics(own)}")
        self.log_to_tracker(update.phase, own)

    def log_to_tracker(self, phase: str, metrics: dict[str, float]) -> None:
        if self.tracker_run:
            self.tracker_run.log({name if "/" in name else f"{phase}/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        if self.tracker_run:
            self.tracker_run.finish()


def _format_metrics(metrics: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in metrics.items() if name != "epoch")


def _start_tracker_run(name: str, run_id: str) -> Any:
    """A run of trackio or wandb, which are used alike: `init`, `log`, `finish`."""
    try:
        library = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"train.report_to = {name!r} needs {name}", f"{error.name} is not installed", f"type: pip install {name}"
        ) from error
    init: Callable[..., Any] = library.init
    return init(project="charter", name=run_id)
