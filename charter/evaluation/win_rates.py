"""Compute pairwise win rates by a held-out judge, and measure how much this judge can be trusted.

A win rate is worth as much as the judge. So each result has the judge's accuracy on pairs with a label by people (LLMBar, or any file
of preferences). If the accuracy is not above chance, the result says "no evidence". Judges often prefer the longer response, so
pairs of about equal length are reported apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charter.evaluation.agreement import HumanPair, compute_agreement
from charter.evaluation.agreement_study import read_pairs
from charter.models import RoleModels
from engine.errors import UsageError
from engine.settings import Settings
from engine.statistics import compute_wilson_interval
from engine.store import QueryFunction
from producers.parse import RowError, decode_row
from producers.rows import read_rows
from schemas.records import ChatMessage

ResponsePair = tuple[tuple[ChatMessage, ...], str, str]  # a dialogue and two responses
PairJudge = Callable[[Sequence[ResponsePair]], list[float | None]]

ALL_PAIRS, EQUAL_LENGTH = "all pairs", "equal length"
_MIN_LENGTH_RATIO = 0.9  # of the shorter to the longer response, in characters
_LLMBAR_COLUMNS = ("input", "output_1", "output_2", "label")


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

    `probabilities` are those that the first response is better. In a pair of equal length, the shorter response has at least 90 % of
    the characters of the longer one.
    """
    judged = list(zip(pairs, probabilities, strict=True))
    equal = [(pair, p) for pair, p in judged if has_equal_length(*pair[1:])]
    return [_compute_win_rate(ALL_PAIRS, [p for _, p in judged]), _compute_win_rate(EQUAL_LENGTH, [p for _, p in equal])]


def has_equal_length(a: str, b: str) -> bool:
    shorter, longer = sorted((len(a), len(b)))
    return shorter >= _MIN_LENGTH_RATIO * longer


def _compute_win_rate(group: str, probabilities: Sequence[float | None]) -> WinRate:
    labels = [p for p in probabilities if p is not None]
    wins = sum(0.5 if p == 0.5 else float(p < 0.5) for p in labels)
    low, high = compute_wilson_interval(wins, len(labels)) or (None, None)
    return WinRate(group, len(probabilities), len(labels), wins, wins / len(labels) if labels else None, low, high)


# The accuracy of the judge


def measure_accuracy(judge: PairJudge, file: str, limit: int | None, seed: int = 0) -> JudgeAccuracy:
    """Return the accuracy of the judge on a file of LLMBar, or on another file of human preferences. Raises UsageError for other files."""
    pairs = read_llmbar(file, seed) or _read_human_pairs(file, seed)
    pairs = pairs[:limit]
    probabilities = judge([pair for pair, _ in pairs])
    preferred = [None if p is None else p if first else 1 - p for p, (_, first) in zip(probabilities, pairs, strict=True)]
    row = compute_agreement("", [HumanPair(a, b, first) for (_, a, b), first in pairs], preferred)
    return JudgeAccuracy(Path(file).name, len(pairs), row.decided, row.accuracy, row.accuracy_low, row.accuracy_high)


def read_llmbar(file: str, seed: int) -> list[tuple[ResponsePair, bool]]:
    """Return the pairs of a file of LLMBar (Zeng et al. 2024) with whether the first response is better, in random order.

    Return an empty list if the file has other columns. Raises UsageError if a row has a column of LLMBar but not all of them.
    """
    pairs: list[tuple[ResponsePair, bool]] = []
    for number, raw in read_rows(file):
        try:
            row = decode_row(raw)
        except RowError:
            row = {}
        if "output_1" not in row:
            return []
        is_valid = all(isinstance(row.get(name), str) for name in _LLMBAR_COLUMNS[:3]) and row.get("label") in (1, 2)
        if not is_valid:
            raise UsageError(
                f"{file} row {number} is not a row of LLMBar",
                "a row has the texts input, output_1 and output_2, and the label 1 or 2",
                "correct the row",
            )
        messages = (ChatMessage(role="user", content=row["input"]),)
        pairs.append(((messages, row["output_1"], row["output_2"]), row["label"] == 1))
    random.Random(f"llmbar/{seed}").shuffle(pairs)
    return pairs


def _read_human_pairs(file: str, seed: int) -> list[tuple[ResponsePair, bool]]:
    data = read_pairs(file, None, seed)
    return [
        ((tuple(response.messages), pair.response_a, pair.response_b), pair.a_preferred)
        for response, pair in zip(data.judge_inputs, data.human_pairs, strict=True)
    ]


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


def make_evidence_fields(judge: str, accuracies: Sequence[JudgeAccuracy]) -> Mapping[str, Any]:
    """Return the columns of a result with the evidence for the judge."""
    return {
        "judge": judge,
        "judge_accuracy": "; ".join(map(str, accuracies)) or None,
        "evidence": describe_evidence(accuracies),
    }
