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
from engine.models.port import Model
from schemas import ids
from schemas.codec import decode
from schemas.records import ModelRef, Pause, PolicyKind, PolicyUpdate

log = logging.getLogger("charter.policy")
TOPIC = PolicyUpdate.topic
BATCH = 500
OPEN_AGAIN_S = 30.0
NO_BATCH = str(UUID(int=0))
RESTORE = "restore"


# Versions. `known` are the updates in the order of the log.


def updates(bus: Bus) -> list[PolicyUpdate]:
    """Every policy and reward update so far, in order; of two with one version the first."""
    return first_of_each([decode(value, PolicyUpdate) for value in read_values(bus, TOPIC)])


def first_of_each(found: Iterable[PolicyUpdate]) -> list[PolicyUpdate]:
    kept: dict[tuple[PolicyKind, int], PolicyUpdate] = {}
    for update in found:
        kept.setdefault((update.kind, update.version), update)
    return list(kept.values())


def policies(known: Iterable[PolicyUpdate]) -> dict[int, PolicyUpdate]:
    """The policies by version; version 0 is the first model and has no update."""
    return {update.version: update for update in known if update.kind is PolicyKind.POLICY}


def newest_version(known: Iterable[PolicyUpdate], kind: PolicyKind = PolicyKind.POLICY) -> int:
    return max((update.version for update in known if update.kind is kind), default=0)


def weights_of(known: Sequence[PolicyUpdate], version: int) -> int:
    """The version whose training made the weights that `version` answers with."""
    by_version = policies(known)
    while version in by_version and by_version[version].restored_version is not None:
        version = by_version[version].restored_version or 0
    return version


def line(known: Sequence[PolicyUpdate], version: int) -> list[int]:
    """`version` and the versions that it comes from, back to the one that the last supervised phase made (0: the first model).

    Its last entry is the reference of the RL phase; answers of all of these versions belong to that phase.
    """
    by_version, found = policies(known), [version]
    while (update := by_version.get(found[-1])) is not None:
        if update.restored_version is not None:
            found.append(update.restored_version)
        elif update.phase == "sft":
            break
        else:
            found.append(update.base_version)
    return found


def version_before(known: Sequence[PolicyUpdate], version: int) -> int:
    """The version that the weights of `version` were trained from: where a rollback leads to."""
    update = policies(known).get(weights_of(known, version))
    if update is None:
        raise UsageError(
            "there is no earlier policy to go back to",
            f"policy {version} has the weights of the first model",
            "type: charter policy list",
        )
    return update.base_version


def restored(known: Sequence[PolicyUpdate], version: int, *, run_id: str, first: str) -> PolicyUpdate:
    """The update that makes the weights of `version` the newest policy; `first` names the first model, which is version 0."""
    source = weights_of(known, version)
    update = policies(known).get(source)
    if update is None and version:
        raise UsageError(
            f"there is no policy {version} on the log", "training has made no such version", "type: charter policy list"
        )
    present = newest_version(known)
    batch_id = update.batch_id if update else NO_BATCH
    return PolicyUpdate(
        record_id=ids.record_id("restore", [batch_id], ids.fingerprint(version=present + 1, restores=source)),
        parent_ids=[update.record_id] if update else [],
        run_id=run_id,
        stage="policy",
        model=update.model if update else ModelRef(id=first, revision=""),
        policy_version=present + 1,
        kind=PolicyKind.POLICY,
        version=present + 1,
        phase=RESTORE,
        uri=update.uri if update else first,
        content_hash=update.content_hash if update else "",
        base_version=present,
        batch_id=batch_id,
        restored_version=source,
    )


# Pauses


def paused(found: Iterable[Pause]) -> dict[str, str]:
    """The phases that are paused now, and why."""
    newest = {record.phase: record for record in found}
    return {phase: record.reason for phase, record in newest.items() if record.paused}


def pauses(bus: Bus) -> dict[str, str]:
    return paused(decode(value, Pause) for value in read_values(bus, Pause.topic))


def pause(phase: str, reason: str, *, run_id: str, on: bool = True) -> Pause:
    """The record that pauses a phase, or lets it go on (`on` false)."""
    made = Pause(record_id=NO_BATCH, run_id=run_id, stage="policy", phase=phase, paused=on, reason=reason)
    stamp = ids.fingerprint(phase=phase, on=on, reason=reason, at=made.created_at.isoformat())
    return made.model_copy(update={"record_id": ids.record_id("pause", [], stamp)})


# Following


class PolicyFollower:
    """Follows `policies`; `open_update` loads the weights of an update. `first` is policy version 0.

    Weights that cannot be read (a damaged folder, storage that is away) are tried again later; until then the policy that was
    there goes on answering, under its own version.
    """

    def __init__(self, bus: Bus, first: Model, open_update: Callable[[PolicyUpdate], Model]) -> None:
        self.first = self.model = first
        self.version = 0
        self.open_update = open_update
        self.reader = bus.reader(bus.begin_offsets([TOPIC]))
        self.ends = bus.end_offsets
        self.wanted: PolicyUpdate | None = None
        self.not_before = 0.0

    def current(self) -> tuple[Model, int]:
        """The policy to answer with now, and its version. Loading a new one takes as long as it takes to read its weights."""
        self.look()
        if self.wanted is not None and time.monotonic() >= self.not_before:
            self.change(self.wanted)
        return self.model, self.version

    def change(self, update: PolicyUpdate) -> None:
        try:
            self.model = self.first if update.restored_version == 0 else self.open_update(update)
        except (CharterError, OSError) as error:
            log.error("policy %d cannot be loaded, policy %d goes on answering: %s", update.version, self.version, error)
            self.not_before = time.monotonic() + OPEN_AGAIN_S
            return
        self.version, self.wanted = update.version, None
        log.info("answering with policy %d from now on", update.version)

    def look(self) -> None:
        """Note the newest policy among the updates that have arrived since the last look."""
        ends = self.ends([TOPIC])
        while any(self.reader.positions().get(place, 0) < end for place, end in ends.items()):
            for message in self.reader.poll(1.0, BATCH):
                update = decode(message.value or b"", PolicyUpdate)
                newest = max(self.version, self.wanted.version if self.wanted else 0)
                if update.kind is PolicyKind.POLICY and update.version > newest:
                    self.wanted, self.not_before = update, 0.0

    def close(self) -> None:
        self.reader.close()
