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

from charter.pipeline import STAGES, connect, make_host, store_of
from charter.text import story, table
from engine.bus.port import Bus
from engine.errors import CharterError, UsageError
from engine.host import Host
from engine.models import model_folder
from engine.settings import Settings
from engine.store import Store
from producers.files import SHIPPED, Producer, shipped_lines
from producers.parse import parse_prompt
from producers.rows import rows
from schemas import ids

# Small answers and one round, so that two cores need a few minutes; a real run keeps the defaults.
PRESET: dict[str, dict[str, Any]] = {
    "run": {"id": "demo"},
    "prompts": {"eval_share": 0.0},
    "respond": {"max_tokens": 96, "temperature": 0.7},
    "critique": {"rounds": 1, "max_tokens": 64, "temperature": 0.7},
    "revise": {"max_tokens": 96},
    "ppo": {"epochs": 1},
}
LOOK_EVERY_S = 1.0
COUNTS = ("prompts", "responses", "critiques", "revisions", "preferences", "dead letters")


@dataclass(frozen=True)
class Act:
    """Some lines of the shipped prompts, answered by one policy; then training that makes the next one."""

    title: str
    first: int
    last: int
    policy: int
    training: tuple[str, ...]


def acts(prompts: int) -> list[Act]:
    """Three acts: `prompts` prompts, then two thirds and one third as many new ones."""
    second, third = max(1, 2 * prompts // 3), max(1, prompts // 3)
    if prompts < 2 or prompts + second + third > shipped_lines():
        raise UsageError(
            f"--prompts {prompts} does not work",
            f"the demo needs 2 prompts or more, and all three acts at most {shipped_lines()}",
            "type: charter demo --prompts 24",
        )
    return [
        Act(f"{prompts} prompts through every stage", 1, prompts, 0, ("sft", "reward")),
        Act(f"policy 1 answers {second} new prompts", prompts + 1, prompts + second, 1, ("ppo",)),
        Act(f"policy 2 answers {third} new prompts", prompts + second + 1, prompts + second + third, 2, ()),
    ]


def prompt_ids(act: Act) -> list[str]:
    lines = rows(str(SHIPPED), act.first, act.last)
    return [ids.prompt_id(parse_prompt(line, source="", max_chars=10**6).messages) for _, line in lines]


class Progress:
    """What is going on: a live table on a terminal, plain key=value lines elsewhere."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.live: Any = None
        self.last = ""
        if sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(refresh_per_second=4, transient=True)
            self.live.start()

    def say(self, text: str) -> None:
        """A line that stays."""
        line = f"[{time.monotonic() - self.started:5.0f} s] {text}"
        if self.live:
            self.live.console.print(line, highlight=False, markup=False)
        else:
            click.echo(line)

    def show(self, title: str, counts: dict[str, int], done: int, total: int) -> None:
        """The state of the stream; outside a terminal only when it changed."""
        if self.live:
            self.live.update(self.panel(f"{title}: {done} of {total} finished", counts))
            return
        line = " ".join(f"{name.replace(' ', '_')}={count}" for name, count in counts.items())
        if line != self.last:
            click.echo(f"elapsed_s={time.monotonic() - self.started:.0f} finished={done}/{total} {line}")
            self.last = line

    def training(self, phase: str, counts: dict[str, int]) -> None:
        """The live table's title while the stream waits; the steps themselves are lines that stay."""
        if self.live:
            self.live.update(self.panel(f"training: {phase}", counts))

    def panel(self, title: str, counts: dict[str, int]) -> Any:
        from rich.table import Table

        rich_table = Table(title=f"{title}  ({time.monotonic() - self.started:.0f} s)")
        for name in counts:
            rich_table.add_column(name, justify="right")
        rich_table.add_row(*(str(count) for count in counts.values()))
        return rich_table

    def step(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """One line for each training step."""
        wanted = ("loss", "accuracy", "policy_loss", "value_loss", "approx_kl", "kl_ref", "clipfrac", "grad_norm")
        figures = " ".join(f"{name}={metrics[name]:.4g}" for name in wanted if name in metrics)
        self.say(f"{phase} step {step}: {figures}")

    def close(self) -> None:
        if self.live:
            self.live.stop()


class Demo:
    """The demo in the data folder of the settings."""

    def __init__(self, settings: Settings, prompts: int) -> None:
        self.settings, self.acts = settings, acts(prompts)
        self.store: Store = store_of(settings)
        self.base = model_folder(settings.models.policy)
        self.started = time.monotonic()

    def run(self) -> None:
        bus = connect(self.settings)
        progress = Progress(self.started)
        try:
            progress.say(f"model {self.settings.models.policy}, data in {self.settings.folder.resolve()}")
            with make_host(self.settings, bus, STAGES, sink=True) as host:
                self.play(bus, host, progress)
        finally:
            progress.close()
            bus.close()
        click.echo("\n".join(self.summary()))

    def play(self, bus: Bus, host: Host, progress: Progress) -> None:
        """Every act that is not over yet, and its training."""
        from trainer.loop import Trainer

        trainer = Trainer(bus, self.store, self.settings, self.base, progress.step)
        try:
            for act in self.acts:
                self.perform(act, bus, host, progress)
                for phase in act.training:
                    self.train(trainer, act, phase, host, progress)
        finally:
            trainer.close()

    def perform(self, act: Act, bus: Bus, host: Host, progress: Progress) -> None:
        """Publish an act's prompts (those that are not yet) and wait until each has gone all the way."""
        wanted = prompt_ids(act)
        if self.finished(wanted) < len(wanted):
            progress.say(act.title)
        producer = Producer(bus, self.settings.run.id, eval_share=self.settings.prompts.eval_share)
        producer.publish(str(SHIPPED), first=act.first, last=act.last)

        def over() -> bool:
            done = self.finished(wanted)
            progress.show(act.title, self.counts(), done, len(wanted))
            return done >= len(wanted)

        wait_until(over, host)

    def train(self, trainer: Any, act: Act, phase: str, host: Host, progress: Progress) -> None:
        """One update, unless an earlier start of the demo has made it or left it half done."""
        resumed = trainer.resume()
        if phase not in {manifest.phase for manifest in trainer.known()[1]}:
            progress.say(f"training: {phase}")
            progress.training(phase, self.counts())
            resumed = trainer.update(phase)
        if resumed:
            progress.say(f"{resumed.kind.value.lower()} {resumed.version} published by {resumed.phase}")
        # The update is on the log; the summary reads it from the database.
        wait_until(lambda: self.count(f"SELECT count(*) FROM policies WHERE phase = '{phase}'") > 0, host)

    # What the database says

    def count(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        return int(self.store.query(sql, parameters, limit_s=10.0).rows[0][0])

    def counts(self) -> dict[str, int]:
        tables = [name.replace(" ", "_") for name in COUNTS]
        row = self.store.query("SELECT " + ", ".join(f"(SELECT count(*) FROM {name})" for name in tables)).rows[0]
        return dict(zip(COUNTS, row, strict=True))

    def finished(self, prompts: Sequence[str]) -> int:
        """How many of these prompts have ended: a finished chain and a judgement, or a dead letter."""
        sql = """SELECT count(*) FROM (SELECT unnest(?::UUID[]) AS prompt_id) p
                 WHERE (prompt_id IN (SELECT prompt_id FROM revision_chains) AND prompt_id IN (SELECT prompt_id FROM preferences))
                    OR prompt_id::VARCHAR IN (SELECT decode(source_key) FROM dead_letters)"""
        return self.count(sql, [list(prompts)])

    # The end

    def summary(self) -> list[str]:
        """One story, the counts, the figures, where everything is, and what to type next."""
        counts = [(name, count) for name, count in self.counts().items()]
        versions = self.store.query("SELECT policy_version, count(*) FROM responses GROUP BY 1 ORDER BY 1").rows
        seconds = time.monotonic() - self.started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
        data = "" if self.settings.data.folder == ".charter" else f" --data {self.settings.data.folder}"
        program, example = shown_program(), self.example()
        return [
            "",
            "One prompt's story",
            "------------------",
            story(example),
            "",
            table(["records", "count"], counts),
            "",
            table(["policy version", "responses"], versions),
            "",
            table(["update", "from", "figures"], self.figures()),
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

    def example(self) -> dict[str, Any]:
        """A red-team prompt with a revision, or whatever there is."""
        order = "len(coalesce(revisions, [])) DESC, source = 'red-team' DESC, created_at"
        rows = self.store.records(f"SELECT * FROM traces WHERE responses IS NOT NULL ORDER BY {order} LIMIT 1")
        if not rows:
            raise CharterError(
                "no prompt of the demo was answered", "the stages gave up on all of them", "to see why, type: charter dlq"
            )
        return rows[0]

    def figures(self) -> list[tuple[str, str, str]]:
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


def shown_program() -> str:
    """How to call this program from here: after `make demo` it is in .venv and not on the path."""
    return "charter" if shutil.which("charter") else os.path.relpath(Path(sys.executable).with_name("charter"))


def wait_until(condition: Callable[[], bool], host: Host) -> None:
    """Look every second; a failure of any thread ends the wait with its error."""
    while not condition():
        host.failed.wait(LOOK_EVERY_S)
        host.check()
