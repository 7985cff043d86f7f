"""Send prompts through the real stages, sink and trainer, for several policy versions.

The module makes one run of the benchmark.

    iteration 0   policy 0 (the base model) responds -> SFT on the final responses produces policy 1; the labels train reward
                  model 1. This iteration has twice as many prompts as the other iterations, because no labels exist before it
    iteration k   policy k responds to new prompts   -> PPO (or SFT) on these responses produces policy k+1; the new labels
                  train the next reward model
    the last one  the last policy responds to new prompts; nothing is trained

The responses of a version are sampled before their prompts are used for training, so the rates of a version are held-out
metrics. `refused_updates` lists the updates that the learner rejected. It also lists the PPO updates that were skipped because
there was no reward model. An iteration without an update only adds responses and labels. If a reward model is rejected, its
labels are used to train the next reward model.
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
from trainer.learners.rollouts import Rollout, compute_model_logprobs
from trainer.loop import Trainer
from trainer.monitor import RewardHackingMonitor
from trainer.weights import Hardware

_CRITIC_ID, _JUDGE_ID = "programmatic-critic", "programmatic-judge"
_CONSTITUTION_FILE = Path(__file__).with_name("constitution.toml")
_NUM_HELD_OUT, _HELD_OUT_SEED = 64, 999
_FINISHED_PROMPTS_SQL = """SELECT count(*) FROM prompts WHERE prompt_id IN (SELECT prompt_id FROM revision_chains)
              AND prompt_id IN (SELECT prompt_id FROM preferences)"""


def make_settings(folder: Path, base: Path, seed: int, overrides: Mapping[str, str]) -> Settings:
    """Return the settings of a run. They are Charter's defaults, but the sizes and learning rates suit the small model."""
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


@dataclass
class Experiment:
    """This is one run in `settings.folder`. The bus, the stages, the sink and the trainer run in this process.

    If `monitored` is true, the monitor checks each policy of PPO. If a limit is exceeded and `rolls_back` is true, the policy
    is rolled back as in the training loop, and the run ends. If `rolls_back` is false, an exceeded limit is only recorded. A
    false alarm then cannot end a run before the policy has learned.
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
            train_settings=self.settings.train,
        )
        self.held_out_questions = list(islice(generate_questions(_HELD_OUT_SEED), _NUM_HELD_OUT))
        held_out = {question.text for question in self.held_out_questions}
        self.questions = (question for question in self.questions if question.text not in held_out)

    def build_host(self) -> Host:
        models = RoleModels(self.settings, open_models={_CRITIC_ID: ProgrammaticCritic(self.rule), _JUDGE_ID: self.judge})
        executor, constitution = (
            ModelExecutor("local", downstream_wait_s=0.05),
            load_constitution(self.settings.run.constitution),
        )
        run_id = self.settings.run.id
        stages = [make_stage(name, self.settings, models, constitution, self.bus) for name in STAGES]
        workers = [Worker(self.bus, stage, executor, run_id=run_id, instance="0") for stage in stages]
        return Host(workers, {"sink": Sink(self.bus, self.store, max_wait_s=0.1).run}, [models.close])

    def answer_questions(self, questions: Sequence[ToyQuestion], eval_fraction: float = 0.0) -> None:
        """Publish questions and run every stage, until the database contains the labels of all questions.

        The stages run only during this call. If they ran during training, their polling would use CPU time.
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
        """Run iteration 0, one iteration per phase, and a last iteration without training.

        An iteration trains the reward model if a PPO update follows.
        """
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
        """Run one iteration: the newest policy responds to new prompts, then the phases train. Return True after a rollback."""
        self.time_call("stream", self.answer_questions, list(islice(self.questions, num_prompts)))
        state = self.trainer.read_state()
        exceeded = self.time_call("monitor", self.trainer.check_policy, self.monitor, state) if self.monitored else None
        if exceeded:
            self.exceeded_limits.append(
                {
                    "version": self.trainer.read_state().policy_version,
                    "detail": exceeded.detail,
                    "rollback_version": exceeded.rollback_version,
                }
            )
        if exceeded and self.rolls_back:
            self.trainer.trigger_rollback(exceeded)
            self.time_call("stream", self.answer_questions, list(islice(self.questions, num_prompts)))
            return True
        for phase in phases:
            state = self.trainer.read_state()
            if phase == "ppo" and not state.reward_version:
                self.refused_updates.append(f"ppo after policy {state.policy_version}: no reward model")
                continue
            try:
                self.time_call(phase, self.trainer.update, phase)
            except TrainingFailed as error:
                self.refused_updates.append(f"{phase} after policy {state.policy_version}: {error.what}")
        return False

    def time_call(self, name: str, call: Any, *arguments: Any) -> Any:
        """Call a function, add its duration to `seconds_by_phase`, and return its result."""
        started = time.monotonic()
        try:
            return call(*arguments)
        finally:
            self.seconds_by_phase[name] = self.seconds_by_phase.get(name, 0.0) + time.monotonic() - started

    def load_responses(self) -> list[dict[str, Any]]:
        """Return the first completion for every training prompt, with its policy version."""
        return self.store.query_dicts(
            """SELECT policy_version, messages[-1].content AS question, source, completions[1].text AS text
               FROM responses WHERE split = 'TRAIN' ORDER BY commit_seq""",
            limit_s=30.0,
        )

    def compute_kls(self) -> dict[int, float]:
        """Return KL(version || policy 1) in nats per completion, estimated on each version's own first completions.

        The KL limits within PPO use only estimates on the completions of the previous version.
        """
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
        checkpoints = self.settings.folder / "checkpoints"
        folders = {version: checkpoints / f"policy-{source:06d}" for version, source in sources.items()}
        return {version: estimate_kl(folders[version], folders[1], own) for version, own in sorted(rollouts.items())}

    def load_update_metrics(self, kind: str) -> list[dict[str, float]]:
        """Return the metrics of each update of the policy (kind POLICY) or the reward model (REWARD), by version from 1."""
        sql = "SELECT metrics FROM policy_versions WHERE kind = ? ORDER BY version"
        return [dict(metrics) for (metrics,) in self.store.query(sql, [kind], limit_s=30.0).rows]

    def compare_by_rule(self, pairs: Sequence[tuple[Any, str, str]]) -> list[float | None]:
        """Return the win probabilities that the rule gives. The monitor's held-out judge must not depend on the labels."""
        return [compute_win_probability(self.rule.compute_margin(messages[-1].content, a, b)) for messages, a, b in pairs]


def estimate_kl(policy: Path, reference: Path, rollouts: Sequence[Rollout]) -> float:
    """Return an estimate of KL(policy || reference) in nats per completion, from completions that the policy sampled."""
    if policy == reference:
        return 0.0
    width, hardware = max(len(r.token_ids) for r in rollouts), Hardware(64, False, "fp32")
    own, other = (compute_model_logprobs(folder, rollouts, width, hardware) for folder in (policy, reference))
    return float((own - other).sum(-1).mean())
