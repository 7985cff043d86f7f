"""Batches: what one training phase trains on, drawn from DuckDB by commit sequence and written down before the first step.

A row is new to a phase once. Each phase has a cursor for each source of rows (`prompts.source`): the commit up to which rows of
that source have been drawn. A cursor moves when the batch's update is on the log, never before, so that a batch that is given
up leaves its rows free. Rows that a mix passes over stay before the cursor of their source and are the first that a later
batch takes; a row that arrives late has a later commit and is met then; a person's label that takes the place of another is a
row of its own, which is new once too.

A reward model's batch also holds labels that earlier ones have trained on (`reward.replay_ratio`), drawn afresh for each batch: a
reward model that learns the newest policy's answers alone forgets what tells apart the answers that this policy does not give
any more, and PPO then finds them again. (Bai et al. 2022, HH-RLHF, section 4.5, train on the comparisons of all policies so
far; Rolnick et al. 2019 mix new and replayed experience half and half.) The manifest names them.

A manifest names the rows in the order of training, hashes what training sees of them, and holds the seed and the settings: a
crash resumes with the identical batch, and an old batch can be rebuilt. Staleness is judged here and nowhere else, from what
the records say: a rollout that PPO may not use is dropped with a reason, on the `dropped-rollouts` topic.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from engine.errors import CharterError
from engine.policy import get_newest_version, get_policy_ancestry, get_weights_version
from engine.store import Store
from schemas import ids
from schemas.records import BatchManifest, ChatMessage, DroppedRollout, PolicyKind, PolicyUpdate

QUERY_TIMEOUT_S = 60.0  # a batch is worth a longer look at the database than a screen is
SFT_PHASE, _RL_PHASES = "sft", ("ppo", "dpo")
_NEW_ROW_VIEWS = {"sft": "sft_examples", "reward": "preference_pairs", "ppo": "rollouts", "dpo": "preference_pairs"}
# Where the rows of a manifest are read: a label that a person has overridden since is no pair any more, but was in its batch.
_MANIFEST_VIEWS = _NEW_ROW_VIEWS | {"reward": "preference_labels", "dpo": "preference_labels"}
KEY_COLUMNS = {"sft": "record_id", "reward": "record_id", "ppo": "response_id", "dpo": "record_id"}
_PAIR_COLUMNS = "record_id, prompt_id, messages, response_a, response_b, finish_reason_a, finish_reason_b, p_a, source, pairing, label_source, policy_version"
# What training sees of a row, and what a manifest's hash covers. A view may show more.
_TRAINING_COLUMNS = {
    "sft": "record_id, prompt_id, messages, completion, finish_reason, source, end_reason, policy_version",
    "reward": _PAIR_COLUMNS,
    "dpo": _PAIR_COLUMNS,
    "ppo": "response_id, completion_index, prompt_id, messages, source, model, prompt_token_ids, token_ids, logprobs, text, finish_reason,"
    " temperature, policy_version",
}
_LENGTH_EXPRESSIONS = {
    "sft": "length(completion) + list_sum([length(message.content) for message in messages])",
    "reward": "length(response_a) + length(response_b) + 2 * list_sum([length(message.content) for message in messages])",
    "dpo": "length(response_a) + length(response_b) + 2 * list_sum([length(message.content) for message in messages])",
}
# The texts of chosen rounds in the place of a chain's final text, which stays where a chain has none of them (it was clean, or
# skipped, or a person's). A revision that lost against its predecessor is none; one whose end is not known teaches no end.
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
        GROUP BY ALL HAVING length(trim(r.round.revision)) > 0)
    SELECT {columns} FROM (
        SELECT e.* REPLACE (coalesce(c.text, e.completion) AS completion, coalesce(c.finish_reason, e.finish_reason) AS finish_reason), c.round
        FROM sft_examples e LEFT JOIN chosen c USING (record_id)
        WHERE e.record_id IN (SELECT unnest($1::UUID[]))) ORDER BY round"""
_OTHER_SOURCES = "*"  # in a mix: every source that it does not name
_STEPS_PER_LENGTH_GROUP = 16  # steps whose rows are sorted by length together: little padding, and still a shuffle


@dataclass(frozen=True)
class StalenessLimits:
    """How stale a rollout may be. `age_s` 0: of any age."""

    max_staleness: int = 4
    max_reward_staleness: int = 4
    max_age_s: float = 0.0


