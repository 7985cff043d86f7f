"""Read the published versions, the consumed rows and the paused phases from the log.

`TrainingLog` reads and writes the trainer's topics. Its method `read_state` reads all six topics in one poll loop and returns
an immutable `TrainingState`. The loop calls this method once per tick. The module's functions are pure functions. The whole
state can be read from the log again, so a restarted trainer continues where the last trainer stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.bus.port import Bus, Writer
from engine.bus.read import TopicTail
from engine.errors import CommitUncertain, DependencyUnreachable
from engine.policy import (
    RESTORE_PHASE,
    deduplicate_updates,
    get_newest_version,
    get_paused_phases,
    get_policy_ancestry,
    get_weights_version,
    index_policies,
)
from engine.topic_guard import TopicGuard
from engine.weight_sync import get_served_model_name
from engine.worker import to_producer_record
from schemas.codec import decode_record
from schemas.records import (
    Allowance,
    BatchManifest,
    DroppedRollout,
    Incident,
    Metric,
    Pause,
    PolicyKind,
    PolicyUpdate,
    Record,
    RunManifest,
)
from trainer.methods import REWARD_PHASE, SFT_PHASE, is_rewarded

_WRITER_NAME = "trainer"
_STATE_RECORDS: tuple[type[Record], ...] = (PolicyUpdate, BatchManifest, Incident, Pause, RunManifest, Allowance)
_PUBLISHED_RECORDS: tuple[type[Record], ...] = (*_STATE_RECORDS, DroppedRollout, Metric)


@dataclass(frozen=True)
class TrainingState:
    """This state holds the current versions, the batches that led to an update, and the underlying log records.

    `policy_ancestry` holds the versions of the current RL phase, from the newest to the reference. `reward_version_by_policy`
    maps each policy version to the reward version that was current when the policy was published. `model_revisions` maps each
    policy version to the revision of its weights. `publication_times` maps each policy version except 0 to the time in UTC at
    which the trainer wrote its update. `updates` holds one update per version, in the order of the log.
    `cluster_id` identifies the log. `has_training_loop` is true if a training loop has run on this log. From then on, the purposes of
    prompts decide what they train.
    """

    policy_version: int = 0
    reward_version: int = 0
    policy_ancestry: tuple[int, ...] = (0,)
    trained_batches: Sequence[BatchManifest] = ()
    reward_version_by_policy: Mapping[int, int] = field(default_factory=dict)
    model_revisions: Mapping[int, str] = field(default_factory=dict)
    publication_times: Mapping[int, datetime] = field(default_factory=dict)
    updates: Sequence[PolicyUpdate] = ()
    manifests: Sequence[BatchManifest] = ()
    incidents: Sequence[Incident] = ()
    pauses: Sequence[Pause] = ()
    run_manifests: Sequence[RunManifest] = ()
    cluster_id: str | None = None
    has_training_loop: bool = False

    @property
    def reference_version(self) -> int:
        return self.policy_ancestry[-1]

    @property
    def paused_phases(self) -> dict[str, str]:
        """Return the paused phases, each with the reason for the pause."""
        return get_paused_phases(self.pauses)


class TrainingLog:
    """The training log reads the records that make up the training state, and publishes with a transactional writer.

    Opening the writer fences every other trainer on the same log. `base_revision` is the revision of the base model's weights.
    """

    def __init__(self, bus: Bus, base_revision: str) -> None:
        self.bus, self.base_revision = bus, base_revision
        self.open()

    def open(self) -> None:
        """Open a writer. The next `read_state` reads the log from its beginning."""
        self.writer: Writer = self.bus.open_writer(_WRITER_NAME, topics=[record.topic for record in _PUBLISHED_RECORDS])
        self.topic_guard = TopicGuard(self.bus, self.bus.topic_ids([record.topic for record in _STATE_RECORDS]))
        self.records: dict[type[Record], list[Any]] = {record: [] for record in _STATE_RECORDS}
        self.tail = TopicTail(self.bus, *(record.topic for record in _STATE_RECORDS))
        self.state = self.compute_state()

    def reopen(self) -> None:
        """Replace the writer after an uncertain commit.

        Opening the new writer commits or aborts the uncertain transaction. The next `read_state` shows the result.
        """
        with suppress(CommitUncertain, DependencyUnreachable):
            self.writer.close()
        self.open()

    def read_state(self) -> TrainingState:
        """Read the records that were added to the log since the last call, and return the state of training."""
        self.topic_guard.verify_at_interval()
        if messages := self.tail.read_new():
            record_by_topic = {record.topic: record for record in _STATE_RECORDS}
            for message in messages:
                record = record_by_topic[message.topic]
                if record is Allowance:  # many of them are published, and only their existence matters
                    self.records[record].clear()
                self.records[record].append(decode_record(message.value or b"", record))
            self.state = self.compute_state()
        return self.state

    def compute_state(self) -> TrainingState:
        updates, manifests, incidents, pauses, runs, allowances = (tuple(self.records[record]) for record in _STATE_RECORDS)
        return compute_training_state(
            deduplicate_updates(updates),
            manifests,
            self.base_revision,
            incidents=incidents,
            pauses=pauses,
            run_manifests=runs,
            cluster_id=self.bus.cluster_id,
            has_training_loop=bool(allowances),
        )

    def publish(self, records: Sequence[Record]) -> None:
        """Publish records in one transaction."""
        self.writer.commit([to_producer_record(record) for record in records])

    def close(self) -> None:
        self.writer.close()


def compute_training_state(
    updates: Sequence[PolicyUpdate],
    manifests: Sequence[BatchManifest],
    base_revision: str = "",
    *,
    incidents: Sequence[Incident] = (),
    pauses: Sequence[Pause] = (),
    run_manifests: Sequence[RunManifest] = (),
    cluster_id: str | None = None,
    has_training_loop: bool = False,
) -> TrainingState:
    """Compute the state from the records of the log. `base_revision` is the revision of policy version 0's weights."""
    manifest_by_id = {manifest.record_id: manifest for manifest in manifests}
    trained_batches: list[BatchManifest] = []
    reward_version_by_policy, reward_version = {0: 0}, 0
    for update in updates:
        if update.kind is PolicyKind.REWARD:
            reward_version = update.version
        else:
            reward_version_by_policy[update.version] = reward_version
        if update.restored_version is None and (manifest := manifest_by_id.get(update.batch_id)):
            trained_batches.append(manifest)
    policy_version = get_newest_version(updates)
    revisions = {
        update.version: update.model.revision for update in updates if update.kind is PolicyKind.POLICY and update.model
    }
    for version in list(revisions):
        if get_weights_version(updates, version) == 0:
            revisions[version] = base_revision
    return TrainingState(
        policy_version=policy_version,
        reward_version=reward_version,
        policy_ancestry=tuple(get_policy_ancestry(updates, policy_version)),
        trained_batches=tuple(trained_batches),
        reward_version_by_policy=reward_version_by_policy,
        model_revisions={0: base_revision} | revisions,
        publication_times={
            update.version: update.created_at.astimezone(UTC).replace(tzinfo=None)
            for update in updates
            if update.kind is PolicyKind.POLICY
        },
        updates=updates,
        manifests=manifests,
        incidents=incidents,
        pauses=pauses,
        run_manifests=run_manifests,
        cluster_id=cluster_id,
        has_training_loop=has_training_loop,
    )


