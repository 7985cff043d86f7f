"""`charter train`: the trainer of the settings, what watches and gates it, and where its numbers go."""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from charter.observe import figures_of_trainer, show
from charter.options import stop_on_signals, tell
from charter.pipeline import connect, store_of
from charter.watching import watch_of
from engine.errors import UsageError
from engine.models import model_folder

if TYPE_CHECKING:
    from engine.settings import Settings
    from schemas.records import PolicyUpdate
    from trainer.loop import Trainer

LIBRARIES = ("trackio", "wandb")


def train_here(settings: Settings, phase: str | None, loop: bool) -> None:
    """Train in this process, and in those that a launcher has put beside it."""
    from trainer.gate import gate_of
    from trainer.loop import Trainer

    numbers = Numbers(settings)
    bus = connect(settings)
    trainer = Trainer(
        bus,
        store_of(settings),
        settings,
        base_folder(settings),
        on_step=numbers.step,
        on_update=numbers.update,
        say=tell,
        watch=watch_of(settings) if loop and settings.watch.answers else None,
        gate=gate_of(settings.gate),
    )
    closing = show(settings, figures_of_trainer(numbers.latest, numbers.steps))
    try:
        if loop:
            trainer.loop(stop_on_signals())
        else:
            once(trainer, phase)
    finally:
        trainer.close()
        for close in (*closing, numbers.close, bus.close):
            close()


def base_folder(settings: Settings) -> Path:
    """The weights of policy version 0."""
    return model_folder(settings.train.base or settings.models.policy)


def once(trainer: Trainer, phase: str | None) -> None:
    """Finish what is unfinished, then the phase that is named, or the one that is due."""
    update = trainer.resume()
    chosen = phase or (None if update else trainer.due())
    if chosen:
        update = trainer.update(chosen)
    if update is None:
        held = ", ".join(sorted(trainer.paused()))
        why = f"{held} is paused (charter policy resume)" if held else "no phase has enough new rows"
        click.echo(f"{why}; name one to train now: charter train --phase sft")


class Numbers:
    """The numbers of steps and updates: lines on the terminal, the log, Prometheus, and trackio or wandb if so set."""

    def __init__(self, settings: Settings) -> None:
        self.latest: dict[str, dict[str, float]] = {}
        self.steps: Counter[str] = Counter()
        self.run = tracker(settings.train.report_to, settings.run.id) if settings.train.report_to else None

    def step(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        self.latest[phase] = metrics
        self.steps[phase] += 1
        click.echo(f"phase={phase} step={step} {figures(metrics)}")
        about = {"phase": phase, "step": step, "metrics": metrics}
        logging.getLogger("charter.trainer").info("%s step %d", phase, step, extra=about)
        self.report(phase, metrics)

    def update(self, update: PolicyUpdate) -> None:
        """What an update has made, and its own numbers: those that no step has."""
        own = {name: value for name, value in update.metrics.items() if name not in self.latest.get(update.phase, {})}
        click.echo(f"{update.kind.value.lower()} {update.version} from {update.phase}: {update.uri}")
        click.echo(f"phase={update.phase} version={update.version} {figures(own)}")
        self.report(update.phase, own)

    def report(self, phase: str, metrics: dict[str, float]) -> None:
        if self.run:
            self.run.log({name if "/" in name else f"{phase}/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        if self.run:
            self.run.finish()


def figures(metrics: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in metrics.items() if name != "epoch")


def tracker(name: str, run_id: str) -> Any:
    """A run of trackio or wandb, which are used alike: `init`, `log`, `finish`."""
    try:
        library = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"train.report_to = {name!r} needs {name}", f"{error.name} is not installed", f"type: pip install {name}"
        ) from error
    init: Callable[..., Any] = library.init
    return init(project="charter", name=run_id)