@dataclass(frozen=True)
class TrainingState:
    """Where training stands, from the log: versions, what each phase has consumed, and whose answers PPO may use.

    `line` are the versions of the present RL phase, newest first, its reference last; `rewards_at` the reward version that
    there was when a policy was published; `revisions` the weights' revision of each policy version.
    """

    policy_version: int = 0
    reward_version: int = 0
    policy_ancestry: tuple[int, ...] = (0,)
    cursors: Mapping[tuple[str, str], int] = field(default_factory=dict)
    reward_version_by_policy: Mapping[int, int] = field(default_factory=dict)
    model_revisions: Mapping[int, str] = field(default_factory=dict)

    @property
    def reference_version(self) -> int:
        return self.policy_ancestry[-1]

    def get_cursor(self, phase: str, source: str = "") -> int:
        """Up to which commit a phase has drawn the rows of a source ("": those of every source)."""
        return max(self.cursors.get((phase, source), -1), self.cursors.get((phase, ""), -1))


def compute_training_state(
    updates: Sequence[PolicyUpdate], manifests: Sequence[BatchManifest], base_revision: str = ""
) -> TrainingState:
    """Where training stands. `first_revision` is the revision of the first model's weights, policy version 0."""
    by_id = {manifest.record_id: manifest for manifest in manifests}
    cursors: dict[tuple[str, str], int] = {}
    rewards_at, reward_version = {0: 0}, 0
    for update in updates:
        if update.kind is PolicyKind.REWARD:
            reward_version = update.version
        else:
            rewards_at[update.version] = reward_version
        if update.restored_version is None and (manifest := by_id.get(update.batch_id)):
            for source, at in (manifest.cursors or {"": manifest.commit_seq_to}).items():
                key = (manifest.phase, source)
                cursors[key] = max(cursors.get(key, -1), at)
    present = get_newest_version(updates)
    revisions = {
        update.version: update.model.revision for update in updates if update.kind is PolicyKind.POLICY and update.model
    }
    for version in list(revisions):
        if get_weights_version(updates, version) == 0:
            revisions[version] = base_revision
    return TrainingState(
        policy_version=present,
        reward_version=reward_version,
        policy_ancestry=tuple(get_policy_ancestry(updates, present)),
        cursors=cursors,
        reward_version_by_policy=rewards_at,
        model_revisions={0: base_revision} | revisions,
    )


@dataclass(frozen=True)
class Batch:
    """A manifest and the rows it names, in its order, which is the order to train in: rows of similar length lie together."""

    manifest: BatchManifest
    rows: list[dict[str, Any]]
    sl_rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """The learner's settings when the manifest was written: a resumed batch trains with these."""
        settings: dict[str, Any] = json.loads(self.manifest.settings)
        return settings


@dataclass(frozen=True)
class RowRef:
    """What is known of a row before it is drawn. `length` is in characters (of a rollout: 0)."""

    row_id: str
    source: str
    commit_seq: int
    length: int = 0
    policy_version: int | None = None
    replayed: bool = False


# Candidates


def select_new_rows(store: Store, phase: str, state: TrainingState, *, limit: int) -> list[RowRef]:
    """The first `most` rows of each source that a phase without staleness has not trained on, in the order of their commits."""
    sql = f"""
        {_ROW_REF_SQL.format(phase=phase, length=_LENGTH_EXPRESSIONS[phase], view=_NEW_ROW_VIEWS[phase])}
        WHERE v.commit_seq > greatest(coalesce(c.at, -1), $3)
        QUALIFY row_number() OVER (PARTITION BY v.source ORDER BY v.commit_seq) <= $4
        ORDER BY v.commit_seq"""
    return _query_row_refs(store, sql, [*_get_cursor_parameters(phase, state), limit])


def sample_replayed_rows(store: Store, phase: str, state: TrainingState, *, count: int, seed: int) -> list[RowRef]:
    """`count` rows that earlier batches of a phase have drawn, chosen by a hash of their ids and the seed."""
    sql = f"""
        {_ROW_REF_SQL.format(phase=phase, length=_LENGTH_EXPRESSIONS[phase], view=_NEW_ROW_VIEWS[phase])}
        WHERE v.commit_seq <= greatest(coalesce(c.at, -1), $3)
        ORDER BY md5(v.record_id::VARCHAR || $5::VARCHAR), v.record_id LIMIT $4"""
    found = _query_row_refs(store, sql, [*_get_cursor_parameters(phase, state), count, seed])
    return [replace(light, replayed=True) for light in sorted(found, key=lambda light: light.commit_seq)]


_ROW_REF_SQL = """
    WITH cursors AS (SELECT unnest($1::VARCHAR[]) AS source, unnest($2::BIGINT[]) AS at)
    SELECT v.record_id, v.source, v.commit_seq, coalesce({length}, 0) AS length, v.policy_version
    FROM {view} v LEFT JOIN cursors c ON c.source = v.source"""


