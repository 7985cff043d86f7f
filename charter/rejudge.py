"""Asking the judge outside the stream: known failure modes, and a slice of old pairs under two constitutions.

The judge is the stage itself (`consumers.judge`, from the settings), given a constitution with the principle that is asked.
Nothing is written: what comes back is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from charter.pipeline import Models, make_judge, store_of
from constitutions.cases import Case, Cases
from constitutions.loader import ALL_ID, Constitution, applicable
from engine.settings import Settings
from schemas import ids
from schemas.records import ChatMessage, Completion, FinishReason, Preference, Response

ALL = ALL_ID


@dataclass(frozen=True)
class Bench:
    """A judge to ask: the settings' one, for any constitution, a batch at a time."""

    settings: Settings
    models: Models
    asked: Callable[[int], None] = lambda count: None

    def labels(self, constitution: Constitution, pairs: Sequence[Response]) -> list[Preference]:
        """What the judge says of each pair."""
        judge, rows = make_judge(self.settings, self.models, constitution), self.settings.models.max_rows
        made: list[Preference] = []
        for start in range(0, len(pairs), rows):
            batch = pairs[start : start + rows]
            made += [preference for (preference,) in judge(batch)]
            self.asked(len(batch))
        return made


def pair_of(messages: Sequence[ChatMessage], a: str, b: str, tags: Sequence[str], source: str) -> Response:
    """Two texts as the completions of an answer, which is what the judge compares."""
    prompt_id = ids.prompt_id(messages)
    return Response(
        record_id=ids.record_id("pair", [prompt_id], ids.fingerprint(a=a, b=b)),
        prompt_id=prompt_id,
        run_id="bench",
        stage="respond",
        messages=list(messages),
        source=source,
        tags=list(tags),
        completions=[
            Completion(index=index, text=text, finish_reason=FinishReason.STOP) for index, text in enumerate((a, b))
        ],
    )  # fmt: skip


def questions(constitution: Constitution) -> dict[str, Constitution]:
    """For each principle a constitution that asks it alone; one for all where all are asked in one question."""
    if constitution.judge_with == "all":
        return {ALL: constitution}
    return {principle.id: constitution.judging_by(principle.id) for principle in constitution.judging}


# Known failure modes


@dataclass
class Tally:
    """How one principle fared on its cases; `p` are the probabilities of the answer that must win."""

    principle: str
    hits: int = 0
    misses: int = 0
    shown_first: int = 0
    shown_second: int = 0
    no_label: int = 0
    p: list[float] = field(default_factory=list)

    def add(self, label: Preference) -> None:
        self.shown_first += label.p_forward is not None and label.p_forward > 0.5
        self.shown_second += label.p_backward is not None and label.p_backward > 0.5
        if label.p_a is None:
            self.no_label += 1
            return
        self.p.append(label.p_a)
        self.hits += label.p_a > 0.5
        self.misses += label.p_a <= 0.5

    def row(self) -> tuple[Any, ...]:
        cases = self.hits + self.misses + self.no_label
        return (
            self.principle, cases, self.hits, self.misses, self.shown_first, self.shown_second, self.no_label, mean(self.p),
        )  # fmt: skip


TALLIED = ["principle", "cases", "hits", "misses", "right_when_first", "right_when_second", "no_label", "mean_p"]


def try_cases(bench: Bench, constitution: Constitution, cases: Cases) -> list[Tally]:
    """Each principle's hits and misses on the cases that are about it.

    Where all principles are asked in one question a case is asked once, and counted for each principle that it is about.
    """
    named = [principle.id for principle in constitution.judging]
    cases.check(constitution.name, named)
    about = [concerned(case, constitution) for case in cases.cases]
    pairs = [
        pair_of([ChatMessage(role="user", content=case.prompt)], case.wins, case.loses, case.tags, "cases")
        for case in cases.cases
    ]
    whole = bench.labels(constitution, pairs) if constitution.judge_with == ALL else None
    tallies = []
    for name in named:
        concern = [i for i, names in enumerate(about) if name in names]
        tally = Tally(name)
        found = (
            [whole[i] for i in concern] if whole else bench.labels(constitution.judging_by(name), [pairs[i] for i in concern])
        )
        for label in found:
            tally.add(label)
        tallies.append(tally)
    return tallies


