"""Compute the agreement of a judge with human labels.

All metrics use only pairs in which a person preferred one response. `p` is the judge's probability of this response. If the judge
gave no label (an abstention), `p` is None. The metrics report abstentions separately and do not count them as correct or wrong.

The sources are Wilson 1927 for the Wilson interval, Cohen 1960 for kappa, Naeini et al. 2015 for the expected calibration error, and Brier 1950 for the
Brier score. The calibration error has ten bins of the confidence max(p, 1 - p), so it does not change if A and B are swapped.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.statistics import compute_brier_score, compute_confidence_error, compute_wilson_interval
from schemas.records import Outcome, Preference


@dataclass(frozen=True)
class HumanPair:
    """Holds two responses, and whether a person preferred response A."""

    response_a: str
    response_b: str
    a_preferred: bool

    @property
    def a_longer(self) -> bool | None:
        """Return whether response A has more characters than response B. Return None for equal lengths."""
        return None if len(self.response_a) == len(self.response_b) else len(self.response_a) > len(self.response_b)


@dataclass
class AgreementMetrics:
    """Holds the agreement metrics of one judge. A metric that cannot be computed is None.

    `labelled` is the number of labels, `decided` the number of labels that are not ties, and `agreed` the number of decided
    labels that match the human label. `accuracy` is agreed / decided, with the 95 % interval `accuracy_low` to `accuracy_high`.
    `kappa` is Cohen's kappa of the decided labels, where the two categories are response A and response B.
    `brier` and `ece` are computed from the soft labels. Of the judgments that are readable in both orders,
    `swap_inconsistency` is the fraction that prefer the same position in both orders. `mass` is the mean option mass. Of the
    decided labels of pairs with different lengths, `prefers_longer` is the fraction that prefer the longer response.
    `tokens_read`, `tokens_cached` and `tokens_written` are the prompt tokens, the cached prompt tokens and the completion
    tokens per pair. `seconds` is the time per pair. The `*_per_label` metrics divide the total of all pairs, including
    abstentions, by the number of labels.
    """

    judge: str
    pairs: int
    labelled: int
    decided: int
    agreed: int
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    kappa: float | None = None
    brier: float | None = None
    ece: float | None = None
    swap_inconsistency: float | None = None
    mass: float | None = None
    prefers_longer: float | None = None
    abstentions: dict[str, int] = field(default_factory=dict)
    tokens_read: float | None = None
    tokens_cached: float | None = None
    tokens_written: float | None = None
    seconds: float | None = None
    tokens_per_label: float | None = None
    seconds_per_label: float | None = None
    cost_per_label: float | None = None


def _ratio_or_none(count: int, total: int) -> float | None:
    return count / total if total else None


def _mean_or_none(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def compute_kappa(choices: Sequence[tuple[bool, bool]]) -> float | None:
    """Return Cohen's kappa of two raters who choose between two categories.

    Kappa is 1 for full agreement and 0 for the agreement that is expected by chance. It is None if there are no choices, or if
    both raters always choose the same category, because chance then explains the full agreement.
    """
    total = len(choices)
    if not total:
        return None
    first, second = (sum(choice[rater] for choice in choices) / total for rater in (0, 1))
    expected = first * second + (1 - first) * (1 - second)
    observed = sum(a == b for a, b in choices) / total
    return None if expected == 1 else (observed - expected) / (1 - expected)


def compute_agreement(judge: str, pairs: Sequence[HumanPair], probabilities: Sequence[float | None]) -> AgreementMetrics:
    """Return the metrics that need only the judge's probability of the preferred response. None means that there is no label."""
    labels = [p for p in probabilities if p is not None]
    decided = [(pair, p > 0.5) for pair, p in zip(pairs, probabilities, strict=True) if p is not None and p != 0.5]
    agreed = sum(correct for _, correct in decided)
    # Pairs of unequal length, each as (A is longer, the judge preferred A).
    unequal = [(pair.a_longer, pair.a_preferred == correct) for pair, correct in decided if pair.a_longer is not None]
    low, high = compute_wilson_interval(agreed, len(decided)) or (None, None)
    return AgreementMetrics(
        judge=judge,
        pairs=len(pairs),
        labelled=len(labels),
        decided=len(decided),
        agreed=agreed,
        accuracy=_ratio_or_none(agreed, len(decided)),
        accuracy_low=low,
        accuracy_high=high,
        kappa=compute_kappa([(pair.a_preferred, pair.a_preferred == correct) for pair, correct in decided]),
        brier=compute_brier_score(labels),
        ece=compute_confidence_error(labels),
        prefers_longer=_ratio_or_none(sum(a_longer == judge_prefers_a for a_longer, judge_prefers_a in unequal), len(unequal)),
    )


def compute_judge_agreement(
    judge: str, pairs: Sequence[HumanPair], labels: Sequence[Preference | None], seconds: float | None, cost: float | None
) -> AgreementMetrics:
    """Return the metrics of a judge's labels. A label is None if the pair does not fit into the context of the model.

    `seconds` and `cost` are totals over all pairs, or None if they are unknown.
    """
    probabilities = [_get_preferred_probability(pair, label) for pair, label in zip(pairs, labels, strict=True)]
    row = compute_agreement(judge, pairs, probabilities)
    judged = [label for label in labels if label]
    readable = [label for label in judged if label.outcome in (Outcome.OK, Outcome.POSITION_FLIP)]
    row.swap_inconsistency = _ratio_or_none(sum(label.position_flip for label in readable), len(readable))
    row.mass = _mean_or_none(
        [label.option_mass for label in judged if label.option_mass is not None and not math.isnan(label.option_mass)]
    )
    outcomes = Counter(label.outcome.value if label else "NOT_ASKED" for label in labels)
    row.abstentions = {name: count for name, count in sorted(outcomes.items()) if name != Outcome.OK.value}
    row.tokens_read = _mean_or_none([float(label.prompt_tokens) for label in judged])
    row.tokens_cached = _mean_or_none([float(label.cached_tokens) for label in judged])
    row.tokens_written = _mean_or_none([float(label.completion_tokens) for label in judged])
    row.seconds = seconds / len(pairs) if pairs and seconds is not None else None
    if row.labelled:
        row.tokens_per_label = sum(label.prompt_tokens + label.completion_tokens for label in judged) / row.labelled
        row.seconds_per_label = None if seconds is None else seconds / row.labelled
        row.cost_per_label = None if cost is None else cost / row.labelled
    return row


def _get_preferred_probability(pair: HumanPair, label: Preference | None) -> float | None:
    """Return the judge's probability of the response that the person preferred. Return None if there is no usable
    label."""
    if label is None or label.outcome is not Outcome.OK or label.p_a is None:
        return None
    return label.p_a if pair.a_preferred else 1 - label.p_a


def compute_baselines(pairs: Sequence[HumanPair], seed: int) -> list[AgreementMetrics]:
    """Return the metrics of three baselines: the longer response wins, the shorter response wins, and random probabilities."""
    rng = random.Random(f"baseline/{seed}")
    longer = [None if pair.a_longer is None else float(pair.a_longer == pair.a_preferred) for pair in pairs]
    rows = [
        compute_agreement("longer wins", pairs, longer),
        compute_agreement("shorter wins", pairs, [None if p is None else 1 - p for p in longer]),
    ]
    for row in rows:
        row.brier = row.ece = None  # these baselines give decisions, not probabilities
    return [*rows, compute_agreement("random", pairs, [rng.random() for _ in pairs])]
