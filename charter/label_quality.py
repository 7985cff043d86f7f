"""Decide from the labels themselves whether they are good enough to train on.

Five checks: the share of labels that flip when the responses change places, the share of labels that are nearly ties, the share
of critiques and revisions that contain parts of their prompt, the agreement of the judge with people, and the accuracy of the
newest reward model in comparison with a rule that always prefers the longer response. The view `label_quality` has the numbers of
all labels that train; `[label_quality]` has the limits. A number from fewer than `label_quality.min_labels` labels decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from engine.settings import LabelQualitySettings
from engine.store import QueryResult, Store
from engine.text import format_count

# A label p is nearly a tie if |p - 0.5| is at most this value. The view `label_quality` has the same bound.
TIE_MARGIN = 0.05
_LARGER_JUDGE = "Use a larger judge (models.judge) with a new data folder"


@dataclass(frozen=True)
class LabelQuality:
    """Numbers about labels that train.

    `flips` of the `both_orders` labels flip with the order of the responses. This includes flips that give no label.
    `uncertain` of the `labels` are nearly ties. `leaks` of the `written` critiques and revisions contain parts of their prompt.
    The judge agrees with people on `agreed` of `compared` pairs; `agreement_low` is the lower bound of the 95 % interval. The
    accuracies of the newest reward model are over `held_out` labels.
    """

    labels: int
    both_orders: int
    flips: int
    uncertain: int
    written: int = 0
    leaks: int = 0
    compared: int = 0
    agreed: int = 0
    agreement_low: float | None = None
    reward_version: int | None = None
    held_out: int = 0
    reward_accuracy: float | None = None
    length_accuracy: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The result of the checks. `problems` has what is wrong and what to do; `facts` has the numbers that were checked."""

    num_labels: int
    problems: tuple[str, ...]
    facts: tuple[str, ...]

    @property
    def subject(self) -> str:
        return f"{'this' if self.num_labels == 1 else 'these'} {format_count(self.num_labels, 'labels')}"

    def __str__(self) -> str:
        """Return the verdict as one line."""
        if not self.num_labels:
            return "labels: there are none yet"
        if self.problems:
            return f"labels: do not train a policy on {self.subject}: {'; '.join(self.problems)}"
        if not self.facts:
            count = format_count(self.num_labels, "labels", "are")
            return f"labels: {count} too few to say whether they are good enough to train on"
        return f"labels: good enough to train on ({'; '.join(self.facts)})"


def read_label_quality(query: Callable[[str], QueryResult]) -> LabelQuality:
    """Return the numbers of all labels of a database that train. `query` runs a query on the database."""
    names = ", ".join(field.name for field in fields(LabelQuality))
    return LabelQuality(*query(f"SELECT {names} FROM label_quality").rows[0])


def judge_labels(quality: LabelQuality, limits: LabelQualitySettings) -> Verdict:
    """Compare the numbers with the limits."""
    checks = list(_check_labels(quality, limits))
    return Verdict(
        quality.labels,
        tuple(f"{fact}. {remedy}" for fact, passed, remedy in checks if not passed),
        tuple(fact for fact, passed, _ in checks if passed),
    )


def read_verdict(store: Store, limits: LabelQualitySettings) -> Verdict:
    """Return the verdict on all labels of the database that train."""
    return judge_labels(read_label_quality(store.query), limits)


def make_label_check(limits: LabelQualitySettings) -> Callable[[Store], str | None]:
    """Return a function that returns what is wrong with the labels of a database, or None."""
    return lambda store: "; ".join(read_verdict(store, limits).problems) or None


def _check_labels(quality: LabelQuality, limits: LabelQualitySettings) -> Iterator[tuple[str, bool, str]]:
    """Yield the fact, whether it is within its limit, and the remedy, for each check that has enough labels."""
    minimum = limits.min_labels
    if quality.both_orders >= minimum:
        share = quality.flips / quality.both_orders
        fact = f"{share:.0%} of {quality.both_orders} labels flip with the order of the responses, at most {limits.max_flip_rate:.0%}"
        yield fact, share <= limits.max_flip_rate, _LARGER_JUDGE
    if quality.labels >= minimum:
        share = quality.uncertain / quality.labels
        fact = f"{share:.0%} of {quality.labels} labels are within 0.45 to 0.55, at most {limits.max_uncertain_share:.0%}"
        yield fact, share <= limits.max_uncertain_share, f"{_LARGER_JUDGE}, or raise respond.temperature"
    if quality.written >= minimum:
        share = quality.leaks / quality.written
        fact = f"{share:.0%} of {quality.written} critiques and revisions contain parts of their prompt"
        fact += f", at most {limits.max_leak_rate:.0%}"
        yield fact, share <= limits.max_leak_rate, "Use a larger critic (models.critic) with a new data folder"
    if quality.compared >= minimum and quality.agreement_low is not None:
        fact = f"the judge agrees with people on {quality.agreed} of {quality.compared} pairs"
        fact += f" (lower bound {quality.agreement_low:.2f}, above {limits.min_agreement:g})"
        yield fact, quality.agreement_low > limits.min_agreement, f"{_LARGER_JUDGE}, or label more pairs (charter label)"
    if quality.held_out >= minimum and quality.reward_accuracy is not None and quality.length_accuracy is not None:
        fact = f"reward model {quality.reward_version} predicts {quality.reward_accuracy:.0%} of {quality.held_out} held-out labels,"
        fact += f" and always preferring the longer response {quality.length_accuracy:.0%}"
        yield fact, quality.reward_accuracy > quality.length_accuracy, "Collect more pairs and train the reward model again"
