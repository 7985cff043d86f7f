"""Batches: what one training phase trains on, drawn from DuckDB by commit sequence and written down before the first step.

A row trains once per phase: the cursor of a phase is the `commit_seq_to` of its last finished manifest. A manifest names the
rows, hashes their content and holds the seed and the settings, so that a crash resumes with the identical batch and an old
batch can be rebuilt. A rollout that PPO may not use is dropped with a reason, on the `drops` topic.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import CharterError
from engine.store import Store
from schemas import ids
from schemas.records import BatchManifest, Drop, Turn
from trainer.ppo import Rollout
from trainer.reward import PreferenceExample
from trainer.sft import SftExample

LIMIT_S = 60.0  # a batch is worth a longer look at the database than a screen is
VIEW = {"sft": "sft_examples", "reward": "preference_pairs", "ppo": "rollouts", "dpo": "preference_pairs"}
RL_PHASES = ("ppo", "dpo")  # held to the policy of the last supervised phase
# Where the rows of a manifest are read: a label that a person has overridden since is no pair any more, but was in its batch.
ROWS = VIEW | {"reward": "preference_labels", "dpo": "preference_labels"}
# The columns that a manifest's hash covers: a view may get more of them, and old batches can still be rebuilt.
HASHED = {
    "sft": (
        *("record_id", "prompt_id", "run_id", "turns", "completion", "stopped", "source", "ended", "rounds"),
        *("constitution", "principle_id", "policy_version", "created_at", "commit_seq"),
    ),
    "reward": (
        *("record_id", "prompt_id", "run_id", "response_id", "turns", "a", "b", "a_stopped", "b_stopped", "p_a", "gap", "mass"),
        *("flipped", "source", "pairing", "constitution", "principle_id", "label_source", "policy_version", "created_at"),
        "commit_seq",
    ),
    "ppo": (
        *("response_id", "prompt_id", "run_id", "turns", "source", "epoch", "model", "prompt_token_ids", "temperature"),
        *("candidate", "text", "token_ids", "logprobs", "stopped", "policy_version", "excluded_because", "created_at"),
        "commit_seq",
    ),
}
HASHED["dpo"] = HASHED["reward"]
KEY = {"sft": "record_id", "reward": "record_id", "ppo": "response_id", "dpo": "record_id"}


@dataclass(frozen=True)
class Standing:
    """Where training stands: versions, what each phase has consumed, and the version that the last SFT made."""

    policy_version: int = 0
    reward_version: int = 0
    reference_version: int = 0
    cursors: tuple[tuple[str, int], ...] = ()
    reward_batch: str | None = None

    def cursor(self, phase: str) -> int:
        return dict(self.cursors).get(phase, -1)


@dataclass(frozen=True)
class Batch:
    """A manifest and the rows it names, in its order."""

    manifest: BatchManifest
    rows: list[dict[str, Any]]
    sl_rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """The learner's settings when the manifest was written: a resumed batch trains with these."""
        settings: dict[str, Any] = json.loads(self.manifest.settings)
        return settings


def candidates(
    store: Store,
    phase: str,
    standing: Standing,
    *,
    limit: int,
    max_staleness: int = 4,
    allow_overlap: bool = False,
) -> tuple[list[str], list[Drop]]:
    """The ids of the first `limit` rows after the phase's cursor that it may train on, and the rollouts it may not."""
    light = "record_id, commit_seq"
    if phase == "ppo":
        light = "response_id, candidate, prompt_id, run_id, policy_version, excluded_because, commit_seq"
    sql = f"SELECT {light} FROM {VIEW[phase]} WHERE commit_seq > ? ORDER BY commit_seq"
    if phase != "ppo":  # of rollouts all are looked at: those that may not be used are dropped, not passed over
        sql += f" LIMIT {limit}"
    rows = store.records(sql, [standing.cursor(phase)], limit_s=LIMIT_S)
    reasons: list[str | None] = [None] * len(rows)
    if phase == "ppo":
        overlap = set() if allow_overlap else reward_prompts(store, standing)
        reasons = [exclusion(row, standing, max_staleness, overlap) for row in rows]
    kept = [str(row[KEY[phase]]) for row, reason in zip(rows, reasons, strict=True) if reason is None]
    drops = [drop(row, reason) for row, reason in zip(rows, reasons, strict=True) if reason is not None]
    return list(dict.fromkeys(kept))[:limit], drops


def exclusion(row: dict[str, Any], standing: Standing, max_staleness: int, overlap: set[str]) -> str | None:
    """Why PPO may not train on a rollout; None when it may."""
    if row["excluded_because"]:
        return str(row["excluded_because"])
    if row["policy_version"] < standing.reference_version:
        return "sampled before the last supervised update"
    if standing.policy_version - row["policy_version"] > max_staleness:
        return f"older than {max_staleness} policy versions"
    if str(row["prompt_id"]) in overlap:
        return "its prompt trained the reward model"
    return None


def drop(row: dict[str, Any], reason: str) -> Drop:
    dropped = str(row["response_id"])
    return Drop(
        record_id=ids.record_id("ppo-drop", [dropped], ids.fingerprint(reason=reason), row["candidate"]),
        parent_ids=[dropped],
        prompt_id=str(row["prompt_id"]),
        run_id=row["run_id"],
        stage="train",
        policy_version=row["policy_version"],
        dropped_id=dropped,
        reason=reason,
    )


