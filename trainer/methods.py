"""State what each RL method (`train.rl_method`) trains on and what it needs.

All other modules ask this module and never compare a phase with the name of one method. A new method is one entry in
`RL_METHODS`, one learner file and one `learn_*` function in `trainer.phases`. The name of a method is also the name of its phase
in records.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.errors import UsageError
from engine.pairing import CONTRAST_PAIRING
from engine.settings import JUDGE, METHOD_DEFAULTS, REWARD_MODEL, Settings, TrainSettings, parse_rewards

# chains: the final responses of revision chains. pairs: preference labels. rollouts: completions of recent policies. groups:
# also completions of recent policies, but a batch has all completions of a response that have a reward (`train.rewards`).
RowKind = Literal["chains", "pairs", "rollouts", "groups"]


@dataclass(frozen=True)
class RLMethod:
    """This object describes one RL method.

    `row_kind` is what its batches consist of. `is_rewarded` is false if it trains on completions without any reward or label.
    `uses_constitution` is true if the learner reads the constitution. Its batches then record the text of the constitution, and
    the tags of each prompt. `has_adaptive_beta` is true if each update computes the KL coefficient of the next
    update (metric `beta`, minimum: the setting `beta` of the method). `has_combined_objective` is true if the method can add the
    supervised loss (`train.objective`). `min_completions` is the minimum of `respond.num_completions`.
    """

    phase: str
    title: str
    row_kind: RowKind
    is_rewarded: bool = True
    uses_constitution: bool = False
    has_adaptive_beta: bool = False
    has_combined_objective: bool = False
    min_completions: int = 1

    @property
    def uses_rollouts(self) -> bool:
        """Return whether the method trains on completions of recent policies.

        Such a batch has limits of staleness. A completion that exceeds them is dropped with a reason.
        """
        return self.row_kind in ("rollouts", "groups")

    @property
    def uses_groups(self) -> bool:
        """Return whether the method compares the completions of a response, with the rewards `train.rewards`."""
        return self.row_kind == "groups"

    def needs_reward_model(self, train: TrainSettings) -> bool:
        """Return whether a reward model scores the completions, so that the phase `reward` comes first."""
        if self.uses_groups:
            return any(term.source == REWARD_MODEL for term in parse_rewards(train.rewards))
        return self.uses_rollouts and self.is_rewarded

    def needs_labels(self, train: TrainSettings) -> bool:
        """Return whether the judge's labels decide what is learned. The trainer then checks their quality first."""
        uses_judge = self.uses_groups and any(term.source == JUDGE for term in parse_rewards(train.rewards))
        return self.row_kind == "pairs" or uses_judge or self.needs_reward_model(train)

    def divides_prompts(self, train: TrainSettings) -> bool:
        """Return whether prompts are divided into those for the reward model and those for RL (`prompts.rl_fraction`).

        They are not divided if the completions that RL trains on need labels too.
        """
        uses_judge = self.uses_groups and any(term.source == JUDGE for term in parse_rewards(train.rewards))
        return self.uses_rollouts and self.needs_reward_model(train) and not uses_judge


RL_METHODS = {
    method.phase: method
    for method in (
        RLMethod("ppo", "PPO", "rollouts", has_adaptive_beta=True, has_combined_objective=True),
        RLMethod("dpo", "DPO", "pairs"),
        RLMethod("grpo", "GRPO", "groups", has_adaptive_beta=True, min_completions=4),
        RLMethod("rloo", "RLOO", "groups", has_adaptive_beta=True, min_completions=2),
        RLMethod("distill", "self-distillation", "rollouts", is_rewarded=False, uses_constitution=True),
    )
}
SFT_PHASE, REWARD_PHASE = "sft", "reward"
PHASES = (SFT_PHASE, REWARD_PHASE, *RL_METHODS)
TRL_PHASES = (SFT_PHASE, REWARD_PHASE, "dpo")  # the phases that one of trl's trainers trains
_ROW_KINDS: dict[str, RowKind] = {SFT_PHASE: "chains", REWARD_PHASE: "pairs"}


