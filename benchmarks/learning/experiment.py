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

from benchmarks.learning.language import ToyQuestion, generate_questions
from benchmarks.learning.programmatic import PreferenceRule, ProgrammaticCritic, ProgrammaticJudge, compute_win_probability
from charter.connect import connect_bus, open_store
from charter.models import RoleModels
from charter.pipeline import STAGES, make_stage
from constitutions.loader import load_constitution as load_constitution
from consumers.sink import Sink
from engine.bus.port import Bus
from engine.errors import TrainingFailed
from engine.host import Host
from engine.settings import Settings, load_settings
from engine.store import Store
from engine.worker import ModelExecutor, Worker
from producers.files import FileProducer
from trainer.learners import ppo
from trainer.learners.ppo import Rollout
from trainer.loop import Trainer
from trainer.monitor import RewardHackingMonitor
from trainer.weights import Hardware

_CRITIC_ID, _JUDGE_ID = "programmatic-critic", "programmatic-judge"
_CONSTITUTION_FILE = Path(__file__).with_name("constitution.toml")
_NUM_HELD_OUT, _HELD_OUT_SEED = 64, 999
_FINISHED_PROMPTS_SQL = """SELECT count(*) FROM prompts WHERE prompt_id IN (SELECT prompt_id FROM revision_chains)
              AND prompt_id IN (SELECT prompt_id FROM preferences)"""


def make_settings(folder: Path, base: Path, seed: int, overrides: Mapping[str, str]) -> Settings:
    flags = {
        "data.folder": str(folder), "run.constitution": str(_CONSTITUTION_FILE), "prompts.eval_fraction": "0",
        "models.policy": str(base), "models.critic": _CRITIC_ID, "models.judge": _JUDGE_ID, "models.max_batch_size": "192",
        "respond.max_tokens": "48", "critique.rounds": "1", "critique.few_shot": "false", "bus.partitions": "4",
        "respond.num_completions": "6", "monitor.prompts": str(_NUM_HELD_OUT),
        "train.seed": str(seed), "train.micro_batch_size": "64", "train.precision": "fp32", "train.save_total_limit": "99",
        "train.sft_mixture": '["*=1"]', "train.reward_mixture": '["*=1"]',
        "sft.learning_rate": "3e-4", "sft.batch_size": "16", "sft.epochs": "2",
        "reward.learning_rate": "1e-3", "reward.batch_size": "16", "reward.epochs": "1",
        "ppo.learning_rate": "3e-4", "ppo.batch_size": "64", "ppo.epochs": "3",
    }  # fmt: skip
    return load_settings(flags | dict(overrides), environment={})[0]


# What is different with SmolLM2, a hundred times as large: adapters, the usual rates, and passes that fit into memory.
SMOLLM2_SETTINGS = {
    "models.max_batch_size": "32", "respond.num_completions": "4", "respond.max_tokens": "64", "monitor.prompts": "16",
    "train.lora_rank": "16", "train.micro_batch_size": "8", "train.precision": "auto", "sft.learning_rate": "2e-5",
    "reward.learning_rate": "3e-5", "ppo.learning_rate": "1e-5", "ppo.batch_size": "16",
}  # fmt: skip


