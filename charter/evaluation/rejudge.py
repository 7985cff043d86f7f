"""Run the judge outside the pipeline: on test cases of a constitution, and on stored pairs under two constitutions.

`charter constitution test` uses `run_cases`; `charter constitution diff --rejudge` uses `compare_labels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from charter.connect import open_store
from charter.models import RoleModels
from charter.pipeline import make_pair_judge
from charter.progress import show_progress
from constitutions.cases import CaseFile, ConstitutionCase
from constitutions.loader import ALL_PRINCIPLES_ID, Constitution, filter_by_tags
from engine.errors import CharterError
from engine.models.interface import Result, require_results
from engine.settings import Settings
from schemas import ids
from schemas.records import ChatMessage, Completion, FinishReason, Preference, Response


@contextmanager
def open_batch_judge(settings: Settings) -> Iterator[BatchJudge]:
    """Yield the judge of the settings, and show the number of judged pairs."""
    models = RoleModels(settings)
    try:
        with show_progress("judging", "pairs") as progress:

            def count_pairs(batch_size: int) -> None:
                progress.num_done += batch_size

            yield BatchJudge(settings, models, count_pairs)
    finally:
        models.close()


ALL_PRINCIPLES = ALL_PRINCIPLES_ID


@dataclass(frozen=True)
class BatchJudge:
    """Labels pairs under any constitution, with the judge of the settings. Calls `on_progress` with the size of each batch."""

    settings: Settings
    models: RoleModels
    on_progress: Callable[[int], None] = lambda count: None

    def label_pairs(self, constitution: Constitution, pairs: Sequence[Response]) -> list[Preference]:
        """Return the preference for each pair. A pair is a Response with two completions. Raise the error of a failed pair."""
        return require_results(self.judge_pairs(constitution, pairs))

    def judge_pairs(self, constitution: Constitution, pairs: Sequence[Response]) -> list[Result[Preference]]:
        """Return the preference for each pair, or the error of the pair."""
        judge = make_pair_judge(self.settings, self.models.get_model("judge"), constitution)
        batch_size = self.settings.models.max_batch_size
        preferences: list[Result[Preference]] = []
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            preferences += [result if isinstance(result, CharterError) else result[0] for result in judge(batch)]
            self.on_progress(len(batch))
        return preferences


def make_pair_response(
    messages: Sequence[ChatMessage], response_a: str, response_b: str, tags: Sequence[str], source: str
) -> Response:
    """Return a Response record whose two completions are the given responses. The record is the input of the judge stage."""
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
    """Return {principle id: constitution}. Each of these constitutions has only one judge principle.

    If the constitution asks all principles in one question (`judge_with` is "all"), return {ALL_PRINCIPLES: constitution}.
    """
    if constitution.judge_with == "all":
        return {ALL_PRINCIPLES: constitution}
    return {principle.id: constitution.with_single_judge_principle(principle.id) for principle in constitution.judge}


@dataclass
class PrincipleTally:
    """Counts the results of one principle on its cases.

    A hit is a label that prefers the response that must win. `win_probabilities` are the judge's probabilities of this response.
    `hits_shown_first` and `hits_shown_second` count the hits when this response is shown first and second.
    """

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
        """Return the values of TALLY_COLUMNS."""
        num_cases = self.hits + self.misses + self.unlabeled
        return (
            self.principle_id, num_cases, self.hits, self.misses, self.hits_shown_first, self.hits_shown_second, self.unlabeled,
            mean_or_none(self.win_probabilities),
        )  # fmt: skip


TALLY_COLUMNS = ["principle", "cases", "hits", "misses", "right_when_first", "right_when_second", "no_label", "mean_p"]


def run_cases(judge: BatchJudge, constitution: Constitution, cases: CaseFile) -> list[PrincipleTally]:
    """Judge the cases. Return the tally of each principle over the cases that test this principle.

    If the constitution asks all principles in one question, a case is judged once and counted for each principle that it tests.
    """
    principle_ids = [principle.id for principle in constitution.judge]
    cases.check_principles(constitution.name, principle_ids)
    principles_by_case = [_get_case_principles(case, constitution) for case in cases.cases]
    pairs = [
        make_pair_response([ChatMessage(role="user", content=case.prompt)], case.wins, case.loses, case.tags, "cases")
        for case in cases.cases
    ]
    shared_labels = judge.label_pairs(constitution, pairs) if constitution.judge_with == ALL_PRINCIPLES else None
    tallies = []
    for principle_id in principle_ids:
        indices = [i for i, ids_of_case in enumerate(principles_by_case) if principle_id in ids_of_case]
        if shared_labels:
            labels = [shared_labels[i] for i in indices]
        else:
            single = constitution.with_single_judge_principle(principle_id)
            labels = judge.label_pairs(single, [pairs[i] for i in indices])
        tally = PrincipleTally(principle_id)
        for label in labels:
            tally.add_label(label)
        tallies.append(tally)
    return tallies


def _get_case_principles(case: ConstitutionCase, constitution: Constitution) -> Sequence[str]:
    """Return the principles that a case names. If it names no principles, return all principles that match its tags."""
    return case.principles or [principle.id for principle in filter_by_tags(constitution.judge, case.tags)]


_FROZEN_PAIRS_SQL = """
SELECT messages, tags, source, response_a, response_b FROM (
    SELECT DISTINCT ON (response_id, response_a, response_b) messages, tags, source, response_a, response_b,
           md5(coalesce(response_id, record_id)::VARCHAR || md5(response_a) || md5(response_b)) AS sort_key
    FROM preferences WHERE find_pair_outcome(response_a, response_b, finish_reason_a, finish_reason_b) IS NULL
    ORDER BY response_id, response_a, response_b, commit_seq
) ORDER BY sort_key LIMIT ?"""


def load_frozen_pairs(settings: Settings, count: int) -> list[Response]:
    """Return `count` pairs of responses from the database.

    A hash of the ids selects the pairs, so each call returns the same pairs.
    """
    rows = open_store(settings).query_dicts(_FROZEN_PAIRS_SQL, [count], limit_s=30.0)
    return [
        make_pair_response(
            [ChatMessage(**message) for message in r["messages"]], r["response_a"], r["response_b"], r["tags"], r["source"]
        )
        for r in rows
    ]


# Maps the index of a pair to p(A), or to None if there is no label. Pairs that do not match the tags of the principle
# are omitted.
PairLabels = dict[int, float | None]
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
    """Compare the labels of each principle under two constitutions. Return a row with COMPARISON_COLUMNS for each principle.

    If only one constitution has a principle, the labels of the principle are compared with the mean labels over all principles
    of the other constitution. The last row compares the mean labels of the two constitutions. A judge prompt that both
    constitutions have is judged only once.
    """
    cache: dict[tuple[str, tuple[str, ...]], PairLabels] = {}

    def label_once(constitution: Constitution) -> PairLabels:
        asks_all = constitution.judge_with == ALL_PRINCIPLES
        prompt = constitution.combined_judge_prompt if asks_all else constitution.judge[0].judge_prompt
        tags = () if asks_all else constitution.judge[0].tags
        if (prompt, tags) not in cache:
            indices = [i for i, pair in enumerate(pairs) if not tags or set(tags) & set(pair.tags)]
            preferences = judge.label_pairs(constitution, [pairs[i] for i in indices])
            cache[prompt, tags] = {i: preference.p_a for i, preference in zip(indices, preferences, strict=True)}
        return cache[prompt, tags]

    labels = [{name: label_once(part) for name, part in _split_by_principle(c).items()} for c in (a, b)]
    means = [average_labels(c, labels_by_principle) for c, labels_by_principle in zip((a, b), labels, strict=True)]
    rows = []
    for name in dict.fromkeys([*labels[0], *labels[1]]):
        before, after = (labels_by_principle.get(name) for labels_by_principle in labels)
        if before is not None and after is not None:
            change = "same" if before is after else "changed"  # the cache returns the same object if the prompt is unchanged
            rows.append(_make_comparison_row(name, change, before, after, "its earlier prompt"))
        elif before is not None:
            rows.append(_make_comparison_row(name, "removed", before, means[1], f"the mean of {b.name} {b.version}"))
        elif after is not None:
            rows.append(_make_comparison_row(name, "added", means[0], after, f"the mean of {a.name} {a.version}"))
    rows.append(_make_comparison_row("(mean of all)", "", means[0], means[1], ""))
    return rows


def average_labels(constitution: Constitution, labels_by_principle: dict[str, PairLabels]) -> PairLabels:
    """Return the weighted mean label of each pair over its principles.

    The mean is the expected label if one principle is sampled.
    """
    weights = {principle.id: principle.weight for principle in constitution.judge} | {ALL_PRINCIPLES: 1.0}
    means: PairLabels = {}
    for pair in sorted({pair for labels in labels_by_principle.values() for pair in labels}):
        terms = [(weights[name], p) for name, labels in labels_by_principle.items() if (p := labels.get(pair)) is not None]
        means[pair] = math.fsum(w * p for w, p in terms) / math.fsum(w for w, _ in terms) if terms else None
    return means


def _make_comparison_row(name: str, change: str, before: PairLabels, after: PairLabels, against: str) -> tuple[Any, ...]:
    shared = [pair for pair in before if pair in after]
    labeled = [(p, q) for pair in shared if (p := before[pair]) is not None and (q := after[pair]) is not None]
    return (
        name, change, len(labeled), len(shared) - len(labeled), mean_or_none([p for p, _ in labeled]), mean_or_none([q for _, q in labeled]),
        mean_or_none([abs(p - q) for p, q in labeled]), sum(is_flip(p, q) for p, q in labeled), against,
    )  # fmt: skip


def is_flip(p: float, q: float) -> bool:
    """Return whether two labels prefer different responses. If a label is a tie, return False."""
    return (p - 0.5) * (q - 0.5) < 0


def mean_or_none(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
