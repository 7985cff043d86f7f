"""Select the rows of a batch from DuckDB by commit sequence, and record them in a manifest before training.

Each row trains a phase once. A phase has one cursor per source of rows (`prompts.source`). The cursor is the commit up to which
the rows of the source were sampled. If the rows of a batch were numbered again, their ids replace the cursor (see
`trainer.consumed`). The cursor moves only when the update of a batch is on the log. The rows of a voided batch therefore stay
available. A mixture can skip rows. The cursor of a source stays before its skipped rows, so the next batch takes these rows
first. A row that arrives late has a later commit, so a later batch can sample it. A human label that replaces another label is a
new row.

A batch of the reward model also replays labels of earlier batches (`reward.replay_ratio`). The replayed labels are sampled
again for each batch. A reward model that learns only from the responses of the newest policy forgets how to score older kinds
of responses. PPO would then return to these older kinds. (Bai et al. 2022, HH-RLHF, section 4.5, train on the comparisons of
all policies so far. Rolnick et al. 2019 mix new and replayed experience in equal parts.) The manifest lists the replayed rows.

A manifest lists the rows in the order of training. The manifest holds a hash of all columns that training reads, the seed, and
the settings. After a crash, training therefore resumes with the identical batch, and an old batch can be rebuilt. Only this
module decides whether a rollout is too stale. The decision depends only on the records. A rollout that can no longer be used is
dropped, and the reason is published on the topic `dropped-rollouts`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from engine.errors import CharterError
from engine.settings import REWARD_MODEL, RewardTerm, TrainSettings, parse_mixture, parse_rewards
from engine.store import Store
from engine.text import format_count
from schemas import ids
from schemas.records import BatchManifest, ChatMessage, DroppedRollout
from trainer.consumed import ALL_SOURCES, QUERY_TIMEOUT_S, ConsumedRows, find_consumed_rows
from trainer.methods import (
    PHASES,
    REWARD_PHASE,
    RL_METHODS,
    SFT_PHASE,
    RowKind,
    get_row_kind,
    uses_constitution,
    uses_groups,
    uses_rollouts,
)
from trainer.rewards import Evidence, compute_reward, read_evidence
from trainer.state import TrainingState

# By what the batches of a phase consist of (`trainer.methods`).
_NEW_ROW_VIEWS: dict[RowKind, str] = {"chains": "sft_examples", "pairs": "preference_pairs"}
# The views from which the rows of a manifest are loaded. If a person overrides a label, the old label is no longer in `preference_pairs`.
# A batch that trained on the old label can still be rebuilt from `preference_labels`. These views also have the rows of prompts
# that were held out after the batch.
_MANIFEST_VIEWS: dict[RowKind, str] = {
    "chains": "trainable_responses",
    "pairs": "preference_labels",
    "rollouts": "rollouts",
    "groups": "rollouts",
}
# The column with the ids that a manifest lists. The completions of a response have one id.
KEY_COLUMNS = {phase: "response_id" if uses_rollouts(phase) else "record_id" for phase in PHASES}
# The columns that training reads. The hash in a manifest covers the same columns. A view may have more columns.
_TRAINING_COLUMNS: dict[RowKind, str] = {
    "chains": "record_id, prompt_id, messages, completion, finish_reason, source, end_reason, policy_version",
    "pairs": "record_id, prompt_id, messages, response_a, response_b, finish_reason_a, finish_reason_b, p_a, source, pairing,"
    " label_source, policy_version",
    "rollouts": "response_id, completion_index, prompt_id, messages, source, model, prompt_token_ids, token_ids, logprobs, text, finish_reason,"
    " temperature, policy_version",
}
_TRAINING_COLUMNS["groups"] = _TRAINING_COLUMNS["rollouts"]  # and the grades and labels of `trainer.rewards`
_LENGTH_EXPRESSIONS: dict[RowKind, str] = {
    "chains": "length(completion) + list_sum([length(message.content) for message in messages])",
    "pairs": "length(response_a) + length(response_b) + 2 * list_sum([length(message.content) for message in messages])",
}
# This query replaces the final response of a chain with the chain's revisions of the selected rounds. A chain without a
# revision in these rounds keeps its final response. (The critic accepted the response, the chain was skipped, or a person wrote
# the response.) A revision that was judged worse than its predecessor is omitted. If the finish reason of a revision is
# unknown, training does not append the end token.
_SELECTED_ROUNDS_SQL = """
    WITH rounds AS (
        SELECT record_id, response_id, end_reason, round AS last, unnest(rounds) AS round
        FROM revision_chains WHERE record_id IN (SELECT unnest($1::UUID[]))),
    chosen AS (
        SELECT r.record_id, r.round.round AS round, r.round.revision AS text,
               CASE WHEN bool_and(v.finish_reason = 'STOP') THEN 'STOP' ELSE 'UNKNOWN' END AS finish_reason
        FROM rounds r LEFT JOIN revisions v
            ON v.response_id = r.response_id AND v.round = r.round.round AND v.response = r.round.revision
        WHERE r.round.round IN (SELECT unnest($2::INTEGER[])) AND NOT (r.end_reason = 'LOST' AND r.round.round = r.last)
        GROUP BY ALL HAVING find_rejection_reason(r.round.revision, '') = 'NONE')
    SELECT {columns} FROM (
        SELECT e.* REPLACE (coalesce(c.text, e.completion) AS completion, coalesce(c.finish_reason, e.finish_reason) AS finish_reason), c.round
        FROM trainable_responses e LEFT JOIN chosen c USING (record_id)
        WHERE e.record_id IN (SELECT unnest($1::UUID[]))) ORDER BY round"""
_OTHER_SOURCES = "*"  # this part of a mixture holds all sources that the mixture does not name
# Rows are sorted by length within groups of this number of steps. The sorted groups need little padding, and the order of the
# steps is still random.
_STEPS_PER_LENGTH_GROUP = 16


@dataclass(frozen=True)
class StalenessLimits:
    """These limits define how stale a rollout may be. The limits count policy versions, reward-model versions and seconds.

    If `max_age_s` is 0, the age has no limit.
    """

    max_staleness: int = 4
    max_reward_staleness: int = 4
    max_age_s: float = 0.0


@dataclass(frozen=True)
class Batch:
    """A batch has a manifest and rows. The rows are in the order of training.

    Rows of similar length are next to each other.
    """

    manifest: BatchManifest
    rows: list[dict[str, Any]]
    sl_rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the learner's settings that the manifest records. A resumed batch trains with these settings."""
        settings: dict[str, Any] = json.loads(self.manifest.settings)
        return settings


