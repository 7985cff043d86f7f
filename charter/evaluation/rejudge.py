"""`charter constitution`: the principles as code. List, show, lint and compare them, test them with the judge, study them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click

from charter.connect import open_store
from charter.models import RoleModels
from charter.pipeline import make_judge_stage
from constitutions.cases import CaseFile, ConstitutionCase
from constitutions.loader import ALL_PRINCIPLES_ID, Constitution, filter_by_tags
from engine.settings import Settings
from schemas import ids
from schemas.records import ChatMessage, Completion, FinishReason, Preference, Response


@contextmanager
def open_batch_judge(settings: Settings) -> Iterator[BatchJudge]:
    """The settings' judge, and a line on a terminal's error stream that counts what it was asked."""

    models, asked = RoleModels(settings), 0

    def count(more: int) -> None:
        nonlocal asked
        asked += more
        if sys.stderr.isatty():
            click.echo(f"\rpairs judged: {asked}", err=True, nl=False)

    try:
        yield BatchJudge(settings, models, count)
    finally:
        models.close()
        if asked and sys.stderr.isatty():
            click.echo(err=True)


ALL_PRINCIPLES = ALL_PRINCIPLES_ID


@dataclass(frozen=True)
class BatchJudge:
    """A judge to ask: the settings' one, for any constitution, a batch at a time."""

    settings: Settings
    models: RoleModels
    on_progress: Callable[[int], None] = lambda count: None

    def label_pairs(self, constitution: Constitution, pairs: Sequence[Response]) -> list[Preference]:
        """What the judge says of each pair."""
        judge, rows = make_judge_stage(self.settings, self.models, constitution), self.settings.models.max_batch_size
        made: list[Preference] = []
        for start in range(0, len(pairs), rows):
            batch = pairs[start : start + rows]
            made += [preference for (preference,) in judge(batch)]
            self.on_progress(len(batch))
        return made


def make_pair_response(
    messages: Sequence[ChatMessage], response_a: str, response_b: str, tags: Sequence[str], source: str
) -> Response:
    """Two texts as the completions of an answer, which is what the judge compares."""
    prompt_id = ids.compute_prompt_id(messages)
    return Response(
        record_id=ids.compute_record_id("pair", [prompt_id], ids.compute_fingerprint("imported_pair", response_a=response_a, response_b=response_b)),
        prompt_id=prompt_id,
        run_id="bench",
        stage="respond",
        messages=list(messages),
        source=source,
        tags=list(tags),
        completions=[
            Completion(index=index, text=text, finish_reason=FinishReason.STOP) for index, text in enumerate((response_a, response_b))
        ],
    )  # fmt: skip


def _split_by_principle(constitution: Constitution) -> dict[str, Constitution]:
    """For each principle a constitution that asks it alone; one for all where all are asked in one question."""
    if constitution.judge_with == "all":
        return {ALL_PRINCIPLES: constitution}
    return {principle.id: constitution.with_single_judge_principle(principle.id) for principle in constitution.judge}


# Known failure modes


@dataclass
class PrincipleTally:
    """How one principle fared on its cases; `p` are the probabilities of the answer that must win."""

    principle_id: str
    hits: int = 0
    misses: int = 0
    hits_shown_first: int = 0
    hits_shown_second: int = 0
    unlabeled: int = 0
    win_probabilities: list[float] = field(default_factory=list)

    def add_label(self, label: Preference) -> None:
        self.hits_shown_first += label.p_forward is not None and label.p_forward > 0.5
        self.hits_shown_second += label.p_backward is not None and label.p_backward > 0.5
        if label.p_a is None:
            self.unlabeled += 1
            return
        self.win_probabilities.append(label.p_a)
        self.hits += label.p_a > 0.5
        self.misses += label.p_a <= 0.5

    def to_row(self) -> tuple[Any, ...]:
        cases = self.hits + self.misses + self.unlabeled
        return (
            self.principle_id, cases, self.hits, self.misses, self.hits_shown_first, self.hits_shown_second, self.unlabeled,
            mean_or_none(self.win_probabilities),
        )  # fmt: skip


TALLY_COLUMNS = ["principle", "cases", "hits", "misses", "right_when_first", "right_when_second", "no_label", "mean_p"]


def run_cases(judge: BatchJudge, constitution: Constitution, cases: CaseFile) -> list[PrincipleTally]:
    """Each principle's hits and misses on the cases that are about it.

    Where all principles are asked in one question a case is asked once, and counted for each principle that it is about.
    """
    named = [principle.id for principle in constitution.judge]
    cases.check_principles(constitution.name, named)
    about = [_get_case_principles(case, constitution) for case in cases.cases]
    pairs = [
        make_pair_response([ChatMessage(role="user", content=case.prompt)], case.wins, case.loses, case.tags, "cases")
        for case in cases.cases
    ]
    whole = judge.label_pairs(constitution, pairs) if constitution.judge_with == ALL_PRINCIPLES else None
    tallies = []
    for name in named:
        concern = [i for i, names in enumerate(about) if name in names]
        tally = PrincipleTally(name)
        found = (
            [whole[i] for i in concern]
            if whole
            else judge.label_pairs(constitution.with_single_judge_principle(name), [pairs[i] for i in concern])
        )
        for label in found:
            tally.add_label(label)
        tallies.append(tally)
    return tallies


