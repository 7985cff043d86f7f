"""Make one update of the policy or the reward model. Each step is durable before the next step starts.

After a crash at any point, training therefore resumes with the same batch. These are the steps:

1. Sample a batch from the rows that are new to the phase, and publish its manifest (topic `batches`).
2. Train, and publish the metrics of each step (topic `metrics`).
3. Write the checkpoint. The safetensors and a manifest are written to a temporary folder, which is then renamed.
4. Run the promotion gate on a new policy, if a gate is configured.
5. Publish the PolicyUpdate (topic `policies`). The PolicyUpdate has the new version. The responders then load the new policy.
6. Remove the checkpoints that are no longer referenced.

A batch is consumed only when its PolicyUpdate is on the log. `resume` trains an unfinished batch before a new batch is sampled.
A batch is voided if training on it fails, or if the promotion gate rejects its policy. To void a batch, the updater publishes
an Incident with the `voided_batch_id`. The rows of the batch can then be sampled again.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from constitutions.loader import load_constitution
from engine.checkpoints import (
    Checkpoint,
    compute_revision,
    is_disk_full_error,
    make_disk_full_error,
    read_checkpoint,
    require_disk_space,
    write_checkpoint,
)
from engine.commit_history import read_commit_history
from engine.errors import CharterError, CommitUncertain, DependencyUnreachable, UsageError, WriterFenced
from engine.remote_checkpoints import join_url, remove_remote_checkpoint, upload_checkpoint
from engine.settings import JUDGE, Settings, parse_rewards
from engine.store import Store
from engine.text import format_count
from schemas import ids
from schemas.records import Allowance, BatchManifest, DroppedRollout, Incident, Metric, ModelRef, PolicyKind, PolicyUpdate
from trainer.batches import (
    Batch,
    RowRef,
    StalenessLimits,
    build_manifest,
    compute_age_s,
    count_missing_rows,
    describe_mixture_shortfall,
    get_mixture,
    get_row_threshold,
    group_by_length,
    load_group_rows,
    load_newest_chains,
    load_rows,
    measure_clock_difference,
    rebuild_batch,
    sample_mixture,
    sample_replayed_rows,
    select_new_rows,
    select_rollouts,
    select_stale_pairs,
)
from trainer.consumed import find_moved_batches, read_complete_history
from trainer.folders import ModelFolders, get_base_version, get_policy_kind, name_batch_checkpoint
from trainer.groups import GroupSelection, compute_cursor, sample_groups, select_groups
from trainer.methods import RL_METHODS, needs_reward_model, uses_constitution, uses_groups, uses_rollouts
from trainer.monitor import LimitExceeded
from trainer.pacing import Pacer
from trainer.phases import LearnContext, Learner
from trainer.scores import ScorePublisher
from trainer.state import (
    TrainingLog,
    TrainingState,
    compute_served_revisions,
    find_referenced_checkpoints,
    get_last_beta,
    is_superseded,
    name_checkpoint,
)
from trainer.timed_store import QueryTimer, TimedStore

logger = logging.getLogger("charter.trainer")
_MAX_CLOCK_DIFFERENCE_S = 1.0
PhaseStepCallback = Callable[[str, int, dict[str, float]], None]
PromotionCheck = Callable[[Store, Path, int], LimitExceeded | None]


@dataclass
class Updater:
    """The updater makes one update at a time. Its methods are in the order in which an update calls them.

    `promotion_gate` is called with the database, the folder and the version of a new policy. If it returns an exceeded limit,
    the policy is not published. `notify` shows a message to the user.
    """

    log: TrainingLog
    store: TimedStore
    settings: Settings
    base_folder: Path
    learners: Mapping[str, Learner]
    on_step: PhaseStepCallback
    on_update: Callable[[PolicyUpdate], None]
    notify: Callable[[str], None]
    promotion_gate: PromotionCheck | None = None
    dropped_ids: set[str] = field(default_factory=set)
    groups: GroupSelection = field(default_factory=GroupSelection)  # of the last `select_rows` of a phase with groups
    awaited_sources: set[str] = field(default_factory=set)  # the log already says that groups wait for their grades
    mixture_warnings: dict[str, str | None] = field(default_factory=dict)
    has_reported_clocks: bool = False
    pacer: Pacer | None = None  # only a training loop has one
    reported_session: str | None = None  # the session of the sink for which moved batches were reported

    def __post_init__(self) -> None:
        self.checkpoints_folder = self.settings.folder / "checkpoints"
        self.lifetime = QueryTimer(self.store)
        self.scores = ScorePublisher(self.store, self.log.publish)

    def get_folders(self, state: TrainingState) -> ModelFolders:
        return ModelFolders(state, self.base_folder, self.checkpoints_folder)

    def update(self, phase: str, state: TrainingState) -> PolicyUpdate:
        """Update a phase on the rows that it has not trained on.

        Raise UsageError when there are no such rows.
        """
        timer = QueryTimer(self.store)
        if needs_reward_model(phase, self.settings.train) and not state.reward_version:
            raise UsageError(
                f"{RL_METHODS[phase].title} needs a reward model",
                "no reward model has been trained yet",
                "type: charter train --phase reward",
            )
        with self.store.hold_open():
            rows = self.select_rows(phase, state)
            if not rows:
                why = "no row has arrived, or all rows were already used for training"
                if uses_rollouts(phase) and self.dropped_ids:
                    sql = "select reason, count(*) from dropped_rollouts group by 1"
                    why = f"{format_count(len(self.dropped_ids), 'rollouts')} can no longer be used. For the reasons, type: charter sql '{sql}'"
                elif uses_groups(phase) and self.groups.waiting:
                    sources = ", ".join(self.groups.missing or {})
                    why = f"{format_count(len(self.groups.waiting), 'groups', 'wait')} for {sources} (train.rewards)"
                raise UsageError(f"there is nothing new for {phase} to train on", why, "type: charter status")
            batch = self.sample_batch(phase, rows, state)
        return self.finish_or_void_batch(batch, state, timer)

    def resume(self, manifest: BatchManifest, state: TrainingState) -> PolicyUpdate | None:
        """Finish a batch that a crash left unfinished, with identical rows.

        If the rows were erased or are too old, void the batch instead and return None. Raise StoreIncomplete if the database is
        being rebuilt.
        """
        logger.info("resuming the unfinished %s batch %d", manifest.phase, manifest.batch_number)
        timer = QueryTimer(self.store)
        read_complete_history(self.store, state)  # raises an error if the database does not have all rows yet
        if why := self.find_outdated_reason(manifest, state):
            self.void_batch(
                manifest, f"batch {manifest.batch_number} ({manifest.phase}) was left unfinished and is voided", why
            )
            return None
        batch = rebuild_batch(self.store, manifest)
        if allowances := self.plan_batch(manifest.phase, 0, state):
            self.log.publish(allowances)
        return self.finish_or_void_batch(batch, state, timer)

    def plan_batch(self, phase: str, num_left: int, state: TrainingState) -> list[Allowance]:
        """Return the allowance that belongs to a batch (trainer/pacing.py), or an empty list without a training loop."""
        return self.pacer.plan_batch(phase, num_left, self.store, state) if self.pacer else []

    def find_outdated_reason(self, manifest: BatchManifest, state: TrainingState) -> str | None:
        """Return why an unfinished batch can no longer be used. Return None if it can be used.

        The rows of the batch may have been erased, or they may be too old.
        """
        num_erased = self.store.query("SELECT count(*) FROM erasures").rows[0][0]
        if num_erased and (num_missing := count_missing_rows(self.store, manifest)):
            return f"{format_count(num_missing, 'rows', 'are')} no longer in the database; {format_count(num_erased, 'prompts', 'were')} erased"
        max_age_s = self.settings.train.max_age_s
        if uses_rollouts(manifest.phase) and max_age_s and self.load_finished_checkpoint(manifest) is None:
            sql = "SELECT created_at, policy_version FROM responses WHERE record_id IN (SELECT unnest(?::UUID[]))"
            rows = self.store.query(sql, [manifest.record_ids]).rows
            if any(compute_age_s(created_at, version, state) > max_age_s for created_at, version in rows):
                return f"its oldest rollout is now older than {max_age_s:g} s (train.max_age_s)"
        return None

    # Step 1: the batch

    def select_rows(self, phase: str, state: TrainingState) -> list[RowRef]:
        """Return the rows that a phase may train on.

        For RL, also publish a DroppedRollout for each rollout or pair that the phase can no longer use.
        """
        train = self.settings.train
        has_reward_model = needs_reward_model(phase, train)
        limits = StalenessLimits(
            train.max_staleness, train.max_reward_staleness if has_reward_model else sys.maxsize, train.max_age_s
        )
        if not uses_rollouts(phase):
            # After a voided batch of the maximum size, the loop looks for further rows behind the rows of this batch.
            limit = train.max_rows + 2 * get_row_threshold(train, phase)
            rows = select_new_rows(
                self.store,
                phase,
                state,
                limit=limit,
                by_purpose=self.is_by_purpose(state),
                contrast_phases=train.contrast_pairs,
            )
            drops = select_stale_pairs(self.store, rows, state, limits) if rows and phase in RL_METHODS else []
            stale = {drop.dropped_id for drop in drops}
            self.publish_drops(drops)
            return [row for row in rows if row.row_id not in stale]
        if train.max_age_s:
            self.warn_about_clocks(state)
        selection: dict[str, Any] = {
            "allow_overlap": train.allow_overlap or not has_reward_model,
            "by_purpose": self.is_by_purpose(state),
            "served_revisions": compute_served_revisions(state, self.settings.models.policy),
        }
        if uses_groups(phase):
            return self.select_groups(phase, state, limits, selection)
        rows, drops = select_rollouts(self.store, phase, state, limits, **selection)
        self.publish_drops(drops)
        return rows

    def is_by_purpose(self, state: TrainingState) -> bool:
        """Return whether the purpose of a prompt decides what it trains. It does from the start of the first training loop on."""
        train = self.settings.train
        return state.has_training_loop and RL_METHODS[train.rl_method].divides_prompts(train)

    def select_groups(
        self, phase: str, state: TrainingState, limits: StalenessLimits, selection: Mapping[str, Any]
    ) -> list[RowRef]:
        """Return the groups that have all grades. Publish drops, and log once what other groups wait for."""
        self.groups = select_groups(
            self.store,
            phase,
            state,
            limits,
            parse_rewards(self.settings.train.rewards),
            pairing=self.settings.judge.pairing,
            min_completions=RL_METHODS[phase].min_completions,
            **selection,
        )
        self.publish_drops(self.groups.drops)
        for source, count in (self.groups.missing or {}).items():
            if source not in self.awaited_sources:
                what = "labels of the judge" if source == JUDGE else f"grades of {source}"
                command = "charter run --stage judge" if source == JUDGE else "charter run --stage grade"
                logger.info("%s: %d groups wait for %s (%s)", phase, count, what, command)
                self.awaited_sources.add(source)
        return list(self.groups.ready)

    def publish_drops(self, drops: Sequence[DroppedRollout]) -> None:
        """Publish the drops that this process has not published yet."""
        # A published drop reaches the database only after the sink writes it. Until then, `dropped_ids` prevents duplicates.
        if new_drops := [record for record in drops if record.record_id not in self.dropped_ids]:
            self.log.publish(new_drops)
            self.dropped_ids |= {record.record_id for record in new_drops}

    def warn_about_clocks(self, state: TrainingState) -> None:
        """Report once that the clock of a stage and the clock of the trainer differ, because `train.max_age_s` compares them."""
        if self.has_reported_clocks:
            return
        difference_s = measure_clock_difference(self.store, state).total_seconds()
        if abs(difference_s) > _MAX_CLOCK_DIFFERENCE_S:
            self.has_reported_clocks = True
            self.notify(
                f"the clock of a stage is at least {abs(difference_s):.0f} s {'ahead of' if difference_s > 0 else 'behind'} the"
                f" clock of the trainer: train.max_age_s drops rollouts later than it should. Synchronize the clocks"
            )

    def sample_batch(self, phase: str, rows: Sequence[RowRef], state: TrainingState) -> Batch:
        """Sample a batch from the rows and publish its manifest."""
        train = self.settings.train
        batch_number = len(state.manifests) + 1
        seed = train.seed + batch_number
        settings = self.get_learner_settings(phase, state)
        mixture = get_mixture(train, phase)

        if uses_groups(phase):
            chosen = sample_groups(rows, train.max_rows)
        else:
            chosen = sample_mixture(rows, mixture, min_size=get_row_threshold(train, phase), max_size=train.max_rows)
        warning = describe_mixture_shortfall(chosen, mixture)
        if warning and warning != self.mixture_warnings.get(phase):  # a warning is shown again only after it has changed
            self.notify(f"{phase}: {warning}")
        self.mixture_warnings[phase] = warning

        if replay_ratio := settings.get("replay_ratio", 0.0):
            wanted = round(replay_ratio * len(chosen))
            count = min(wanted, train.max_rows - len(chosen))
            if count < wanted:
                logger.warning(
                    "%s: only %d of %d replayed labels fit into the batch in addition to the new labels (train.max_rows)",
                    phase,
                    count,
                    wanted,
                )
            chosen += sample_replayed_rows(
                self.store,
                phase,
                state,
                count=count,
                seed=seed,
                by_purpose=self.is_by_purpose(state),
                contrast_phases=train.contrast_pairs,
            )
        if not uses_rollouts(phase):
            chosen = group_by_length(chosen, settings["batch_size"], seed)

        row_ids, reward_record_ids, cursor = [row.row_id for row in chosen], list[str](), None
        if uses_groups(phase):
            batch_rows, reward_record_ids = load_group_rows(self.store, phase, row_ids, parse_rewards(train.rewards))
            cursor = compute_cursor(chosen, self.groups)
        else:
            batch_rows = load_rows(self.store, phase, row_ids, settings.get("rounds", ()))
        method = RL_METHODS.get(phase)
        is_combined = method is not None and method.has_combined_objective and train.objective == "combined"
        sl_rows = load_newest_chains(self.store, len(batch_rows)) if is_combined else []
        manifest = build_manifest(
            phase,
            batch_number,
            batch_rows,
            sl_rows,
            state,
            chosen,
            run_id=self.settings.run.id,
            seed=train.seed,
            settings=settings,
            mixture=mixture,
            sink_session=self.read_sink_session(state),
            reward_record_ids=reward_record_ids,
            cursor=cursor,
        )
        num_left = sum(row.weight for row in rows) - sum(row.weight for row in chosen)
        self.log.publish([manifest, *self.plan_batch(phase, num_left, state)])
        return Batch(manifest, batch_rows, sl_rows)

    def read_sink_session(self, state: TrainingState) -> str | None:
        """Return the newest session of the sink. Report once per session which batches are recognized by the ids of their rows."""
        history = read_commit_history(self.store)
        moved = find_moved_batches(history, state)
        if moved and history.session_id != self.reported_session:
            self.notify(
                f"the database has numbered the rows of {len(moved)} earlier batches again, because it lost rows and was restored"
                " from the log. The trainer recognizes these rows by their ids, so no row is trained twice"
            )
        self.reported_session = history.session_id
        return history.session_id

    def get_learner_settings(self, phase: str, state: TrainingState) -> dict[str, Any]:
        """Return the settings that the learner uses and the manifest records.

        An adaptive `beta` is the value of the last update, but at least the setting. A learner that reads the constitution gets its
        text, so that a resumed batch is the same after the file has changed.
        """
        train = self.settings.train
        settings: dict[str, Any] = getattr(self.settings, phase).model_dump()
        settings |= {"lora_rank": train.lora_rank, "max_length": train.max_length}
        method = RL_METHODS.get(phase)
        if method and method.has_adaptive_beta:
            settings["beta"] = max(get_last_beta(state, phase), settings["beta"])
        if method and method.has_combined_objective:
            settings["alpha"] = train.alpha
        if method and method.uses_groups:
            settings |= {"rewards": train.rewards, "max_completion_length": self.settings.respond.max_tokens}
        if uses_constitution(phase):
            settings["constitution"] = load_constitution(self.settings.run.constitution).text
        return settings

    # Steps 2 to 6

    def finish_or_void_batch(self, batch: Batch, state: TrainingState, timer: QueryTimer) -> PolicyUpdate:
        """Train on a batch whose manifest is published, and publish the update.

        If the batch causes an error, void the batch. Its rows can then be sampled again.
        """
        try:
            return self.train_and_publish(batch, state, timer)
        except (DependencyUnreachable, CommitUncertain, WriterFenced):
            raise  # the batch did not cause the error, so the batch is not voided
        except CharterError as error:
            self.void_batch(batch.manifest, error.what, error.why)
            raise

    def void_batch(self, manifest: BatchManifest, title: str, detail: str) -> None:
        """Publish the incident that voids a batch. Then remove the checkpoint of the batch, if there is one."""
        incident = Incident(
            record_id=ids.compute_record_id("incident", [manifest.record_id], ids.compute_fingerprint("incident", title=title)),
            parent_ids=[manifest.record_id],
            run_id=manifest.run_id,
            stage="train",
            policy_version=manifest.base_policy_version,
            phase=manifest.phase,
            title=title,
            detail=detail,
            voided_batch_id=manifest.record_id,
        )
        self.log.publish([incident])
        if checkpoint := self.load_finished_checkpoint(manifest):
            _remove_checkpoint(checkpoint.folder)

    def train_and_publish(self, batch: Batch, state: TrainingState, timer: QueryTimer) -> PolicyUpdate:
        """Train on a batch whose manifest is published, and publish the update (steps 2 to 6)."""
        manifest = batch.manifest
        kind, version = get_policy_kind(manifest), get_base_version(manifest) + 1
        checkpoint = self.load_or_train_checkpoint(batch, state)
        _require_not_superseded(manifest, self.log.read_state())  # a rollback may have been published during training
        gate = self.promotion_gate if kind is PolicyKind.POLICY else None
        if gate and (exceeded := gate(self.store, checkpoint.folder, version)):
            raise CharterError(
                f"policy {version} is not published: {exceeded.title}",
                exceeded.detail,
                "the rows of its batch can be sampled again. The limits are the settings promotion.*",
            )
        wall_s, query_s, query_share = timer.read()
        update = PolicyUpdate(
            record_id=ids.compute_record_id(
                "train", [manifest.record_id], ids.compute_fingerprint("policy_update", version=version)
            ),
            parent_ids=[manifest.record_id],
            run_id=manifest.run_id,
            stage="train",
            model=ModelRef(id=checkpoint.folder.name, revision=compute_revision(checkpoint.folder)),
            policy_version=version if kind is PolicyKind.POLICY else manifest.base_policy_version,
            seed=manifest.seed,
            kind=kind,
            version=version,
            phase=manifest.phase,
            uri=self.copy_checkpoint(checkpoint),
            content_hash=checkpoint.content_hash,
            base_version=get_base_version(manifest),
            batch_id=manifest.record_id,
            metrics=checkpoint.manifest["metrics"] | {"wall_s": wall_s, "duckdb_s": query_s, "duckdb_share": query_share},
        )
        self.log.publish([update, self.make_timing_metric(manifest, update)])
        state = self.log.read_state()
        if update.record_id not in {published.record_id for published in state.updates}:
            # Another update with this version was published first. Of two updates with the same version, the first one is valid.
            _require_not_superseded(manifest, state)
        self.remove_old_checkpoints(state)
        self.on_update(update)
        return update

    def load_or_train_checkpoint(self, batch: Batch, state: TrainingState) -> Checkpoint:
        """Load the batch's checkpoint if it was written before a crash. Otherwise train, and write the checkpoint."""
        manifest = batch.manifest
        if checkpoint := self.load_finished_checkpoint(manifest):
            return checkpoint
        folders = self.get_folders(state)
        folder = self.checkpoints_folder / name_batch_checkpoint(manifest)
        if folder.exists():
            _remove_voided_checkpoint(folder, state)
            self.remove_copy(folder)
        require_disk_space(self.checkpoints_folder, folders.get_policy_folder(manifest.base_policy_version))
        context = LearnContext(
            folders,
            self.settings.train,
            publish=self.log.publish,
            publish_scores=self.scores.publish,
            on_step=lambda step, metrics: self.publish_step_metrics(manifest, step, metrics),
        )
        try:
            save, metrics = self.learners[manifest.phase](context, batch)
        except OSError as error:
            if is_disk_full_error(error):
                raise make_disk_full_error(self.checkpoints_folder, str(error)) from error
            raise
        description = {"batch_id": manifest.record_id, "phase": manifest.phase, "metrics": metrics}
        return write_checkpoint(folder, save, description | {"batch": manifest.model_dump(mode="json")})

    def load_finished_checkpoint(self, manifest: BatchManifest) -> Checkpoint | None:
        """Return the checkpoint of this batch. Return None if the checkpoint was not written completely."""
        folder = self.checkpoints_folder / name_batch_checkpoint(manifest)
        checkpoint = read_checkpoint(folder) if folder.exists() else None
        return checkpoint if checkpoint and checkpoint.manifest.get("batch_id") == manifest.record_id else None

    def copy_checkpoint(self, checkpoint: Checkpoint) -> str:
        """Copy a checkpoint to train.checkpoint_url. Return the URL of the copy, or the folder if there is no such URL."""
        url = self.settings.train.checkpoint_url
        return upload_checkpoint(checkpoint, url) if url else str(checkpoint.folder.resolve())

    def remove_copy(self, folder: Path) -> None:
        """Remove the copy of a checkpoint at train.checkpoint_url."""
        if url := self.settings.train.checkpoint_url:
            remove_remote_checkpoint(join_url(url, folder.name))

    def publish_step_metrics(self, manifest: BatchManifest, step: int, metrics: dict[str, float]) -> None:
        """Publish the metrics of one step and pass them to `on_step`."""
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
        self.log.publish([metric])
        self.on_step(manifest.phase, step, metrics)

    def make_timing_metric(self, manifest: BatchManifest, update: PolicyUpdate) -> Metric:
        """Return a metric with the duration of an update and the share of DuckDB queries in this duration.

        The metric also has the share of DuckDB queries in the total time since the start. The total time includes idle polling.
        """
        metrics = {name: update.metrics[name] for name in ("wall_s", "duckdb_s", "duckdb_share")}
        alive_s, _, alive_share = self.lifetime.read()
        metrics |= {"alive_s": alive_s, "alive_duckdb_share": alive_share}
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

    def remove_old_checkpoints(self, state: TrainingState) -> None:
        """Remove old checkpoints.

        Keep the newest `train.save_total_limit` checkpoints of each kind, and the checkpoints that are still referenced.
        """
        referenced = find_referenced_checkpoints(state)
        for kind in (PolicyKind.POLICY, PolicyKind.REWARD):
            trained = sorted(u.version for u in state.updates if u.kind is kind and u.restored_version is None)
            for version in trained[: -self.settings.train.save_total_limit]:
                folder = self.checkpoints_folder / name_checkpoint(kind, version)
                if folder.name not in referenced and folder.exists():
                    self.remove_copy(folder)
                    _remove_checkpoint(folder)
                    logger.info("removed the checkpoint %s", folder.name)


