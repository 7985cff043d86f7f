"""Measure the effect of each principle of a constitution by excluding it (`charter constitution ablate`).

For each principle, one replay (`charter replay --exclude-principle`) runs the stages that use the principle. The constitution of
this replay excludes the principle. One more replay with the full constitution is the control.

A seed depends only on the response, and the sampling of a principle depends on its id. Therefore an excluded principle should
change only the chains and labels that the principle was sampled for. Changes in other chains and labels are noise: a different
batch composition changes the rounding, and the different rounding can change a sampled token. The column `changed_elsewhere`
counts these changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from charter.evaluation.rejudge import ALL_PRINCIPLES, is_flip, mean_or_none
from charter.replay import ReplayPlan, ReplayRequest, make_replay_plan, run_replay
from constitutions.loader import load_constitution
from consumers.chain import compute_similarity
from engine.bus.port import Bus
from engine.errors import UsageError
from engine.settings import Settings
from engine.store import Store
from engine.text import format_count

ABLATION_COLUMNS = (
    *("excluded_principle", "used_by", "sampled", "chains", "revised", "changed", "similarity"),
    *("pairs", "no_label", "flips", "mean_p_change", "changed_elsewhere", "run"),
)
_STAGE_BY_PRINCIPLE_LIST = {
    "critique": "critique",
    "judge": "judge",
}  # maps a list of principles to the first stage that uses it


@dataclass(frozen=True)
class AblationRun:
    """Describes one replay. `excluded_principle` is empty for the control. `stage` is the first stage that uses the principle."""

    excluded_principle: str
    stage: str
    plan: ReplayPlan

    @property
    def run_id(self) -> str:
        return self.plan.settings.run.id


def plan_ablations(
    settings: Settings,
    bus: Bus,
    principles: Sequence[str],
    *,
    start: str,
    end: str,
    archive: bool,
    stages: Sequence[str] = tuple(_STAGE_BY_PRINCIPLE_LIST.values()),
    revises_suites: bool = False,
) -> Iterator[AblationRun]:
    """Yield the control of each stage, then one replay for each principle. If `principles` is given, ablate only these.

    If `revises_suites` is true, the replays also revise responses to prompts of evaluation suites.

    Raises ConstitutionError for an unknown principle.
    """
    constitution = load_constitution(settings.run.constitution)
    for principle in principles:
        constitution.without_principles([principle])  # raises for an unknown name before any replay starts
    for list_name, stage in _STAGE_BY_PRINCIPLE_LIST.items():
        principle_ids = [p.id for p in getattr(constitution, list_name) if not principles or p.id in principles]
        for principle_id in ["", *principle_ids] if principle_ids and stage in stages else []:
            excluded = (principle_id,) if principle_id else ()
            request = ReplayRequest(
                stage, start, end, archive=archive, excluded_principles=excluded, revises_suites=revises_suites
            )
            yield AblationRun(principle_id, stage, make_replay_plan(settings, bus, request))


def run_ablations(ablations: Sequence[AblationRun], bus: Bus) -> None:
    """Run the replays one after the other. Finished replays return immediately. Raises UsageError if the user stops a replay."""
    for number, ablation in enumerate(ablations):
        if not run_replay(ablation.plan, bus, quiet=True).is_finished:
            progress = f"{number} of {format_count(len(ablations), 'runs', 'are')} finished"
            raise UsageError("the ablation was stopped", progress, "run the same command to continue")


# Selects the last record of each chain in a run, and the principles of the critiques of the chain.
_CHAIN_ENDS_SQL = """
WITH sampled AS (SELECT response_id, list(DISTINCT principle_id) AS principles FROM raw.critiques WHERE run_id = $1 GROUP BY 1)
SELECT DISTINCT ON (response_id) response_id::VARCHAR AS response, record_id::VARCHAR AS record, initial_response, final_response,
       coalesce(principles, []) AS principles
FROM (SELECT response_id, record_id, initial_response, final_response, commit_seq FROM raw.critiques WHERE run_id = $1 AND final
      UNION ALL
      SELECT response_id, record_id, initial_response, final_response, commit_seq FROM raw.revisions WHERE run_id = $1 AND final)
LEFT JOIN sampled USING (response_id) ORDER BY response_id, commit_seq"""
_LABELS_SQL = """
SELECT DISTINCT ON (response_id, completion_index_a, completion_index_b) response_id::VARCHAR AS response, completion_index_a, completion_index_b,
       record_id::VARCHAR AS record,
       list_append(list_transform(votes, lambda vote: vote.principle_id), principle_id) AS principles,
       CASE WHEN outcome = 'OK' THEN p_a END AS p
