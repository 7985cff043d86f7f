"""How far a judge agrees with people: the figures of an agreement study, from labels and what people preferred.

Everything is counted on pairs of which a person preferred one answer. `p` is the judge's probability of the answer that the
person preferred, None where it gave no label: an abstention is never counted as right or wrong, and always shown.

Wilson's interval: Wilson 1927. Expected calibration error: Naeini et al. 2015, with ten bins of the confidence max(p, 1 - p),
so that it does not depend on which answer is called A. Brier score: Brier 1950.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.statistics import compute_brier_score, compute_calibration_error, compute_wilson_interval
from schemas.records import Outcome, Preference


@dataclass(frozen=True)
class HumanPair:
    """Two answers, of which a person preferred `a` or not."""

    response_a: str
    response_b: str
    a_preferred: bool

    @property
    def a_longer(self) -> bool | None:
        """None where both have as many characters."""
        return None if len(self.response_a) == len(self.response_b) else len(self.response_a) > len(self.response_b)


@dataclass
class AgreementMetrics:
    """One judge's figures. Shares are of what their names say, intervals are for 95 %, and what cannot be told is None.

    accuracy: of the labels that prefer an answer (`decided`), those that prefer the person's. brier, ece: of the soft labels.
    swap_inconsistency: of the judgements that could be read in both orders, those in which the same place won twice.
    prefers_longer: of the decided labels on answers of unequal length. tokens_*, seconds: per pair. *_per_label: what all pairs
    together cost, for each label that came of it; an abstention costs as much as a label.
    """

    judge: str
    pairs: int
    labelled: int
    decided: int
    agreed: int
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
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


def _ratio_or_none(hits: int, n: int) -> float | None:
    return hits / n if n else None


def _mean_or_none(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def compute_agreement(judge: str, pairs: Sequence[HumanPair], probabilities: Sequence[float | None]) -> AgreementMetrics:
    """What can be told of any judge that gives probabilities of the preferred answers."""
    given = [p for p in probabilities if p is not None]
    decided = [(pair, p > 0.5) for pair, p in zip(pairs, probabilities, strict=True) if p is not None and p != 0.5]
    agreed = sum(right for _, right in decided)
    unequal = [(pair.a_longer, pair.a_preferred == right) for pair, right in decided if pair.a_longer is not None]
    low, high = compute_wilson_interval(agreed, len(decided)) or (None, None)
    return AgreementMetrics(
        judge=judge,
        pairs=len(pairs),
        labelled=len(given),
        decided=len(decided),
        agreed=agreed,
        accuracy=_ratio_or_none(agreed, len(decided)),
        accuracy_low=low,
        accuracy_high=high,
        brier=compute_brier_score(given),
        ece=compute_calibration_error(given),
        prefers_longer=_ratio_or_none(sum(longer == says_a for longer, says_a in unequal), len(unequal)),
    )


def compute_judge_agreement(
    judge: str, pairs: Sequence[HumanPair], labels: Sequence[Preference | None], seconds: float, cost: float | None
) -> AgreementMetrics:
    """The figures of a judge's labels; None is a pair that it could not be asked about. What they cost is of all pairs."""
    ps = [_get_preferred_probability(pair, label) for pair, label in zip(pairs, labels, strict=True)]
    row, known = compute_agreement(judge, pairs, ps), [label for label in labels if label]
    readable = [label for label in known if label.outcome in (Outcome.OK, Outcome.POSITION_FLIP)]
    row.swap_inconsistency = _ratio_or_none(sum(label.position_flip for label in readable), len(readable))
    row.mass = _mean_or_none(
        [label.option_mass for label in known if label.option_mass is not None and not math.isnan(label.option_mass)]
    )
    abstained = Counter(label.outcome.value if label else "NOT_ASKED" for label in labels)
    row.abstentions = {name: count for name, count in sorted(abstained.items()) if name != Outcome.OK.value}
    row.tokens_read = _mean_or_none([float(label.prompt_tokens) for label in known])
    row.tokens_cached = _mean_or_none([float(label.cached_tokens) for label in known])
    row.tokens_written = _mean_or_none([float(label.completion_tokens) for label in known])
    row.seconds = seconds / len(pairs) if pairs else None
    if row.labelled:
        row.tokens_per_label = sum(label.prompt_tokens + label.completion_tokens for label in known) / row.labelled
        row.seconds_per_label = seconds / row.labelled
        row.cost_per_label = None if cost is None else cost / row.labelled
    return row


def _get_preferred_probability(pair: HumanPair, label: Preference | None) -> float | None:
    """The probability of the preferred answer, where there is a label that trains."""
    if label is None or label.outcome is not Outcome.OK or label.p_a is None:
        return None
    return label.p_a if pair.a_preferred else 1 - label.p_a


def compute_baselines(pairs: Sequence[HumanPair], seed: int) -> list[AgreementMetrics]:
    """What needs no model: the longer answer wins, the shorter answer wins, and probabilities that are drawn."""
    rng = random.Random(f"baseline/{seed}")
    longer = [None if pair.a_longer is None else float(pair.a_longer == pair.a_preferred) for pair in pairs]
    rows = [
        compute_agreement("longer wins", pairs, longer),
        compute_agreement("shorter wins", pairs, [None if p is None else 1 - p for p in longer]),
    ]
    for row in rows:
        row.brier = row.ece = None  # they are no probabilities
    return [*rows, compute_agreement("random", pairs, [rng.random() for _ in pairs])]
