"""Which principle does what: a constitution's principles left out one at a time, and what that changes.

For each principle the stages that use it run again without it, as a replay of its own (`charter replay --exclude-principle`), beside one
replay under the full constitution. Seeds hang on the answer and draws on the principle's id, so a principle that is left out
moves only the draws that it had. A text or label that changes although the principle was not drawn for it is noise: a batch of
other lengths rounds otherwise, and sampling takes another way. Each row counts that too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from charter.evaluation.rejudge import ALL_PRINCIPLES, is_flip, mean_or_none
from charter.replay import ReplayPlan, make_replay_plan, run_replay
from constitutions.loader import load_constitution
from consumers.chain import compute_similarity
from engine.bus.port import Bus
from engine.errors import UsageError
from engine.settings import Settings
from engine.store import Store

ABLATION_COLUMNS = (
    *("excluded_principle", "used_by", "sampled", "chains", "revised", "changed", "similarity"),
    *("pairs", "no_label", "flips", "mean_p_change", "changed_elsewhere", "run"),
)
_STAGE_BY_PRINCIPLE_LIST = {"critique": "critique", "judge": "judge"}  # a list of principles -> the stage that begins with it


@dataclass(frozen=True)
class AblationRun:
    """One replay of the study: the principle that is left out (none: empty), the stage that uses it, and the replay."""

    excluded_principle: str
    stage: str
    plan: ReplayPlan

    @property
    def run_id(self) -> str:
        return self.plan.settings.run.id


def plan_ablations(
    settings: Settings, bus: Bus, principles: Sequence[str], *, start: str, end: str, archive: bool
) -> Iterator[AblationRun]:
    """For each stage the full constitution first, then without each of its principles (or of the wanted ones)."""
    constitution = load_constitution(settings.run.constitution)
    constitution.without_principles(principles)  # an unknown name is an error before anything runs
    for part, stage in _STAGE_BY_PRINCIPLE_LIST.items():
        names = [p.id for p in getattr(constitution, part) if not principles or p.id in principles]
        for name in ["", *names] if names else []:
            plan = make_replay_plan(
                settings, bus, stage=stage, start=start, end=end, name=None, only=False, archive=archive,
                constitution=None, model=None, policy=None, excluded_principles=[name] if name else (),
            )  # fmt: skip
            yield AblationRun(name, stage, plan)


def run_ablations(ablations: Sequence[AblationRun], bus: Bus) -> None:
    """Run the replays one after the other; what is over already is over at once."""
    for number, trial in enumerate(ablations):
        if not run_replay(trial.plan, bus, quiet=True):
            what = f"{number} of {len(ablations)} runs are over"
            raise UsageError("the study was stopped", what, "the same command goes on with it")


# What came out

# The record that ended each chain in a run, and the principles that it was criticised by. An id that two runs share is one
# configuration's.
_CHAIN_ENDS_SQL = """
WITH drawn AS (SELECT response_id, list(DISTINCT principle_id) AS principles FROM raw.critiques WHERE run_id = $1 GROUP BY 1)
SELECT DISTINCT ON (response_id) response_id::VARCHAR AS response, record_id::VARCHAR AS record, initial_response, final_response,
       coalesce(principles, []) AS principles
FROM (SELECT response_id, record_id, initial_response, final_response, commit_seq FROM raw.critiques WHERE run_id = $1 AND final
      UNION ALL
      SELECT response_id, record_id, initial_response, final_response, commit_seq FROM raw.revisions WHERE run_id = $1 AND final)