def reward_prompts(store: Store, standing: Standing) -> set[str]:
    """The prompts that the present reward model was trained on."""
    if standing.reward_batch is None:
        return set()
    sql = """SELECT DISTINCT prompt_id FROM preferences
             WHERE record_id IN (SELECT unnest(record_ids) FROM batches WHERE record_id = ?)"""
    return {str(prompt) for (prompt,) in store.query(sql, [standing.reward_batch], limit_s=LIMIT_S).rows}


def manifest_of(
    phase: str,
    number: int,
    rows: Sequence[dict[str, Any]],
    sl_rows: Sequence[dict[str, Any]],
    standing: Standing,
    *,
    run_id: str,
    seed: int,
    settings: object,
) -> BatchManifest:
    """The manifest of a batch. Its id follows from its content and what it trains, so that it is the same after a crash."""
    record_ids = list(dict.fromkeys(str(row[KEY[phase]]) for row in rows))
    content = content_hash(phase, rows, sl_rows)
    text = json.dumps(settings, sort_keys=True)
    configuration = ids.fingerprint(
        content=content,
        number=number,
        seed=seed,
        settings=text,
        policy=standing.policy_version,
        reward=standing.reward_version,
    )
    return BatchManifest(
        record_id=ids.record_id(f"batch/{phase}", record_ids, configuration),
        run_id=run_id,
        stage="train",
        policy_version=standing.policy_version,
        seed=seed,
        phase=phase,
        number=number,
        record_ids=record_ids,
        sl_record_ids=[str(row["record_id"]) for row in sl_rows],
        content_hash=content,
        commit_seq_from=min(row["commit_seq"] for row in rows),
        commit_seq_to=max(row["commit_seq"] for row in rows),
        base_policy_version=standing.policy_version,
        base_reward_version=standing.reward_version or None,
        reference_policy_version=standing.reference_version if phase in RL_PHASES else None,
        mix=dict(Counter(mix_key(phase, row) for row in rows)),
        settings=text,
    )


def mix_key(phase: str, row: dict[str, Any]) -> str:
    if phase == "sft":
        return f"{row['source']}/{(row['ended'] or 'demonstration').lower()}"
    return str(row["source"])


def content_hash(phase: str, rows: Sequence[dict[str, Any]], sl_rows: Sequence[dict[str, Any]]) -> str:
    """SHA-256 over the rows, in order, and those of the supervised half."""
    digest = hashlib.sha256()
    for part, name in ((rows, phase), (sl_rows, "sft")):
        for row in part:
            hashed = {column: row[column] for column in HASHED[name]}
            digest.update(json.dumps(hashed, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def rows_of(store: Store, phase: str, record_ids: Sequence[str]) -> list[dict[str, Any]]:
    """The whole rows with these ids, in commit order."""
    usable = " AND excluded_because IS NULL" if phase == "ppo" else ""
    order = "commit_seq, candidate" if phase == "ppo" else "commit_seq"
    sql = f"SELECT * FROM {ROWS[phase]} WHERE {KEY[phase]} IN (SELECT unnest(?::UUID[])){usable} ORDER BY {order}"
    return store.records(sql, [list(record_ids)], limit_s=LIMIT_S)


def rebuild(store: Store, manifest: BatchManifest) -> Batch:
    """The rows that a manifest names; raises CharterError when they are not the same any more."""
    rows = rows_of(store, manifest.phase, manifest.record_ids)
    sl_rows = rows_of(store, "sft", manifest.sl_record_ids) if manifest.sl_record_ids else []
    if content_hash(manifest.phase, rows, sl_rows) != manifest.content_hash:
        raise CharterError(
            f"batch {manifest.record_id} cannot be rebuilt",
            f"{len(rows)} of its rows are in {store.path}, and their content is not what the manifest says",
            "use the database that the batch was drawn from",
        )
    return Batch(manifest, rows, sl_rows)


def newest_chains(store: Store, count: int) -> list[dict[str, Any]]:
    """The newest finished chains, for the supervised half of a combined objective."""
    rows = store.records("SELECT record_id FROM sft_examples ORDER BY commit_seq DESC LIMIT ?", [count], limit_s=LIMIT_S)
    return rows_of(store, "sft", [str(row["record_id"]) for row in rows]) if rows else []


def turns_of(row: dict[str, Any]) -> tuple[Turn, ...]:
    return tuple(Turn(**turn) for turn in row["turns"])


def sft_example(row: dict[str, Any]) -> SftExample:
    return SftExample(
        turns=turns_of(row), completion=row["completion"], stopped=row["stopped"], record_id=str(row["record_id"])
    )


def preference_example(row: dict[str, Any]) -> PreferenceExample:
    return PreferenceExample(
        turns=turns_of(row),
        a=row["a"],
        b=row["b"],
        p_a=row["p_a"],
        record_id=str(row["record_id"]),
        a_stopped=row["a_stopped"],
        b_stopped=row["b_stopped"],
        exchangeable=row["pairing"] == "candidates" and row["label_source"] == "AI",
    )


def rollout(row: dict[str, Any]) -> Rollout:
    return Rollout(
        prompt_token_ids=tuple(row["prompt_token_ids"]),
        token_ids=tuple(row["token_ids"]),
        logprobs=tuple(row["logprobs"]),
        stopped=row["stopped"],
        policy_version=row["policy_version"],
        record_id=str(row["response_id"]),
        temperature=row["temperature"],
    )
