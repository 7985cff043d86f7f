"""Deterministic ids. The same work always has the same id, and work with a changed configuration has another id.

* `prompt_id` = hash(messages, epoch). A prompt of an evaluation suite has another one: hash(suite, item, transformation, messages).
* `record_id` = hash(stage, parent ids, configuration fingerprint, sample index).
* A fingerprint covers the configuration that can change a result: model revision, policy version, template, sampling and
  constitution hash. It does not cover run, device, batch size, address and timeouts, because these do not change a result.

An id must not change when a name in the code changes. `FINGERPRINT_KEYS` therefore maps the names in the code to the names in
the hash, and the names in `SEED_PURPOSES` are part of seeds. tests/schemas/test_frozen_ids.py checks that ids do not change.

An id is a BLAKE2b hash of 16 bytes in the form of a UUID. DuckDB stores the 16 bytes; everywhere else an id is text.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence

from schemas.records import ChatMessage


def compute_id(*parts: object) -> str:
    """Return the id of JSON values. The hash of their canonical JSON differs for ("a", "bc") and ("ab", "c")."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    # A JSON escape can contain a lone surrogate. With "surrogatepass", such a text has an id instead of raising an error.
    return str(uuid.UUID(bytes=hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()))


def compute_prompt_id(messages: Sequence[ChatMessage], epoch: int = 0) -> str:
    """Return the id of a prompt, from its dialogue and its epoch."""
    return compute_id("prompt", [[message.role, message.content] for message in messages], epoch)


def compute_suite_prompt_id(suite: str, item: str, transform: str, messages: Sequence[ChatMessage]) -> str:
    """Return the id of a prompt of an evaluation suite. It differs from the id of the same dialogue outside the suite."""
    return compute_id("suite prompt", suite, item, transform, [[message.role, message.content] for message in messages])


def compute_record_id(stage: str, parent_ids: Sequence[str], fingerprint: str, sample_index: int = 0) -> str:
    """Return the id of the record that a stage produces from its parents under one configuration."""
    return compute_id("record", stage, list(parent_ids), fingerprint, sample_index)


def compute_fingerprint(subject: str, /, **configuration: object) -> str:
    """Return the hash of the configuration that changes a result.

    `subject` is a key of `FINGERPRINT_KEYS`. The keywords must be names that this dictionary lists for the subject, and their
    values must be JSON values. The subject "custom_stage" accepts any keywords. Raise KeyError for any other subject or
    keyword.
    """
    keys = {name: name for name in configuration} if subject == "custom_stage" else FINGERPRINT_KEYS[subject]
    hashed = {keys[name]: _FROZEN_VALUES.get((subject, name, str(value)), value) for name, value in configuration.items()}
    return compute_id("configuration", hashed)


def compute_seed(record_id: str, sample_index: int = 0) -> int:
    """Return a 63-bit seed that depends only on an id and an index, so that repeated work uses the same random numbers."""
    return uuid.UUID(compute_id("seed", record_id, sample_index)).int >> 65


def compute_stage_seed(purpose: str, response_id: str, index: int) -> int:
    """Return the seed of a stage's work on a response. `index` is the number of the round or of the pair.

    `purpose` is one of `SEED_PURPOSES`. The seed depends on the response and not on the constitution. Two runs with different
    constitutions therefore use the same random numbers, and a difference between their results comes from the principles.
    """
    if purpose not in SEED_PURPOSES:
        raise KeyError(purpose)
    return compute_seed(f"{response_id}/{purpose}", index)


def _make_keys(names: str, **renamed: str) -> dict[str, str]:
    return {name: name for name in names.split()} | renamed


# Subject -> name in the code -> name in the hash. The names in the hash must never change.
FINGERPRINT_KEYS: dict[str, dict[str, str]] = {
    "prompt": {},
    "suite_prompt": _make_keys("subset instructions"),
    "source": _make_keys("content run epoch kind", rows="lines", publish_prompts="answer"),
    "generation": _make_keys("recipe run seed"),
    "human_preference": _make_keys("p_a source", response_a="a", response_b="b"),
    "demonstration": _make_keys("completion", is_complete="stopped"),
    "template": _make_keys("template prefill", num_votes="votes"),
    "respond": _make_keys("model policy_version template sampling", num_completions="samples"),
    "contrast_prompt": _make_keys("respond constitution role principles header"),
    "contrast": _make_keys("pairing"),
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
    "grade": _make_keys("subject grader grader_version principle model template constitution"),
    "imported_pair": _make_keys("", response_a="a", response_b="b"),
    "human_label": _make_keys("p_a at"),
    "served_model": _make_keys("url model"),
    "run": _make_keys("run configuration"),
    "run_start": _make_keys("run"),
    "run_configuration": _make_keys("settings constitution version"),
    "replay": _make_keys("settings constitution", selection="what"),
    "batch": _make_keys("content seed settings policy reward", batch_number="number"),
    "policy_update": _make_keys("version"),
    "policy_restore": _make_keys("version", restored_version="restores"),
    "pause": _make_keys("phase reason at", paused="on"),
    "allowance": _make_keys("policy_version offsets num_completions reason at"),
    "not_needed": {},
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