@dataclass(frozen=True)
class RowRef:
    """This object refers to a row that may be sampled. `length` is in characters. For a rollout, `length` is 0.

    `weight` is what the row counts for the threshold of its phase: 1, or the number of completions of a group.
    """

    row_id: str
    source: str
    commit_seq: int
    length: int = 0
    policy_version: int | None = None
    replayed: bool = False
    weight: int = 1


# Selecting rows


def get_row_threshold(train: TrainSettings, phase: str) -> int:
    """Return the number of new rows that a phase needs before an update starts. For groups, it is a number of completions."""
    return {
        "chains": train.sft_rows,
        "pairs": train.reward_rows,
        "rollouts": train.ppo_rows,
        "groups": train.group_completions,
    }[get_row_kind(phase)]


def get_mixture(train: TrainSettings, phase: str) -> dict[str, float]:
    """Return the configured share of each source in a batch of a phase. Return an empty dict for rollouts, which have no mixture."""
    return parse_mixture(
        {"chains": train.sft_mixture, "pairs": train.reward_mixture, "rollouts": [], "groups": []}[get_row_kind(phase)]
    )


def _get_new_row_view(phase: str, contrast_phases: Collection[str]) -> str:
    """Return the view with the rows of a phase. The phases in `contrast_phases` also train on contrast pairs."""
    return "training_pairs" if phase in contrast_phases else _NEW_ROW_VIEWS[get_row_kind(phase)]