LEFT JOIN drawn USING (response_id) ORDER BY response_id, commit_seq"""
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
    """A row of COLUMNS for each trial, against the full constitution's trial of its stage.

    The full one stands against the run that was replayed, as far as that made the same records: what differs there is noise,
    and so is what differs `elsewhere`, where the principle was not drawn.
    """
    rows, full = [], {trial.stage: trial.run_id for trial in ablations if not trial.excluded_principle}
    for trial in ablations:
        against = full[trial.stage] if trial.excluded_principle else trial.plan.selection.run_id
        chains, labels = ([of(store, run) for run in (against, trial.run_id)] for of in (_load_chains, _load_labels))
        if not trial.excluded_principle:
            chains, labels = _select_shared_records(*chains), _select_shared_records(*labels)
        work, told = (chains, "final_response") if trial.stage == "critique" else (labels, "p")
        drawn, elsewhere = _count_sampled_and_elsewhere(trial.excluded_principle, work[0], work[1], told)
        figures = (*_compute_chain_stats(*chains), *_compute_label_stats(*labels))
        rows.append((trial.excluded_principle or "(nothing)", trial.stage, drawn, *figures, elsewhere, trial.run_id))
    return rows


def _count_sampled_and_elsewhere(
    principle: str, before: RowsByKey, after: RowsByKey, result_key: str
) -> tuple[int | None, int]:
    """For how much of the work before a principle was drawn, and how much of the rest says otherwise in `told` after."""
    drawn = {key for key, row in before.items() if {principle, ALL_PRINCIPLES} & set(row["principles"])}
    moved = {key for key, row in after.items() if key in before and before[key][result_key] != row[result_key]}
    return len(drawn) if principle else None, len(moved - drawn)


def _select_shared_records(before: RowsByKey, after: RowsByKey) -> list[RowsByKey]:
    """What both runs made under one record id; the new run's in full where they share none."""
    shared = {key: row for key, row in before.items() if key in after and after[key]["record"] == row["record"]}
    return [shared, after]


def _compute_chain_stats(before: RowsByKey, after: RowsByKey) -> tuple[Any, ...]:
    """Chains, share of them revised, and of those that both have: how many end otherwise, and how alike the ends are."""
    texts = [(before[key]["final_response"] or "", row["final_response"] or "") for key, row in after.items() if key in before]
    revised = [float(row["final_response"] != row["initial_response"]) for row in after.values()]
    alike = mean_or_none([compute_similarity(one, other) for one, other in texts])
    return len(after), mean_or_none(revised), sum(one != other for one, other in texts) if texts else None, alike


def _compute_label_stats(before: RowsByKey, after: RowsByKey) -> tuple[Any, ...]:
    """Pairs that both have, those without a label in one of them, flips, and the mean change of p(a)."""
    both = [(before[key]["p"], row["p"]) for key, row in after.items() if key in before]
    given = [(p, q) for p, q in both if p is not None and q is not None]
    change = mean_or_none([abs(p - q) for p, q in given])
    return len(both), len(both) - len(given), sum(is_flip(p, q) for p, q in given) if given else None, change


def split_by_stage(rows: Sequence[tuple[Any, ...]]) -> Iterator[tuple[list[str], list[tuple[Any, ...]]]]:
    """The rows of each stage, with the columns that say something there: a stage that makes no chains has none to count."""
    for stage in _STAGE_BY_PRINCIPLE_LIST.values():
        part = [row for row in rows if row[ABLATION_COLUMNS.index("used_by")] == stage]
        kept = [
            i
            for i in range(len(ABLATION_COLUMNS))
            if any(row[i] for row in part) or not _is_empty_column(ABLATION_COLUMNS[i], part)
        ]
        if part:
            yield [ABLATION_COLUMNS[i] for i in kept], [tuple(row[i] for i in kept) for row in part]


def _is_empty_column(column: str, rows: Sequence[tuple[Any, ...]]) -> bool:
    """Whether a column hangs on chains or pairs of which there are none."""
    base = "chains" if column in ("chains", "revised", "changed", "similarity") else "pairs"
    return column not in ("excluded_principle", "used_by", "sampled", "elsewhere", "run") and not any(
        row[ABLATION_COLUMNS.index(base)] for row in rows
    )