def _get_case_principles(case: ConstitutionCase, constitution: Constitution) -> Sequence[str]:
    """The principles that a case is about: those it names, else all that fit its tags."""
    return case.principles or [principle.id for principle in filter_by_tags(constitution.judge, case.tags)]


# A frozen slice under two constitutions

_FROZEN_PAIRS_SQL = """
SELECT messages, tags, source, response_a, response_b FROM (
    SELECT DISTINCT ON (response_id, response_a, response_b) messages, tags, source, response_a, response_b,
           md5(coalesce(response_id, record_id)::VARCHAR || md5(response_a) || md5(response_b)) AS place
    FROM preferences WHERE length(trim(response_a)) > 0 AND length(trim(response_b)) > 0 AND response_a <> response_b
    ORDER BY response_id, response_a, response_b, commit_seq
) ORDER BY place LIMIT ?"""


def load_frozen_pairs(settings: Settings, count: int) -> list[Response]:
    """The same `count` pairs of answers from the same database each time, chosen by a hash of their ids."""
    rows = open_store(settings).query_dicts(_FROZEN_PAIRS_SQL, [count], limit_s=30.0)
    return [
        make_pair_response(
            [ChatMessage(**message) for message in r["messages"]], r["response_a"], r["response_b"], r["tags"], r["source"]
        )
        for r in rows
    ]


PairLabels = dict[
    int, float | None
]  # pair -> p(a); None where there is no label; pairs that the principle is not for are absent
COMPARISON_COLUMNS = [
    "principle",
    "change",
    "pairs",
    "no_label",
    "mean_p_first",
    "mean_p_second",
    "mean_change",
    "flips",
    "against",
]


def compare_labels(judge: BatchJudge, a: Constitution, b: Constitution, pairs: Sequence[Response]) -> list[tuple[Any, ...]]:
    """For each principle how the labels of the pairs differ (columns FLIPPED).

    A principle that only one version has is set against the mean label of all principles of the other; the last row sets
    both means, which are what a pair is labelled on average, against each other. What both ask in the same words is asked once.
    """
    known: dict[tuple[str, tuple[str, ...]], PairLabels] = {}

    def ask(constitution: Constitution) -> PairLabels:
        whole = constitution.judge_with == ALL_PRINCIPLES
        words = constitution.combined_judge_prompt if whole else constitution.judge[0].judge_prompt
        tags = () if whole else constitution.judge[0].tags
        if (words, tags) not in known:
            fitting = [i for i, pair in enumerate(pairs) if not tags or set(tags) & set(pair.tags)]
            found = judge.label_pairs(constitution, [pairs[i] for i in fitting])
            known[words, tags] = {i: label.p_a for i, label in zip(fitting, found, strict=True)}
        return known[words, tags]

    sides = [{name: ask(alone) for name, alone in _split_by_principle(side).items()} for side in (a, b)]
    means = [average_labels(side, found) for side, found in zip((a, b), sides, strict=True)]
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        before, after = (side.get(name) for side in sides)
        if before is not None and after is not None:
            same = before is after
            rows.append(_make_comparison_row(name, "same" if same else "changed", before, after, "its words before"))
        elif before is not None:
            rows.append(_make_comparison_row(name, "removed", before, means[1], f"the mean of {b.name} {b.version}"))
        elif after is not None:
            rows.append(_make_comparison_row(name, "added", means[0], after, f"the mean of {a.name} {a.version}"))
    rows.append(_make_comparison_row("(mean of all)", "", means[0], means[1], ""))
    return rows


def average_labels(constitution: Constitution, labels_by_principle: dict[str, PairLabels]) -> PairLabels:
    """Each pair's label averaged over the principles that have one, by their weights: what a draw gives on average."""
    weights = {principle.id: principle.weight for principle in constitution.judge} | {ALL_PRINCIPLES: 1.0}
    means: PairLabels = {}
    for pair in sorted({pair for labels in labels_by_principle.values() for pair in labels}):
        given = [(weights[name], p) for name, labels in labels_by_principle.items() if (p := labels.get(pair)) is not None]
        means[pair] = math.fsum(w * p for w, p in given) / math.fsum(w for w, _ in given) if given else None
    return means


def _make_comparison_row(name: str, change: str, before: PairLabels, after: PairLabels, against: str) -> tuple[Any, ...]:
    shared = [pair for pair in before if pair in after]
    both = [(p, q) for pair in shared if (p := before[pair]) is not None and (q := after[pair]) is not None]
    return (
        name, change, len(both), len(shared) - len(both), mean_or_none([p for p, _ in both]), mean_or_none([q for _, q in both]),
        mean_or_none([abs(p - q) for p, q in both]), sum(is_flip(p, q) for p, q in both), against,
    )  # fmt: skip


def is_flip(p: float, q: float) -> bool:
    """Whether two labels name different answers the better one."""
    return (p - 0.5) * (q - 0.5) < 0


def mean_or_none(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