def select_new_rows(
    store: Store,
    phase: str,
    state: TrainingState,
    *,
    limit: int,
    by_purpose: bool = False,
    contrast_phases: Collection[str] = (),
) -> list[RowRef]:
    """Return the first `limit` rows of each source that a phase has not trained on, in commit order.

    If `by_purpose` is true, the reward model does not get the judge's labels of prompts that are for RL. `contrast_phases` are the
    phases that also train on contrast pairs (`train.contrast_pairs`).

    Methods that train on rollouts use `select_rollouts` instead. An RL phase does not get pairs that it has dropped.
    """
    kind = get_row_kind(phase)
    dropped = " AND v.record_id NOT IN (SELECT dropped_id FROM dropped_rollouts)" if phase in RL_METHODS else ""
    other = f" AND {_IS_FOR_REWARD_SQL}" if by_purpose and phase == REWARD_PHASE else ""
    sql = f"""
        {_ROW_REF_SQL.format(length=_LENGTH_EXPRESSIONS[kind], view=_get_new_row_view(phase, contrast_phases))}
        WHERE NOT {_IS_CONSUMED_SQL}{dropped}{other}
        QUALIFY row_number() OVER (PARTITION BY v.source ORDER BY v.commit_seq) <= $5
        ORDER BY v.commit_seq"""
    return _query_row_refs(store, sql, [*_to_parameters(find_consumed_rows(store, phase, state)), limit])


def sample_replayed_rows(
    store: Store,
    phase: str,
    state: TrainingState,
    *,
    count: int,
    seed: int,
    by_purpose: bool = False,
    contrast_phases: Collection[str] = (),
) -> list[RowRef]:
    """Return `count` rows of earlier batches of a phase, in commit order.

    The rows are selected by a hash of their ids and the seed.
    """
    kind = get_row_kind(phase)
    sql = f"""
        {_ROW_REF_SQL.format(length=_LENGTH_EXPRESSIONS[kind], view=_get_new_row_view(phase, contrast_phases))}
        WHERE {_IS_CONSUMED_SQL}{f" AND {_IS_FOR_REWARD_SQL}" if by_purpose and phase == REWARD_PHASE else ""}
        ORDER BY md5(v.record_id::VARCHAR || $6::VARCHAR), v.record_id LIMIT $5"""
    rows = _query_row_refs(store, sql, [*_to_parameters(find_consumed_rows(store, phase, state)), count, seed])
    return [replace(row, replayed=True) for row in sorted(rows, key=lambda row: row.commit_seq)]


# The parameters $1 to $4 are those of `_to_parameters`.
_CONSUMED_SQL = """
    cursors AS (SELECT unnest($1::VARCHAR[]) AS source, unnest($2::BIGINT[]) AS at),
    moved AS (SELECT unnest(record_ids) AS record_id FROM batches WHERE record_id IN (SELECT unnest($4::UUID[])))"""
_IS_CONSUMED_SQL = "(v.commit_seq <= greatest(coalesce(c.at, -1), $3) OR v.record_id IN (SELECT record_id FROM moved))"
# The judge labels no pairs of prompts that are for RL. It may have labeled some of them before a training loop began.
_IS_FOR_REWARD_SQL = "(v.purpose <> 'RL' OR v.label_source = 'HUMAN')"
_IS_IN_REWARD_BATCH_SQL = f"v.record_id IN (SELECT unnest(record_ids) FROM batches WHERE phase = '{REWARD_PHASE}')"
_ROW_REF_SQL = f"""
    WITH {_CONSUMED_SQL}
    SELECT v.record_id, v.source, v.commit_seq, coalesce({{length}}, 0) AS length, v.policy_version
    FROM {{view}} v LEFT JOIN cursors c ON c.source = v.source"""


def _to_parameters(consumed: ConsumedRows) -> list[Any]:
    """Return the sources that have a separate cursor, their cursors, the cursor of all other sources, and the moved batches."""
    return [list(consumed.cursors), list(consumed.cursors.values()), consumed.get_cursor(), list(consumed.moved_batch_ids)]


def _query_row_refs(store: Store, sql: str, parameters: Sequence[Any]) -> list[RowRef]:
    rows = store.query(sql, parameters, limit_s=QUERY_TIMEOUT_S).rows
    return [
        RowRef(str(row_id), source, commit_seq, int(length), version) for row_id, source, commit_seq, length, version in rows
    ]


