"""Read the grades and labels that reward completions, and compute the rewards (`train.rewards`).

A completion has a reward only if every term can be read. A grade whose outcome is not OK, and a pair without a label, have no
value, so nothing is guessed. The reward model is not read here: its score is computed when the batch is trained.

A manifest lists the ids of the grades and labels of its batch, and its hash covers their values. A batch is therefore resumed
with the same rewards, also if other grades have arrived since then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from engine.pairing import COMPLETIONS_PAIRING, list_pairs
from engine.settings import JUDGE, RewardTerm
from engine.store import Store
from trainer.consumed import QUERY_TIMEOUT_S

_OK = "OK"
# The newest grade of each completion, grader and principle counts. With $3, only the records that a manifest lists count.
_GRADES_SQL = """
    SELECT record_id, response_id, completion_index, grader AS source, principle_id, label, score, outcome
    FROM grades WHERE subject = 'completion' AND grader IN (SELECT unnest($1::VARCHAR[]))
      AND response_id IN (SELECT unnest($2::UUID[])) AND ($3::UUID[] IS NULL OR record_id IN (SELECT unnest($3::UUID[])))
    QUALIFY row_number() OVER (PARTITION BY response_id, completion_index, grader, principle_id ORDER BY commit_seq DESC) = 1"""
# The newest label of each pair counts. A label by a person replaces the label of the judge.
_PAIRS_SQL = f"""
    SELECT p.record_id, p.response_id, p.completion_index_a, p.completion_index_b, p.p_a, p.outcome
    FROM preferences p LEFT JOIN overridden_labels o ON o.record_id = p.record_id
    WHERE p.pairing = '{COMPLETIONS_PAIRING}' AND p.completion_index_a IS NOT NULL AND p.completion_index_b IS NOT NULL
      AND p.response_id IN (SELECT unnest($1::UUID[]))
      AND (($2::UUID[] IS NULL AND o.record_id IS NULL) OR p.record_id IN (SELECT unnest($2::UUID[])))
    QUALIFY row_number() OVER (
        PARTITION BY p.response_id, p.completion_index_a, p.completion_index_b ORDER BY p.commit_seq DESC) = 1"""


@dataclass(frozen=True)
class Evidence:
    """The grades and labels of one completion that its reward is computed from. The entries are sorted by their ids.

    An entry of `grades` has the keys record_id, source, principle_id, label, score and outcome. An entry of `pairs` has record_id,
    outcome and `p_win`, the probability that this completion is the better one.
    """

    grades: Sequence[Mapping[str, Any]] = ()
    pairs: Sequence[Mapping[str, Any]] = ()

    def to_columns(self) -> dict[str, Any]:
        """Return the columns of a row of a batch. The hash of the manifest covers them."""
        return {"reward_grades": [dict(grade) for grade in self.grades], "reward_pairs": [dict(pair) for pair in self.pairs]}

    @property
    def record_ids(self) -> list[str]:
        return [str(entry["record_id"]) for entry in (*self.grades, *self.pairs)]


def read_evidence(
    store: Store, terms: Sequence[RewardTerm], response_ids: Sequence[str], record_ids: Sequence[str] | None = None
) -> dict[tuple[str, int], Evidence]:
    """Return the evidence of each completion, by response id and completion index.

    If `record_ids` is given, only these grades and labels are read.
    """
    graders = sorted({term.source for term in terms if term.is_grader})
    named = None if record_ids is None else list(record_ids)
    grades: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    pairs: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    if graders:
        for row in store.query_dicts(_GRADES_SQL, [graders, list(response_ids), named], limit_s=QUERY_TIMEOUT_S):
            key = str(row.pop("response_id")), row.pop("completion_index")
            grades[key].append(row | {"record_id": str(row["record_id"])})
    if any(term.source == JUDGE for term in terms):
        for row in store.query_dicts(_PAIRS_SQL, [list(response_ids), named], limit_s=QUERY_TIMEOUT_S):
            for side, index in (("a", row["completion_index_a"]), ("b", row["completion_index_b"])):
                p_win = row["p_a"] if side == "a" or row["p_a"] is None else 1 - row["p_a"]
                entry = {"record_id": str(row["record_id"]), "outcome": row["outcome"], "p_win": p_win}
                pairs[str(row["response_id"]), index].append(entry)
    return {
        key: Evidence(*(sorted(entries[key], key=lambda entry: entry["record_id"]) for entries in (grades, pairs)))
        for key in {*grades, *pairs}
    }


def find_missing_source(evidence: Sequence[Evidence], terms: Sequence[RewardTerm], pairing: str) -> str | None:
    """Return a source whose grades or labels of a response have not all arrived. Return None if all have arrived.

    `evidence` has one entry per completion of the response. A grader may give several grades, one per principle. All completions
    have the same number of grades, and the grades of one completion arrive in order, so equal numbers mean that all have arrived.
    """
    for term in terms:
        if term.is_grader:
            counts = {sum(grade["source"] == term.source for grade in one.grades) for one in evidence}
            if len(counts) > 1 or counts == {0}:
                return term.source
    if any(term.source == JUDGE for term in terms):
        num_pairs = len({pair["record_id"] for one in evidence for pair in one.pairs})
        if num_pairs < len(list_pairs(pairing, len(evidence))):
            return JUDGE
    return None


def compute_reward(evidence: Evidence, terms: Iterable[RewardTerm]) -> float | None:
    """Return the sum of the terms, without the reward model. Return None if a term cannot be read."""
    values = {term.name: compute_term_value(evidence, term) for term in terms}
    if any(value is None for value in values.values()):
        return None
    return sum(term.weight * (values[term.name] or 0.0) for term in terms)


def compute_term_value(evidence: Evidence, term: RewardTerm) -> float | None:
    """Return the value of a grader or of the judge for one completion. Return None if it cannot be read."""
    if term.source == JUDGE:
        wins = [pair["p_win"] for pair in evidence.pairs if pair["outcome"] == _OK and pair["p_win"] is not None]
        return fmean(wins) if wins else None
    grades = [grade for grade in evidence.grades if grade["source"] == term.source]
    if not grades or any(grade["outcome"] != _OK for grade in grades):
        return None
    if term.label:
        return fmean(float(grade["label"] == term.label) for grade in grades)
    scores = [grade["score"] for grade in grades]
    return None if None in scores else fmean(scores)
