"""Select the groups of completions that GRPO and RLOO may train on.

A group consists of the completions of one response. A batch has whole groups only. A group waits until all grades and labels
that its reward needs have arrived. A completion without a reward is not part of its group. A group with fewer than two rewards
is dropped with a reason, as a rollout that is too stale is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.settings import REWARD_MODEL, RewardTerm
from engine.store import Store
from schemas.records import DroppedRollout
from trainer.batches import RowRef, StalenessLimits, make_dropped_rollout, select_rollout_rows
from trainer.consumed import QUERY_TIMEOUT_S
from trainer.rewards import Evidence, compute_reward, find_missing_source, read_evidence
from trainer.state import TrainingState


@dataclass(frozen=True)
class GroupSelection:
    """The groups that are new to a phase.

    `ready` may be trained. `waiting` may be trained when its grades have arrived; `missing` counts these groups by the source
    that they wait for. `drops` can no longer be trained.
    """

    ready: Sequence[RowRef] = ()
    waiting: Sequence[RowRef] = ()
    missing: Mapping[str, int] | None = None
    drops: Sequence[DroppedRollout] = ()


def select_groups(
    store: Store,
    phase: str,
    state: TrainingState,
    limits: StalenessLimits,
    terms: Sequence[RewardTerm],
    *,
    pairing: str,
    min_completions: int,
    allow_overlap: bool,
    by_purpose: bool = False,
    served_revisions: Mapping[int, str] | None = None,
) -> GroupSelection:
    """Sort the groups that a phase has not trained on. `min_completions` is the minimum size of a response."""
    rows, drops = select_rollout_rows(
        store, phase, state, limits, allow_overlap=allow_overlap, by_purpose=by_purpose, served_revisions=served_revisions
    )
    dropped_ids = {drop.dropped_id for drop in drops}
    by_response: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if str(row["response_id"]) not in dropped_ids:  # a batch never has a part of a group
            by_response.setdefault(str(row["response_id"]), []).append(row)
    if not by_response:
        return GroupSelection(drops=drops)
    sizes_sql = "SELECT record_id, len(completions) FROM responses WHERE record_id IN (SELECT unnest(?::UUID[]))"
    sizes = {str(key): size for key, size in store.query(sizes_sql, [list(by_response)], limit_s=QUERY_TIMEOUT_S).rows}
    readable = [term for term in terms if term.source != REWARD_MODEL]
    evidence = read_evidence(store, readable, list(by_response))
    ready, waiting, missing = [], [], Counter[str]()
    for response_id, completions in by_response.items():
        first = completions[0]
        ref = RowRef(response_id, first["source"], first["commit_seq"], 0, first["policy_version"])
        of_group = [evidence.get((response_id, row["completion_index"]), Evidence()) for row in completions]
        # The stages also grade and judge the completions that cannot train. Their records show that all have arrived.
        of_response = [evidence.get((response_id, index), Evidence()) for index in range(sizes[response_id])]
        num_rewards = sum(compute_reward(one, readable) is not None for one in of_group)
        if sizes[response_id] < min_completions:
            drops.append(make_dropped_rollout(first, f"its group has fewer than {min_completions} completions"))
        elif source := find_missing_source(of_response, readable, pairing):
            waiting.append(replace(ref, weight=len(completions)))
            missing[source] += 1
        elif num_rewards < 2:
            drops.append(make_dropped_rollout(first, "fewer than two completions of its group have a reward"))
        else:
            ready.append(replace(ref, weight=num_rewards))
    return GroupSelection(ready, waiting, missing, drops)


def sample_groups(groups: Sequence[RowRef], max_completions: int) -> list[RowRef]:
    """Return the oldest groups that together have at most `max_completions` completions. Return at least one group."""
    chosen, total = list[RowRef](), 0
    for group in groups:
        if chosen and total + group.weight > max_completions:
            break
        chosen.append(group)
        total += group.weight
    return chosen


def compute_cursor(chosen: Sequence[RowRef], selection: GroupSelection) -> int:
    """Return the commit up to which every group is in the batch or can no longer be used.

    Groups that wait, and groups that did not fit into the batch, are after it. The next batch takes them first.
    """
    chosen_ids = {group.row_id for group in chosen}
    left = [group.commit_seq for group in (*selection.ready, *selection.waiting) if group.row_id not in chosen_ids]
    return min([max(group.commit_seq for group in chosen), *(commit_seq - 1 for commit_seq in left)])