def get_row_kind(phase: str) -> RowKind:
    """Return what the batches of a phase consist of."""
    return RL_METHODS[phase].row_kind if phase in RL_METHODS else _ROW_KINDS[phase]


def list_enabled_phases(train: TrainSettings) -> tuple[str, ...]:
    """Return the phases that alternate with these settings: SFT, the reward model if it is needed, and the RL method."""
    method = RL_METHODS[train.rl_method]
    return (SFT_PHASE, *([REWARD_PHASE] if method.needs_reward_model(train) else []), method.phase)


def is_rewarded(phase: str) -> bool:
    """Return whether the rewards or labels of a phase can change. The responses alone decide what the other phases learn."""
    return phase not in RL_METHODS or RL_METHODS[phase].is_rewarded


def uses_constitution(phase: str) -> bool:
    """Return whether the learner of a phase reads the constitution."""
    return phase in RL_METHODS and RL_METHODS[phase].uses_constitution


def uses_rollouts(phase: str) -> bool:
    """Return whether a phase is an RL method that trains on completions of recent policies."""
    return phase in RL_METHODS and RL_METHODS[phase].uses_rollouts


def needs_reward_model(phase: str, train: TrainSettings) -> bool:
    """Return whether a phase is an RL method that needs a reward model."""
    return phase in RL_METHODS and RL_METHODS[phase].needs_reward_model(train)


def uses_groups(phase: str) -> bool:
    """Return whether a phase is an RL method that compares the completions of a response."""
    return get_row_kind(phase) == "groups"


def get_rl_fraction(settings: Settings) -> float:
    """Return the fraction of new prompts that are for RL, or 0 if the RL method does not divide the prompts."""
    divides = RL_METHODS[settings.train.rl_method].divides_prompts(settings.train)
    return settings.prompts.rl_fraction if divides else 0.0


def require_enough_completions(settings: Settings, phase: str | None = None) -> None:
    """Raise UsageError if the RL method cannot compare so few completions of a prompt. `phase` replaces train.rl_method."""
    method, count = RL_METHODS[phase or settings.train.rl_method], settings.respond.num_completions
    if count < method.min_completions:
        raise UsageError(
            f"{method.title} cannot train on groups of {count} (respond.num_completions)",
            f"{method.title} compares the completions of a prompt with each other, and needs at least {method.min_completions}",
            f"set respond.num_completions to {method.min_completions} or more, or remove this setting: the default of"
            f" {method.phase} is {METHOD_DEFAULTS[method.phase]['respond']['num_completions']}",
        )


def list_unlabeled_phases(settings: Settings) -> list[str]:
    """Return a sentence for each enabled phase that trains on labels, while the judge stage makes only contrast pairs."""
    train = settings.train
    if settings.judge.pairing != CONTRAST_PAIRING:
        return []
    return [
        f"judge.pairing = contrast makes only contrast pairs, so {phase} gets no labels except those by people. To train {phase} on"
        f" contrast pairs, add {phase} to train.contrast_pairs"
        for phase in list_enabled_phases(train)
        if get_row_kind(phase) == "pairs" and phase not in train.contrast_pairs
    ]


def list_ignored_settings(settings: Settings) -> list[str]:
    """Return a sentence for each setting that differs from its default and that the RL method does not use."""
    method, train, default = RL_METHODS[settings.train.rl_method], settings.train, TrainSettings()
    ignored = []
    if train.objective != default.objective and not method.has_combined_objective:
        ignored.append(f"train.objective = {train.objective} has no effect with train.rl_method = {method.phase}")
    if train.rewards != default.rewards and not method.uses_groups:
        ignored.append(f"train.rewards has no effect with train.rl_method = {method.phase}")
    enabled = list_enabled_phases(train)
    if unused := [phase for phase in train.contrast_pairs if phase not in enabled]:
        listed = ", ".join(unused)
        ignored.append(f"train.contrast_pairs = {listed} has no effect with train.rl_method = {method.phase}")
    distill = settings.distill
    if method.uses_constitution and distill.beta != type(distill)().beta and distill.divergence != "jsd":
        ignored.append(f"distill.beta has no effect with distill.divergence = {distill.divergence}")
    return ignored
