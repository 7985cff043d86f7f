"""State what each RL method (`train.rl_method`) trains on and what it needs.

All other modules ask this module and never compare a phase with the name of one method. A new method is one entry in
`RL_METHODS`, one learner file and one `learn_*` function in `trainer.phases`. The name of a method is also the name of its phase
in records.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from engine.settings import TrainSettings

# chains: the final responses of revision chains. pairs: preference labels. rollouts: single completions of recent policies.
RowKind = Literal["chains", "pairs", "rollouts"]


@dataclass(frozen=True)
class RLMethod:
    """This object describes one RL method.

    `row_kind` is what its batches consist of. `has_adaptive_beta` is true if each update computes the KL coefficient of the next
    update (metric `beta`, minimum: the setting `beta` of the method). `has_combined_objective` is true if the method can add the
    supervised loss (`train.objective`).
    """

    phase: str
    title: str
    row_kind: RowKind
    has_adaptive_beta: bool = False
    has_combined_objective: bool = False

    @property
    def uses_rollouts(self) -> bool:
        """Return whether the method trains on completions of recent policies.

        Such a batch has limits of staleness. A completion that exceeds them is dropped with a reason.
        """
        return self.row_kind == "rollouts"

    def needs_reward_model(self, train: TrainSettings) -> bool:
        """Return whether a reward model scores the completions, so that the phase `reward` comes first."""
        return self.uses_rollouts

    def needs_labels(self, train: TrainSettings) -> bool:
        """Return whether the judge's labels decide what is learned. The trainer then checks their quality first."""
        return self.row_kind == "pairs" or self.needs_reward_model(train)


RL_METHODS = {
    method.phase: method
    for method in (
        RLMethod("ppo", "PPO", "rollouts", has_adaptive_beta=True, has_combined_objective=True),
        RLMethod("dpo", "DPO", "pairs"),
    )
}
SFT_PHASE, REWARD_PHASE = "sft", "reward"
PHASES = (SFT_PHASE, REWARD_PHASE, *RL_METHODS)
_ROW_KINDS: dict[str, RowKind] = {SFT_PHASE: "chains", REWARD_PHASE: "pairs"}


def get_row_kind(phase: str) -> RowKind:
    """Return what the batches of a phase consist of."""
    return RL_METHODS[phase].row_kind if phase in RL_METHODS else _ROW_KINDS[phase]


def list_enabled_phases(train: TrainSettings) -> tuple[str, ...]:
    """Return the phases that alternate with these settings: SFT, the reward model if it is needed, and the RL method."""
    method = RL_METHODS[train.rl_method]
    return (SFT_PHASE, *([REWARD_PHASE] if method.needs_reward_model(train) else []), method.phase)


def uses_rollouts(phase: str) -> bool:
    """Return whether a phase is an RL method that trains on completions of recent policies."""
    return phase in RL_METHODS and RL_METHODS[phase].uses_rollouts


def needs_reward_model(phase: str, train: TrainSettings) -> bool:
    """Return whether a phase is an RL method that needs a reward model."""
    return phase in RL_METHODS and RL_METHODS[phase].needs_reward_model(train)
