"""One run of the proof: prompts through every real stage, sink and trainer, for several policy versions.

    act 0   policy 0 (the base model) answers -> SFT on final texts makes policy 1; reward model 1 learns the labels (twice as
            many prompts as later: it learns from nothing)
    act k   policy k answers new prompts      -> PPO (or SFT) on these makes policy k+1; the reward model learns these labels
    last    the last policy answers new prompts

Every answer of a version was sampled before anything trained on its prompt, so the rates of a version are held-out figures.
An update that the learner refuses, and PPO without a reward model, are kept in `refused`; such an act adds answers and labels
only, and the labels of a refused reward model train the next one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.learning.language import Question, questions
from benchmarks.learning.programmatic import ProgrammaticCritic, ProgrammaticJudge, Rule, chance
from charter.pipeline import STAGES, Models, connect, make_stage, store_of
from constitutions.loader import load as load_constitution
from consumers.sink import Sink
from engine.bus.port import Bus
from engine.errors import CannotLearn
from engine.host import Host
from engine.settings import Settings, load
from engine.store import Store
from engine.worker import Lane, Worker
from producers.files import Producer
from trainer import ppo
from trainer.loop import Trainer
from trainer.ppo import Rollout
from trainer.watch import Watch
from trainer.weights import Hardware

CRITIC, JUDGE = "programmatic-critic", "programmatic-judge"
CONSTITUTION = Path(__file__).with_name("constitution.toml")
HELD_OUT, HELD_OUT_SEED = 64, 999
FINISHED = """SELECT count(*) FROM prompts WHERE prompt_id IN (SELECT prompt_id FROM revision_chains)
              AND prompt_id IN (SELECT prompt_id FROM preferences)"""


def settings_for(folder: Path, base: Path, seed: int, more: Mapping[str, str]) -> Settings:
    flags = {
        "data.folder": str(folder), "run.constitution": str(CONSTITUTION), "prompts.eval_share": "0",
        "models.policy": str(base), "models.critic": CRITIC, "models.judge": JUDGE, "models.max_rows": "192",
        "respond.max_tokens": "48", "critique.rounds": "1", "critique.few_shot": "false", "bus.partitions": "4",
        "respond.samples": "6", "watch.prompts": str(HELD_OUT),
        "train.seed": str(seed), "train.micro_rows": "64", "train.precision": "fp32", "train.keep": "99",
        "train.sft_mix": '["*=1"]', "train.reward_mix": '["*=1"]',
        "sft.learning_rate": "3e-4", "sft.batch_size": "16", "sft.epochs": "2",
        "reward.learning_rate": "1e-3", "reward.batch_size": "16", "reward.epochs": "1",
        "ppo.learning_rate": "3e-4", "ppo.batch_size": "64", "ppo.epochs": "3",
    }  # fmt: skip
    return load(flags | dict(more), environment={})[0]


# What is different with SmolLM2, a hundred times as large: adapters, the usual rates, and passes that fit into memory.
SMOLLM2 = {
    "models.max_rows": "32", "respond.samples": "4", "respond.max_tokens": "64", "watch.prompts": "16",
    "train.lora_rank": "16", "train.micro_rows": "8", "train.precision": "auto", "sft.learning_rate": "2e-5",
    "reward.learning_rate": "3e-5", "ppo.learning_rate": "1e-5", "ppo.batch_size": "16",
}  # fmt: skip


@dataclass
class Experiment:
    """The parts of one run in `settings.folder`, in this process.

    `watched`: the watch looks at each policy of PPO. On a trip `goes_back` does what the loop does, and ends the run; else the
    trip is only told, so that a false alarm would not hide what is learned.
    """

    settings: Settings
    rule: Rule
    judge: ProgrammaticJudge
    questions: Iterator[Question]
    watched: bool = False
    goes_back: bool = False
    bus: Bus = field(init=False)
    store: Store = field(init=False)
    trainer: Trainer = field(init=False)
    published: int = 0
    spent: dict[str, float] = field(default_factory=dict)
    trips: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bus, self.store = connect(self.settings), store_of(self.settings)
        self.trainer = Trainer(self.bus, self.store, self.settings, Path(self.settings.models.policy))
        self.watch = Watch(self.settings.watch, compare=self.held_out_judge)
        self.held_out = list(islice(questions(HELD_OUT_SEED), HELD_OUT))
        kept = {question.text for question in self.held_out}
        self.questions = (question for question in self.questions if question.text not in kept)

    def host(self) -> Host:
        models = Models(self.settings, opened={CRITIC: ProgrammaticCritic(self.rule), JUDGE: self.judge})
        lane, constitution = Lane("local", linger_s=0.05), load_constitution(self.settings.run.constitution)
        run_id = self.settings.run.id
        stages = [make_stage(name, self.settings, models, constitution, self.bus) for name in STAGES]
        workers = [Worker(self.bus, stage, lane, run_id=run_id, slot="0") for stage in stages]
        return Host(workers, {"sink": Sink(self.bus, self.store, max_wait_s=0.1).run}, [models.close])

    def answer(self, asked: Sequence[Question], eval_share: float = 0.0) -> None:
        """Send questions through every stage, until all of them are in the database with their labels.

        The stages run meanwhile only: beside training they would look for work all the time.
        """
        path = self.settings.folder / f"prompts-{self.published:06d}.jsonl"
        path.write_text("".join(json.dumps({"prompt": q.text, "source": q.source}) + "\n" for q in asked))
        Producer(self.bus, self.settings.run.id, eval_share=eval_share).publish(str(path))
        self.published += len(asked)
        with self.host() as host:
            while self.store.query(FINISHED, limit_s=10.0).rows[0][0] < self.published:
                host.check()
                host.failed.wait(0.2)

    def run(self, prompts: int, phases: Sequence[str]) -> None:
        """One act for each phase and one before; the reward model learns after each but the last, where no PPO follows."""
        rewards = [["reward"] if phase == "ppo" else [] for phase in phases]
        if self.watched:
            self.answer(self.held_out, eval_share=1.0)
        self.act(2 * prompts, ["sft", *rewards[0]])
        for phase, reward in zip(phases, [*rewards[1:], []], strict=True):
            if self.act(prompts, [phase, *reward]):
                break
        else:
            self.act(prompts, [])
        self.trainer.close()
        self.bus.close()

    def act(self, prompts: int, phases: Sequence[str]) -> bool:
        """The newest policy answers new prompts, then training; or the way back, after which this returns True."""
        self.timed("stream", self.answer, list(islice(self.questions, prompts)))
        trip = self.timed("watch", self.watch, self.trainer) if self.watched else None
        if trip:
            self.trips.append({"version": self.trainer.standing().policy_version, "why": trip.why, "good": trip.good})
        if trip and self.goes_back:
            self.trainer.trip(trip)
            self.timed("stream", self.answer, list(islice(self.questions, prompts)))
            return True
        for phase in phases:
            standing = self.trainer.standing()
            if phase == "ppo" and not standing.reward_version:
                self.refused.append(f"ppo after policy {standing.policy_version}: there is no reward model")
                continue
            try:
                self.timed(phase, self.trainer.update, phase)
            except CannotLearn as error:
                self.refused.append(f"{phase} after policy {standing.policy_version}: {error.what}")
        return False

    def timed(self, name: str, call: Any, *arguments: Any) -> Any:
        started = time.monotonic()
        try:
            return call(*arguments)
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.monotonic() - started

    def answers(self) -> list[dict[str, Any]]:
        """The first answer to every prompt that was not held out, with its version."""
        return self.store.records(
            """SELECT policy_version, messages[-1].content AS question, source, completions[1].text AS text
               FROM responses WHERE split = 'TRAIN' ORDER BY commit_seq""",
            limit_s=30.0,
        )

    def divergences(self) -> dict[int, float]:
        """KL(version || policy 1) in nats per answer, from the version's own first answers; what limits within PPO estimate."""
        rows = self.store.records(
            """SELECT policy_version, prompt_token_ids, completions[1].token_ids AS token_ids FROM responses
               WHERE split = 'TRAIN' AND policy_version > 0""",
            limit_s=30.0,
        )
        rollouts: dict[int, list[Rollout]] = {}
        for row in rows:
            ids = tuple(row["prompt_token_ids"]), tuple(row["token_ids"])
            rollouts.setdefault(row["policy_version"], []).append(Rollout(*ids, (), True, row["policy_version"], ""))
        sources = dict(self.store.query("SELECT version, weights_of FROM policy_versions WHERE kind = 'POLICY'").rows)
        made = self.settings.folder / "checkpoints"
        folders = {version: made / f"policy-{source:06d}" for version, source in sources.items()}
        return {version: divergence(folders[version], folders[1], found) for version, found in sorted(rollouts.items())}

    def updates(self, kind: str) -> list[dict[str, float]]:
        """What each update of the policy (kind POLICY) or the reward model (REWARD) reported, by version from 1."""
        sql = "SELECT metrics FROM policy_versions WHERE kind = ? ORDER BY version"
        return [dict(metrics) for (metrics,) in self.store.query(sql, [kind], limit_s=30.0).rows]

    def held_out_judge(self, pairs: Sequence[tuple[Any, str, str]]) -> list[float | None]:
        """The rule itself, whatever the labels are."""
        return [chance(self.rule.prefers(messages[-1].content, a, b)) for messages, a, b in pairs]


def divergence(policy: Path, reference: Path, rollouts: Sequence[Rollout]) -> float:
    """The estimate of KL(policy || reference) in nats per answer, from answers that the policy sampled."""
    if policy == reference:
        return 0.0
    width, hardware = max(len(r.token_ids) for r in rollouts), Hardware(64, False, "fp32")
    own, other = (ppo.logprobs_under(folder, rollouts, width, hardware) for folder in (policy, reference))
    return float((own - other).sum(-1).mean())
