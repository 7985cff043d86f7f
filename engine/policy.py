"""Which policy answers now, which ones there were, and how to go back to an earlier one.

Everything here is read from the topics `policies` and `pauses`. Going back is going forward: a new PolicyUpdate with the next
version points at the older weights and names what it restored_version, so that versions only rise and every stamp stays true. The
weights change between batches, never within one, and every record carries the version of the weights that made it.
"""

from __future__ import annotations

import logging
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


# Versions. `known` are the updates in the order of the log.


def read_policy_updates(bus: Bus) -> list[PolicyUpdate]:
    """Every policy and reward update so far, in order; of two with one version the first."""
    return deduplicate_updates([decode_record(value, PolicyUpdate) for value in read_values(bus, _POLICY_TOPIC)])


def deduplicate_updates(updates: Iterable[PolicyUpdate]) -> list[PolicyUpdate]:
    kept: dict[tuple[PolicyKind, int], PolicyUpdate] = {}
    for update in updates:
        kept.setdefault((update.kind, update.version), update)
    return list(kept.values())


def index_policies(updates: Iterable[PolicyUpdate]) -> dict[int, PolicyUpdate]:
    """The policies by version; version 0 is the first model and has no update."""
    return {update.version: update for update in updates if update.kind is PolicyKind.POLICY}


def get_newest_version(updates: Iterable[PolicyUpdate], kind: PolicyKind = PolicyKind.POLICY) -> int:
    return max((update.version for update in updates if update.kind is kind), default=0)


def get_weights_version(updates: Sequence[PolicyUpdate], version: int) -> int:
    """The version whose training made the weights that `version` answers with."""
    by_version = index_policies(updates)
    while version in by_version and by_version[version].restored_version is not None:
        version = by_version[version].restored_version or 0
    return version


def get_policy_ancestry(updates: Sequence[PolicyUpdate], version: int) -> list[int]:
    """`version` and the versions that it comes from, back to the one that the last supervised phase made (0: the first model).

    Its last entry is the reference of the RL phase; answers of all of these versions belong to that phase.
    """
    by_version, found = index_policies(updates), [version]
    while (update := by_version.get(found[-1])) is not None:
        if update.restored_version is not None:
            found.append(update.restored_version)
        elif update.phase == "sft":
            break
        else:
            found.append(update.base_version)
    return found


def get_parent_version(updates: Sequence[PolicyUpdate], version: int) -> int:
    """The version that the weights of `version` were trained from: where a rollback leads to."""
    update = index_policies(updates).get(get_weights_version(updates, version))
    if update is None:
        raise UsageError(
            "there is no earlier policy to go back to",
            f"policy {version} has the weights of the first model",
            "type: charter policy list",
        )
    return update.base_version


def make_restore_update(updates: Sequence[PolicyUpdate], version: int, *, run_id: str, base_model: str) -> PolicyUpdate:
    """The update that makes the weights of `version` the newest policy; `first` names the first model, which is version 0."""
    source = get_weights_version(updates, version)
    update = index_policies(updates).get(source)
    if update is None and version:
        raise UsageError(
            f"there is no policy {version} on the log", "training has made no such version", "type: charter policy list"
        )
    present = get_newest_version(updates)
    batch_id = update.batch_id if update else _NIL_UUID
    return PolicyUpdate(
        record_id=ids.compute_record_id(
            "restore", [batch_id], ids.compute_fingerprint("policy_restore", version=present + 1, restored_version=source)
        ),
        parent_ids=[update.record_id] if update else [],
        run_id=run_id,
        stage="policy",
        model=update.model if update else ModelRef(id=base_model, revision=""),
        policy_version=present + 1,
        kind=PolicyKind.POLICY,
        version=present + 1,
        phase=RESTORE_PHASE,
        uri=update.uri if update else base_model,
        content_hash=update.content_hash if update else "",
        base_version=present,
        batch_id=batch_id,
        restored_version=source,
    )


# Pauses


def get_paused_phases(pauses: Iterable[Pause]) -> dict[str, str]:
    """The phases that are paused now, and why."""
    newest = {record.phase: record for record in pauses}
    return {phase: record.reason for phase, record in newest.items() if record.paused}


def read_paused_phases(bus: Bus) -> dict[str, str]:
    return get_paused_phases(decode_record(value, Pause) for value in read_values(bus, Pause.topic))


def make_pause(phase: str, reason: str, *, run_id: str, paused: bool = True) -> Pause:
    """The record that pauses a phase, or lets it go on (`on` false)."""
    made = Pause(record_id=_NIL_UUID, run_id=run_id, stage="policy", phase=phase, paused=paused, reason=reason)
    stamp = ids.compute_fingerprint("pause", phase=phase, paused=paused, reason=reason, at=made.created_at.isoformat())
    return made.model_copy(update={"record_id": ids.compute_record_id("pause", [], stamp)})


# Following


class PolicyFollower:
    """Follows `policies`; `open_update` loads the weights of an update. `first` is policy version 0.

    Weights that cannot be read (a damaged folder, storage that is away) are tried again later; until then the policy that was
    there goes on answering, under its own version.
    """

    def __init__(self, bus: Bus, base_model: Model, open_update: Callable[[PolicyUpdate], Model]) -> None:
        self.base_model = self.model = base_model
        self.version = 0
        self.open_update = open_update
        self.reader = bus.open_reader(bus.beginning_offsets([_POLICY_TOPIC]))
        self.get_end_offsets = bus.end_offsets
        self.pending_update: PolicyUpdate | None = None
        self.retry_at = 0.0

    def get_current_policy(self) -> tuple[Model, int]:
        """The policy to answer with now, and its version. Loading a new one takes as long as it takes to read its weights."""
        self.refresh()
        if self.pending_update is not None and time.monotonic() >= self.retry_at:
            self.switch_to(self.pending_update)
        return self.model, self.version

    def switch_to(self, update: PolicyUpdate) -> None:
        try:
            self.model = self.base_model if update.restored_version == 0 else self.open_update(update)
        except (CharterError, OSError) as error:
            logger.error("policy %d cannot be loaded, policy %d goes on answering: %s", update.version, self.version, error)
            self.retry_at = time.monotonic() + _LOAD_RETRY_INTERVAL_S
            return
        self.version, self.pending_update = update.version, None
        logger.info("answering with policy %d from now on", update.version)

    def refresh(self) -> None:
        """Note the newest policy among the updates that have arrived since the last look."""
        ends = self.get_end_offsets([_POLICY_TOPIC])
        while any(self.reader.positions().get(place, 0) < end for place, end in ends.items()):
            for message in self.reader.poll(1.0, _MAX_POLL_RECORDS):
                update = decode_record(message.value or b"", PolicyUpdate)
                newest = max(self.version, self.pending_update.version if self.pending_update else 0)
                if update.kind is PolicyKind.POLICY and update.version > newest:
                    self.pending_update, self.retry_at = update, 0.0

    def close(self) -> None:
        self.reader.close()
