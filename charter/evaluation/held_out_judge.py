"""The watch of `charter train --loop` from the settings: its limits, and the held-out judge that it asks.

The held-out judge must not be what taught the reward model. Another model (`monitor.judge`) is asked under the constitution's
judging principles. Without one the judge's own model is asked under the critique principles, which labelled nothing: what it
says is weaker evidence, for it may share the judge's faults.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from charter.evaluation.agreement_study import label_pairs
from charter.evaluation.rejudge import BatchJudge, make_pair_response
from charter.models import RoleModels
from constitutions.loader import Constitution, JudgePrinciple, load_constitution
from engine.settings import Settings
from schemas.records import ChatMessage, Outcome

if TYPE_CHECKING:
    from trainer.monitor import RewardHackingMonitor


_CRITIQUE_JUDGE_PROMPT = "A critic is told: {critique}\n\nWhich answer would this critic find less fault with?"


def make_reward_hacking_monitor(settings: Settings) -> RewardHackingMonitor:
    """The watch that looks at every policy of the RL phase."""
    from trainer.monitor import RewardHackingMonitor

    return RewardHackingMonitor(settings.monitor, HeldOutJudge(settings) if settings.monitor.prompts else None)


class HeldOutJudge:
    """Compares two answers to each dialogue; its model is in memory only while it is asked."""

    def __init__(self, settings: Settings) -> None:

        constitution = load_constitution(settings.run.constitution)
        judge = settings.judge.model_copy(update={"pairing": "completions"})
        models = settings.models.model_copy(update={"judge": settings.monitor.judge or settings.models.judge})
        self.settings = settings.model_copy(update={"judge": judge, "models": models})
        self.constitution = constitution if settings.monitor.judge else make_critique_judge_constitution(constitution)

    def __call__(self, pairs: Sequence[tuple[tuple[ChatMessage, ...], str, str]]) -> list[float | None]:
        """The probability that the first answer is better, in both orders; None where the judge gave no label."""

        asked = [make_pair_response(messages, a, b, (), "") for messages, a, b in pairs]
        labels = label_pairs(BatchJudge(self.settings, RoleModels(self.settings)), self.constitution, asked)
        return [label.p_a if label is not None and label.outcome is Outcome.OK else None for label in labels]


def make_critique_judge_constitution(constitution: Constitution) -> Constitution:
    """A constitution that judges by the critique principles."""

    judging = [
        JudgePrinciple(
            id=p.id,
            name=p.name,
            weight=p.weight,
            tags=p.tags,
            judge_prompt=_CRITIQUE_JUDGE_PROMPT.format(critique=p.critique_prompt),
        )
        for p in constitution.critique
    ]
    return Constitution(**constitution.model_dump() | {"judge": judging, "judge_with": "one", "prose": ()})
