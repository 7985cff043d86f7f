"""`charter demo`: run the whole training loop once on one machine, with a small real model.

The constitution is "Answer in one short sentence.": a small model can follow it, and a program can check it.

1. Policy 0 responds to shipped prompts; the responses are critiqued, revised and judged, and written to DuckDB. SFT trains policy 1
   on the final responses and on shipped demonstrations.
2. Policy 1 responds to helpful prompts, which are neither critiqued nor revised. A reward model is trained on the labels of both
   iterations. PPO trains policy 2 on the responses of policy 1 and the reward model. Self-distillation trains policy 3 on the same
   responses, without labels.
3. All policies respond to other shipped prompts, which train nothing (charter/demo_evaluation.py). The demo ends with their grades.

The labels are those of a grader, and not of a language model: SmolLM2 judges almost at random.

The demo reads the log and the database to find the remaining work. If the demo was killed, the next start continues it. If the
demo is already finished, it only prints its summary.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.live import Live
from rich.table import Table

from charter.connect import connect_bus, open_store
from charter.console import TerminalFormatter, format_table, is_logging_json, print_progress
from charter.demo_evaluation import DemoEvaluation
from charter.grader_judge import GraderJudge
from charter.label_quality import Verdict, read_verdict
from charter.pipeline import make_host
from charter.progress import claim_terminal_line
from charter.stages import STAGES
from charter.text import escape_unprintable, format_trace
from consumers.graders.one_sentence import OneSentenceGrader
from engine.bus.port import Bus
from engine.errors import CharterError, UsageError
from engine.host import Host
from engine.models import resolve_model_folder
from engine.models.interface import Model
from engine.settings import Settings
from engine.store import Store
from producers.files import DEMONSTRATIONS_PATH, SHIPPED_PROMPTS_PATH, FileProducer, count_shipped_prompts
from producers.parse import parse_prompt
from producers.rows import read_rows
from schemas import ids
from schemas.records import PolicyKind

if TYPE_CHECKING:
    from trainer.loop import Trainer

_JUDGE = GraderJudge(OneSentenceGrader())
# The completions are short and there is only one revision round, so two cores need a few minutes. A real run uses the defaults.
DEMO_PRESET: dict[str, dict[str, Any]] = {
    "run": {"id": "demo", "constitution": "one-sentence"},
    "models": {"judge": _JUDGE.id, "max_batch_size": 48},  # two completions of 24 prompts
    "prompts": {"eval_fraction": 0.0},
    "respond": {"max_tokens": 64, "temperature": 0.7},
    "critique": {"rounds": 1, "max_tokens": 48, "temperature": 0.7, "few_shot": False},  # SmolLM2 repeats examples
    "revise": {"max_tokens": 48},
    "grade": {"graders": ["refusal", "length", _JUDGE.grader.name]},
    # Each phase trains on all of its rows: half of them are helpful, or a few more. The prompts are too few to divide them into
    # prompts for the reward model and prompts for PPO.
    "train": {"sft_mixture": [], "reward_mixture": [], "allow_overlap": True},
    "sft": {"learning_rate": 5e-5},  # the updates have few steps
    "reward": {"learning_rate": 1e-4, "batch_size": 4},
    "ppo": {"epochs": 1},
    "distill": {"learning_rate": 5e-5, "batch_size": 4},
}
_POLL_INTERVAL_S = 1.0
_STATUS_INTERVAL_S = 10.0  # maximum time between two lines of output without a terminal
_COUNTED_TABLES = ("prompts", "responses", "critiques", "revisions", "preferences", "dead letters")
_SUITE_TABLES = (
    "prompts",
    "responses",
)  # these tables also have the records of evaluation suites, which the demo does not count
_UPDATE_KINDS = {PolicyKind.POLICY: "policy", PolicyKind.REWARD: "reward model"}
_PHASE_TITLES = {
    "sft": "sft (policy 1 from the final responses of the revision chains and from demonstrations)",
    "reward": "reward (a reward model from the preference labels of the grader)",
    "ppo": "ppo (policy 2 from policy 1 and the reward model)",
    "distill": "distill (policy 3 from policy 2: answer without the constitution as with it)",
}


@dataclass(frozen=True)
class DemoIteration:
    """Describes one iteration. A policy responds to the first prompts of a file, then training makes the next policies."""

    title: str
    path: Path
    num_prompts: int
    training_phases: tuple[str, ...]


def _plan_iterations(num_prompts: int) -> list[DemoIteration]:
    """Return the two iterations, with two thirds of `num_prompts` prompts and with all of them.

    The evaluation needs further `num_prompts` shipped prompts.
    """
    num_shipped = count_shipped_prompts()
    num_demonstrations = sum(1 for _ in read_rows(str(DEMONSTRATIONS_PATH)))
    if not 2 <= num_prompts <= min(num_shipped // 2, num_demonstrations):
        raise UsageError(
            f"--prompts cannot be {num_prompts}",
            f"the minimum is 2, and the demo has {num_shipped} prompts for the first iteration and the evaluation, and"
            f" {num_demonstrations} demonstrations for the second iteration",
            f"type: charter demo --prompts {min(num_shipped // 2, num_demonstrations)}",
        )
    num_first = max(1, 2 * num_prompts // 3)
    return [
        DemoIteration(f"policy 0 responds to {num_first} prompts", SHIPPED_PROMPTS_PATH, num_first, ("sft",)),
        DemoIteration(
            f"policy 1 responds to {num_prompts} helpful prompts",
            DEMONSTRATIONS_PATH,
            num_prompts,
            ("reward", "ppo", "distill"),
        ),
    ]


def _compute_prompt_ids(iteration: DemoIteration) -> list[str]:
    lines = read_rows(str(iteration.path), 1, iteration.num_prompts)
    return [ids.compute_prompt_id(parse_prompt(line, source="", max_chars=10**6).messages) for _, line in lines]


class _NoteHandler(logging.Handler):
    """Prints warnings as notes, with the elapsed time and in order with the other lines."""

    def __init__(self, print_line: Callable[[str], None]) -> None:
        super().__init__()
        self.print_line = print_line
        self.addFilter(_is_warning)

    def emit(self, record: logging.LogRecord) -> None:
        self.print_line(f"note: {escape_unprintable(record.getMessage())}")


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno == logging.WARNING and record.name.startswith("charter")


@contextmanager
def _print_warnings_as_notes(print_line: Callable[[str], None]) -> Iterator[None]:
    """Pass the warnings of Charter to `print_line` in the block, and not to the standard error of the command."""
    logger, note_handler = logging.getLogger("charter"), _NoteHandler(print_line)
    terminal_handlers = [h for h in logging.getLogger().handlers if isinstance(h.formatter, TerminalFormatter)]

    def is_other(record: logging.LogRecord) -> bool:
        return not _is_warning(record)

    for handler in terminal_handlers:
        handler.addFilter(is_other)
    logger.addHandler(note_handler)
    try:
        yield
    finally:
        logger.removeHandler(note_handler)
        for handler in terminal_handlers:
            handler.removeFilter(is_other)


class DemoProgress:
    """Shows the progress as a live table on a terminal. Otherwise prints a line for each change, and at least every 10 seconds."""

    def __init__(self, started_at: float) -> None:
        self.started_at = self.printed_at = started_at
        self.title, self.status = "starting", "starting"
        self.counts: dict[str, int] = {}
        self.lock = threading.Lock()
        self.stop_event = threading.Event()
        self.live_display: Live | None = None
        self.exit_stack = ExitStack()
        if not is_logging_json():
            self.exit_stack.enter_context(_print_warnings_as_notes(self.print_line))
        if sys.stdout.isatty():
            self.exit_stack.enter_context(claim_terminal_line())
            self.live_display = Live(get_renderable=self.build_table, refresh_per_second=4, transient=True)
            self.live_display.start()
        else:
            threading.Thread(target=self.repeat_status, name="progress", daemon=True).start()

    def print_line(self, text: str) -> None:
        """Print a line with the elapsed time. On a terminal, the line appears above the live table."""
        line = f"[{time.monotonic() - self.started_at:5.0f} s] {text}"
        if self.live_display:
            self.live_display.console.print(line, highlight=False, markup=False)
            return
        with self.lock:
            click.echo(line)
            self.printed_at = time.monotonic()

    def show_counts(self, title: str, counts: dict[str, int], done: int, total: int, running_stages: Sequence[str]) -> None:
        """Show the number of finished prompts, the number of records in each table, and the stages that run a batch now."""
        self.title = f"{title}: {done} of {total} finished"
        fields = " ".join(f"{name.replace(' ', '_')}={count}" for name, count in counts.items())
        self.status = f"finished={done}/{total} {fields} running={','.join(running_stages) or 'none'}"
        if counts != self.counts:
            self.counts = counts
            if not self.live_display:
                self.print_line(self.status)

    def show_evaluation(self, title: str) -> None:
        """Show that policies are evaluated."""
        self.title, self.counts, self.status = title, {}, f"{title} in progress"
        self.print_line(title)

    def show_training(self, phase: str, counts: dict[str, int]) -> None:
        """Show the training phase; `print_step` prints its steps."""
        self.title, self.counts, self.status = f"training: {phase}", counts, f"training: {phase} in progress"
        self.print_line(f"training: {_PHASE_TITLES[phase]}")

    def repeat_status(self) -> None:
        """Print the status again after 10 seconds without output, so that the user sees that a slow batch still runs."""
        while not self.stop_event.wait(_POLL_INTERVAL_S):
            if time.monotonic() - self.printed_at >= _STATUS_INTERVAL_S:
                with suppress(BrokenPipeError):  # the main thread reports this error
                    self.print_line(self.status)

    def build_table(self) -> Table:
        table = Table(title=f"{self.title}  ({time.monotonic() - self.started_at:.0f} s)")
        for name in self.counts:
            table.add_column(name, justify="right")
        table.add_row(*(str(count) for count in self.counts.values()))
        return table

    def print_step(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """Print one line for a training step."""
        names = (
            "teacher_effect",
            "loss",
            "accuracy",
            "policy_loss",
            "value_loss",
            "approx_kl",
            "kl_ref",
            "clipfrac",
            "grad_norm",
        )
        values = " ".join(f"{name}={metrics[name]:.4g}" for name in names if name in metrics)
        self.print_line(f"{phase} step {step}: {values}")

    def close(self) -> None:
        self.stop_event.set()
        if self.live_display:
            self.live_display.stop()
        self.exit_stack.close()


class Demo:
    """Runs the demo in the data folder of the settings. The second iteration and the evaluation use `prompts` prompts."""

    def __init__(self, settings: Settings, prompts: int, *, accept_configuration: bool = False) -> None:
        self.settings, self.iterations = settings, _plan_iterations(prompts)
        self.accept_configuration = accept_configuration
        self.store: Store = open_store(settings)
        self.base_folder = resolve_model_folder(settings.models.policy)
        self.evaluation = DemoEvaluation(settings, self.store, prompts)
        self.started_at = time.monotonic()

    def run(self) -> bool:
        """Run the demo, or only print the summary of a finished one. Return False if a signal stopped the evaluation."""
        if self.is_finished():
            click.echo("the demo of this data folder is finished, so its summary is printed and nothing runs")
        elif not self.run_stages():
            return False
        click.echo("\n".join(self.format_summary()))
        return True

    def is_finished(self) -> bool:
        """Return whether the database has the updates of all phases, and the grades of the evaluation."""
        if not self.store.path.exists():
            return False
        phases = [phase for iteration in self.iterations for phase in iteration.training_phases]
        sql = "SELECT count(DISTINCT phase) FROM policies WHERE run_id = ? AND phase IN (SELECT unnest(?::VARCHAR[]))"
        return self.query_count(sql, [self.settings.run.id, phases]) == len(phases) and self.evaluation.is_finished()

    def run_stages(self) -> bool:
        """Run the iterations, the training phases and the evaluation. Return False if a signal stopped the evaluation."""
        bus = connect_bus(self.settings)
        progress = DemoProgress(self.started_at)
        open_models: dict[str, Model] = {_JUDGE.id: _JUDGE}
        try:
            progress.print_line(f"model {self.settings.models.policy}, data folder {self.settings.folder.resolve()}")
            with make_host(
                self.settings,
                bus,
                STAGES,
                sink=True,
                accept_configuration=self.accept_configuration,
                open_models=open_models,
            ) as host:
                self.run_iterations(bus, host, progress)
            open_models.clear()  # the evaluation opens one policy after the other
            if not self.evaluation.is_finished():
                progress.show_evaluation(self.evaluation.title)
                if not self.evaluation.run(bus):
                    print_progress("stopped; to continue, run the same command again")
                    return False
        finally:
            progress.close()
            bus.close()
        return True

    def run_iterations(self, bus: Bus, host: Host, progress: DemoProgress) -> None:
        """Run the iterations and their training phases. Skip iterations and phases that are already finished."""
        from trainer.loop import Trainer

        trainer = Trainer(bus, self.store, self.settings, self.base_folder, progress.print_step)
        try:
            self.publish_demonstrations(bus, host)
            for iteration in self.iterations:
                self.run_iteration(iteration, bus, host, progress)
                for phase in iteration.training_phases:
                    self.train_phase(trainer, phase, host, progress)
        finally:
            trainer.close()

    def publish_demonstrations(self, bus: Bus, host: Host) -> None:
        """Publish the demonstrations that are not on the log yet. Wait until they are in the database."""
        producer = FileProducer(
            bus, self.settings.run.id, eval_fraction=self.settings.prompts.eval_fraction, kind="demonstrations"
        )
        num_rows = self.evaluation.num_prompts
        producer.publish(str(DEMONSTRATIONS_PATH), last_row=num_rows)
        _wait_until(
            lambda: self.store.path.exists() and self.query_count("SELECT count(*) FROM demonstrations") >= num_rows, host
        )

    def run_iteration(self, iteration: DemoIteration, bus: Bus, host: Host, progress: DemoProgress) -> None:
        """Publish the prompts of an iteration that are not on the log yet. Wait until all prompts of the iteration are finished."""
        prompt_ids = _compute_prompt_ids(iteration)
        if self.count_finished(prompt_ids) < len(prompt_ids):
            number = self.iterations.index(iteration) + 1
            progress.print_line(f"iteration {number} of {len(self.iterations)}: {iteration.title}")
        producer = FileProducer(bus, self.settings.run.id, eval_fraction=self.settings.prompts.eval_fraction)
        producer.publish(str(iteration.path), last_row=iteration.num_prompts)

        def is_finished() -> bool:
            done, counts = self.count_finished(prompt_ids), self.query_record_counts()
            progress.show_counts(iteration.title, counts, done, len(prompt_ids), _get_running_stages(host))
            return done >= len(prompt_ids)

        _wait_until(is_finished, host)

    def train_phase(self, trainer: Trainer, phase: str, host: Host, progress: DemoProgress) -> None:
        """Train one update of a phase. Continue an update that an earlier start began. Skip a finished update."""
        update = trainer.resume()
        if phase not in {update.phase for update in trainer.read_state().updates}:
            progress.show_training(phase, self.query_record_counts())
            if phase == "ppo" and (verdict := self.read_verdict()).problems:
                progress.print_line(f"{verdict}. The demo runs PPO anyway, to show the whole loop")
            update = trainer.update(phase)
        if update:
            progress.print_line(f"{update.phase}: published {_UPDATE_KINDS[update.kind]} {update.version}")
        # The update is on the log. The summary reads it from the database, so wait for the sink.
        _wait_until(lambda: self.query_count(f"SELECT count(*) FROM policies WHERE phase = '{phase}'") > 0, host)

    def read_verdict(self) -> Verdict:
        return read_verdict(self.store, self.settings.label_quality)

    def query_count(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        return int(self.store.query(sql, parameters, limit_s=10.0).rows[0][0])

    def query_record_counts(self) -> dict[str, int]:
        tables = [name.replace(" ", "_") for name in _COUNTED_TABLES]
        sources = [f"{name} WHERE split <> 'SUITE'" if name in _SUITE_TABLES else name for name in tables]
        row = self.store.query("SELECT " + ", ".join(f"(SELECT count(*) FROM {source})" for source in sources)).rows[0]
        return dict(zip(_COUNTED_TABLES, row, strict=True))

    def count_finished(self, prompt_ids: Sequence[str]) -> int:
        """Return the number of these prompts that have a finished chain and a preference, or a dead letter."""
        sql = """SELECT count(*) FROM (SELECT unnest(?::UUID[]) AS prompt_id) p
                 WHERE (prompt_id IN (SELECT prompt_id FROM revision_chains) AND prompt_id IN (SELECT prompt_id FROM preferences))
                    OR prompt_id::VARCHAR IN (SELECT decode(source_key) FROM dead_letters)"""
        return self.query_count(sql, [list(prompt_ids)])

    def format_summary(self) -> list[str]:
        """Return the closing summary: one trace, counts, metrics, file locations, next commands, and the result of the evaluation."""
        counts = list(self.query_record_counts().items())
        seconds = time.monotonic() - self.started_at
        memory_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2  # Linux reports kilobytes
        data = "" if self.settings.data.folder == ".charter" else f" --data {self.settings.data.folder}"
        program, example = _get_program_path(), self.find_example_trace()
        title = "Trace of one prompt"
        result_title = "How often each policy answers in one short sentence"
        return [
            "",
            title,
            "-" * len(title),
            format_trace(example),
            "",
            format_table(["records", "count"], counts),
            "",
            format_table(["update", "phase", "metrics"], self.query_update_metrics()),
            "",
            f"time         {seconds:.0f} s since this start",
            f"peak memory  {memory_gb:.1f} GB",
            f"database     {self.settings.folder / 'charter.duckdb'}",
            f"log          {self.settings.bus_address}",
            f"checkpoints  {self.settings.folder / 'checkpoints'}",
            "",
            str(self.read_verdict()),
            "",
            "Next steps",
            "  Show the trace of this prompt:",
            f"    {program} show{data} {str(example['prompt_id'])[:8]}",
            "  Query the database:",
            f'    {program} sql{data} "select policy_version, count(*) from responses group by 1"',
            "  Compare two policies on the evaluation:",
            f"    {program} eval compare{data} --name demo 0 latest",
            "  Show the progress of each stage:",
            f"    {program} status{data}",
            "  Run your own prompts and principles in a new folder, with the base model and not with the policy of this demo:",
            f"    {program} init NAME",
            "",
            result_title,
            "-" * len(result_title),
            *self.evaluation.format_result(),
        ]

    def find_example_trace(self) -> dict[str, Any]:
        """Return a trace with a usable revision, if there is one. Of several traces, prefer a red-team prompt.

        Raises CharterError if no prompt has a response.
        """
        order = "(end_reason = 'LAST_ROUND') DESC, len(coalesce(revisions, [])) DESC, source = 'red-team' DESC, created_at"
        rows = self.store.query_dicts(
            f"SELECT * FROM traces WHERE responses IS NOT NULL AND split <> 'SUITE' ORDER BY {order} LIMIT 1"
        )
        if not rows:
            raise CharterError(
                "no prompt of the demo has a response", "all of them became dead letters", "type: charter dlq list"
            )
        return rows[0]

    def query_update_metrics(self) -> list[tuple[str, str, str]]:
        """Return (update, phase, metrics) for each policy and reward model, oldest first."""
        names = {
            "sft": ("mean_loss", "examples"),
            "reward": ("mean_loss", "reward/accuracy", "reward/deviation"),
            "ppo": ("policy_loss", "value_loss", "kl_ref", "reward_mean"),
            "distill": ("teacher_effect", "loss", "kl_ref"),
        }
        rows = self.store.query("SELECT kind, version, phase, metrics FROM policies ORDER BY commit_seq").rows
        return [
            (
                f"{_UPDATE_KINDS[PolicyKind(kind)]} {version}",
                phase,
                "  ".join(f"{name} {metrics[name]:.4g}" for name in names.get(phase, ()) if name in metrics),
            )
            for kind, version, phase, metrics in rows
        ]


def _get_running_stages(host: Host) -> list[str]:
    """Return the stages that process a batch now. Stages that only have records in a queue are omitted."""
    return [
        worker.stage.name
        for worker in host.workers
        if sum(len(records) for records in list(worker.in_flight_records.values())) > worker.num_queued
    ]


def _get_program_path() -> str:
    """Return the command to type for `charter`. After `make demo` it is in .venv, which is not on the PATH."""
    return "charter" if shutil.which("charter") else os.path.relpath(Path(sys.executable).with_name("charter"))


def _wait_until(condition: Callable[[], bool], host: Host) -> None:
    """Wait until the condition is true. Raises the error of the first host thread that fails."""
    while not condition():
        host.failure_event.wait(_POLL_INTERVAL_S)
        host.raise_if_failed()
