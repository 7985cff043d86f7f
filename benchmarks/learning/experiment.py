"""One run of the proof: prompts through every real stage, sink and trainer, for several policy versions.

    act 0   policy 0 (the base model) answers -> SFT on final texts makes policy 1; reward model 1 learns the labels
    act k   policy k answers new prompts      -> PPO on these answers makes policy k+1; the reward model learns these labels
    last    the last policy answers new prompts

Every answer of a version was sampled before anything trained on its prompt, so the rates of a version are held-out figures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.learning.language import Question
from benchmarks.learning.programmatic import ProgrammaticCritic, ProgrammaticJudge
from charter.pipeline import STAGES, Models, connect, make_stage, store_of
from constitutions.loader import load as load_constitution
from consumers.sink import Sink
from engine.bus.port import Bus
from engine.host import Host
from engine.settings import Settings, load
from engine.store import Store
from engine.worker import Lane, Worker
from producers.files import Producer
from trainer.loop import Trainer

CRITIC, JUDGE = "programmatic-critic", "programmatic-judge"
CONSTITUTION = Path(__file__).with_name("constitution.toml")
FINISHED = """SELECT count(*) FROM prompts WHERE prompt_id IN (SELECT prompt_id FROM chain_ends)
              AND prompt_id IN (SELECT prompt_id FROM preferences)"""


def settings_for(folder: Path, base: Path, seed: int, **more: Any) -> Settings:
    flags = {
        "data.folder": str(folder), "run.constitution": str(CONSTITUTION), "prompts.eval_share": "0",
        "models.policy": str(base), "models.critic": CRITIC, "models.judge": JUDGE, "models.max_rows": "128",
        "respond.max_tokens": "48", "critique.rounds": "1", "critique.few_shot": "false", "bus.partitions": "4",
        "train.seed": str(seed), "sft.learning_rate": "3e-4", "sft.batch_size": "16", "sft.epochs": "2",
        "reward.learning_rate": "3e-4", "reward.batch_size": "16", "reward.epochs": "2",
        "ppo.learning_rate": "1e-4", "ppo.batch_size": "32", "ppo.epochs": "2",
    }  # fmt: skip
    return load(flags | more, environment={})[0]


@dataclass
class Experiment:
    """The parts of one run in `settings.folder`, in this process."""

    settings: Settings
    judge: ProgrammaticJudge
    questions: Iterator[Question]
    bus: Bus = field(init=False)
    store: Store = field(init=False)
    trainer: Trainer = field(init=False)
    published: int = 0
    spent: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bus, self.store = connect(self.settings), store_of(self.settings)
        self.trainer = Trainer(self.bus, self.store, self.settings, Path(self.settings.models.policy))

    def host(self) -> Host:
        models = Models(self.settings, opened={CRITIC: ProgrammaticCritic(), JUDGE: self.judge})
        lane, constitution = Lane("local", linger_s=0.05), load_constitution(self.settings.run.constitution)
        workers = [
            Worker(
                self.bus,
                make_stage(name, self.settings, models, constitution, self.bus),
                lane,
                run_id=self.settings.run.id,
                slot="0",
            )
            for name in STAGES
        ]
        return Host(workers, {"sink": Sink(self.bus, self.store, max_wait_s=0.1).run}, [models.close])

    def answer(self, host: Host, count: int) -> None:
        """Send new questions through every stage, until all of them are in the database with their labels."""
        asked = list(islice(self.questions, count))
        path = self.settings.folder / f"prompts-{self.published:06d}.jsonl"
        path.write_text("".join(json.dumps({"prompt": q.text, "source": q.source}) + "\n" for q in asked))
        Producer(self.bus, self.settings.run.id, eval_share=0.0).publish(str(path))
        self.published += count
        while self.store.query(FINISHED, limit_s=10.0).rows[0][0] < self.published:
            host.check()
            host.failed.wait(0.2)

    def run(self, prompts: int, ppo_phases: int) -> None:
        with self.host() as host:
            self.timed("stream", self.answer, host, prompts)
            self.timed("sft", self.trainer.update, "sft")
            self.timed("reward", self.trainer.update, "reward")
            for _ in range(ppo_phases):
                self.timed("stream", self.answer, host, prompts)
                self.timed("ppo", self.trainer.update, "ppo")
                self.timed("reward", self.trainer.update, "reward")
            self.timed("stream", self.answer, host, prompts)
        self.trainer.close()
        self.bus.close()

    def timed(self, name: str, call: Any, *arguments: Any) -> None:
        started = time.monotonic()
        call(*arguments)
        self.spent[name] = self.spent.get(name, 0.0) + time.monotonic() - started

    def answers(self) -> list[dict[str, Any]]:
        """Every first answer, by version."""
        return self.store.records(
            """SELECT policy_version, turns[-1].content AS question, source, candidates[1].text AS text
               FROM responses ORDER BY commit_seq""",
            limit_s=30.0,
        )
