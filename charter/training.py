"""Build and run the trainer of `charter train`, with its monitor, its promotion gate and its metrics reports."""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from charter.connect import connect_bus, open_store, require_log
from charter.console import print_progress
from charter.evaluation.held_out_judge import make_reward_hacking_monitor
from charter.label_quality import make_label_check, read_verdict
from charter.lag import describe_unarchived
from charter.rewards import require_usable_rewards
from charter.startup import start_when_ready
from charter.telemetry import make_trainer_collector, start_metrics_server
from engine.bus.port import Bus
from engine.errors import UsageError
from engine.models import resolve_model_folder
from engine.settings import Settings
from engine.stop_signals import stop_on_signals
from schemas.records import PolicyUpdate
from trainer.methods import RL_METHODS

if TYPE_CHECKING:
    from trainer.loop import Trainer

_USUAL_LORA_RANK = 16
_NUM_CARDS = (1, 2, 4, 8, 16, 64)
_TRACKING_LIBRARIES = ("trackio", "wandb")


def run_training(settings: Settings, phase: str | None, loop: bool, *, wait: bool = False, force: bool = False) -> None:
    """Run the trainer. If `loop` is true, make updates until a signal arrives.

    Otherwise make one update, of `phase` or of the next phase that is ready. If `wait` is true, wait at the start for a
    dependency that is unreachable or full. If `force` is true, RL trains on labels of any quality.
    """
    if not loop:
        require_log(settings)  # a loop may start before the first records exist
    reporter = MetricsReporter(settings)
    bus, trainer = start_when_ready(partial(_open_trainer, settings, reporter, loop, force, phase), wait=wait)
    closing = start_metrics_server(settings, make_trainer_collector(reporter.latest_metrics, reporter.step_counts))
    try:
        if loop:
            trainer.run_loop(stop_on_signals())
        else:
            if line := describe_unarchived(bus, trainer.store, settings.folder):
                print_progress(f"not trained: {line}", logging.WARNING)
            _train_once(trainer, phase, settings)
    finally:
        trainer.close()
        for close in (*closing, reporter.close, bus.close):
            close()


def print_memory_estimates(settings: Settings) -> None:
    """Print the memory of an update on each card, for the policy and for models of usual sizes. No weights are loaded."""
    from trainer import memory

    train = settings.train
    common = memory.UpdateSettings(
        sequence_length=train.max_length,
        completion_length=min(settings.respond.max_tokens, train.max_length),
        micro_batch_size=train.micro_batch_size,
        bf16=train.precision != "fp32",  # a card multiplies in bf16
        gradient_checkpointing=train.gradient_checkpointing,
    )
    # Without adapters in the settings, the adapters of the table have a usual rank.
    lora = replace(common, lora_rank=train.lora_rank or _USUAL_LORA_RANK)
    variants = [common, lora, *([replace(lora, base_dtype="bf16")] if common.bf16 else [])]
    shapes, spec = list(memory.SHAPES), train.base_model or settings.models.policy
    policy = memory.read_shape(resolve_model_folder(spec)) if spec == "smollm2" or Path(spec).is_dir() else None
    if policy:
        shapes.insert(0, policy)
    else:
        print_progress(f"{spec} is not in the table: it is not the folder of a decoder with gated MLPs (Llama, Qwen, Mistral)")
    for line in memory.format_estimates(shapes, variants, _NUM_CARDS):
        click.echo(line)
    click.echo(
        f"GiB on each card, by the number of cards. Sequences of {common.sequence_length} tokens with completions of"
        f" {common.completion_length}, {common.micro_batch_size} in one pass, gradient_checkpointing ="
        f" {str(common.gradient_checkpointing).lower()}. Libraries and fragments of the allocator are not included"
        " (docs/training.md)."
    )


