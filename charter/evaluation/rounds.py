"""Measure what each round of revision changes: the same chains after 0, 1, 2, ... revisions.

A chain that has ended keeps its final response in later rounds, so each round has the same chains. A chain whose last revision
lost keeps the response before it. A chain counts if it has ended and its initial response is usable; chains of skipped sources and
chains that have not ended are counted apart.

The critic checks more principles in later rounds. So the probability of a violation is that under the first principle of the
chain, which the critic checks in every round. docs/evaluation.md describes what the numbers do not show.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from charter.evaluation.win_rates import PairJudge, ResponsePair, WinRate, compute_win_rates
from consumers.chain import compute_similarity
from consumers.graders.interface import GradedText
from consumers.graders.refusal import PARTLY, REFUSES, UNUSABLE, RefusalGrader
from engine.errors import UsageError
from engine.models.interface import require_results
from engine.statistics import compute_wilson_interval
from engine.store import QueryFunction
from schemas.records import ChatMessage, EndReason, RejectionReason

_CRITIQUES_SQL = """
SELECT DISTINCT ON (response_id, round) response_id::VARCHAR AS chain, round, messages, initial_response, response, previous_response,
       verdicts, end_reason, final, model.id AS model
FROM raw.critiques WHERE run_id = $run AND split <> 'SUITE' ORDER BY response_id, round, commit_seq"""
_REVISIONS_SQL = """
SELECT DISTINCT ON (response_id, round) response_id::VARCHAR AS chain, round, response, similarity, rejection_reason, final, model.id AS model
FROM raw.revisions WHERE run_id = $run AND split <> 'SUITE' ORDER BY response_id, round, commit_seq"""


@dataclass
class RevisedChain:
    """One chain: its response after each round, and the probability of a violation under its first principle.

    `similarities` has the similarity of each usable revision to the response before it, by round.
    """

    messages: tuple[ChatMessage, ...]
    texts: dict[int, str]
    violations: dict[int, float] = field(default_factory=dict)
    similarities: dict[int, float] = field(default_factory=dict)

    def get_text(self, num_rounds: int) -> str:
        """Return the response after at most `num_rounds` revisions."""
        return self.texts[max(round for round in self.texts if round <= num_rounds)]

    def get_violation(self, num_rounds: int) -> float | None:
        """Return the probability of a violation of `get_text`, or None if the critic gave no verdict on it."""
        return self.violations.get(max(round for round in self.texts if round <= num_rounds))


@dataclass(frozen=True)
class ChainSet:
    """The chains of a run. `critics` are the ids of the models that criticized or revised."""

    chains: list[RevisedChain]
    critics: frozenset[str]
    num_unfinished: int
    num_skipped: int
    num_unusable: int


@dataclass(frozen=True)
class RoundRow:
    """The chains after at most `rounds` revisions. `revised` is the number of chains with a usable revision in this round.

    `violation` is the mean probability of a violation over the `verdicts` chains that have one. `refused` has its 95 % interval.
    `similarity` compares with the response before the revision (mean of the revised chains), `similarity_to_first` with the initial
    response. `words` is the mean length. `wins` is the win rate against the initial response, over the chains whose response has
    changed.
    """

    rounds: int
    chains: int
    revised: int
    violation: float | None
    verdicts: int
    refused: float
    refused_low: float
    refused_high: float
    unusable: int
    similarity: float | None
    similarity_to_first: float
    words: float
    wins: list[WinRate] = field(default_factory=list)


def load_chains(query: QueryFunction, run: str) -> ChainSet:
    """Return the chains of a run. Raises UsageError if the run has no chain that counts."""
    steps: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for sql, kind in ((_CRITIQUES_SQL, "critique"), (_REVISIONS_SQL, "revision")):
        for row in query(sql, {"run": run}).to_dicts():
            steps[row["chain"]].append(row | {"kind": kind})
    critics = frozenset(row["model"] for rows in steps.values() for row in rows if row["model"])
    chains, num_unfinished, num_skipped, num_unusable = [], 0, 0, 0
    for rows in steps.values():
        first = next((row for row in rows if row["kind"] == "critique" and row["round"] == 0), None)
        if first is None or not any(row["final"] for row in rows):
            num_unfinished += 1
        elif first["end_reason"] == EndReason.SKIPPED:
            num_skipped += 1
        elif first["end_reason"] == EndReason.UNUSABLE:
            num_unusable += 1
        else:
            chains.append(_make_chain(first, rows))
    if not chains:
        raise UsageError(
            f"run {run} has no finished chain",
            f"it has {num_unfinished} unfinished chains, {num_skipped} of skipped sources, and {num_unusable} with an unusable response",
            "name another run: --run ID, or finish the run: charter run --until-done",
        )
    return ChainSet(chains, critics, num_unfinished, num_skipped, num_unusable)


def _make_chain(first: dict[str, Any], rows: Sequence[dict[str, Any]]) -> RevisedChain:
    chain = RevisedChain(tuple(ChatMessage(**message) for message in first["messages"]), {0: first["initial_response"]})
    lost = {row["round"] for row in rows if row["kind"] == "critique" and row["end_reason"] == EndReason.LOST}
    for row in rows:
        if row["kind"] == "revision" and row["rejection_reason"] == RejectionReason.NONE:
            chain.similarities[row["round"]] = row["similarity"]
            if row["round"] not in lost:
                chain.texts[row["round"]] = row["response"]
    verdicts = first["verdicts"] or []
    if verdicts:
        principle = verdicts[0]["principle_id"]
        for row in rows:
            for verdict in (row.get("verdicts") or []) if row["round"] in chain.texts else []:
                if verdict["principle_id"] == principle and verdict["p_flawed"] is not None:
                    chain.violations[row["round"]] = verdict["p_flawed"]
    return chain


def compute_round_rows(
    chains: Sequence[RevisedChain], judge: PairJudge | None = None, limit: int | None = None
) -> list[RoundRow]:
    """Return one row for each number of revisions, from 0 to the largest of the run.

    With a judge, compare the response of each round with the initial response of the chain. `limit` is the maximum number of pairs of
    each round.
    """
    rows = []
    for num_rounds in range(max(max(chain.similarities, default=0) for chain in chains) + 1):
        wins = compute_wins(chains, num_rounds, judge, limit) if judge and num_rounds else []
        rows.append(_compute_row(chains, num_rounds, wins))
    return rows


def _compute_row(chains: Sequence[RevisedChain], num_rounds: int, wins: list[WinRate]) -> RoundRow:
    texts = [chain.get_text(num_rounds) for chain in chains]
    graded = RefusalGrader().grade([GradedText(chain.messages, text) for chain, text in zip(chains, texts, strict=True)])
    labels = [grade.label for (grade,) in require_results(graded)]
    num_refused = sum(label in (REFUSES, PARTLY) for label in labels)
    low, high = compute_wilson_interval(num_refused, len(chains)) or (0.0, 1.0)
    violations = [p for chain in chains if (p := chain.get_violation(num_rounds)) is not None]
    similarities = [chain.similarities[num_rounds] for chain in chains if num_rounds in chain.similarities]
    return RoundRow(
        rounds=num_rounds,
        chains=len(chains),
        revised=len(similarities),
        violation=_compute_mean(violations),
        verdicts=len(violations),
        refused=num_refused / len(chains),
        refused_low=low,
        refused_high=high,
        unusable=labels.count(UNUSABLE),
        similarity=_compute_mean(similarities),
        similarity_to_first=math.fsum(compute_similarity(c.texts[0], t) for c, t in zip(chains, texts, strict=True))
        / len(chains),
        words=sum(len(text.split()) for text in texts) / len(chains),
        wins=wins,
    )


def _compute_mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def compute_wins(chains: Sequence[RevisedChain], num_rounds: int, judge: PairJudge, limit: int | None) -> list[WinRate]:
    """Return the win rates of the responses after `num_rounds` revisions against the initial responses that differ from them."""
    pairs: list[ResponsePair] = [
        (chain.messages, chain.texts[0], text) for chain in chains if (text := chain.get_text(num_rounds)) != chain.texts[0]
    ][:limit]
    return compute_win_rates(pairs, judge(pairs)) if pairs else []