@dataclass
class Experiment:
    """The parts of one run in `settings.folder`, in this process.

    `watched`: the watch looks at each policy of PPO. On a trip `goes_back` does what the loop does, and ends the run; else the
    trip is only told, so that a false alarm would not hide what is learned.
    """

    settings: Settings
    rule: PreferenceRule
    judge: ProgrammaticJudge
    questions: Iterator[ToyQuestion]
    monitored: bool = False
    rolls_back: bool = False
    bus: Bus = field(init=False)
    store: Store = field(init=False)
    trainer: Trainer = field(init=False)
    num_published: int = 0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    exceeded_limits: list[dict[str, Any]] = field(default_factory=list)
    refused_updates: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bus, self.store = connect_bus(self.settings), open_store(self.settings)
        self.trainer = Trainer(self.bus, self.store, self.settings, Path(self.settings.models.policy))
        self.monitor = RewardHackingMonitor(
            self.settings.monitor,
            self.settings.run.id,
            judge=self.compare_by_rule,
            batch_size=self.settings.models.max_batch_size,
        )
        self.held_out_questions = list(islice(generate_questions(_HELD_OUT_SEED), _NUM_HELD_OUT))
        kept = {question.text for question in self.held_out_questions}
        self.questions = (question for question in self.questions if question.text not in kept)

    def build_host(self) -> Host:
        models = RoleModels(self.settings, open_models={_CRITIC_ID: ProgrammaticCritic(self.rule), _JUDGE_ID: self.judge})
        lane, constitution = ModelExecutor("local", downstream_wait_s=0.05), load_constitution(self.settings.run.constitution)
        run_id = self.settings.run.id
        stages = [make_stage(name, self.settings, models, constitution, self.bus) for name in STAGES]
        workers = [Worker(self.bus, stage, lane, run_id=run_id, instance="0") for stage in stages]
        return Host(workers, {"sink": Sink(self.bus, self.store, max_wait_s=0.1).run}, [models.close])

    def answer_questions(self, questions: Sequence[ToyQuestion], eval_fraction: float = 0.0) -> None:
        """Send questions through every stage, until all of them are in the database with their labels.

        The stages run meanwhile only: beside training they would look for work all the time.
        """
        path = self.settings.folder / f"prompts-{self.num_published:06d}.jsonl"
        path.write_text("".join(json.dumps({"prompt": q.text, "source": q.source}) + "\n" for q in questions))
        FileProducer(self.bus, self.settings.run.id, eval_fraction=eval_fraction).publish(str(path))
        self.num_published += len(questions)
        with self.build_host() as host:
            while self.store.query(_FINISHED_PROMPTS_SQL, limit_s=10.0).rows[0][0] < self.num_published:
                host.raise_if_failed()
                host.failure_event.wait(0.2)

    def run(self, num_prompts: int, phases: Sequence[str]) -> None:
        """One act for each phase and one before; the reward model learns after each but the last, where no PPO follows."""
        rewards = [["reward"] if phase == "ppo" else [] for phase in phases]
        if self.monitored:
            self.answer_questions(self.held_out_questions, eval_fraction=1.0)
        self.run_act(2 * num_prompts, ["sft", *rewards[0]])
        for phase, reward in zip(phases, [*rewards[1:], []], strict=True):
            if self.run_act(num_prompts, [phase, *reward]):
                break
        else:
            self.run_act(num_prompts, [])
        self.trainer.close()
        self.bus.close()

    def run_act(self, num_prompts: int, phases: Sequence[str]) -> bool:
        """The newest policy answers new prompts, then training; or the way back, after which this returns True."""
        self.time_call("stream", self.answer_questions, list(islice(self.questions, num_prompts)))
        state = self.trainer.read_state()
        trip = self.time_call("watch", self.trainer.check_policy, self.monitor, state) if self.monitored else None
        if trip:
            self.exceeded_limits.append(
                {"version": self.trainer.read_state().policy_version, "why": trip.detail, "good": trip.rollback_version}
            )
        if trip and self.rolls_back:
            self.trainer.trigger_rollback(trip)
            self.time_call("stream", self.answer_questions, list(islice(self.questions, num_prompts)))
            return True
        for phase in phases:
            standing = self.trainer.read_state()
            if phase == "ppo" and not standing.reward_version:
                self.refused_updates.append(f"ppo after policy {standing.policy_version}: there is no reward model")
                continue
            try:
                self.time_call(phase, self.trainer.update, phase)
            except TrainingFailed as error:
                self.refused_updates.append(f"{phase} after policy {standing.policy_version}: {error.what}")
        return False

    def time_call(self, name: str, call: Any, *arguments: Any) -> Any:
        started = time.monotonic()
        try:
            return call(*arguments)
        finally:
            self.seconds_by_phase[name] = self.seconds_by_phase.get(name, 0.0) + time.monotonic() - started

    def load_responses(self) -> list[dict[str, Any]]:
        """The first answer to every prompt that was not held out, with its version."""
        return self.store.query_dicts(
            """SELECT policy_version, messages[-1].content AS question, source, completions[1].text AS text
               FROM responses WHERE split = 'TRAIN' ORDER BY commit_seq""",
            limit_s=30.0,
        )

    def compute_kls(self) -> dict[int, float]:
        """KL(version || policy 1) in nats per answer, from the version's own first answers; what limits within PPO estimate."""
        rows = self.store.query_dicts(
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
        return {version: estimate_kl(folders[version], folders[1], found) for version, found in sorted(rollouts.items())}

    def load_update_metrics(self, kind: str) -> list[dict[str, float]]:
        """What each update of the policy (kind POLICY) or the reward model (REWARD) reported, by version from 1."""
        sql = "SELECT metrics FROM policy_versions WHERE kind = ? ORDER BY version"
        return [dict(metrics) for (metrics,) in self.store.query(sql, [kind], limit_s=30.0).rows]

    def compare_by_rule(self, pairs: Sequence[tuple[Any, str, str]]) -> list[float | None]:
        """The rule itself, whatever the labels are."""
        return [compute_win_probability(self.rule.compute_margin(messages[-1].content, a, b)) for messages, a, b in pairs]


def estimate_kl(policy: Path, reference: Path, rollouts: Sequence[Rollout]) -> float:
    """The estimate of KL(policy || reference) in nats per answer, from answers that the policy sampled."""
    if policy == reference:
        return 0.0
    width, hardware = max(len(r.token_ids) for r in rollouts), Hardware(64, False, "fp32")
    own, other = (ppo.compute_model_logprobs(folder, rollouts, width, hardware) for folder in (policy, reference))
    return float((own - other).sum(-1).mean())