def select_rollouts(
    store: Store,
    phase: str,
    state: TrainingState,
    limits: StalenessLimits,
    *,
    allow_overlap: bool,
    by_purpose: bool = False,
    served_revisions: Mapping[int, str] | None = None,
) -> tuple[list[RowRef], list[DroppedRollout]]:
    """Return the responses that an RL phase may train on, and a DroppedRollout for each response that it can no longer use.

    The arguments are those of `select_rollout_rows`.
    """
    rows, drops = select_rollout_rows(
        store, phase, state, limits, allow_overlap=allow_overlap, by_purpose=by_purpose, served_revisions=served_revisions
    )
    usable: dict[str, RowRef] = {}
    for row in rows:  # each completion is a row, but a response gets only one `RowRef`
        response_id = str(row["response_id"])
        usable.setdefault(response_id, RowRef(response_id, row["source"], row["commit_seq"], 0, row["policy_version"]))
    return list(usable.values()), drops


def select_rollout_rows(
    store: Store,
    phase: str,
    state: TrainingState,
    limits: StalenessLimits,
    *,
    allow_overlap: bool,
    by_purpose: bool = False,
    served_revisions: Mapping[int, str] | None = None,
) -> tuple[list[dict[str, Any]], list[DroppedRollout]]:
    """Return the completions that an RL phase may train on, and a DroppedRollout for each one that it can no longer use.

    A completion that no RL phase could ever use is skipped. The column `exclusion_reason` of the view gives the reason. If
    `by_purpose` is true, completions of prompts for the reward model are skipped, too.
    `served_revisions` maps each policy version to the revision that a server reports. The revision is needed because the
    weights on a server cannot be compared directly.
    """
    sql = f"""
        SELECT response_id, completion_index, prompt_id, run_id, source, policy_version, model.revision AS revision, created_at,
               commit_seq
        FROM rollouts WHERE commit_seq > $1 AND exclusion_reason IS NULL{" AND purpose <> 'REWARD'" if by_purpose else ""}
        AND response_id NOT IN (SELECT dropped_id FROM dropped_rollouts)
        AND response_id NOT IN (SELECT unnest(record_ids) FROM batches WHERE record_id IN (SELECT unnest($2::UUID[])))
        AND response_id NOT IN (SELECT unnest($3::UUID[]))
        ORDER BY commit_seq, completion_index"""
    consumed = find_consumed_rows(store, phase, state)
    parameters = [consumed.get_cursor(), list(consumed.moved_batch_ids), _list_rows_behind_cursor(consumed, phase, state)]
    rows = store.query_dicts(sql, parameters, limit_s=QUERY_TIMEOUT_S)
    prompts = [] if allow_overlap else list({str(row["prompt_id"]) for row in rows})
    overlap = _find_reward_model_prompts(store, state, prompts, by_purpose) if prompts else set()
    usable, drops = [], []
    for row in rows:
        reason = find_staleness_reason(row, state, limits) or find_revision_mismatch(row, state, served_revisions or {})
        if reason is None and str(row["prompt_id"]) in overlap:
            reason = "its prompt trained the reward model"
        if reason is not None:
            drops.append(make_dropped_rollout(row, reason))
        else:
            usable.append(row)
    return usable, drops


def _list_rows_behind_cursor(consumed: ConsumedRows, phase: str, state: TrainingState) -> list[str]:
    """Return the rows of earlier batches of a phase that are behind its cursor.

    The cursor of a phase with groups stays before the first group that waits for a grade.
    """
    return [
        record_id
        for manifest in state.trained_batches
        if manifest.phase == phase and manifest.commit_seq_to > consumed.get_cursor()
        for record_id in manifest.record_ids
    ]


def select_stale_pairs(
    store: Store, rows: Sequence[RowRef], state: TrainingState, limits: StalenessLimits
) -> list[DroppedRollout]:
    """Return a DroppedRollout for each of these labels whose responses are too stale for DPO.

    A label of responses that no policy sampled has no limit, and neither has a label by a person. A pair from before the last
    supervised update may be used, because DPO needs no log-probabilities of the sampling policy.
    """
    sql = """
        SELECT p.record_id, p.prompt_id, p.run_id, p.policy_version, coalesce(r.created_at, p.created_at) AS created_at
        FROM preferences p LEFT JOIN responses r ON r.record_id = p.response_id
        WHERE p.label_source <> 'HUMAN' AND p.policy_version IS NOT NULL AND p.record_id IN (SELECT unnest(?::UUID[]))"""
    pairs = store.query_dicts(sql, [[row.row_id for row in rows]], limit_s=QUERY_TIMEOUT_S)
    reasons = [(pair, find_pair_staleness_reason(pair, state, limits)) for pair in pairs]
    return [make_dropped_rollout(pair, reason) for pair, reason in reasons if reason is not None]