FROM raw.preferences WHERE run_id = $1 AND label_source = 'AI'
ORDER BY response_id, completion_index_a, completion_index_b, commit_seq"""

RowsByKey = dict[Any, dict[str, Any]]


def _load_chains(store: Store, run: str) -> RowsByKey:
    return {row["response"]: row for row in store.query_dicts(_CHAIN_ENDS_SQL, [run], limit_s=30.0)}


def _load_labels(store: Store, run: str) -> RowsByKey:
    rows = store.query_dicts(_LABELS_SQL, [run], limit_s=30.0)
    return {(row["response"], row["completion_index_a"], row["completion_index_b"]): row for row in rows}


def compute_ablation_rows(ablations: Sequence[AblationRun], store: Store) -> list[tuple[Any, ...]]:
    """Compare each ablation with the control of its stage. Return a row with ABLATION_COLUMNS for each ablation.

    Compare each control with the source run, on the records that both runs have. The differences between these two runs
    are noise.
    """
    rows = []
    controls = {ablation.stage: ablation.run_id for ablation in ablations if not ablation.excluded_principle}
    for ablation in ablations:
        principle, stage = ablation.excluded_principle, ablation.stage
        baseline_run = controls[stage] if principle else ablation.plan.selection.run_id
        chains = _load_chains(store, baseline_run), _load_chains(store, ablation.run_id)
        labels = _load_labels(store, baseline_run), _load_labels(store, ablation.run_id)
        if not principle:
            chains, labels = _select_shared_records(*chains), _select_shared_records(*labels)
        results, result_key = (chains, "final_response") if stage == "critique" else (labels, "p")
        sampled, elsewhere = _count_sampled_and_elsewhere(principle, *results, result_key)
        stats = (*_compute_chain_stats(*chains), *_compute_label_stats(*labels))
        rows.append((principle or "(nothing)", stage, sampled, *stats, elsewhere, ablation.run_id))
    return rows


def _count_sampled_and_elsewhere(
    principle: str, before: RowsByKey, after: RowsByKey, result_key: str
) -> tuple[int | None, int]:
    """Return the number of rows that the principle was sampled for, and the number of other rows whose result changed.

    The first number is None for the control. `result_key` is the column that holds the result.
    """
    sampled = {key for key, row in before.items() if {principle, ALL_PRINCIPLES} & set(row["principles"])}
    changed = {key for key, row in after.items() if key in before and before[key][result_key] != row[result_key]}
    return len(sampled) if principle else None, len(changed - sampled)


def _select_shared_records(before: RowsByKey, after: RowsByKey) -> tuple[RowsByKey, RowsByKey]:
    """Return the rows of `before` that have the same record id in `after`, and all rows of `after`."""
    shared = {key: row for key, row in before.items() if key in after and after[key]["record"] == row["record"]}
    return shared, after


def _compute_chain_stats(before: RowsByKey, after: RowsByKey) -> tuple[Any, ...]:
    """Return statistics of the chains.

    The first two values are the number of chains and the fraction of revised chains. The last two values compare the final
    responses of the two runs: the number of changed final responses, and the mean similarity. The last two values use only the
    chains that both runs have. These two values are None if there are no such chains.
    """
    pairs = [(before[key]["final_response"] or "", row["final_response"] or "") for key, row in after.items() if key in before]
    revised = [float(row["final_response"] != row["initial_response"]) for row in after.values()]
    num_changed = sum(old != new for old, new in pairs) if pairs else None
    similarity = mean_or_none([compute_similarity(old, new) for old, new in pairs])
    return len(after), mean_or_none(revised), num_changed, similarity


def _compute_label_stats(before: RowsByKey, after: RowsByKey) -> tuple[Any, ...]:
    """Return statistics of the pairs that both runs have.

    The values are the number of pairs, the number of pairs without a label in at least one run, the number of flips, and the
    mean change of p(A).
    """
    shared = [(before[key]["p"], row["p"]) for key, row in after.items() if key in before]
    labeled = [(p, q) for p, q in shared if p is not None and q is not None]
    change = mean_or_none([abs(p - q) for p, q in labeled])
    return len(shared), len(shared) - len(labeled), sum(is_flip(p, q) for p, q in labeled) if labeled else None, change


def split_by_stage(rows: Sequence[tuple[Any, ...]]) -> Iterator[tuple[list[str], list[tuple[Any, ...]]]]:
    """Yield (columns, rows) for each stage. If a stage has no chains or no pairs, omit the columns that describe them."""
    for stage in _STAGE_BY_PRINCIPLE_LIST.values():
        stage_rows = [row for row in rows if row[ABLATION_COLUMNS.index("used_by")] == stage]
        kept = [
            i
            for i, column in enumerate(ABLATION_COLUMNS)
            if any(row[i] for row in stage_rows) or not _is_empty_column(column, stage_rows)
        ]
        if stage_rows:
            yield [ABLATION_COLUMNS[i] for i in kept], [tuple(row[i] for i in kept) for row in stage_rows]


def _is_empty_column(column: str, rows: Sequence[tuple[Any, ...]]) -> bool:
    """Return whether a column is empty.

    A chain column is empty if no row has chains. A pair column is empty if no row has pairs.
    """
    base = "chains" if column in ("chains", "revised", "changed", "similarity") else "pairs"
    return column not in ("excluded_principle", "used_by", "sampled", "changed_elsewhere", "run") and not any(
        row[ABLATION_COLUMNS.index(base)] for row in rows
    )