def _get_cursor_parameters(phase: str, state: TrainingState) -> list[Any]:
    """The sources that have a cursor of their own in a phase, these cursors, and the one of all others."""
    mine = [(source, at) for (of, source), at in state.cursors.items() if of == phase]
    return [[source for source, _ in mine], [at for _, at in mine], state.get_cursor(phase)]


def _query_row_refs(store: Store, sql: str, parameters: Sequence[Any]) -> list[RowRef]:
    rows = store.query(sql, parameters, limit_s=QUERY_TIMEOUT_S).rows
    return [RowRef(str(key), source, seq, int(length), version) for key, source, seq, length, version in rows]


def select_rollouts(
    store: Store,
    state: TrainingState,
    limits: StalenessLimits,
    *,
    allow_overlap: bool,
    served_revisions: Mapping[int, str] | None = None,
) -> tuple[list[RowRef], list[DroppedRollout]]:
    """The answers that PPO may train on, and a DroppedRollout for each that it may not any more.

    An answer that no PPO may ever use has its reason in the view (`exclusion_reason`) and is passed over. `served` is
    the revision that stands for each policy version on a server, whose weights cannot be compared.
    """
    sql = """
        SELECT response_id, completion_index, prompt_id, run_id, source, policy_version, model.revision AS revision, created_at,
               commit_seq
        FROM rollouts WHERE commit_seq > ? AND exclusion_reason IS NULL
        AND response_id NOT IN (SELECT dropped_id FROM dropped_rollouts) ORDER BY commit_seq, completion_index"""
    rows = store.query_dicts(sql, [state.get_cursor("ppo")], limit_s=QUERY_TIMEOUT_S)
    prompts = [] if allow_overlap else list({str(row["prompt_id"]) for row in rows})
    overlap = _find_reward_model_prompts(store, state, prompts) if prompts else set()
    usable: dict[str, RowRef] = {}
    drops = []
    for row in rows:
        reason = find_staleness_reason(row, state, limits) or find_revision_mismatch(row, state, served_revisions or {})
        if reason is None and str(row["prompt_id"]) in overlap:
            reason = "its prompt trained the reward model"
        if reason is not None:
            drops.append(_make_dropped_rollout(row, reason))
        else:
            key = str(row["response_id"])
            usable.setdefault(key, RowRef(key, row["source"], row["commit_seq"], 0, row["policy_version"]))
    return list(usable.values()), drops


def find_staleness_reason(row: Mapping[str, Any], state: TrainingState, limits: StalenessLimits) -> str | None:
    """Why a rollout is too old for the present policy; None when it is not."""
    version = row["policy_version"]
    if version < state.reference_version:
        return "sampled before the last supervised update"
    if version not in state.policy_ancestry:
        return "sampled by a policy that was rolled back"
    if state.policy_version - version > limits.max_staleness:
        return f"older than {limits.max_staleness} policy versions"
    if state.reward_version - state.reward_version_by_policy.get(version, 0) > limits.max_reward_staleness:
        return f"older than {limits.max_reward_staleness} reward-model versions"
    if limits.max_age_s and compute_age_s(row["created_at"]) > limits.max_age_s:
        return f"older than {limits.max_age_s:g} s"
    return None


def compute_age_s(created_at: datetime) -> float:
    return (datetime.now(UTC).replace(tzinfo=None) - created_at).total_seconds()


def find_revision_mismatch(row: Mapping[str, Any], state: TrainingState, served_revisions: Mapping[int, str]) -> str | None:
    """Why an answer was not sampled by the weights that its version names; None when it was."""
    wanted = state.model_revisions.get(row["policy_version"])
    if wanted is None or row["revision"] in (wanted, served_revisions.get(row["policy_version"])):
        return None
    return f"its model revision {row['revision']} is not that of policy {row['policy_version']}"


def _make_dropped_rollout(row: Mapping[str, Any], reason: str) -> DroppedRollout:
    dropped = str(row["response_id"])
    return DroppedRollout(
        record_id=ids.compute_record_id(
            "ppo-drop", [dropped], ids.compute_fingerprint("dropped_rollout", reason=reason), row["completion_index"]
        ),
        parent_ids=[dropped],
        prompt_id=str(row["prompt_id"]),
        run_id=row["run_id"],
        stage="train",
        policy_version=row["policy_version"],
        dropped_id=dropped,
        reason=reason,
    )