def find_pair_staleness_reason(pair: Mapping[str, Any], state: TrainingState, limits: StalenessLimits) -> str | None:
    """Return why the responses of a pair are too stale for the current policy. Return None if the pair may be used."""
    version = pair["policy_version"]
    if version >= state.reference_version and version not in state.policy_ancestry:
        return "sampled by a policy that was rolled back"
    return _find_age_reason(pair, state, limits)


def find_staleness_reason(row: Mapping[str, Any], state: TrainingState, limits: StalenessLimits) -> str | None:
    """Return why a rollout is too stale for the current policy. Return None if the rollout may be used."""
    version = row["policy_version"]
    if version < state.reference_version:
        return "sampled before the last supervised update"
    if version not in state.policy_ancestry:
        return "sampled by a policy that was rolled back"
    if reason := _find_age_reason(row, state, limits):
        return reason
    if state.reward_version - state.reward_version_by_policy.get(version, 0) > limits.max_reward_staleness:
        return f"older than {limits.max_reward_staleness} reward-model versions"
    return None


def _find_age_reason(row: Mapping[str, Any], state: TrainingState, limits: StalenessLimits) -> str | None:
    if state.policy_version - row["policy_version"] > limits.max_staleness:
        return f"older than {limits.max_staleness} policy versions"
    if limits.max_age_s and compute_age_s(row["created_at"], row["policy_version"], state) > limits.max_age_s:
        return f"older than {limits.max_age_s:g} s"
    return None


def compute_age_s(created_at: datetime, policy_version: int, state: TrainingState) -> float:
    """Return the age of a response in seconds. DuckDB returns `created_at` in UTC, without a time zone.

    The clock of the stage may be behind the clock of the trainer. A response is not older than the policy that sampled it, and
    the trainer has written the time of the policy.
    """
    now = datetime.now(UTC).replace(tzinfo=None)
    return (now - max(created_at, state.publication_times.get(policy_version, created_at))).total_seconds()


def measure_clock_difference(store: Store, state: TrainingState) -> timedelta:
    """Return by how much the clock of a stage is certainly behind (negative) or ahead of the clock of the trainer.

    It is behind if a response is older than its policy. It is ahead if a response is newer than the present.
    """
    now, zero = datetime.now(UTC).replace(tzinfo=None), timedelta()
    sql = "SELECT policy_version, min(created_at), max(created_at) FROM responses GROUP BY policy_version"
    rows = store.query(sql, limit_s=QUERY_TIMEOUT_S).rows
    ahead = max([zero, *(newest - now for _, _, newest in rows)])
    behind = min([zero, *(oldest - state.publication_times.get(version, oldest) for version, oldest, _ in rows)])
    return ahead if ahead > -behind else behind


def find_revision_mismatch(row: Mapping[str, Any], state: TrainingState, served_revisions: Mapping[int, str]) -> str | None:
    """Return a reason if a response was not sampled from the weights of its policy version.

    Return None if the weights match.
    """
    expected = state.model_revisions.get(row["policy_version"])
    if expected is None or row["revision"] in (expected, served_revisions.get(row["policy_version"])):
        return None
    return f"its model revision {row['revision']} is not that of policy {row['policy_version']}"


def make_dropped_rollout(row: Mapping[str, Any], reason: str) -> DroppedRollout:
    """Return the record that excludes a completion (a row with a response_id), or a pair (a row with a record_id)."""
    dropped_id = str(row.get("response_id") or row["record_id"])
    return DroppedRollout(
        record_id=ids.compute_record_id(
            "ppo-drop", [dropped_id], ids.compute_fingerprint("dropped_rollout", reason=reason), row.get("completion_index", 0)
        ),
        parent_ids=[dropped_id],
        prompt_id=str(row["prompt_id"]),
        run_id=row["run_id"],
        stage="train",
        policy_version=row["policy_version"],
        dropped_id=dropped_id,
        reason=reason,
    )