def _require_not_superseded(manifest: BatchManifest, state: TrainingState) -> None:
    """Raise CharterError when a batch started from a policy or reward model that is no longer current."""
    if is_superseded(manifest, state):
        raise CharterError(
            f"batch {manifest.batch_number} ({manifest.phase}) is voided",
            f"it started from policy {manifest.base_policy_version}, but policy {state.policy_version} was published during training",
            "its rows can be sampled again. The next batch starts from the current policy",
        )


def _remove_voided_checkpoint(folder: Path, state: TrainingState) -> None:
    """Remove the checkpoint of a voided batch of this log.

    Raise UsageError if the checkpoint was published or belongs to another log.
    """
    batch_id = read_checkpoint(folder).manifest.get("batch_id")
    is_published = batch_id in {update.batch_id for update in state.updates}
    if is_published or batch_id not in {manifest.record_id for manifest in state.manifests}:
        raise UsageError(
            f"{folder} holds a checkpoint of another batch",
            "the log and the checkpoints do not belong together",
            "use the data folder of this log, or move the checkpoint to another folder",
        )
    _remove_checkpoint(folder)


def _remove_checkpoint(folder: Path) -> None:
    """Rename a checkpoint, then remove it.

    A crash can leave the checkpoint partly removed. With the new name, it is never read as a complete checkpoint.
    """
    renamed = folder.with_name(f".{folder.name}-removed")
    folder.rename(renamed)
    shutil.rmtree(renamed)