def _find_reward_model_prompts(store: Store, state: TrainingState, prompt_ids: Sequence[str]) -> set[str]:
    """Those of the prompts that the reward model was trained on, in its last batch or an earlier one."""
    sql = """
        WITH cursors AS (SELECT unnest(?::VARCHAR[]) AS source, unnest(?::BIGINT[]) AS at)
        SELECT DISTINCT v.prompt_id FROM preference_pairs v LEFT JOIN cursors c ON c.source = v.source
        WHERE v.commit_seq <= greatest(coalesce(c.at, -1), ?) AND v.prompt_id IN (SELECT unnest(?::UUID[]))"""
    parameters = [*_get_cursor_parameters("reward", state), list(prompt_ids)]
    return {str(prompt) for (prompt,) in store.query(sql, parameters, limit_s=QUERY_TIMEOUT_S).rows}


# Mixing and ordering


def sample_mixture(rows: Sequence[RowRef], mixture: Mapping[str, float], *, min_size: int, max_size: int) -> list[RowRef]:
    """The batch that a mix makes of the rows that wait, in the order of their commits.

    It is the largest batch that has the shares, taking the oldest rows of each part. A part without rows is left out and the
    other shares grow; where a scarce part would make the batch smaller than `least`, the other parts fill it up.
    """
    parts = _group_by_mixture_part(rows, mixture)
    scale = sum(mixture.get(part, 1.0) for part in parts)
    size = min(max_size, len(rows), max(compute_exact_mixture_size(rows, mixture), min_size))
    taken = {part: min(len(found), int(size * mixture.get(part, 1.0) / scale)) for part, found in parts.items()}
    for part in sorted(parts, key=lambda part: taken[part] - len(parts[part])):  # the fullest part first
        taken[part] += min(len(parts[part]) - taken[part], size - sum(taken.values()))
    chosen = [row for part, found in parts.items() for row in found[: taken[part]]]
    return sorted(chosen, key=lambda row: row.commit_seq)


def compute_exact_mixture_size(rows: Sequence[RowRef], mixture: Mapping[str, float]) -> int:
    """The size of the largest batch that has the shares of those parts of which there are rows."""
    parts = _group_by_mixture_part(rows, mixture)
    scale = sum(mixture.get(part, 1.0) for part in parts)
    return min((int(len(found) * scale / mixture.get(part, 1.0) + 1e-6) for part, found in parts.items()), default=0)


def _group_by_mixture_part(rows: Sequence[RowRef], mixture: Mapping[str, float]) -> dict[str, list[RowRef]]:
    """The rows by the part of the mix that they belong to; without a mix there is one part."""
    parts: dict[str, list[RowRef]] = {}
    for row in rows:
        parts.setdefault(_get_mixture_part(row.source, mixture), []).append(row)
    return parts


def _get_mixture_part(source: str, mixture: Mapping[str, float]) -> str:
    return source if source in mixture else _OTHER_SOURCES


def describe_mixture_shortfall(rows: Sequence[RowRef], mixture: Mapping[str, float]) -> str | None:
    """What to tell when a batch is not the mix that was asked for; None when it is, to a row or two."""
    got = Counter(_get_mixture_part(row.source, mixture) for row in rows)
    whole = sum(mixture.values())
    if not any(abs(got[part] - len(rows) * share / whole) > 1.5 for part, share in mixture.items()):
        return None
    words = [f"{part} {got[part] / len(rows):.0%} (wanted {share / whole:.0%})" for part, share in mixture.items()]
    missing = [part for part in mixture if not got[part]]
    why = f"; nothing new is there of {', '.join(missing)}" if missing else ""
    return f"the mix of this batch is {', '.join(words)}{why}"


