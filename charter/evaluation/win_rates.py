"""Compute pairwise win rates by a held-out judge, and measure how much this judge can be trusted.

A win rate is worth as much as the judge. So each result has the judge's accuracy on pairs with a label by people (LLMBar, or any file
of preferences). If the accuracy is not above chance, the result says "no evidence". Judges often prefer the longer response, so
pairs of about equal length are reported apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from charter.evaluation.agreement import HumanPair, compute_agreement
from charter.evaluation.agreement_study import PairDataset
from charter.evaluation.held_out_judge import HeldOutJudge
from charter.evaluation.judge_suites import (
    ALL_PAIRS,
    EQUAL_LENGTH,
    SUITES,
    has_equal_length,
    make_llmbar_constitution,
    parse_suite,
)
from charter.models import RoleModels
from engine.errors import UsageError
from engine.settings import Settings
from engine.statistics import compute_wilson_interval
from engine.store import QueryFunction
from schemas.records import ChatMessage

ResponsePair = tuple[tuple[ChatMessage, ...], str, str]  # a dialogue and two responses
PairJudge = Callable[[Sequence[ResponsePair]], list[float | None]]


@dataclass(frozen=True)
class JudgeAccuracy:
    """The share of pairs in which the judge prefers the same response as people, without ties, with its 95 % interval."""

    source: str
    pairs: int
    decided: int
    accuracy: float | None
    low: float | None
    high: float | None

    @property
    def is_above_chance(self) -> bool:
        return self.low is not None and self.low > 0.5

    def __str__(self) -> str:
        if self.accuracy is None or self.low is None or self.high is None:
            return f"{self.source}: no label on {self.pairs} pairs"
        return f"{self.source}: {self.accuracy:.3f} ({self.low:.3f} to {self.high:.3f}, {self.decided} of {self.pairs} pairs)"


@dataclass(frozen=True)
class WinRate:
    """How often the second response wins. A tie is half a win. `pairs` without a label are not part of the rate."""

    group: str
    pairs: int
    labeled: int
    wins: float
    win_rate: float | None
    low: float | None
    high: float | None


def compute_win_rates(pairs: Sequence[ResponsePair], probabilities: Sequence[float | None]) -> list[WinRate]:
    """Return the win rate of the second responses over all pairs, and over the pairs of about equal length.

    `probabilities` are those that the first response is better. In a pair of equal length, the numbers of words differ by at most 10 %.
    """
    judged = list(zip(pairs, probabilities, strict=True))
    equal = [(pair, p) for pair, p in judged if has_equal_length(HumanPair(*pair[1:], True))]
    return [_compute_win_rate(ALL_PAIRS, [p for _, p in judged]), _compute_win_rate(EQUAL_LENGTH, [p for _, p in equal])]


def _compute_win_rate(group: str, probabilities: Sequence[float | None]) -> WinRate:
    labels = [p for p in probabilities if p is not None]
    wins = sum(0.5 if p == 0.5 else float(p < 0.5) for p in labels)
    low, high = compute_wilson_interval(wins, len(labels)) or (None, None)
    return WinRate(group, len(probabilities), len(labels), wins, wins / len(labels) if labels else None, low, high)


# The accuracy of the judge


def measure_accuracy(judge: PairJudge, source: str, data: PairDataset) -> JudgeAccuracy:
    """Return the accuracy of the judge on pairs with a label by people. `source` names the pairs."""
    pairs: list[ResponsePair] = [
        (tuple(response.messages), pair.response_a, pair.response_b)
        for response, pair in zip(data.judge_inputs, data.human_pairs, strict=True)
    ]
    # The probability of the response that people prefer.
    preferred = [
        None if p is None else p if pair.a_preferred else 1 - p for p, pair in zip(judge(pairs), data.human_pairs, strict=True)
    ]
    row = compute_agreement("", data.human_pairs, preferred)
    return JudgeAccuracy(source, len(pairs), row.decided, row.accuracy, row.accuracy_low, row.accuracy_high)


def measure_on_suites(settings: Settings, suites: Sequence[str], limit: int | None) -> list[JudgeAccuracy]:
    """Return the accuracies of the held-out judge on the suites of `charter eval judge` (llmbar=FILE, pairs=FILE).

    The pairs of LLMBar are judged under one principle, whether a response follows the instruction, because this is what their labels
    mean. `limit` is the maximum number of pairs of each file.
    """
    accuracies = []
    for text in suites:
        name, file = parse_suite(text)
        data = SUITES[name](file, limit, 0)
        judge = HeldOutJudge(settings)
        if name == "llmbar":
            judge.constitution = make_llmbar_constitution(judge.constitution)
        accuracies.append(measure_accuracy(judge, data.name, data))
    return accuracies


def read_database_accuracy(query: QueryFunction, model: str) -> JudgeAccuracy | None:
    """Return the agreement of a model's labels in the database with the labels of people, or None without such pairs."""
    sql = "SELECT count(*), count(agree), count(*) FILTER (agree) FROM ai_human_labels WHERE model = $model"
    ((pairs, decided, agreed),) = query(sql, {"model": model}).rows
    if not pairs:
        return None
    low, high = compute_wilson_interval(agreed, decided) or (None, None)
    return JudgeAccuracy("labels by people in the database", pairs, decided, agreed / decided if decided else None, low, high)


def describe_evidence(accuracies: Sequence[JudgeAccuracy]) -> str:
    """Return whether win rates of the judge are evidence: it must be above chance on each file of pairs."""
    if not accuracies:
        return "no evidence: the accuracy of the judge is not known"
    if weak := [accuracy.source for accuracy in accuracies if not accuracy.is_above_chance]:
        return f"no evidence: the judge is at chance on {', '.join(weak)}"
    return "the judge is above chance"


def apply_judge(settings: Settings, spec: str) -> tuple[Settings, str]:
    """Return the settings with another held-out judge, and the id of its model."""
    models = RoleModels(settings)
    try:
        judge = models.get_model_by_spec(spec).id
    finally:
        models.close()
    return settings.model_copy(update={"monitor": settings.monitor.model_copy(update={"judge": spec})}), judge


def require_held_out(spec: str, model: str, used_models: Collection[str], deed: str) -> None:
    """Raise UsageError if the model of --judge is one of `used_models`. `deed` describes what these models did."""
    if model in used_models:
        raise UsageError(
            f"--judge {spec} is the model {model}, which {deed}",
            "a judge that judges its own work is no evidence",
            "name another model: --judge MODEL",
        )


def list_label_models(query: QueryFunction) -> set[str]:
    """Return the ids of the models whose labels are in the database. The policies may have been trained on them."""
    sql = "SELECT DISTINCT model.id FROM preferences WHERE label_source = 'AI' AND model IS NOT NULL AND split = 'TRAIN'"
    return {model for (model,) in query(sql).rows}


def make_evidence_fields(judge: str, accuracies: Sequence[JudgeAccuracy]) -> dict[str, Any]:
    """Return the columns of a result with the evidence for the judge."""
    return {
        "judge": judge,
        "judge_accuracy": "; ".join(map(str, accuracies)) or None,
        "evidence": describe_evidence(accuracies),
    }
