"""The trainer: batches from DuckDB, three kinds of update, and each new policy back onto the stream.

One update goes through these steps, each durable before the next, so that a crash anywhere resumes with the same batch:

1. draw the rows after the phase's cursors, and publish their manifest (`batches`);
2. train, publishing each step's numbers (`metrics`);
3. write the checkpoint: safetensors and the manifest in a temporary folder, then renamed;
4. let the gate look at a new policy, if there is one;
5. publish the PolicyUpdate (`policies`), which is what raises the version and what every responder follows;
6. remove the checkpoints that nothing refers to any more.

A batch is consumed when its PolicyUpdate is on the log, not before. A manifest without one is taken up again before anything
new is drawn, unless the batch was given up (an Incident `voided_batch_id` it: it cannot be trained on, or the gate refused what it made)
or overtaken (someone went back to an earlier policy meanwhile); its rows are then free again. A phase whose batch was given up
is tried again when a threshold of further rows has come, or when the model it starts from has changed: it never spins.

A second trainer on the same log fences the first. Where training stands is read from the log, never kept in memory alone.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.backoff import compute_backoff
from engine.bus.port import Bus
from engine.bus.read import TopicTail
from engine.checkpoints import (
    Checkpoint,
    compute_revision,
    is_disk_full_error,
    locate_checkpoint,
    read_checkpoint,
    remove_incomplete,
    require_disk_space,
    write_checkpoint,
)
from engine.checkpoints import make_disk_full_error as disk_full
from engine.errors import CharterError, CommitUncertain, DependencyUnreachable, UsageError, WriterFenced
from engine.policy import (
    RESTORE_PHASE,
    deduplicate_updates,
    get_parent_version,
    get_paused_phases,
    get_weights_version,
    index_policies,
    make_pause,
    make_restore_update,
)
from engine.settings import Settings, parse_mixture
from engine.store import Parameters, QueryFunction, QueryResult, Store
from engine.weight_sync import get_served_model_name
from engine.worker import to_producer_record
from schemas import ids
from schemas.codec import decode_record
from schemas.records import (
    BatchManifest,
    DroppedRollout,
    Incident,
    Metric,
    ModelRef,
    Pause,
    PolicyKind,
    PolicyUpdate,
    Record,
    RunManifest,
)
from trainer.batches import (
    QUERY_TIMEOUT_S,
    SFT_PHASE,
    Batch,
    RowRef,
    StalenessLimits,
    TrainingState,
    build_manifest,
    compute_age_s,
    compute_exact_mixture_size,
    compute_training_state,
    describe_mixture_shortfall,
    group_by_length,
    is_superseded,
    load_newest_chains,
    load_rows,
    rebuild_batch,
    sample_mixture,
    sample_replayed_rows,
    select_new_rows,
    select_rollouts,
)
from trainer.monitor import LimitExceeded
from trainer.phases import LEARNERS, Learner

logger = logging.getLogger("charter.trainer")
PHASES = ("sft", "reward", "ppo", "dpo")
_DISABLED_PHASES = {"ppo": ("dpo",), "dpo": ("reward", "ppo")}  # what is never due, by train.rl_method
POLL_INTERVAL_S = 2.0
_MAX_POLL_FRACTION = 0.03  # of an idle trainer's time; with a large database it looks less often
_MONITOR_INTERVAL_S = 30.0
_WRITER_NAME = "trainer"
PhaseStepCallback = Callable[[str, int, dict[str, float]], None]
MonitorCheck = Callable[["Trainer"], LimitExceeded | None]
PromotionCheck = Callable[[Store, Path, int], LimitExceeded | None]


class _TimedStore(Store):
    """A store that adds up how long its questions took, waiting for the file included, and can keep the file open for several.

    Opening it takes tens of milliseconds, more than most of the trainer's questions.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.total_query_s = 0.0
        self.open_query: QueryFunction | None = None

    def query(self, sql: str, parameters: Parameters = (), **limits: float) -> QueryResult:
        with self.record_time():
            return self.open_query(sql, parameters) if self.open_query else super().query(sql, parameters, **limits)

    @contextmanager
    def record_time(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.total_query_s += time.monotonic() - started

    @contextmanager
    def hold_open(self) -> Iterator[None]:
        """Inside, all questions go to one connection; the sink waits meanwhile, so this is for moments."""
        with ExitStack() as stack:
            with self.record_time():
                self.open_query = stack.enter_context(self.open_read_session(limit_s=QUERY_TIMEOUT_S))
            try:
                yield
            finally:
                self.open_query = None


@dataclass
class Trainer:
    """Trains from `store`, publishes on `bus`. `base` is the folder of policy version 0.

    `watch` looks after every update, and while the loop waits; what it returns stops the RL phase (see `trip`). `gate` looks
    at a new policy's folder and version before it is published; what it returns keeps it back. `say` tells a person.
    """

    bus: Bus
    store: Store
    settings: Settings
    base_folder: Path
    on_step: PhaseStepCallback = lambda phase, step, metrics: None
    on_update: Callable[[PolicyUpdate], None] = lambda update: None
    notify: Callable[[str], None] = logger.warning
    monitor: MonitorCheck | None = None
    promotion_gate: PromotionCheck | None = None
    learners: Mapping[str, Learner] = field(default_factory=lambda: LEARNERS)

    def __post_init__(self) -> None:
        self.store = self.timed_store = _TimedStore(self.store.path)
        self.base_revision = compute_revision(self.base_folder)
        self.dropped_ids: set[str] = set()
        self.reported_mixtures: dict[str, str | None] = {}
        self.started_at = time.monotonic()
        self.update_start, self.next_monitor_at = (self.started_at, 0.0), 0.0
        self.open()

    def open(self) -> None:
        """A writer of our own, which fences any other trainer, and the log from its beginning."""
        self.writer = self.bus.open_writer(_WRITER_NAME)
        topics = (PolicyUpdate, BatchManifest, Incident, Pause, RunManifest)
        self.log_tails = {record: TopicTail(self.bus, record.topic) for record in topics}
        self.records: dict[type[Record], list[Any]] = {record: [] for record in topics}
        for folder in remove_incomplete(self.checkpoints_folder):
            logger.info("removed %s, which a killed trainer has left half-written", folder.name)

    def close(self) -> None:
        self.writer.close()

    @property
    def checkpoints_folder(self) -> Path:
        return self.settings.folder / "checkpoints"

    # Where training stands

    def refresh(self) -> None:
        """Read what has come to the log since the last look."""
        for record, growing in self.log_tails.items():
            self.records[record] += [decode_record(message.value or b"", record) for message in growing.read_new()]

    def read_log(self) -> tuple[list[PolicyUpdate], list[BatchManifest]]:
        """Every update and every manifest so far."""
        self.refresh()
        return deduplicate_updates(self.records[PolicyUpdate]), list(self.records[BatchManifest])

    def read_state(self) -> TrainingState:
        return compute_training_state(*self.read_log(), self.base_revision)

    def unfinished_batches(self) -> list[BatchManifest]:
        """The manifests that a crash left without their updates, and that are still to be trained on."""
        known, manifests = self.read_log()
        over = {update.batch_id for update in known} | {record.voided_batch_id for record in self.records[Incident]}
        standing = self.read_state()
        left = [manifest for manifest in manifests if manifest.record_id not in over]
        return [manifest for manifest in left if not is_superseded(manifest, standing)]

    def get_paused_phases(self) -> dict[str, str]:
        """The phases that are paused, and why."""
        self.refresh()
        return get_paused_phases(self.records[Pause])

    # What to do

    def get_row_threshold(self, phase: str) -> int:
        train = self.settings.train
        return {"sft": train.sft_rows, "ppo": train.ppo_rows}.get(phase, train.reward_rows)

    def next_phase(self) -> str | None:
        """The phase to start now, if one is due: they take turns, and one that is paused or not ready is passed over."""
        standing, (known, _) = self.read_state(), self.read_log()
        held = {
            *self.get_paused_phases(),
            *(manifest.phase for manifest in self.unfinished_batches()),
        }  # what is begun is finished first: `resume`
        order = tuple(phase for phase in PHASES if phase not in _DISABLED_PHASES[self.rl_phase])
        if (last := _find_last_phase(known)) in order:
            after = order.index(last) + 1
            order = (*order[after:], *order[:after])
        if not self.store.path.exists():
            return None
        with self.timed_store.hold_open():
            return next((phase for phase in order if phase not in held and self.is_ready(phase, standing)), None)

    def is_ready(self, phase: str, state: TrainingState) -> bool:
        """Whether a phase has enough new rows, and what else it needs."""
        if phase == "ppo" and not state.reward_version:
            return False
        rows, threshold = self.select_trainable_rows(phase, state), self.get_row_threshold(phase)
        tried = self.find_last_voided_commit(phase, state)
        if len(rows) < threshold or sum(row.commit_seq > tried for row in rows) < (threshold if tried >= 0 else 0):
            return False
        if phase == SFT_PHASE and self.sft_waits_for_rl(state):
            return False
        # A source that is scarce is waited for, but not longer than until there are twice the rows.
        return compute_exact_mixture_size(rows, self.get_mixture(phase)) >= threshold or len(rows) >= 2 * threshold

    @property
    def rl_phase(self) -> str:
        """The phase that learns from labels."""
        return self.settings.train.rl_method

    def sft_waits_for_rl(self, state: TrainingState) -> bool:
        """Whether SL waits for RL: each SL update makes all earlier answers useless to RL, which would starve otherwise.

        It waits while there are answers that RL can use, or none by the policy of the last SL update yet.
        """
        by_version = index_policies(self.read_log()[0])
        newest = by_version.get(get_weights_version(self.read_log()[0], state.policy_version))
        if newest is None or newest.phase != SFT_PHASE or self.rl_phase in self.get_paused_phases():
            return False
        if self.rl_phase == "dpo" or self.select_trainable_rows("ppo", state):
            return bool(self.select_trainable_rows(self.rl_phase, state))
        if not state.reward_version:
            return False
        since = "SELECT count(*) FROM responses WHERE created_at > ?"
        return bool(
            self.store.query(since, [newest.created_at.replace(tzinfo=None)]).rows[0][0] < self.get_row_threshold("ppo")
        )

    def find_last_voided_commit(self, phase: str, state: TrainingState) -> int:
        """The last commit of the newest batch of a phase that was given up, while the model it started from is the same; -1."""
        voided = {record.voided_batch_id for record in self.records[Incident] if record.voided_batch_id}
        found = [
            manifest.commit_seq_to
            for manifest in self.records[BatchManifest]
            if manifest.phase == phase and manifest.record_id in voided and not is_superseded(manifest, state)
        ]
        return max(found, default=-1)

    def select_trainable_rows(self, phase: str, state: TrainingState) -> list[RowRef]:
        """The rows that a phase may train on. What it may not use any more is dropped here, on the log."""
        train = self.settings.train
        most = max(train.max_rows, 2 * self.get_row_threshold(phase))
        if phase != "ppo":
            return select_new_rows(self.store, phase, state, limit=most)
        bounds = StalenessLimits(train.max_staleness, train.max_reward_staleness, train.max_age_s)
        found, drops = select_rollouts(
            self.store, state, bounds, allow_overlap=train.allow_overlap, served_revisions=self.get_served_revisions()
        )
        self.publish_drops(drops)
        return found

    def get_served_revisions(self) -> dict[int, str]:
        """The revision that stands for each policy version where a server answers."""
        address, _, model = self.settings.models.policy.partition("#")
        if not address.startswith(("http://", "https://")):
            return {}
        from engine.models.endpoint import compute_served_revision

        known, url = self.read_log()[0], address.rstrip("/")
        by_version = index_policies(known)
        names = {
            version: get_served_model_name(by_version[version]) if get_weights_version(known, version) else model
            for version in by_version
        }
        return {version: compute_served_revision(url, name) for version, name in ({0: model} | names).items()}

    def publish_drops(self, drops: Sequence[DroppedRollout]) -> None:
        """Publish drops, each once: they are in the database only a moment later."""
        new = [record for record in drops if record.record_id not in self.dropped_ids]
        if new:
            self.publish(new)
            self.dropped_ids |= {record.record_id for record in new}

    def get_mixture(self, phase: str) -> dict[str, float]:
        train = self.settings.train
        return parse_mixture({"sft": train.sft_mixture, "ppo": []}.get(phase, train.reward_mixture))

    def sample_rows(self, phase: str, rows: Sequence[RowRef]) -> list[RowRef]:
        """The batch that the rows make, in the order of their commits."""
        return sample_mixture(
            rows, self.get_mixture(phase), min_size=self.get_row_threshold(phase), max_size=self.settings.train.max_rows
        )

    # Doing it

    def resume(self) -> PolicyUpdate | None:
        """Finish what a crash left unfinished, with the identical batch; that of a paused phase waits until it goes on."""
        held = self.get_paused_phases()
        manifest = next((manifest for manifest in self.unfinished_batches() if manifest.phase not in held), None)
        if manifest is None:
            return None
        logger.info("going on with the %s batch %d that was left unfinished", manifest.phase, manifest.batch_number)
        self.start_clock()
        if why := self.find_outdated_reason(manifest):
            self.void_batch(
                manifest, f"batch {manifest.batch_number} ({manifest.phase}) was left unfinished and is given up", why
            )
            return None
        return self.finish_or_void_batch(rebuild_batch(self.store, manifest))

    def find_outdated_reason(self, manifest: BatchManifest) -> str | None:
        """Why an unfinished batch must not be trained on any more: rows were forgotten, or are too old by now."""
        forgotten = "SELECT count(*) FROM erasures WHERE created_at > ?"
        drawn_at, bound = manifest.created_at.replace(tzinfo=None), self.settings.train.max_age_s
        if self.store.query(forgotten, [drawn_at]).rows[0][0]:
            try:
                rebuild_batch(self.store, manifest)
            except CharterError:
                return "some of its rows were forgotten"
        if manifest.phase == "ppo" and bound and self.load_finished_checkpoint(manifest) is None:
            oldest = "SELECT min(created_at) FROM responses WHERE record_id IN (SELECT unnest(?::UUID[]))"
            (sampled_at,) = self.store.query(oldest, [manifest.record_ids]).rows[0]
            if sampled_at and compute_age_s(sampled_at) > bound:
                return f"its oldest rollout is older than {bound:g} s by now (train.max_age_s)"
        return None

    def update(self, phase: str) -> PolicyUpdate:
        """One update of a phase on the rows that are new to it; raises UsageError when there are none."""
        self.start_clock()
        standing = self.read_state()
        if phase == "ppo" and not standing.reward_version:
            raise UsageError("PPO needs a reward model", "none has been trained yet", "type: charter train --phase reward")
        with self.timed_store.hold_open():
            rows = self.select_trainable_rows(phase, standing)
            if not rows:
                raise UsageError(
                    f"there is nothing new for {phase} to train on", self.explain_missing_rows(phase), "type: charter status"
                )
            batch = self.create_batch(phase, rows, standing)
        return self.finish_or_void_batch(batch)

    def create_batch(self, phase: str, trainable_rows: Sequence[RowRef], state: TrainingState) -> Batch:
        """Draw a batch and publish its manifest (step 1)."""
        number, settings = len(self.read_log()[1]) + 1, self.get_learner_settings(phase)
        chosen, shares = self.sample_rows(phase, trainable_rows), self.get_mixture(phase)
        self.report_mixture(phase, describe_mixture_shortfall(chosen, shares))
        if replay := settings.get("replay_ratio", 0.0):
            wanted, most = round(replay * len(chosen)), self.settings.train.max_rows
            count = min(wanted, most - len(chosen))
            if count < wanted:
                logger.warning(
                    "%s: at most %d of %d earlier labels fit beside the new ones (train.max_rows)", phase, count, wanted
                )
            chosen += sample_replayed_rows(self.store, phase, state, count=count, seed=self.settings.train.seed + number)
        if phase != "ppo":
            chosen = group_by_length(chosen, settings["batch_size"], self.settings.train.seed + number)
        rows = load_rows(self.store, phase, [light.row_id for light in chosen], settings.get("rounds", ()))
        sl_rows = load_newest_chains(self.store, len(rows)) if self.uses_combined_objective(phase) else []
        manifest = build_manifest(
            phase,
            number,
            rows,
            sl_rows,
            state,
            chosen,
            run_id=self.settings.run.id,
            seed=self.settings.train.seed,
            settings=settings,
            mixture=shares,
        )
        self.publish([manifest])
        return Batch(manifest, rows, sl_rows)

    def report_mixture(self, phase: str, message: str | None) -> None:
        """Say that a batch is not the mix that was asked for; once, as long as it stays so."""
        if message and message != self.reported_mixtures.get(phase):
            self.notify(f"{phase}: {message}")
        self.reported_mixtures[phase] = message

    def uses_combined_objective(self, phase: str) -> bool:
        return phase == "ppo" and self.settings.train.objective == "combined"

    def explain_missing_rows(self, phase: str) -> str:
        if phase == "ppo" and self.dropped_ids:
            count = "charter sql 'select reason, count(*) from dropped_rollouts group by 1'"
            return f"{len(self.dropped_ids)} rollouts may not be used any more; why: {count}"
        return "every row was trained on already, or none has arrived"

    def get_learner_settings(self, phase: str) -> dict[str, Any]:
        learner: Any = getattr(self.settings, phase)
        train = self.settings.train
        settings: dict[str, Any] = learner.model_dump() | {"lora_rank": train.lora_rank, "max_length": train.max_length}
        if phase == "ppo":
            settings |= {"beta": self.get_beta(), "alpha": train.alpha}
        return settings

    def get_beta(self) -> float:
        """The KL weight that the last PPO update left behind; never less than the setting."""
        found = [update for update in self.read_log()[0] if update.phase == "ppo"]
        newest = max(found, key=lambda update: update.version, default=None)
        return max(newest.metrics["beta"] if newest else 0.0, self.settings.ppo.beta)

    def publish(self, records: Sequence[Record]) -> None:
        self.writer.commit([to_producer_record(record) for record in records])

    def finish_or_void_batch(self, batch: Batch) -> PolicyUpdate:
        """Finish a batch whose manifest is published; one that cannot be finished is given up, and its rows are free again."""
        try:
            return self.finish_batch(batch)
        except (DependencyUnreachable, CommitUncertain, WriterFenced):
            raise  # not the batch's fault: it is taken up again
        except CharterError as error:
            self.void_batch(batch.manifest, error.what, error.why)
            raise

    def void_batch(self, manifest: BatchManifest, title: str, detail: str) -> None:
        self.publish([_make_incident(manifest, title, detail, voided_batch_id=manifest.record_id)])
        if self.load_finished_checkpoint(manifest):
            _remove_checkpoint(self.get_checkpoint_folder(manifest))

    def finish_batch(self, batch: Batch) -> PolicyUpdate:
        """Train on a batch whose manifest is published, and publish the update (steps 2 to 6)."""
        manifest, folder = batch.manifest, self.get_checkpoint_folder(batch.manifest)
        checkpoint = self.load_or_train_checkpoint(batch, folder)
        self.require_not_superseded(manifest)
        kind, version = _get_policy_kind(manifest), _get_base_version(manifest) + 1
        if self.promotion_gate and kind is PolicyKind.POLICY and (trip := self.promotion_gate(self.store, folder, version)):
            raise CharterError(
                f"policy {version} is not published: {trip.title}", trip.detail, "its batch is free again; see promotion.*"
            )
        update = PolicyUpdate(
            record_id=ids.compute_record_id(
                "train", [manifest.record_id], ids.compute_fingerprint("policy_update", version=version)
            ),
            parent_ids=[manifest.record_id],
            run_id=manifest.run_id,
            stage="train",
            model=ModelRef(id=folder.name, revision=compute_revision(folder)),
            policy_version=version if kind is PolicyKind.POLICY else manifest.base_policy_version,
            seed=manifest.seed,
            kind=kind,
            version=version,
            phase=manifest.phase,
            uri=str(folder.resolve()),
            content_hash=checkpoint.content_hash,
            base_version=_get_base_version(manifest),
            batch_id=manifest.record_id,
            metrics=checkpoint.manifest["metrics"] | self.get_timings(),
        )
        self.publish([update, self.make_timing_metric(manifest, update)])
        if update.record_id not in {known.record_id for known in self.read_log()[0]}:
            self.require_not_superseded(manifest)
        self.remove_old_checkpoints()
        self.on_update(update)
        return update

    def require_not_superseded(self, manifest: BatchManifest) -> None:
        """Raise CharterError when someone has published another version of what this batch would make."""
        standing = self.read_state()
        if is_superseded(manifest, standing):
            raise CharterError(
                f"batch {manifest.batch_number} ({manifest.phase}) is given up",
                f"it trained from policy {manifest.base_policy_version}, and policy {standing.policy_version} was published"
                " meanwhile",
                "its rows are free again; the next batch starts from the present policy",
            )

    def get_checkpoint_folder(self, manifest: BatchManifest) -> Path:
        return self.checkpoints_folder / f"{_get_policy_kind(manifest).value.lower()}-{_get_base_version(manifest) + 1:06d}"

    def load_finished_checkpoint(self, manifest: BatchManifest) -> Checkpoint | None:
        """The checkpoint of this batch, if it was written whole."""
        folder = self.get_checkpoint_folder(manifest)
        found = read_checkpoint(folder) if folder.exists() else None
        return found if found and found.manifest.get("batch_id") == manifest.record_id else None

    def load_or_train_checkpoint(self, batch: Batch, folder: Path) -> Checkpoint:
        """The batch's checkpoint: the one on disk when a crash came after it was written, else trained now."""
        if found := self.load_finished_checkpoint(batch.manifest):
            return found
        if folder.exists():
            self.remove_voided_checkpoint(folder)
        base = self.get_policy_folder(batch.manifest.base_policy_version)
        require_disk_space(self.checkpoints_folder, base)
        try:
            save, metrics = self.learners[batch.manifest.phase](self, batch)
        except OSError as error:
            if is_disk_full_error(error):
                raise disk_full(self.checkpoints_folder, str(error)) from error
            raise
        about = {"batch_id": batch.manifest.record_id, "phase": batch.manifest.phase, "metrics": metrics}
        return write_checkpoint(folder, save, about | {"batch": batch.manifest.model_dump(mode="json")})

    def remove_voided_checkpoint(self, folder: Path) -> None:
        """Remove the checkpoint of a batch of this log that was given up; raises UsageError when it is anything else."""
        owner = read_checkpoint(folder).manifest.get("batch_id")
        known, manifests = self.read_log()
        if owner not in {m.record_id for m in manifests} or owner in {update.batch_id for update in known}:
            raise UsageError(
                f"{folder} holds a checkpoint of another batch",
                "the log and the checkpoints do not belong together",
                "use the data folder that the log belongs to, or move that checkpoint away",
            )
        _remove_checkpoint(folder)

    def publish_step_metrics(self, manifest: BatchManifest, step: int, metrics: dict[str, float]) -> None:
        """Publish one step's numbers and pass them on."""
        metric = Metric(
            record_id=ids.compute_record_id("metric", [manifest.record_id], ids.compute_fingerprint("metric"), step),
            parent_ids=[manifest.record_id],
            run_id=manifest.run_id,
            stage="train",
            policy_version=manifest.base_policy_version,
            phase=manifest.phase,
            batch_number=manifest.batch_number,
            step=step,
            metrics=metrics,
        )
        self.publish([metric])
        self.on_step(manifest.phase, step, metrics)

    # Checkpoints

    def get_policy_folder(self, version: int) -> Path:
        """The verified folder whose weights this policy version answers with."""
        source = get_weights_version(self.read_log()[0], version)
        return self.get_version_folder(PolicyKind.POLICY, source) if source else self.base_folder

    def get_version_folder(self, kind: PolicyKind, version: int) -> Path:
        """The verified folder of a published version."""
        update = next(u for u in self.read_log()[0] if u.kind is kind and u.version == version)
        return read_checkpoint(locate_checkpoint(update.uri, self.checkpoints_folder), update.content_hash).folder

    def remove_old_checkpoints(self) -> None:
        """Keep the newest of each kind and every one that is still referred to; the update that replaces them is on the log."""
        known = self.read_log()[0]
        wanted = {folder.name for folder in self.get_referenced_checkpoints()}
        for kind in (PolicyKind.POLICY, PolicyKind.REWARD):
            trained = sorted(u.version for u in known if u.kind is kind and u.restored_version is None)
            for version in trained[: -self.settings.train.save_total_limit]:
                folder = self.checkpoints_folder / f"{kind.value.lower()}-{version:06d}"
                if folder.name not in wanted and folder.exists():
                    _remove_checkpoint(folder)
                    logger.info("removed the checkpoint %s", folder.name)

    def get_referenced_checkpoints(self) -> set[Path]:
        """The checkpoints of the live policy, the one before it and its reference, of the reward model, and those of runs."""
        known, standing = self.read_log()[0], self.read_state()
        versions = {
            get_weights_version(known, version) for version in (*standing.policy_ancestry[:2], standing.reference_version)
        }
        named = set()
        for manifest in self.records[RunManifest]:
            settings = json.loads(manifest.settings)
            pinned = (settings.get("replay") or {}).get("pinned")
            versions |= {get_weights_version(known, pinned)} if pinned else set()
            named |= {Path(spec) for spec in settings.get("models", {}).values() if isinstance(spec, str)}
        found = {self.checkpoints_folder / f"policy-{version:06d}" for version in versions}
        return (
            found | {self.checkpoints_folder / f"reward-{standing.reward_version:06d}"} | {path for path in named if path.name}
        )

    # Time

    def start_clock(self) -> None:
        self.update_start = (time.monotonic(), self.timed_store.total_query_s)

    def get_timings(self) -> dict[str, float]:
        """How long this update took, and how much of that was waiting for the database."""
        wall, waited = time.monotonic() - self.update_start[0], self.timed_store.total_query_s - self.update_start[1]
        return {"wall_s": wall, "duckdb_s": waited, "duckdb_share": waited / max(wall, 1e-9)}

    def make_timing_metric(self, manifest: BatchManifest, update: PolicyUpdate) -> Metric:
        """The seconds of an update, and DuckDB's share of all time since the start, looking for rows included."""
        metrics = {name: update.metrics[name] for name in ("wall_s", "duckdb_s", "duckdb_share")}
        alive = time.monotonic() - self.started_at
        metrics |= {"alive_s": alive, "alive_duckdb_share": self.timed_store.total_query_s / max(alive, 1e-9)}
        return Metric(
            record_id=ids.compute_record_id("metric", [update.record_id], ids.compute_fingerprint("metric", kind="time")),
            parent_ids=[manifest.record_id],
            run_id=manifest.run_id,
            stage="train",
            policy_version=update.policy_version,
            phase="loop",
            batch_number=manifest.batch_number,
            step=0,
            metrics=metrics,
        )

    # Stopping, and going back

    def trigger_rollback(self, exceeded: LimitExceeded) -> PolicyUpdate | None:
        """Pause the RL phase, go back to the last good policy and say why, in one transaction; returns the new update."""
        known, standing = self.read_log()[0], self.read_state()
        run_id = self.settings.run.id
        good = self.find_available_version(
            get_parent_version(known, standing.policy_version)
            if exceeded.rollback_version is None
            else exceeded.rollback_version
        )
        update = None
        if get_weights_version(known, good) != get_weights_version(known, standing.policy_version):
            update = make_restore_update(known, good, run_id=run_id, base_model=self.settings.models.policy)
        stop = make_pause(self.rl_phase, exceeded.title, run_id=run_id)
        incident = Incident(
            record_id=ids.compute_record_id(
                "incident", [stop.record_id], ids.compute_fingerprint("incident", title=exceeded.title)
            ),
            run_id=run_id,
            stage="train",
            policy_version=standing.policy_version,
            phase=self.rl_phase,
            title=exceeded.title,
            detail=exceeded.detail,
            metrics=exceeded.metrics,
        )
        self.publish([stop, incident, *([update] if update else [])])
        back = f"; policy {update.version} has the weights of policy {update.restored_version}" if update else ""
        self.notify(f"{self.rl_phase} is paused: {exceeded.title} ({exceeded.detail}){back}. To go on: charter policy resume")
        return update

    def find_available_version(self, version: int) -> int:
        """A version whose weights are still on disk: this one, or the reference, whose weights always are."""
        source = get_weights_version(self.read_log()[0], version)
        there = source == 0 or (self.checkpoints_folder / f"policy-{source:06d}").exists()
        return version if there else self.read_state().reference_version

    def run_monitor(self) -> None:
        """Let the watch look, unless RL is paused already."""
        if self.monitor is None or self.rl_phase in self.get_paused_phases() or time.monotonic() < self.next_monitor_at:
            return
        self.next_monitor_at = time.monotonic() + _MONITOR_INTERVAL_S
        if trip := self.monitor(self):
            self.trigger_rollback(trip)

    # The loop

    def run_loop(self, stop: threading.Event) -> None:
        """Update whenever a phase has enough new rows, until `stop`; what is away is waited for, what fails is told once."""
        failures, doubt, told = 0, False, ""
        while not stop.is_set():
            phase, looked = None, self.timed_store.total_query_s
            try:
                if doubt:
                    self.reopen()
                    doubt = False
                self.resume()  # at each look: a phase that was paused with a batch in hand may have been let go on
                self.run_monitor()
                phase = self.next_phase()
                if phase is not None:
                    self.update(phase)
                    self.next_monitor_at = 0.0
                failures, told = 0, ""
            except (DependencyUnreachable, CommitUncertain) as error:
                logger.warning("the trainer waits: %s", error.what)
                failures, doubt = failures + 1, True
            except WriterFenced:
                raise
            except CharterError as error:
                if str(error) != told:
                    self.notify(str(error))
                failures, told = failures + 1, str(error)
            if failures:
                stop.wait(compute_backoff(failures - 1))
            elif phase is None:
                stop.wait(max(POLL_INTERVAL_S, (self.timed_store.total_query_s - looked) / _MAX_POLL_FRACTION))

    def reopen(self) -> None:
        """A new writer settles what the last one left in doubt; the log then says whether it landed."""
        with suppress(CommitUncertain, DependencyUnreachable):
            self.writer.close()
        self.open()


def _get_policy_kind(manifest: BatchManifest) -> PolicyKind:
    return PolicyKind.REWARD if manifest.phase == "reward" else PolicyKind.POLICY


def _get_base_version(manifest: BatchManifest) -> int:
    """The version that a batch's update starts from."""
    return (
        manifest.base_reward_version or 0 if _get_policy_kind(manifest) is PolicyKind.REWARD else manifest.base_policy_version
    )


def _find_last_phase(updates: Sequence[PolicyUpdate]) -> str:
    """The phase of the newest update that was trained."""
    return next((update.phase for update in reversed(updates) if update.phase != RESTORE_PHASE), "")


def _remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; one that is half removed after a crash is not taken for a whole one."""
    aside = folder.with_name(f".{folder.name}-removed")
    folder.rename(aside)
    shutil.rmtree(aside)


def _make_incident(manifest: BatchManifest, title: str, detail: str, voided_batch_id: str | None = None) -> Incident:
    return Incident(
        record_id=ids.compute_record_id("incident", [manifest.record_id], ids.compute_fingerprint("incident", title=title)),
        parent_ids=[manifest.record_id],
        run_id=manifest.run_id,
        stage="train",
        policy_version=manifest.base_policy_version,
        phase=manifest.phase,
        title=title,
        detail=detail,
        voided_batch_id=voided_batch_id,
    )