def _find_reward_model_prompts(store: Store, state: TrainingState, prompt_ids: Sequence[str], by_purpose: bool) -> set[str]:
    """Return the subset of `prompt_ids` that the reward model was trained on, in all batches so far."""
    skipped = ""
    if by_purpose:  # a cursor also passes the labels that were skipped, as it passes contrast pairs
        skipped = f"AND ({_IS_FOR_REWARD_SQL} OR {_IS_IN_REWARD_BATCH_SQL})"
    sql = f"""
        WITH {_CONSUMED_SQL}
        SELECT DISTINCT v.prompt_id FROM training_pairs v LEFT JOIN cursors c ON c.source = v.source
        WHERE {_IS_CONSUMED_SQL} AND v.prompt_id IN (SELECT unnest($5::UUID[]))
          AND (v.label_source <> 'CONTRAST' OR {_IS_IN_REWARD_BATCH_SQL}) {skipped}"""
    parameters = [*_to_parameters(find_consumed_rows(store, REWARD_PHASE, state)), list(prompt_ids)]
    return {str(prompt) for (prompt,) in store.query(sql, parameters, limit_s=QUERY_TIMEOUT_S).rows}


# Mixture and order


def sample_mixture(rows: Sequence[RowRef], mixture: Mapping[str, float], *, min_size: int, max_size: int) -> list[RowRef]:
    """Return the largest batch that has the shares of a mixture, in commit order.

    The oldest rows of each part are used. A part without rows is omitted, and the shares of the other parts grow. If a scarce
    part makes the batch smaller than `min_size`, rows of the other parts fill it.
    """
    parts = _group_by_mixture_part(rows, mixture)
    total_share = sum(mixture.get(part, 1.0) for part in parts)
    size = min(max_size, len(rows), max(compute_exact_mixture_size(rows, mixture), min_size))
    counts = {part: min(len(available), int(size * mixture.get(part, 1.0) / total_share)) for part, available in parts.items()}
    # Rounding and scarce parts can leave the batch too small. Fill it with rows from the part that has the most rows left.
    for part in sorted(parts, key=lambda part: counts[part] - len(parts[part])):
        counts[part] += min(len(parts[part]) - counts[part], size - sum(counts.values()))
    chosen = [row for part, available in parts.items() for row in available[: counts[part]]]
    return sorted(chosen, key=lambda row: row.commit_seq)


def compute_exact_mixture_size(rows: Sequence[RowRef], mixture: Mapping[str, float]) -> int:
    """Return the size of the largest batch with exactly the configured shares. Ignore parts that have no rows."""
    parts = _group_by_mixture_part(rows, mixture)
    total_share = sum(mixture.get(part, 1.0) for part in parts)
    sizes = (int(len(available) * total_share / mixture.get(part, 1.0) + 1e-6) for part, available in parts.items())
    return min(sizes, default=0)


def _group_by_mixture_part(rows: Sequence[RowRef], mixture: Mapping[str, float]) -> dict[str, list[RowRef]]:
    """Group the rows by the part of the mixture that contains their source. An empty mixture has one part for all rows."""
    parts: dict[str, list[RowRef]] = {}
    for row in rows:
        parts.setdefault(row.source if row.source in mixture else _OTHER_SOURCES, []).append(row)
    return parts


def describe_mixture_shortfall(rows: Sequence[RowRef], mixture: Mapping[str, float]) -> str | None:
    """Return a warning if the shares of a batch differ from the configured mixture by more than 1.5 rows.

    Otherwise return None.
    """
    parts = _group_by_mixture_part(rows, mixture)
    counts = {part: len(parts.get(part, [])) for part in mixture}
    total_share = sum(mixture.values())
    if not any(abs(counts[part] - len(rows) * share / total_share) > 1.5 for part, share in mixture.items()):
        return None
    shares = [
        f"{part} {counts[part] / len(rows):.0%} (configured: {share / total_share:.0%})" for part, share in mixture.items()
    ]
    missing = [part for part in mixture if not counts[part]]
    why = f"; there are no new rows of {', '.join(missing)}" if missing else ""
    return f"the mixture of this batch is {', '.join(shares)}{why}"


