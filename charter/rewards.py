"""Check `train.rewards` before training: whether its sources exist, and whether the grades of a judge may reward a policy."""

from __future__ import annotations

import logging

from charter.console import print_progress
from charter.evaluation.principles_study import RankedPair, measure_principles
from charter.models import RoleModels
from charter.pipeline import BUILTIN_GRADERS, make_principles_grader
from charter.stages import PRINCIPLES_GRADER
from constitutions.cases import read_cases
from constitutions.loader import list_shipped_constitutions, load_constitution
from consumers.graders.custom import load_grader
from consumers.graders.instructions import InstructionsGrader
from consumers.graders.principles import RESPECTS, VIOLATES
from consumers.graders.refusal import COMPLIES, PARTLY, REFUSES, UNUSABLE
from engine.errors import UsageError
from engine.pairing import COMPLETIONS_PAIRING, name_pairing
from engine.settings import JUDGE, RewardTerm, Settings, parse_rewards
from engine.store import Store
from engine.text import format_count
from schemas.records import ChatMessage
from trainer.methods import RL_METHODS, require_enough_completions

_LABELS = {
    "refusal": (COMPLIES, REFUSES, PARTLY, UNUSABLE),
    "length": ("complete", "cut"),
    PRINCIPLES_GRADER: (VIOLATES, RESPECTS),
}
# A judge needs seconds for one principle of one completion on a processor.
_MAX_PRINCIPLES = 4
_MAX_HUMAN_PAIRS = 200
_HUMAN_PAIRS_SQL = """
    SELECT messages, response_a, response_b, p_a FROM preferences p LEFT JOIN overridden_labels o ON o.record_id = p.record_id
    WHERE p.label_source = 'HUMAN' AND p.outcome = 'OK' AND p.p_a <> 0.5 AND o.record_id IS NULL
    ORDER BY p.commit_seq DESC LIMIT ?"""


def require_usable_rewards(settings: Settings, store: Store, *, force: bool, phase: str | None = None) -> None:
    """Raise UsageError if groups are too small, or if a term of train.rewards can never be read or has bad grades.

    With `force`, the grader "principles" is not measured. If `phase`, the phase to train, is no RL method, train.rl_method counts.
    """
    method = phase if phase in RL_METHODS else settings.train.rl_method
    require_enough_completions(settings, method)
    if not RL_METHODS[method].uses_groups:
        return
    terms = parse_rewards(settings.train.rewards)
    for term in terms:
        if term.is_grader:
            _require_grader(term, settings)
    pairing = settings.judge.pairing
    if any(term.source == JUDGE for term in terms) and name_pairing(pairing) != COMPLETIONS_PAIRING:
        raise UsageError(
            f"train.rewards cannot use judge with judge.pairing = {pairing}",
            "a win rate needs labels of pairs of completions",
            "set judge.pairing to circular, neighbors or all",
        )
    if any(term.source == PRINCIPLES_GRADER for term in terms):
        _require_few_principles(settings)
        if not force:
            _require_good_principles(settings, store)


def _require_grader(term: RewardTerm, settings: Settings) -> None:
    if term.source == InstructionsGrader.name:
        raise UsageError(
            f"train.rewards cannot use {term.source}",
            "only prompts of a suite have instructions that can be verified, and suites do not train",
            "write the check as a grader: docs/extending.md",
        )
    custom = [load_grader(name, BUILTIN_GRADERS).name for name in settings.grade.graders if name.endswith(".py")]
    graders = [*(name for name in settings.grade.graders if not name.endswith(".py")), *custom]
    if term.source not in graders:
        raise UsageError(
            f"train.rewards names {term.source}, but the stage grade has no such grader",
            f"the graders are {', '.join(graders) or 'none'} (grade.graders), and groups would wait for its grades forever",
            f"add {term.source} to grade.graders, or correct train.rewards",
        )
    if "completion" not in settings.grade.subjects:
        raise UsageError(
            f"train.rewards names {term.source}, but completions get no grades",
            f"grade.subjects is {', '.join(settings.grade.subjects)}",
            "add completion to grade.subjects",
        )
    labels = _LABELS.get(term.source)
    if term.label and labels and term.label not in labels:
        raise UsageError(
            f"train.rewards names the label {term.name}, which does not exist",
            f"the labels of {term.source} are {', '.join(labels)}",
            "correct train.rewards",
        )


def _require_few_principles(settings: Settings) -> None:
    if not 1 <= settings.grade.num_principles <= _MAX_PRINCIPLES:
        asked = "all principles" if not settings.grade.num_principles else f"{settings.grade.num_principles} principles"
        raise UsageError(
            f"the grades of principles cannot be a reward if each completion is graded under {asked}",
            f"a judge needs seconds for each of them; a reward uses 1 to {_MAX_PRINCIPLES} principles that are sampled per prompt",
            f"set grade.num_principles to 1 to {_MAX_PRINCIPLES}",
        )


def _require_good_principles(settings: Settings, store: Store) -> None:
    """Raise UsageError unless the grader ranks the cases of the constitution and the pairs of people well enough."""
    pairs = read_ranked_pairs(settings, store)
    force = "to train anyway, type: charter train --loop --force"
    if not pairs:
        raise UsageError(
            "train.rewards cannot use principles, because nothing shows how good its grades are",
            f"the constitution {settings.run.constitution} has no cases, and people have labeled no pairs",
            f"label pairs (charter label), or use another reward; {force}",
        )
    print_progress(
        f"measuring the grader principles on {format_count(len(pairs), 'pairs')}, before its grades reward the policy",
        logging.INFO,
    )
    every = settings.model_copy(update={"grade": settings.grade.model_copy(update={"num_principles": 0})})
    models = RoleModels(every)
    try:
        grader = make_principles_grader(every, models, load_constitution(settings.run.constitution))
        problems = measure_principles(grader, pairs).list_problems()
    finally:
        models.close()
    if problems:
        raise UsageError(
            f"train.rewards cannot use principles: the grades of {grader.model.id} are not good enough",
            "; ".join(problems),
            f"set a larger models.judge, or use another reward; {force}",
        )


def read_ranked_pairs(settings: Settings, store: Store) -> list[RankedPair]:
    """Return the shipped cases of the constitution and the newest pairs that people have labeled."""
    pairs = []
    if settings.run.constitution in list_shipped_constitutions():
        for case in read_cases(settings.run.constitution).cases:
            messages = (ChatMessage(role="user", content=case.prompt),)
            pairs.append(RankedPair(messages, case.wins, case.loses, case.tags))
    if store.path.exists():
        for row in store.query_dicts(_HUMAN_PAIRS_SQL, [_MAX_HUMAN_PAIRS]):
            texts = row["response_a"], row["response_b"]
            better, worse = texts if row["p_a"] > 0.5 else texts[::-1]
            pairs.append(RankedPair(tuple(ChatMessage(**message) for message in row["messages"]), better, worse))
    return pairs
