"""Deterministic ids: the same work always has the same id, changed configuration has another.

* `prompt_id` = hash(messages, epoch).
* `record_id` = hash(stage, parent ids, configuration fingerprint, sample index).
* A fingerprint has what changes a result (model revision, policy version, template, sampling, constitution hash) and not
  what only changes where or how fast it is made (run, device, batch size, address, timeouts).

Ids are the first 16 bytes of BLAKE2b, written as UUIDs: 16 bytes in DuckDB, text everywhere else.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence

from schemas.records import ChatMessage


def compute_id(*parts: object) -> str:
    """The id of some JSON values. Canonical JSON keeps ("a", "bc") and ("ab", "c") apart."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    # "surrogatepass": a lone surrogate from a JSON escape must get an id too, not crash the producer.
    return str(uuid.UUID(bytes=hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()))


def compute_prompt_id(messages: Sequence[ChatMessage], epoch: int = 0) -> str:
    """The id of a prompt: of its dialogue and its epoch."""
    return compute_id("prompt", [[message.role, message.content] for message in messages], epoch)


def compute_record_id(stage: str, parent_ids: Sequence[str], fingerprint: str, sample_index: int = 0) -> str:
    """The id of what a stage makes of its parents under one configuration."""
    return compute_id("record", stage, list(parent_ids), fingerprint, sample_index)


def compute_fingerprint(**configuration: object) -> str:
    """The hash of the configuration that changes a result; values must be JSON."""
    return compute_id("configuration", configuration)


def compute_seed(record_id: str, sample_index: int = 0) -> int:
    """A 63-bit seed drawn from an id: the same record always draws the same principle and the same noise."""
    return uuid.UUID(compute_id("seed", record_id, sample_index)).int >> 65