def group_by_length(rows: Sequence[RowRef], batch_size: int, seed: int) -> list[RowRef]:
    """Shuffle the rows so that the rows of a step have similar lengths, as a length-grouped sampler does."""
    rng, order = random.Random(seed), list(rows)
    rng.shuffle(order)
    group_size = batch_size * _STEPS_PER_LENGTH_GROUP
    groups = [order[start : start + group_size] for start in range(0, len(order), group_size)]
    order = [row for group in groups for row in sorted(group, key=lambda row: -row.length)]
    steps = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    last = [steps.pop()] if len(order) % batch_size else []  # an incomplete step stays at the end
    rng.shuffle(steps)
    return [row for step in [*steps, *last] for row in step]


# Manifests


def build_manifest(
    phase: str,
    batch_number: int,
    rows: Sequence[dict[str, Any]],
    sl_rows: Sequence[dict[str, Any]],
    state: TrainingState,
    row_refs: Sequence[RowRef],
    *,
    run_id: str,
    seed: int,
    settings: object,
    mixture: Mapping[str, float] | None = None,
    sink_session: str | None = None,
    reward_record_ids: Sequence[str] = (),
    cursor: int | None = None,
) -> BatchManifest:
    """Build the manifest of a batch. `sink_session` is the newest session of the sink when the rows were selected.

    `reward_record_ids` are the grades and labels of the rewards of groups. `cursor` replaces the cursors of all sources.

    The id of the manifest is a hash of the rows, the seed, the settings and the current versions. The id is therefore the same
    after a crash.
    """
    record_ids = [row.row_id for row in row_refs]
    content_hash = compute_content_hash([*rows, *sl_rows])
    settings_json = json.dumps(settings, sort_keys=True)
    fingerprint = ids.compute_fingerprint(
        "batch",
        content=content_hash,
        batch_number=batch_number,
        seed=seed,
        settings=settings_json,
        policy=state.policy_version,
        reward=state.reward_version,
    )
    new_rows = [row for row in row_refs if not row.replayed]  # replayed rows do not move a cursor
    cursors: dict[str, int] = {}
    for row in new_rows:
        cursors[row.source] = max(cursors.get(row.source, -1), row.commit_seq)
    return BatchManifest(
        record_id=ids.compute_record_id(f"batch/{phase}", record_ids, fingerprint),
        run_id=run_id,
        stage="train",
        policy_version=state.policy_version,
        seed=seed,
        phase=phase,
        batch_number=batch_number,
        record_ids=record_ids,
        sl_record_ids=[str(row["record_id"]) for row in sl_rows],
        content_hash=content_hash,
        commit_seq_from=min(row.commit_seq for row in new_rows),
        commit_seq_to=max(row.commit_seq for row in new_rows),
        base_policy_version=state.policy_version,
        base_reward_version=state.reward_version or None,
        reference_policy_version=state.reference_version if phase in RL_METHODS else None,
        mixture=dict(Counter(str(row["source"]) for row in rows)),
        target_mixture=dict(mixture or {}),
        cursors={ALL_SOURCES: cursor} if cursor is not None else {} if uses_rollouts(phase) else cursors,
        replayed_record_ids=[row.row_id for row in row_refs if row.replayed],
        sink_session=sink_session,
        settings=settings_json,
        reward_record_ids=list(reward_record_ids),
    )