def concerned(case: Case, constitution: Constitution) -> Sequence[str]:
    """The principles that a case is about: those it names, else all that fit its tags."""
    return case.principles or [principle.id for principle in applicable(constitution.judging, case.tags)]


# A frozen slice under two constitutions

SLICE = """
SELECT messages, tags, source, response_a, response_b FROM (
    SELECT DISTINCT ON (response_id, response_a, response_b) messages, tags, source, response_a, response_b,
           md5(coalesce(response_id, record_id)::VARCHAR || md5(response_a) || md5(response_b)) AS place
    FROM preferences WHERE length(trim(response_a)) > 0 AND length(trim(response_b)) > 0 AND response_a <> response_b
    ORDER BY response_id, response_a, response_b, commit_seq
) ORDER BY place LIMIT ?"""


def frozen_slice(settings: Settings, count: int) -> list[Response]:
    """The same `count` pairs of answers from the same database each time, chosen by a hash of their ids."""
    rows = store_of(settings).records(SLICE, [count], limit_s=30.0)
    return [
        pair_of([ChatMessage(**message) for message in r["messages"]], r["response_a"], r["response_b"], r["tags"], r["source"])
        for r in rows
    ]


Labels = dict[int, float | None]  # pair -> p(a); None where there is no label; pairs that the principle is not for are absent
FLIPPED = ["principle", "change", "pairs", "no_label", "mean_p_first", "mean_p_second", "mean_change", "flips", "against"]


def compare_labels(bench: Bench, a: Constitution, b: Constitution, pairs: Sequence[Response]) -> list[tuple[Any, ...]]:
    """For each principle how the labels of the pairs differ (columns FLIPPED).

    A principle that only one version has is set against the mean label of all principles of the other; the last row sets
    both means, which are what a pair is labelled on average, against each other. What both ask in the same words is asked once.
    """
    known: dict[tuple[str, tuple[str, ...]], Labels] = {}

    def ask(constitution: Constitution) -> Labels:
        whole = constitution.judge_with == ALL
        words = constitution.whole_question if whole else constitution.judging[0].question
        tags = () if whole else constitution.judging[0].tags
        if (words, tags) not in known:
            fitting = [i for i, pair in enumerate(pairs) if not tags or set(tags) & set(pair.tags)]
            found = bench.labels(constitution, [pairs[i] for i in fitting])
            known[words, tags] = {i: label.p_a for i, label in zip(fitting, found, strict=True)}
        return known[words, tags]

    sides = [{name: ask(alone) for name, alone in questions(side).items()} for side in (a, b)]
    means = [mean_label(side, found) for side, found in zip((a, b), sides, strict=True)]
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        before, after = (side.get(name) for side in sides)
        if before is not None and after is not None:
            same = before is after
            rows.append(flip_row(name, "same" if same else "changed", before, after, "its words before"))
        elif before is not None:
            rows.append(flip_row(name, "removed", before, means[1], f"the mean of {b.name} {b.version}"))
        elif after is not None:
            rows.append(flip_row(name, "added", means[0], after, f"the mean of {a.name} {a.version}"))
    rows.append(flip_row("(mean of all)", "", means[0], means[1], ""))
    return rows


def mean_label(constitution: Constitution, found: dict[str, Labels]) -> Labels:
    """Each pair's label averaged over the principles that have one, by their weights: what a draw gives on average."""
    weights = {principle.id: principle.weight for principle in constitution.judging} | {ALL: 1.0}
    means: Labels = {}
    for pair in sorted({pair for labels in found.values() for pair in labels}):
        given = [(weights[name], p) for name, labels in found.items() if (p := labels.get(pair)) is not None]
        means[pair] = math.fsum(w * p for w, p in given) / math.fsum(w for w, _ in given) if given else None
    return means


def flip_row(name: str, change: str, before: Labels, after: Labels, against: str) -> tuple[Any, ...]:
    shared = [pair for pair in before if pair in after]
    both = [(p, q) for pair in shared if (p := before[pair]) is not None and (q := after[pair]) is not None]
    return (
        name, change, len(both), len(shared) - len(both), mean([p for p, _ in both]), mean([q for _, q in both]),
        mean([abs(p - q) for p, q in both]), sum(flips(p, q) for p, q in both), against,
    )  # fmt: skip


def flips(p: float, q: float) -> bool:
    """Whether two labels name different answers the better one."""
    return (p - 0.5) * (q - 0.5) < 0


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
