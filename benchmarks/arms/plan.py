"""The arms: what each one is trained on, in which phases, and with which settings.

Adding an arm is one entry in `ARMS`. Everything that an arm changes is in its entry; `make_settings` adds the settings that all
arms of a world share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.arms.graders.shuffle import write_shuffled_grader
from benchmarks.arms.worlds import DECLINE_HARM, ONE_SENTENCE, SMALL, World
from benchmarks.learning.programmatic import ProgrammaticJudge, make_judge
from engine.settings import Settings, load_settings

CRITIC_ID, JUDGE_ID = "programmatic-critic", "programmatic-judge"
SEEDS = (600, 601, 602)  # named before the first run; all of them are reported
_CHAIN_STAGES = ("respond", "critique", "revise")


@dataclass(frozen=True)
class Act:
    """New prompts, and the phases that train after them.

    `stages` respond to the prompts. `people` are kinds of data that people (or the judge model) write for the prompts:
    demonstrations, comparisons, judge_responses.
    """

    num_prompts: int
    stages: tuple[str, ...]
    phases: tuple[str, ...]
    people: tuple[str, ...] = ()


Plan = Callable[[int, int], list[Act]]  # (prompts of an update, updates)


def _repeat(stages: tuple[str, ...], *phases: str, people: tuple[str, ...] = ()) -> Plan:
    """Return the plan of an arm whose acts are all equal."""
    return lambda num_prompts, num_updates: [Act(num_prompts, stages, phases, people)] * num_updates


def _plan_supervised(kind: str) -> Plan:
    """Return the plan of an arm with only SFT on what people write, on as many prompts as CAI uses."""

    def plan(num_prompts: int, num_updates: int) -> list[Act]:
        return [Act((1 if number else 2) * num_prompts, (), ("sft",), (kind,)) for number in range(num_updates + 1)]

    return plan


def _plan_cai(num_prompts: int, num_updates: int) -> list[Act]:
    """SL on revisions, then RL with a reward model that is trained again on the labels of each act."""
    stages = (*_CHAIN_STAGES, "judge")
    updates = [Act(num_prompts, stages, ("ppo", "reward"))] * (num_updates - 1)
    return [Act(2 * num_prompts, stages, ("sft", "reward")), *updates, Act(num_prompts, ("respond",), ("ppo",))]


def _plan_rlhf(num_prompts: int, num_updates: int) -> list[Act]:
    """SFT on demonstrations and a reward model of people's comparisons, then RL."""
    first = Act(2 * num_prompts, (), ("sft", "reward"), ("demonstrations", "comparisons"))
    return [first, *[Act(num_prompts, ("respond",), ("ppo",))] * num_updates]


def _plan_rl_with_reward_model(num_prompts: int, num_updates: int) -> list[Act]:
    first = Act(num_prompts, ("respond", "judge"), ("reward",))
    return [first, *[Act(num_prompts, ("respond",), ("ppo",))] * num_updates]


@dataclass(frozen=True)
class Arm:
    """One way to train. `settings` are the settings that differ from those of the world. `judge` is that of `make_judge`.

    `shuffles_grades` is true if the graded completions of a response exchange their grades. `num_seeds` is the number of seeds
    that run by default.
    """

    name: str
    title: str
    world: World
    plan: Plan
    settings: Mapping[str, str] = field(default_factory=dict)
    judge: str = "judge"
    shuffles_grades: bool = False
    num_seeds: int = len(SEEDS)

    def make_judge(self, seed: int) -> ProgrammaticJudge:
        return make_judge(self.judge, self.world.rule, seed)


_GRPO = {"train.rl_method": "grpo"}
# A contrast pair needs one completion besides the one with the constitution. The programmatic judge is not asked about it.
_CONTRAST = {
    "train.rl_method": "dpo", "judge.pairing": "contrast", "train.contrast_pairs": '["dpo"]', "contrast.ask_judge": "false",
    "respond.num_completions": "1",
}  # fmt: skip
ARMS: tuple[Arm, ...] = (
    Arm("demonstrations", "SFT on people's demonstrations", SMALL, _plan_supervised("demonstrations")),
    Arm("cai", "CAI: SFT on revisions, then PPO on AI labels", SMALL, _plan_cai),
    Arm("judge-responses", "SFT on the judge model's own responses", SMALL, _plan_supervised("judge_responses")),
    Arm("rlhf", "RLHF: SFT on demonstrations, then PPO on people's labels", SMALL, _plan_rlhf),
    Arm("shuffled", "CAI with shuffled labels (control)", SMALL, _plan_cai, judge="shuffled"),
    Arm("distill", "self-distillation", ONE_SENTENCE, _repeat(("respond",), "distill"), {"train.rl_method": "distill"}),
    Arm("grpo", "GRPO on grades", ONE_SENTENCE, _repeat(("respond", "grade"), "grpo"), _GRPO),
    Arm("grpo-shuffled", "GRPO on shuffled grades (control)", ONE_SENTENCE, _repeat(("respond", "grade"), "grpo"), _GRPO,
        shuffles_grades=True),
    Arm("revisions", "SFT on revisions", ONE_SENTENCE, _repeat(_CHAIN_STAGES, "sft"), num_seeds=1),
    Arm("ppo", "PPO on a reward model", ONE_SENTENCE, _plan_rl_with_reward_model, num_seeds=1),
    Arm("contrast", "DPO on contrast pairs", ONE_SENTENCE, _repeat(("respond", "judge"), "dpo"), _CONTRAST, num_seeds=1),
    Arm("cai", "CAI: SFT on revisions, then PPO on AI labels", ONE_SENTENCE, _plan_cai, num_seeds=1),
    Arm("decline-harm", "GRPO on the grader refusal", DECLINE_HARM, _repeat(("respond", "grade"), "grpo"), _GRPO, num_seeds=1),
)  # fmt: skip
MODELS = tuple(dict.fromkeys(arm.world.model for arm in ARMS))


def make_settings(
    world: World, folder: Path, base: Path, *, arm: Arm | None, seed: int, threads: int, overrides: Mapping[str, str]
) -> Settings:
    """Return the settings of a run in `folder`. Without an arm, nothing is trained: the run measures the base model."""
    flags = {
        "data.folder": str(folder), "run.constitution": str(world.constitution), "bus.partitions": "4",
        "models.policy": str(base), "models.critic": CRITIC_ID, "models.judge": JUDGE_ID, "models.threads": str(threads),
        "prompts.eval_fraction": "0", "prompts.rl_fraction": "0", "critique.rounds": "1", "critique.few_shot": "false",
        "critique.skip_sources": "[]", "grade.graders": f'["{world.grader_file}"]',
        "train.seed": str(seed), "train.save_total_limit": "1", "train.sft_mixture": "[]", "train.reward_mixture": "[]",
    }  # fmt: skip
    flags |= world.settings
    if arm:
        flags |= arm.settings
        if arm.settings.get("train.rl_method") == "grpo":
            grader = world.grader_name
            if arm.shuffles_grades:
                flags["grade.graders"] = f'["{write_shuffled_grader(folder, world.grader, seed)}"]'
                grader = f"shuffled-{grader}"
            flags["train.rewards"] = f'["{grader}=1"]'
    return load_settings(flags | dict(overrides), environment={})[0]
