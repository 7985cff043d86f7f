"""`charter demo`: run the whole training loop once on one machine, with a small real model.

1. Policy 0 responds to shipped prompts; the responses are critiqued, revised and judged, and written to DuckDB.
2. SFT trains policy 1 on the final responses. The reward model is trained on the judge's labels.
3. Policy 1 responds to new prompts. PPO trains policy 1 on these responses. The result is policy 2.
4. Policy 2 responds to more prompts.

The demo reads the log and the database to find the remaining work. If the demo was killed, the next start continues it. If the
demo is already finished, it only prints its summary.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.live import Live
from rich.table import Table

from charter.connect import connect_bus, open_store
from charter.console import format_table
from charter.label_quality import Verdict, read_verdict
from charter.pipeline import make_host
from charter.progress import claim_terminal_line
from charter.stages import STAGES
from charter.text import format_trace
from engine.bus.port import Bus
from engine.errors import CharterError, UsageError
from engine.host import Host
from engine.models import resolve_model_folder
from engine.settings import Settings
from engine.store import Store
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer, count_shipped_prompts
from producers.parse import parse_prompt
from producers.rows import read_rows
from schemas import ids
from schemas.records import PolicyKind

if TYPE_CHECKING:
    from trainer.loop import Trainer

# The completions are short and there is only one revision round, so two cores need a few minutes. A real run uses the defaults.
DEMO_PRESET: dict[str, dict[str, Any]] = {
    "run": {"id": "demo"},
    "prompts": {"eval_fraction": 0.0},
    "respond": {"max_tokens": 96, "temperature": 0.7},
    "critique": {"rounds": 1, "max_tokens": 64, "temperature": 0.7},
    "revise": {"max_tokens": 96},
    "ppo": {"epochs": 1},
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
    "sft": "sft (policy 1 from the final responses of the revision chains)",
    "reward": "reward (a reward model from the judge's preference labels)",
    "ppo": "ppo (policy 2 from policy 1 and the reward model)",
}


@dataclass(frozen=True)
class DemoIteration:
    """Describes one iteration. A policy responds to a range of the shipped prompts, then training makes the next policy."""

    title: str
    first_line: int
    last_line: int
    policy_version: int
    training_phases: tuple[str, ...]


def _plan_iterations(num_prompts: int) -> list[DemoIteration]:
    """Return three iterations with new prompts.

    Their numbers of prompts are `num_prompts`, two thirds of `num_prompts`, and one third of `num_prompts`.
    """
    second, third = max(1, 2 * num_prompts // 3), max(1, num_prompts // 3)
    if num_prompts < 2 or num_prompts + second + third > count_shipped_prompts():
        raise UsageError(
            f"--prompts cannot be {num_prompts}",
            f"the minimum is 2, and the three iterations need twice this number of the {count_shipped_prompts()} shipped prompts",
            "type: charter demo --prompts 24",
        )
    return [
        DemoIteration(f"policy 0 responds to {num_prompts} prompts", 1, num_prompts, 0, ("sft", "reward")),
        DemoIteration(f"policy 1 responds to {second} new prompts", num_prompts + 1, num_prompts + second, 1, ("ppo",)),
        DemoIteration(
            f"policy 2 responds to {third} new prompts", num_prompts + second + 1, num_prompts + second + third, 2, ()
        ),
    ]


def _compute_prompt_ids(iteration: DemoIteration) -> list[str]:
    lines = read_rows(str(SHIPPED_PROMPTS_PATH), iteration.first_line, iteration.last_line)
    return [ids.compute_prompt_id(parse_prompt(line, source="", max_chars=10**6).messages) for _, line in lines]


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
        names = ("loss", "accuracy", "policy_loss", "value_loss", "approx_kl", "kl_ref", "clipfrac", "grad_norm")
        values = " ".join(f"{name}={metrics[name]:.4g}" for name in names if name in metrics)
        self.print_line(f"{phase} step {step}: {values}")

    def close(self) -> None:
        self.stop_event.set()
        if self.live_display:
            self.live_display.stop()
        self.exit_stack.close()


class Demo:
    """Runs the demo in the data folder of the settings. The first iteration uses `prompts` prompts."""

    def __init__(self, settings: Settings, prompts: int, *, accept_configuration: bool = False) -> None:
        self.settings, self.iterations = settings, _plan_iterations(prompts)
        self.accept_configuration = accept_configuration
        self.store: Store = open_store(settings)
        self.base_folder = resolve_model_folder(settings.models.policy)
        self.started_at = time.monotonic()

    def run(self) -> None:
        bus = connect_bus(self.settings)
        progress = DemoProgress(self.started_at)
        try:
            progress.print_line(f"model {self.settings.models.policy}, data folder {self.settings.folder.resolve()}")
            with make_host(self.settings, bus, STAGES, sink=True, accept_configuration=self.accept_configuration) as host:
                self.run_iterations(bus, host, progress)
        finally:
            progress.close()
            bus.close()
        click.echo("\n".join(self.format_summary()))

    def run_iterations(self, bus: Bus, host: Host, progress: DemoProgress) -> None:
        """Run the iterations and their training phases. Skip iterations and phases that are already finished."""
        from trainer.loop import Trainer

        trainer = Trainer(bus, self.store, self.settings, self.base_folder, progress.print_step)
        try:
            for iteration in self.iterations:
                self.run_iteration(iteration, bus, host, progress)
                for phase in iteration.training_phases:
                    self.train_phase(trainer, phase, host, progress)
        finally:
            trainer.close()

    def run_iteration(self, iteration: DemoIteration, bus: Bus, host: Host, progress: DemoProgress) -> None:
        """Publish the prompts of an iteration that are not on the log yet. Wait until all prompts of the iteration are finished."""
        prompt_ids = _compute_prompt_ids(iteration)
        if self.count_finished(prompt_ids) < len(prompt_ids):
            number = self.iterations.index(iteration) + 1
            progress.print_line(f"iteration {number} of {len(self.iterations)}: {iteration.title}")
        producer = FileProducer(bus, self.settings.run.id, eval_fraction=self.settings.prompts.eval_fraction)
        producer.publish(str(SHIPPED_PROMPTS_PATH), first_row=iteration.first_line, last_row=iteration.last_line)

        def is_finished() -> bool:
            done, counts = self.count_finished(prompt_ids), self.query_record_counts()
            progress.show_counts(iteration.title, counts, done, len(prompt_ids), _get_running_stages(host))
            return done >= len(prompt_ids)

        _wait_until(is_finished, host)

    def train_phase(self, trainer: Trainer, phase: str, host: Host, progress: DemoProgress) -> None:
        """Train one update of a phase. Continue an update that an earlier start began. Skip a finished update."""
        update = trainer.resume()
        if phase not in {manifest.phase for manifest in trainer.read_state().manifests}:
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
        """Return the closing summary: one trace, record counts, metrics of the updates, file locations and next commands."""
        counts = list(self.query_record_counts().items())
        versions = self.store.query(
            "SELECT policy_version, count(*) FROM responses WHERE split <> 'SUITE' GROUP BY 1 ORDER BY 1"
        ).rows
        seconds = time.monotonic() - self.started_at
        memory_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2  # Linux reports kilobytes
        data = "" if self.settings.data.folder == ".charter" else f" --data {self.settings.data.folder}"
        program, example = _get_program_path(), self.find_example_trace()
        title = "Trace of one prompt"
        return [
            "",
            title,
            "-" * len(title),
            format_trace(example),
            "",
            format_table(["records", "count"], counts),
            "",
            format_table(["policy version", "responses"], versions),
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
            "The demo only shows how the pipeline works. The results are poor, because such a small model judges almost at random.",
            "",
            "Next steps",
            "  Show the trace of this prompt:",
            f"    {program} show{data} {str(example['prompt_id'])[:8]}",
            "  Query the database:",
            f'    {program} sql{data} "select policy_version, count(*) from responses group by 1"',
            "  Show the progress of each stage:",
            f"    {program} status{data}",
            "  Run your own prompts and principles in a new folder, with the base model and not with the policy of this demo:",
            f"    {program} init NAME",
        ]

    def find_example_trace(self) -> dict[str, Any]:
        """Return the trace with the most revisions. If several traces have this number, prefer a red-team prompt.

        Raises CharterError if no prompt has a response.
        """
        order = "len(coalesce(revisions, [])) DESC, source = 'red-team' DESC, created_at"
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
