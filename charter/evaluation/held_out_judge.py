"""Provide the held-out judge of the reward hacking monitor (`charter train --loop`).

The held-out judge must differ from the judge that labeled the training data of the reward model. If `monitor.judge` is
set, the held-out judge uses the model of this setting and the judge principles of the constitution. Otherwise the
held-out judge uses the model of the judge and the critique principles. The critique principles are not used for labels of
training data. The second case is weaker evidence, because the same model may make the same errors.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from charter.evaluation.agreement_study import label_pairs
from charter.evaluation.rejudge import BatchJudge, make_pair_response
from charter.models import RoleModels
from constitutions.loader import Constitution, JudgePrinciple, load_constitution
from engine.settings import Settings, parse_rewards
from schemas.records import ChatMessage, Outcome
from trainer.methods import RL_METHODS

if TYPE_CHECKING:
    from trainer.monitor import RewardHackingMonitor


logger = logging.getLogger("charter.trainer")
_CRITIQUE_JUDGE_PROMPT = "A critic is told: {critique}\n\nWhich answer would this critic find less fault with?"


def make_reward_hacking_monitor(settings: Settings) -> RewardHackingMonitor:
    """Return the monitor that checks every policy of the RL phase. If monitor.prompts is not set, the monitor has no judge."""
    from trainer.monitor import RewardHackingMonitor, find_exempt_checks

    judge = HeldOutJudge(settings) if settings.monitor.prompts else None
    needs_grades = "refusal" in settings.grade.graders
    exempt = find_exempt_checks(list_training_targets(settings))
    if exempt:
        logger.info("the monitor does not check %s, because training changes it on purpose", ", ".join(sorted(exempt)))
    method = RL_METHODS[settings.train.rl_method]
    has_grades = method.uses_groups and not method.needs_reward_model(settings.train)
    return RewardHackingMonitor(
        settings.monitor,
        settings.run.id,
        judge,
        settings.models.max_batch_size,
        needs_grades,
        exempt,
        parse_rewards(settings.train.rewards) if has_grades else (),
        settings.train,
    )


def list_training_targets(settings: Settings) -> set[str]:
    """Return what training changes on purpose: the graders in train.rewards, and the targets of the constitution."""
    targets: set[str] = set(load_constitution(settings.run.constitution).targets)
    if RL_METHODS[settings.train.rl_method].uses_groups:
        targets |= {term.source for term in parse_rewards(settings.train.rewards)}
    return targets


class HeldOutJudge:
    """Compares two responses to each dialogue. Each call loads the model and then frees its memory for training."""

    def __init__(self, settings: Settings) -> None:
        constitution = load_constitution(settings.run.constitution)
        judge = settings.judge.model_copy(update={"pairing": "neighbors"})
        models = settings.models.model_copy(update={"judge": settings.monitor.judge or settings.models.judge})
        self.settings = settings.model_copy(update={"judge": judge, "models": models})
        self.constitution = constitution if settings.monitor.judge else make_critique_judge_constitution(constitution)

    def __call__(self, pairs: Sequence[tuple[tuple[ChatMessage, ...], str, str]]) -> list[float | None]:
        """Return the probability, over both orders, that the first response of each pair is better. Return None if
        there is no label."""
        responses = [make_pair_response(messages, a, b, (), "") for messages, a, b in pairs]
        labels = label_pairs(BatchJudge(self.settings, RoleModels(self.settings)), self.constitution, responses)
        return [label.p_a if label is not None and label.outcome is Outcome.OK else None for label in labels]


def make_critique_judge_constitution(constitution: Constitution) -> Constitution:
    """Return the constitution with new judge principles, which are made from its critique principles."""
    judge_principles = [
        JudgePrinciple(
            id=p.id,
            name=p.name,
            weight=p.weight,
            tags=p.tags,
            judge_prompt=_CRITIQUE_JUDGE_PROMPT.format(critique=p.critique_prompt),
        )
        for p in constitution.critique
    ]
    return Constitution(**constitution.model_dump() | {"judge": judge_principles, "judge_with": "one", "prose": ()})