def group_by_length(rows: Sequence[RowRef], batch_size: int, seed: int) -> list[RowRef]:
    """The rows shuffled, but so that those of one step are of similar length (the order of a length-grouped sampler)."""
    shuffle, order = random.Random(seed), list(rows)
    shuffle.shuffle(order)
    wide = batch_size * _STEPS_PER_LENGTH_GROUP
    order = [
        row for start in range(0, len(order), wide) for row in sorted(order[start : start + wide], key=lambda r: -r.length)
    ]
    steps = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    last = [steps.pop()] if len(order) % batch_size else []  # a short step stays the last
    shuffle.shuffle(steps)
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
) -> BatchManifest:
    """The manifest of a batch. Its id follows from its content and what it trains, so that it is the same after a crash."""
    record_ids = [light.row_id for light in row_refs]
    content = compute_content_hash([*rows, *sl_rows])
    text = json.dumps(settings, sort_keys=True)
    configuration = ids.compute_fingerprint(
        "batch",
        content=content,
        batch_number=batch_number,
        seed=seed,
        settings=text,
        policy=state.policy_version,
        reward=state.reward_version,
    )
    cursors: dict[str, int] = {}
    new = [light for light in row_refs if not light.replayed]
    for light in new:
        cursors[light.source] = max(cursors.get(light.source, -1), light.commit_seq)
    return BatchManifest(
        record_id=ids.compute_record_id(f"batch/{phase}", record_ids, configuration),
        run_id=run_id,
        stage="train",
        policy_version=state.policy_version,
        seed=seed,
        phase=phase,
        batch_number=batch_number,
        record_ids=record_ids,
        sl_record_ids=[str(row["record_id"]) for row in sl_rows],
        content_hash=content,
        commit_seq_from=min(light.commit_seq for light in new),
        commit_seq_to=max(light.commit_seq for light in new),
        base_policy_version=state.policy_version,
        base_reward_version=state.reward_version or None,
        reference_policy_version=state.reference_version if phase in _RL_PHASES else None,
        mixture=dict(Counter(str(row["source"]) for row in rows)),
        target_mixture=dict(mixture or {}),
        cursors={} if phase == "ppo" else cursors,
        replayed_record_ids=[light.row_id for light in row_refs if light.replayed],
        settings=text,
    )


def compute_content_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 over the rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def load_rows(store: Store, phase: str, record_ids: Sequence[str], rounds: Sequence[int] = ()) -> list[dict[str, Any]]:
    """The whole rows with these ids, in their order (the answers of one response, the rounds of one chain in theirs)."""
    usable = " AND exclusion_reason IS NULL" if phase == "ppo" else ""
    sql = f"SELECT {_TRAINING_COLUMNS[phase]} FROM {_MANIFEST_VIEWS[phase]} WHERE {KEY_COLUMNS[phase]} IN (SELECT unnest(?::UUID[])){usable}"
    parameters: list[Any] = [list(record_ids)]
    if rounds:
        sql, parameters = _SELECTED_ROUNDS_SQL.format(columns=_TRAINING_COLUMNS[phase]), [*parameters, list(rounds)]
    place = {record_id: n for n, record_id in enumerate(record_ids)}
    rows = store.query_dicts(sql, parameters, limit_s=QUERY_TIMEOUT_S)
    return sorted(rows, key=lambda row: (place[str(row[KEY_COLUMNS[phase]])], row.get("completion_index", 0)))


def is_superseded(manifest: BatchManifest, state: TrainingState) -> bool:
    """Whether the models that a batch was drawn for are not the present ones any more."""
    of_policy = manifest.base_policy_version != state.policy_version
    of_reward = (manifest.base_reward_version or 0) != state.reward_version
    return {"sft": of_policy, "reward": of_reward}.get(manifest.phase, of_policy or of_reward)


def rebuild_batch(store: Store, manifest: BatchManifest) -> Batch:
    """The rows that a manifest names; raises CharterError when they are not the same any more."""
    rows = load_rows(store, manifest.phase, manifest.record_ids, json.loads(manifest.settings).get("rounds", ()))
    sl_rows = load_rows(store, "sft", manifest.sl_record_ids) if manifest.sl_record_ids else []
    found = {str(row[KEY_COLUMNS[manifest.phase]]) for row in rows} | {str(row["record_id"]) for row in sl_rows}
    missing = {*manifest.record_ids, *manifest.sl_record_ids} - found
    if compute_content_hash([*rows, *sl_rows]) != manifest.content_hash:
        raise CharterError(
            f"batch {manifest.batch_number} ({manifest.phase}) cannot be rebuilt",
            f"{len(missing)} of its {len(manifest.record_ids)} rows are not in {store.path} (any more)"
            if missing
            else f"its rows in {store.path} are not what they were when it was drawn",
            "use the database that the batch was drawn from; rows that were forgotten are gone",
        )
    return Batch(manifest, rows, sl_rows)


def load_newest_chains(store: Store, count: int) -> list[dict[str, Any]]:
    """The newest finished chains, for the supervised half of a combined objective."""
    rows = store.query_dicts(
        "SELECT record_id FROM sft_examples ORDER BY commit_seq DESC LIMIT ?", [count], limit_s=QUERY_TIMEOUT_S
    )
    return load_rows(store, "sft", [str(row["record_id"]) for row in rows]) if rows else []


def parse_messages(row: Mapping[str, Any]) -> tuple[ChatMessage, ...]:
    return tuple(ChatMessage(**message) for message in row["messages"])
