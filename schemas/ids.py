"""Deterministic ids: repeated work has the same id, and a changed configuration gives another id.

* `prompt_id` = hash(messages, epoch).
* `record_id` = hash(stage, parent ids, configuration fingerprint, sample index).
* A fingerprint contains what changes a result (model revision, policy version, template, sampling, constitution hash), and not
  what only changes where or how fast it is computed (run, device, batch size, address, timeouts).

Ids must not change when names in the code change. `FINGERPRINT_KEYS` and `SEED_PURPOSES` therefore map all hashed values to
the names in the hash, and tests/schemas/test_frozen_ids.py pins the results.

Ids are 16 bytes of BLAKE2b, written as UUIDs: 16 bytes in DuckDB, text elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence

from schemas.records import ChatMessage


def compute_id(*parts: object) -> str:
    """Return the id of some JSON values. Canonical JSON distinguishes ("a", "bc") from ("ab", "c")."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    # "surrogatepass": text with a lone surrogate from a JSON escape must get an id too, not crash the producer.
    return str(uuid.UUID(bytes=hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()))


def compute_prompt_id(messages: Sequence[ChatMessage], epoch: int = 0) -> str:
    """Return the id of a prompt, from its dialogue and its epoch."""
    return compute_id("prompt", [[message.role, message.content] for message in messages], epoch)


def compute_record_id(stage: str, parent_ids: Sequence[str], fingerprint: str, sample_index: int = 0) -> str:
    """Return the id of the record that a stage produces from its parents under one configuration."""
    return compute_id("record", stage, list(parent_ids), fingerprint, sample_index)


def compute_fingerprint(subject: str, /, **configuration: object) -> str:
    """Return the hash of the configuration that changes a result.

    `subject` is a row of `FINGERPRINT_KEYS`; the keywords are names in that row, and their values must be JSON.
    A custom stage uses the subject "custom_stage" with any keywords. Raise KeyError for a keyword that the row lacks.
    """
    keys = {name: name for name in configuration} if subject == "custom_stage" else FINGERPRINT_KEYS[subject]
    hashed = {keys[name]: _FROZEN_VALUES.get((subject, name, str(value)), value) for name, value in configuration.items()}
    return compute_id("configuration", hashed)


def compute_seed(record_id: str, sample_index: int = 0) -> int:
    """Return a 63-bit seed that depends on an id: the same record always samples the same principle and the same noise."""
    return uuid.UUID(compute_id("seed", record_id, sample_index)).int >> 65


def compute_stage_seed(purpose: str, response_id: str, index: int) -> int:
    """Return the seed of a stage's work on a response in one round (or for one pair), both called `index`.

    `purpose` is one of `SEED_PURPOSES`. The seed depends on the response and not on the constitution: the same response under
    two constitutions samples with the same noise, so that a difference between two runs comes from the principles.
    """
    if purpose not in SEED_PURPOSES:
        raise KeyError(purpose)
    return compute_seed(f"{response_id}/{purpose}", index)


def _make_keys(names: str, **renamed: str) -> dict[str, str]:
    return {name: name for name in names.split()} | renamed


# Subject -> name in the code -> name in the hash. A rename changes only the names in the code.
FINGERPRINT_KEYS: dict[str, dict[str, str]] = {
    "prompt": {},
    "source": _make_keys("content run epoch kind", rows="lines", publish_prompts="answer"),
    "human_preference": _make_keys("p_a source", response_a="a", response_b="b"),
    "demonstration": _make_keys("completion", is_complete="stopped"),
    "template": _make_keys("template prefill", num_votes="votes"),
    "respond": _make_keys("model policy_version template sampling", num_completions="samples"),
    "critique": _make_keys(
        "model template verdict constitution sampling rounds selection early_stop few_shot skip_sources", thresholds="limits"
    ),
    "revise": _make_keys("model template constitution sampling few_shot"),
    "judge": _make_keys(
        "model template constitution pairing principles clamp max_tokens",
        answer_mode="form",
        label_order="order",
        min_option_mass="min_mass",
        reject_position_flips="reject_flips",
    ),
    "imported_pair": _make_keys("", response_a="a", response_b="b"),
    "human_label": _make_keys("p_a at"),
    "served_model": _make_keys("url model"),
    "run": _make_keys("run configuration"),
    "run_configuration": _make_keys("settings constitution version"),
    "replay": _make_keys("settings constitution", selection="what"),
    "batch": _make_keys("content seed settings policy reward", batch_number="number"),
    "policy_update": _make_keys("version"),
    "policy_restore": _make_keys("version", restored_version="restores"),
    "pause": _make_keys("phase reason at", paused="on"),
    "metric": _make_keys("", kind="of"),
    "score": _make_keys("", reward_version="reward"),
    "dropped_rollout": _make_keys("reason"),
    "rollback_incident": _make_keys("reason"),
    "incident": _make_keys("", title="what"),
    "monitor": _make_keys("run version"),
}
# (subject, name, value in the code) -> the value in the hash.
_FROZEN_VALUES = {
    ("judge", "answer_mode", "logprobs"): "options",
    ("critique", "selection", "sample"): "random",
    ("critique", "selection", "rotate"): "rotation",
}
SEED_PURPOSES = ("principle", "critique", "revise", "judge")
