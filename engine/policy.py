"""Find the current policy and its history, and roll back to an earlier version.

All state is read from the topics `policies` and `pauses`. A rollback is a new PolicyUpdate with the next version. The update
refers to the weights of the restored version. `restored_version` contains this version. So version numbers only increase, and
the versions in records stay valid. The weights change only between batches. Every record contains the version of the weights
that produced it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from uuid import UUID

from engine.bus.port import Bus
from engine.bus.read import read_values
from engine.errors import CharterError, UsageError
from engine.models.interface import Model
from schemas import ids
from schemas.codec import decode_record
from schemas.records import ModelRef, Pause, PolicyKind, PolicyUpdate

logger = logging.getLogger("charter.policy")
_POLICY_TOPIC = PolicyUpdate.topic
_MAX_POLL_RECORDS = 500
_LOAD_RETRY_INTERVAL_S = 30.0
_NIL_UUID = str(UUID(int=0))
RESTORE_PHASE = "restore"


# Versions: the functions below expect `updates` in the order of the log.


def read_policy_updates(bus: Bus) -> list[PolicyUpdate]:
    """Return all policy and reward-model updates in order. If two updates have the same version, only the first is
    returned."""
    return deduplicate_updates([decode_record(value, PolicyUpdate) for value in read_values(bus, _POLICY_TOPIC)])


def deduplicate_updates(updates: Iterable[PolicyUpdate]) -> list[PolicyUpdate]:
    """Keep the first update of each kind and version."""
    kept: dict[tuple[PolicyKind, int], PolicyUpdate] = {}
    for update in updates:
        kept.setdefault((update.kind, update.version), update)
    return list(kept.values())


def index_policies(updates: Iterable[PolicyUpdate]) -> dict[int, PolicyUpdate]:
    """Return a mapping of version to policy update. Version 0 is the base model and has no update."""
    return {update.version: update for update in updates if update.kind is PolicyKind.POLICY}


def get_newest_version(updates: Iterable[PolicyUpdate], kind: PolicyKind = PolicyKind.POLICY) -> int:
    """Return the newest version of a kind, or 0 if there are no updates."""
    return max((update.version for update in updates if update.kind is kind), default=0)


def get_weights_version(updates: Sequence[PolicyUpdate], version: int) -> int:
    """Return the version whose training produced the weights of `version`. The two versions differ after a rollback."""
    by_version = index_policies(updates)
    while version in by_version and by_version[version].restored_version is not None:
        version = by_version[version].restored_version or 0
    return version


def get_policy_ancestry(updates: Sequence[PolicyUpdate], version: int) -> list[int]:
    """Return `version` and its ancestors, back to the result of the last SFT phase (or to 0, the base model).

    The last entry is the reference policy of the RL phase. The completions of all these versions belong to this phase.
    """
    by_version, ancestry = index_policies(updates), [version]
    while (update := by_version.get(ancestry[-1])) is not None:
        if update.restored_version is not None:
            ancestry.append(update.restored_version)
        elif update.phase == "sft":
            break
        else:
            ancestry.append(update.base_version)
    return ancestry


def get_parent_version(updates: Sequence[PolicyUpdate], version: int) -> int:
    """Return the version from which the weights of `version` were trained. A rollback restores this version."""
    update = index_policies(updates).get(get_weights_version(updates, version))
    if update is None:
        raise UsageError(
            "there is no earlier policy for a rollback",
            f"policy {version} has the weights of the base model",
            "type: charter policy list",
        )
    return update.base_version


def make_restore_update(updates: Sequence[PolicyUpdate], version: int, *, run_id: str, base_model: str) -> PolicyUpdate:
    """Return the update that makes the weights of `version` the newest policy. `base_model` is the model of version 0.

    Raise UsageError if there is no such version.
    """
    source = get_weights_version(updates, version)
    update = index_policies(updates).get(source)
    if update is None and version:
        raise UsageError(
            f"there is no policy {version} on the log", "training has not produced this version", "type: charter policy list"
        )
    newest = get_newest_version(updates)
    batch_id = update.batch_id if update else _NIL_UUID
    return PolicyUpdate(
        record_id=ids.compute_record_id(
            "restore", [batch_id], ids.compute_fingerprint("policy_restore", version=newest + 1, restored_version=source)
        ),
        parent_ids=[update.record_id] if update else [],
        run_id=run_id,
        stage="policy",
        model=update.model if update else ModelRef(id=base_model, revision=""),
        policy_version=newest + 1,
        kind=PolicyKind.POLICY,
        version=newest + 1,
        phase=RESTORE_PHASE,
        uri=update.uri if update else base_model,
        content_hash=update.content_hash if update else "",
        base_version=newest,
        batch_id=batch_id,
        restored_version=source,
    )


# Pauses


def get_paused_phases(pauses: Iterable[Pause]) -> dict[str, str]:
    """Return the paused phases with their reasons. A phase is paused if its newest record is a pause."""
    newest = {record.phase: record for record in pauses}
    return {phase: record.reason for phase, record in newest.items() if record.paused}


def read_paused_phases(bus: Bus) -> dict[str, str]:
    """Read the paused phases and their reasons from the log."""
    return get_paused_phases(decode_record(value, Pause) for value in read_values(bus, Pause.topic))


def make_pause(phase: str, reason: str, *, run_id: str, paused: bool = True) -> Pause:
    """Return the record that pauses a training phase, or resumes it if `paused` is false."""
    pause = Pause(record_id=_NIL_UUID, run_id=run_id, stage="policy", phase=phase, paused=paused, reason=reason)
    fingerprint = ids.compute_fingerprint("pause", phase=phase, paused=paused, reason=reason, at=pause.created_at.isoformat())
    return pause.model_copy(update={"record_id": ids.compute_record_id("pause", [], fingerprint)})


# The newest policy


class PolicyFollower:
    """Reads new policies from the topic `policies`. `open_update` loads the weights of an update. `base_model` is version 0.

    The class is thread-safe: while one thread loads weights, the others wait.

    If the weights cannot be read (a damaged folder, unavailable storage), loading is retried later. Until then the previous
    policy stays in use, and records have the previous version.
    """

    def __init__(self, bus: Bus, base_model: Model, open_update: Callable[[PolicyUpdate], Model]) -> None:
        self.model = base_model
        self.version = 0
        self.open_update = open_update
        self.reader = bus.open_reader(bus.beginning_offsets([_POLICY_TOPIC]))
        self.get_end_offsets = bus.end_offsets
        self.pending_update: PolicyUpdate | None = None
        self.retry_at = 0.0
        self.lock = threading.Lock()

    def get_current_policy(self) -> tuple[Model, int]:
        """Return the current policy and its version. If there is a new policy, load its weights first."""
        with self.lock:
            self.refresh()
            if self.pending_update is not None and time.monotonic() >= self.retry_at:
                self.switch_to(self.pending_update)
            return self.model, self.version

    def switch_to(self, update: PolicyUpdate) -> None:
        try:
            self.model = self.open_update(update)
        except (CharterError, OSError) as error:
            logger.error("policy %d cannot be loaded, policy %d stays in use: %s", update.version, self.version, error)
            self.retry_at = time.monotonic() + _LOAD_RETRY_INTERVAL_S
            return
        self.version, self.pending_update = update.version, None
        logger.info("policy %d is in use", update.version)

    def refresh(self) -> None:
        """Read new updates and set the newest policy as the pending update."""
        ends = self.get_end_offsets([_POLICY_TOPIC])
        while any(self.reader.positions().get(tp, 0) < end for tp, end in ends.items()):
            for consumer_record in self.reader.poll(1.0, _MAX_POLL_RECORDS):
                update = decode_record(consumer_record.value or b"", PolicyUpdate)
                newest = max(self.version, self.pending_update.version if self.pending_update else 0)
                if update.kind is PolicyKind.POLICY and update.version > newest:
                    self.pending_update, self.retry_at = update, 0.0

    def close(self) -> None:
        self.reader.close()