def compute_content_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the SHA-256 of the rows in the given order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def load_rows(store: Store, phase: str, record_ids: Sequence[str], rounds: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Load the rows with these ids, in the order of the ids.

    The completions of a response are sorted by their index. The rounds of a chain are sorted by their number.
    """
    columns, key = _TRAINING_COLUMNS[get_row_kind(phase)], KEY_COLUMNS[phase]
    if uses_constitution(phase):  # the tags of a prompt select the principles that apply to it
        columns += ", tags"
    usable = " AND coalesce(exclusion_reason, 'held out') = 'held out'" if uses_rollouts(phase) else ""
    sql = f"SELECT {columns} FROM {_MANIFEST_VIEWS[get_row_kind(phase)]} WHERE {key} IN (SELECT unnest(?::UUID[])){usable}"
    parameters: list[Any] = [list(record_ids)]
    if rounds:
        sql, parameters = _SELECTED_ROUNDS_SQL.format(columns=columns), [*parameters, list(rounds)]
    position_by_id = {record_id: position for position, record_id in enumerate(record_ids)}
    rows = store.query_dicts(sql, parameters, limit_s=QUERY_TIMEOUT_S)
    return sorted(rows, key=lambda row: (position_by_id[str(row[key])], row.get("completion_index", 0)))


def load_group_rows(
    store: Store, phase: str, response_ids: Sequence[str], terms: Sequence[RewardTerm], record_ids: Sequence[str] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Load the completions of these groups that have a reward, with the grades and labels that the reward is computed from.

    `num_in_group` counts the completions of a group before those without a reward are removed. Also return the ids of the grades
    and labels. If `record_ids` is given, only these grades and labels are read.
    """
    readable = [term for term in terms if term.source != REWARD_MODEL]
    evidence = read_evidence(store, readable, response_ids, record_ids)
    rows = load_rows(store, phase, response_ids)
    sizes = Counter(str(row["response_id"]) for row in rows)
    kept, used_ids = [], dict[str, None]()
    for row in rows:
        response_id = str(row["response_id"])
        of_row = evidence.get((response_id, row["completion_index"]), Evidence())
        if compute_reward(of_row, readable) is not None:
            kept.append(row | of_row.to_columns() | {"num_in_group": sizes[response_id]})
        used_ids |= dict.fromkeys(of_row.record_ids)
    return kept, list(used_ids)


def rebuild_batch(store: Store, manifest: BatchManifest) -> Batch:
    """Load the rows that a manifest lists. Raise CharterError when rows are missing or have changed."""
    rows, sl_rows = _load_batch_rows(store, manifest)
    missing = _find_missing_ids(manifest, rows, sl_rows)
    if compute_content_hash([*rows, *sl_rows]) != manifest.content_hash:
        raise CharterError(
            f"batch {manifest.batch_number} ({manifest.phase}) cannot be rebuilt",
            f"{len(missing)} of its {format_count(len(manifest.record_ids), 'rows')} {'is' if len(missing) == 1 else 'are'} not in {store.path}"
            if missing
            else f"its rows in {store.path} have changed since it was sampled",
            "use the database that the batch was sampled from. Erased rows cannot be restored",
        )
    return Batch(manifest, rows, sl_rows)


def count_missing_rows(store: Store, manifest: BatchManifest) -> int:
    """Return how many of the rows that a manifest lists are not in the database."""
    return len(_find_missing_ids(manifest, *_load_batch_rows(store, manifest)))


def _load_batch_rows(store: Store, manifest: BatchManifest) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    settings = json.loads(manifest.settings)
    if uses_groups(manifest.phase):
        terms = parse_rewards(settings["rewards"])
        rows, _ = load_group_rows(store, manifest.phase, manifest.record_ids, terms, manifest.reward_record_ids)
    else:
        rows = load_rows(store, manifest.phase, manifest.record_ids, settings.get("rounds", ()))
    return rows, load_rows(store, SFT_PHASE, manifest.sl_record_ids) if manifest.sl_record_ids else []


def _find_missing_ids(
    manifest: BatchManifest, rows: Iterable[Mapping[str, Any]], sl_rows: Iterable[Mapping[str, Any]]
) -> set[str]:
    row_ids = {str(row[KEY_COLUMNS[manifest.phase]]) for row in rows} | {str(row["record_id"]) for row in sl_rows}
    return {*manifest.record_ids, *manifest.sl_record_ids} - row_ids


def load_newest_chains(store: Store, count: int) -> list[dict[str, Any]]:
    """Load the newest finished revision chains, for the supervised part of the combined objective."""
    rows = store.query_dicts(
        "SELECT record_id FROM sft_examples ORDER BY commit_seq DESC LIMIT ?", [count], limit_s=QUERY_TIMEOUT_S
    )
    return load_rows(store, SFT_PHASE, [str(row["record_id"]) for row in rows]) if rows else []


def parse_messages(row: Mapping[str, Any]) -> tuple[ChatMessage, ...]:
    """Return the chat messages of a row."""
    return tuple(ChatMessage(**message) for message in row["messages"])