# Batches


def is_superseded(manifest: BatchManifest, state: TrainingState) -> bool:
    """Return whether a batch starts from a model that is no longer the current version."""
    policy_changed = manifest.base_policy_version != state.policy_version
    reward_changed = is_rewarded(manifest.phase) and (manifest.base_reward_version or 0) != state.reward_version
    return {SFT_PHASE: policy_changed, REWARD_PHASE: reward_changed}.get(manifest.phase, policy_changed or reward_changed)


def find_unfinished_batches(state: TrainingState) -> list[BatchManifest]:
    """Return the manifests of batches that must still be trained. Skip finished, voided and superseded batches."""
    finished = {update.batch_id for update in state.updates} | {record.voided_batch_id for record in state.incidents}
    unfinished = [manifest for manifest in state.manifests if manifest.record_id not in finished]
    return [manifest for manifest in unfinished if not is_superseded(manifest, state)]


def find_voided_batches(state: TrainingState, phase: str) -> list[BatchManifest]:
    """Return the voided batches of a phase. Skip batches that started from a model that is no longer current."""
    voided = {record.voided_batch_id for record in state.incidents if record.voided_batch_id}
    return [
        manifest
        for manifest in state.manifests
        if manifest.phase == phase and manifest.record_id in voided and not is_superseded(manifest, state)
    ]


# Updates and versions


def find_last_trained_phase(state: TrainingState) -> str:
    """Return the phase of the newest update that was trained (not restored). Return "" before the first update."""
    return next((update.phase for update in reversed(state.updates) if update.phase != RESTORE_PHASE), "")


def get_last_beta(state: TrainingState, phase: str) -> float:
    """Return the KL coefficient that the newest update of an RL phase computed for the next update.

    Return 0 before the first update of this phase.
    """
    phase_updates = [update for update in state.updates if update.phase == phase]
    newest = max(phase_updates, key=lambda update: update.version, default=None)
    return newest.metrics["beta"] if newest else 0.0


def compute_served_revisions(state: TrainingState, policy_model: str) -> dict[int, str]:
    """Return the revision that an inference server reports for each policy version.

    Return an empty dict when `policy_model` is not the address of a server.
    """
    address, _, base_name = policy_model.partition("#")
    if not address.startswith(("http://", "https://")):
        return {}
    from engine.models.endpoint import compute_served_revision

    by_version = index_policies(state.updates)
    names = {
        version: get_served_model_name(update) if get_weights_version(state.updates, version) else base_name
        for version, update in by_version.items()
    }
    return {version: compute_served_revision(address.rstrip("/"), name) for version, name in ({0: base_name} | names).items()}


def name_checkpoint(kind: PolicyKind, version: int) -> str:
    """Return the folder name of a checkpoint."""
    return f"{kind.value.lower()}-{version:06d}"


def find_referenced_checkpoints(state: TrainingState) -> set[str]:
    """Return the names of the checkpoints that are in use.

    These are the checkpoints of the current policy, of the policy before it, of the reference and of the reward model. A
    checkpoint is also in use if the settings of a run name the checkpoint, or if a replay is pinned to the checkpoint.
    """
    versions = {
        get_weights_version(state.updates, version) for version in (*state.policy_ancestry[:2], state.reference_version)
    }
    names = {name_checkpoint(PolicyKind.REWARD, state.reward_version)}
    for manifest in state.run_manifests:
        settings = json.loads(manifest.settings)
        if pinned := (settings.get("replay") or {}).get("pinned"):
            versions.add(get_weights_version(state.updates, pinned))
        names |= {Path(model).name for model in settings.get("models", {}).values() if isinstance(model, str)}
    return names | {name_checkpoint(PolicyKind.POLICY, version) for version in versions}
