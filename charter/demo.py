"""The whole loop once, on one machine: `charter demo`.

Shipped prompts go through every stage with a real small model and land in DuckDB; SFT makes policy 1, which answers new
prompts; the reward model learns the judge's labels; PPO trains policy 1 on its own answers into
policy 2, which answers more prompts.

Nothing of this is kept in memory: what is still to do is read from the log and the database, so a demo that was killed goes
on where it was, and one that is finished only shows its summary.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from charter.connect import connect_bus, open_store
from charter.console import format_table
from charter.pipeline import STAGES, make_host
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

# Small answers and one round, so that two cores need a few minutes; a real run keeps the defaults.
DEMO_PRESET: dict[str, dict[str, Any]] = {
    "run": {"id": "demo"},
    "prompts": {"eval_fraction": 0.0},
    "respond": {"max_tokens": 96, "temperature": 0.7},
    "critique": {"rounds": 1, "max_tokens": 64, "temperature": 0.7},
    "revise": {"max_tokens": 96},
    "ppo": {"epochs": 1},
}
_POLL_INTERVAL_S = 1.0
_COUNTED_TABLES = ("prompts", "responses", "critiques", "revisions", "preferences", "dead letters")


@dataclass(frozen=True)
class DemoIteration:
    """Some lines of the shipped prompts, answered by one policy; then training that makes the next one."""

    title: str
    first_line: int
    last_line: int
    policy_version: int
    training_phases: tuple[str, ...]


def _plan_iterations(num_prompts: int) -> list[DemoIteration]:
    """Three acts: `prompts` prompts, then two thirds and one third as many new ones."""
    second, third = max(1, 2 * num_prompts // 3), max(1, num_prompts // 3)
    if num_prompts < 2 or num_prompts + second + third > count_shipped_prompts():
        raise UsageError(
            f"--prompts {num_prompts} does not work",
            f"the demo needs 2 prompts or more, and all three acts at most {count_shipped_prompts()}",
            "type: charter demo --prompts 24",
        )
    return [
        DemoIteration(f"{num_prompts} prompts through every stage", 1, num_prompts, 0, ("sft", "reward")),
        DemoIteration(f"policy 1 answers {second} new prompts", num_prompts + 1, num_prompts + second, 1, ("ppo",)),
        DemoIteration(f"policy 2 answers {third} new prompts", num_prompts + second + 1, num_prompts + second + third, 2, ()),
    ]


def _compute_prompt_ids(iteration: DemoIteration) -> list[str]:
    lines = read_rows(str(SHIPPED_PROMPTS_PATH), iteration.first_line, iteration.last_line)
    return [ids.compute_prompt_id(parse_prompt(line, source="", max_chars=10**6).messages) for _, line in lines]


class DemoProgress:
    """What is going on: a live table on a terminal, plain key=value lines elsewhere."""

    def __init__(self, started_at: float) -> None:
        self.started_at = started_at
        self.live_display: Any = None
        self.last_line = ""
        if sys.stdout.isatty():
            from rich.live import Live

            self.live_display = Live(refresh_per_second=4, transient=True)
            self.live_display.start()

    def print_line(self, text: str) -> None:
        """A line that stays."""
        line = f"[{time.monotonic() - self.started_at:5.0f} s] {text}"
        if self.live_display:
            self.live_display.console.print(line, highlight=False, markup=False)
        else:
            click.echo(line)

    def show_counts(self, title: str, counts: dict[str, int], done: int, total: int) -> None:
        """The state of the stream; outside a terminal only when it changed."""
        if self.live_display:
            self.live_display.update(self.build_table(f"{title}: {done} of {total} finished", counts))
            return
        line = " ".join(f"{name.replace(' ', '_')}={count}" for name, count in counts.items())
        if line != self.last_line:
            click.echo(f"elapsed_s={time.monotonic() - self.started_at:.0f} finished={done}/{total} {line}")
            self.last_line = line

    def show_training(self, phase: str, counts: dict[str, int]) -> None:
        """The live table's title while the stream waits; the steps themselves are lines that stay."""
        if self.live_display:
            self.live_display.update(self.build_table(f"training: {phase}", counts))

    def build_table(self, title: str, counts: dict[str, int]) -> Any:

        rich_table = Table(title=f"{title}  ({time.monotonic() - self.started_at:.0f} s)")
        for name in counts:
            rich_table.add_column(name, justify="right")
        rich_table.add_row(*(str(count) for count in counts.values()))
        return rich_table

    def print_step(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """One line for each training step."""
        wanted = ("loss", "accuracy", "policy_loss", "value_loss", "approx_kl", "kl_ref", "clipfrac", "grad_norm")
        figures = " ".join(f"{name}={metrics[name]:.4g}" for name in wanted if name in metrics)
        self.print_line(f"{phase} step {step}: {figures}")

    def close(self) -> None:
        if self.live_display:
            self.live_display.stop()


class Demo:
    """The demo in the data folder of the settings."""

    def __init__(self, settings: Settings, prompts: int) -> None:
        self.settings, self.iterations = settings, _plan_iterations(prompts)
        self.store: Store = open_store(settings)
        self.base_folder = resolve_model_folder(settings.models.policy)
        self.started_at = time.monotonic()

    def run(self) -> None:
        bus = connect_bus(self.settings)
        progress = DemoProgress(self.started_at)
        try:
            progress.print_line(f"model {self.settings.models.policy}, data in {self.settings.folder.resolve()}")
            with make_host(self.settings, bus, STAGES, sink=True) as host:
                self.run_iterations(bus, host, progress)
        finally:
            progress.close()
            bus.close()
        click.echo("\n".join(self.format_summary()))

    def run_iterations(self, bus: Bus, host: Host, progress: DemoProgress) -> None:
        """Every act that is not over yet, and its training."""
        from trainer.loop import Trainer

        trainer = Trainer(bus, self.store, self.settings, self.base_folder, progress.print_step)
        try:
            for act in self.iterations:
                self.run_iteration(act, bus, host, progress)
                for phase in act.training_phases:
                    self.train_phase(trainer, act, phase, host, progress)
        finally:
            trainer.close()

    def run_iteration(self, iteration: DemoIteration, bus: Bus, host: Host, progress: DemoProgress) -> None:
        """Publish an act's prompts (those that are not yet) and wait until each has gone all the way."""
        wanted = _compute_prompt_ids(iteration)
        if self.count_finished(wanted) < len(wanted):
            progress.print_line(iteration.title)
        producer = FileProducer(bus, self.settings.run.id, eval_fraction=self.settings.prompts.eval_fraction)
        producer.publish(str(SHIPPED_PROMPTS_PATH), first_row=iteration.first_line, last_row=iteration.last_line)

        def over() -> bool:
            done = self.count_finished(wanted)
            progress.show_counts(iteration.title, self.query_record_counts(), done, len(wanted))
            return done >= len(wanted)

        _wait_until(over, host)

    def train_phase(self, trainer: Any, iteration: DemoIteration, phase: str, host: Host, progress: DemoProgress) -> None:
        """One update, unless an earlier start of the demo has made it or left it half done."""
        resumed = trainer.resume()
        if phase not in {manifest.phase for manifest in trainer.read_log()[1]}:
            progress.print_line(f"training: {phase}")
            progress.show_training(phase, self.query_record_counts())
            resumed = trainer.update(phase)
        if resumed:
            progress.print_line(f"{resumed.kind.value.lower()} {resumed.version} published by {resumed.phase}")
        # The update is on the log; the summary reads it from the database.
        _wait_until(lambda: self.query_count(f"SELECT count(*) FROM policies WHERE phase = '{phase}'") > 0, host)

    # What the database says

    def query_count(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        return int(self.store.query(sql, parameters, limit_s=10.0).rows[0][0])

    def query_record_counts(self) -> dict[str, int]:
        tables = [name.replace(" ", "_") for name in _COUNTED_TABLES]
        row = self.store.query("SELECT " + ", ".join(f"(SELECT count(*) FROM {name})" for name in tables)).rows[0]
        return dict(zip(_COUNTED_TABLES, row, strict=True))

    def count_finished(self, prompt_ids: Sequence[str]) -> int:
        """How many of these prompts have ended: a finished chain and a judgement, or a dead letter."""
        sql = """SELECT count(*) FROM (SELECT unnest(?::UUID[]) AS prompt_id) p
                 WHERE (prompt_id IN (SELECT prompt_id FROM revision_chains) AND prompt_id IN (SELECT prompt_id FROM preferences))
                    OR prompt_id::VARCHAR IN (SELECT decode(source_key) FROM dead_letters)"""
        return self.query_count(sql, [list(prompt_ids)])

    # The end

    def format_summary(self) -> list[str]:
        """One story, the counts, the figures, where everything is, and what to type next."""
        counts = [(name, count) for name, count in self.query_record_counts().items()]
        versions = self.store.query("SELECT policy_version, count(*) FROM responses GROUP BY 1 ORDER BY 1").rows
        seconds = time.monotonic() - self.started_at
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
        data = "" if self.settings.data.folder == ".charter" else f" --data {self.settings.data.folder}"
        program, example = _get_program_path(), self.find_example_trace()
        return [
            "",
            "One prompt's story",
            "------------------",
            format_trace(example),
            "",
            format_table(["records", "count"], counts),
            "",
            format_table(["policy version", "responses"], versions),
            "",
            format_table(["update", "from", "figures"], self.query_update_metrics()),
            "",
            f"{seconds:.0f} s in this start, {memory:.1f} GB at most in memory",
            f"database     {self.settings.folder / 'charter.duckdb'}",
            f"log          {self.settings.bus_address}",
            f"checkpoints  {self.settings.folder / 'checkpoints'}",
            "",
            "SmolLM2-135M shows the mechanics; its judgements are near chance, so read no quality into them.",
            "Next:",
            f"  {program} show{data} {str(example['prompt_id'])[:8]}",
            f'  {program} sql{data} "select policy_version, count(*) from responses group by 1"',
            f"  {program} status{data}",
            f"  {program} produce{data} YOUR_PROMPTS.jsonl && {program} run{data}",
        ]

    def find_example_trace(self) -> dict[str, Any]:
        """A red-team prompt with a revision, or whatever there is."""
        order = "len(coalesce(revisions, [])) DESC, source = 'red-team' DESC, created_at"
        rows = self.store.query_dicts(f"SELECT * FROM traces WHERE responses IS NOT NULL ORDER BY {order} LIMIT 1")
        if not rows:
            raise CharterError(
                "no prompt of the demo was answered", "the stages gave up on all of them", "to see why, type: charter dlq"
            )
        return rows[0]

    def query_update_metrics(self) -> list[tuple[str, str, str]]:
        wanted = {
            "sft": ("mean_loss", "examples"),
            "reward": ("mean_loss", "reward/accuracy", "reward/deviation"),
            "ppo": ("policy_loss", "value_loss", "kl_ref", "reward_mean"),
        }
        rows = self.store.query("SELECT kind, version, phase, metrics FROM policies ORDER BY commit_seq").rows
        return [
            (
                f"{kind.lower()} {version}",
                phase,
                "  ".join(f"{name} {metrics[name]:.4g}" for name in wanted.get(phase, ()) if name in metrics),
            )
            for kind, version, phase, metrics in rows
        ]


def _get_program_path() -> str:
    """How to call this program from here: after `make demo` it is in .venv and not on the path."""
    return "charter" if shutil.which("charter") else os.path.relpath(Path(sys.executable).with_name("charter"))


def _wait_until(condition: Callable[[], bool], host: Host) -> None:
    """Look every second; a failure of any thread ends the wait with its error."""
    while not condition():
        host.failure_event.wait(_POLL_INTERVAL_S)
        host.raise_if_failed()