def _open_trainer(
    settings: Settings, reporter: MetricsReporter, loop: bool, force: bool, phase: str | None
) -> tuple[Bus, Trainer]:
    """Connect to the log and open the trainer. Close the connection if the trainer cannot be opened."""
    from charter.grading import detect_refusals
    from trainer.loop import Trainer
    from trainer.promotion import make_promotion_gate

    require_usable_rewards(settings, open_store(settings), force=force, phase=phase)
    bus = connect_bus(settings)
    try:
        return bus, Trainer(
            bus,
            open_store(settings),
            settings,
            _get_base_model_folder(settings),
            on_step=reporter.report_step,
            on_update=reporter.report_update,
            notify=print_progress,
            monitor=make_reward_hacking_monitor(settings) if loop and settings.monitor.min_responses else None,
            promotion_gate=make_promotion_gate(settings.promotion, detect_refusals),
            check_labels=None if force else make_label_check(settings.label_quality),
        )
    except BaseException:
        bus.close()
        raise


def _get_base_model_folder(settings: Settings) -> Path:
    """Return the folder of policy version 0."""
    return resolve_model_folder(settings.train.base_model or settings.models.policy)


def _train_once(trainer: Trainer, phase: str | None, settings: Settings) -> None:
    """Print the verdict on the labels, unless the RL method needs none. Resume an unfinished batch, then update `phase`.

    If `phase` is None and there was no unfinished batch, update the next phase that is ready.
    """
    method = RL_METHODS.get(phase or settings.train.rl_method)
    if trainer.store.path.exists() and (method is None or method.needs_labels(settings.train)):
        verdict = read_verdict(trainer.store, settings.label_quality)
        print_progress(str(verdict))
        if verdict.problems and phase in RL_METHODS and trainer.check_labels:
            raise UsageError(
                f"{phase} does not train on {verdict.subject}",
                "; ".join(verdict.problems),
                f"to train anyway, type: charter train --phase {phase} --force",
            )
    update = trainer.resume()
    next_phase = phase or (None if update else trainer.next_phase())
    if next_phase:
        update = trainer.update(next_phase)
    if update is None and not trainer.skips_rl:
        paused = ", ".join(sorted(trainer.read_state().paused_phases))
        why = f"{paused} is paused (to resume it, type: charter policy resume)" if paused else "no phase has enough new rows"
        click.echo(f"{why}. To train a phase now, type: charter train --phase sft")


class MetricsReporter:
    """Sends the metrics of steps and of updates to the terminal, log messages, Prometheus, and trackio or wandb."""

    def __init__(self, settings: Settings) -> None:
        self.latest_metrics: dict[str, dict[str, float]] = {}
        self.step_counts: Counter[str] = Counter()
        self.tracker_run = _start_tracker_run(settings.train.report_to, settings.run.id) if settings.train.report_to else None

    def report_step(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """Report the metrics of one step."""
        self.latest_metrics[phase] = metrics
        self.step_counts[phase] += 1
        click.echo(f"phase={phase} step={step} {_format_metrics(metrics)}")
        fields = {"phase": phase, "step": step, "metrics": metrics}
        logging.getLogger("charter.trainer").info("%s step %d", phase, step, extra=fields)
        self.log_to_tracker(phase, metrics)

    def report_update(self, update: PolicyUpdate) -> None:
        """Report the published version. Also report those metrics of the update that no step has reported."""
        update_metrics = {
            name: value for name, value in update.metrics.items() if name not in self.latest_metrics.get(update.phase, {})
        }
        click.echo(f"{update.kind.value.lower()} {update.version} from {update.phase}: {update.uri}")
        click.echo(f"phase={update.phase} version={update.version} {_format_metrics(update_metrics)}")
        self.log_to_tracker(update.phase, update_metrics)

    def log_to_tracker(self, phase: str, metrics: dict[str, float]) -> None:
        if self.tracker_run:
            self.tracker_run.log({name if "/" in name else f"{phase}/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        if self.tracker_run:
            self.tracker_run.finish()


def _format_metrics(metrics: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in metrics.items() if name != "epoch")


def _start_tracker_run(name: str, run_id: str) -> Any:
    """Start a run of trackio or wandb. Both libraries have the same interface (`init`, `log`, `finish`)."""
    try:
        library = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"train.report_to = {name!r} needs {name}", f"{error.name} is not installed", f"type: pip install {name}"
        ) from error
    init: Callable[..., Any] = library.init
    return init(project="charter", name=run_id)
