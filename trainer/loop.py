"""Decide when to resume a batch, when to roll back, and when to update a phase.

Each tick reads the state of training from the log once (`trainer.state`). It then does the first of these actions that is
needed:

1. Resume a batch that a crash left unfinished.
2. Roll back, if the monitor finds that the newest policy exceeds a limit.
3. Update the next phase that has enough new rows (`trainer.update`).

The phases alternate. A phase whose batch was voided is not retried immediately. The same batch is therefore never retried in a
loop. The phase is retried only when it has enough further rows, or when its starting model has changed. When a second trainer
opens the same log, the first trainer can no longer publish (it is fenced).
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from engine.backoff import compute_backoff
from engine.bus.port import Bus
from engine.checkpoints import compute_revision, remove_incomplete
from engine.commit_history import read_commit_history
from engine.errors import (
    CharterError,
    CommitUncertain,
    DependencyUnreachable,
    StoreIncomplete,
    TopicChanged,
    WriterFenced,
)
from engine.instances import ServiceLease
from engine.pacing import TrainingLoopLease
from engine.policy import get_parent_version, get_weights_version, index_policies, make_pause, make_restore_update
from engine.settings import Settings
from engine.store import Store
from engine.text import format_count
from schemas import ids
from schemas.records import Allowance, BatchManifest, Incident, PolicyUpdate, Record, Score
from trainer.batches import RowRef, compute_exact_mixture_size, get_mixture, get_row_threshold
from trainer.consumed import count_further_rows
from trainer.folders import ModelFolders
from trainer.methods import (
    RL_METHODS,
    SFT_PHASE,
    list_enabled_phases,
    list_ignored_settings,
    list_unlabeled_phases,
    needs_reward_model,
    require_enough_completions,
)
from trainer.monitor import LimitExceeded
from trainer.pacing import Pacer, RolloutStock
from trainer.phases import LEARNERS, Learner
from trainer.state import (
    TrainingLog,
    TrainingState,
    find_last_trained_phase,
    find_unfinished_batches,
    find_voided_batches,
)
from trainer.timed_store import TimedStore
from trainer.update import PhaseStepCallback, PromotionCheck, Updater

logger = logging.getLogger("charter.trainer")
POLL_INTERVAL_S = 2.0
# Queries take at most this fraction of an idle trainer's time. If the queries are slow because the database is large, the
# trainer therefore polls less often.
_MAX_POLL_FRACTION = 0.03
_MONITOR_INTERVAL_S = 30.0
# Returns what is wrong with the labels of the database, or None if RL may train on them.
LabelCheck = Callable[[TimedStore], str | None]
MonitorCheck = Callable[
    [TrainingState, TimedStore, ModelFolders, Callable[[Sequence[Record]], None], Callable[[Sequence[Score]], list[float]]],
    LimitExceeded | None,
]


def _ignore_step(phase: str, step: int, metrics: dict[str, float]) -> None:
    """Do nothing. This function is the default of `on_step`."""


def _ignore_update(update: PolicyUpdate) -> None:
    """Do nothing. This function is the default of `on_update`."""


class Trainer:
    """The trainer trains on the rows of `store` and publishes on `bus`. `base_folder` holds policy version 0.

    `monitor` checks the newest policy while the loop runs. If the policy exceeds a limit, the RL phase is paused
    (`trigger_rollback`). `promotion_gate` checks a new policy before it is published. `check_labels` checks the labels: while it
    finds a problem, `next_phase` skips the RL phase. `on_step` is called with the metrics of each step, and `on_update` with each
    published update. `notify` shows a message to the user.
    """

    def __init__(
        self,
        bus: Bus,
        store: Store,
        settings: Settings,
        base_folder: Path,
        on_step: PhaseStepCallback = _ignore_step,
        on_update: Callable[[PolicyUpdate], None] = _ignore_update,
        notify: Callable[[str], None] = logger.warning,
        monitor: MonitorCheck | None = None,
        promotion_gate: PromotionCheck | None = None,
        check_labels: LabelCheck | None = None,
        learners: Mapping[str, Learner] = LEARNERS,
    ) -> None:
        self.settings, self.notify, self.monitor = settings, notify, monitor
        self.rl_phase = settings.train.rl_method  # the name of an RL method is the name of its phase
        self.rl_method = RL_METHODS[self.rl_phase]
        require_enough_completions(settings)
        for sentence in (*list_ignored_settings(settings), *list_unlabeled_phases(settings)):
            notify(sentence)
        self.next_monitor_at = 0.0
        self.check_labels, self.skips_rl = check_labels, False
        self.ignores_waiting_groups = False  # SFT does not wait for groups, because their grades do not arrive
        self.store = TimedStore(store.path)
        self.log = TrainingLog(bus, compute_revision(base_folder))
        self.updater = Updater(
            self.log,
            self.store,
            settings,
            base_folder,
            learners=learners,
            on_step=on_step,
            on_update=on_update,
            notify=notify,
            promotion_gate=promotion_gate,
        )
        self.lease = ServiceLease(settings.folder, "trainer")
        self.pacer: Pacer | None = None
        self.planned_allowance: Allowance | None = None
        self.rows_by_phase: dict[str, list[RowRef]] = {}  # of one search for the next phase
        self.sft_wait_is_reported = False
        self.remove_incomplete_checkpoints()

    def remove_incomplete_checkpoints(self) -> None:
        """Remove the incomplete checkpoints of killed trainers.

        Another trainer may still be writing a checkpoint. That trainer is already fenced, so it cannot publish the checkpoint.
        """
        for folder in remove_incomplete(self.updater.checkpoints_folder):
            logger.info("removed %s, an incomplete checkpoint of a killed trainer", folder.name)

    def close(self) -> None:
        self.lease.close()
        self.log.close()

    def read_state(self) -> TrainingState:
        """Read the log up to its end and return the state of training."""
        return self.log.read_state()

    # The loop

    def run_loop(self, stop: threading.Event) -> None:
        """Run ticks until `stop` is set, and let the responders see that this loop runs."""
        with self.pace_responders():
            self.run_ticks(stop)

    @contextmanager
    def pace_responders(self) -> Iterator[None]:
        """Publish allowances in the block, and show responders that this loop runs. Only methods with rollouts need this."""
        if not self.rl_method.uses_rollouts:
            yield
            return
        self.pacer = self.updater.pacer = Pacer(self.settings, self.log.bus)
        lease = TrainingLoopLease(self.log.bus, f"{socket.gethostname()}-{os.getpid()}")
        try:
            yield
        finally:
            self.pacer = self.updater.pacer = None
            lease.close()

    def run_ticks(self, stop: threading.Event) -> None:
        """Run ticks until `stop` is set. While a dependency is unreachable, wait and retry.

        A repeated error is shown only once.
        """
        failures, commit_uncertain, last_error = 0, False, ""
        while not stop.is_set():
            done, query_s = False, self.store.total_query_s
            try:
                if commit_uncertain:
                    self.log.reopen()
                    self.remove_incomplete_checkpoints()
                    commit_uncertain = False
                done = self.run_tick()
                failures, last_error = 0, ""
            except StoreIncomplete as error:
                if str(error) != last_error:
                    logger.warning("the trainer waits: %s: %s", error.what, error.why)
                failures, last_error = failures + 1, str(error)
            except (DependencyUnreachable, CommitUncertain) as error:
                logger.warning("the trainer waits: %s", error.what)
                failures, commit_uncertain = failures + 1, True
            except (WriterFenced, TopicChanged):
                raise
            except CharterError as error:
                if str(error) != last_error:
                    self.notify(str(error))
                failures, last_error = failures + 1, str(error)
            if failures:
                if self.pacer:
                    self.pacer.require_renewal()  # the last allowance may not be on the log
                stop.wait(compute_backoff(failures - 1))
            elif not done:
                stop.wait(max(POLL_INTERVAL_S, (self.store.total_query_s - query_s) / _MAX_POLL_FRACTION))

    def run_tick(self) -> bool:
        """Do the first action that is needed. Return False if no action is needed. An idle tick reads the log once."""
        state = self.read_state()
        if _find_resumable_batch(state):
            self.resume(state)
            return True
        if self.run_monitor(state):
            return True
        phase = self.next_phase(state)
        if self.planned_allowance:
            self.log.publish([self.planned_allowance])
            self.planned_allowance = None
        if phase is None:
            return False
        self.update(phase, state)
        self.next_monitor_at = 0.0  # check the new policy at the next tick
        return True

    # The actions. If the caller passes the state of the tick, the method uses this state. In all other cases the method reads
    # the log.

    def resume(self, state: TrainingState | None = None) -> PolicyUpdate | None:
        """Finish the oldest batch that a crash left unfinished.

        A batch of a paused phase is not finished until the phase is resumed.
        """
        state = state or self.read_state()
        manifest = _find_resumable_batch(state)
        if manifest and self.pacer:
            self.rows_by_phase = {}
            with self.store.hold_open():
                self.pacer.stock = self.compute_stock(state)
        return self.updater.resume(manifest, state) if manifest else None

    def update(self, phase: str, state: TrainingState | None = None) -> PolicyUpdate:
        """Update a phase on the rows that it has not trained on.

        Raise UsageError when there are no such rows.
        """
        return self.updater.update(phase, state or self.read_state())

    def next_phase(self, state: TrainingState | None = None) -> str | None:
        """Return the phase to update now. Return None when no phase is ready.

        The search starts at the phase that follows the last updated phase.
        """
        state = state or self.read_state()
        if not self.store.path.exists():
            return None
        phases = list(list_enabled_phases(self.settings.train))
        if (last := find_last_trained_phase(state)) in phases:
            after = phases.index(last) + 1
            phases = [*phases[after:], *phases[:after]]
        blocked = {*state.paused_phases, *(manifest.phase for manifest in find_unfinished_batches(state))}
        self.rows_by_phase = {}
        with self.store.hold_open():
            if self.pacer:
                sft_is_due = SFT_PHASE not in blocked and self.has_enough_rows(SFT_PHASE, state)
                self.planned_allowance = self.pacer.plan(self.store, state, self.compute_stock(state), sft_is_due=sft_is_due)
            ready = (phase for phase in phases if phase not in blocked and self.is_ready(phase, state))
            return next((phase for phase in ready if phase != self.rl_phase or self.find_label_problem() is None), None)

    def select_rows(self, phase: str, state: TrainingState) -> list[RowRef]:
        """Return the rows that a phase may train on. One search for the next phase selects them once."""
        if phase not in self.rows_by_phase:
            self.rows_by_phase[phase] = self.updater.select_rows(phase, state)
        return self.rows_by_phase[phase]

    def compute_stock(self, state: TrainingState) -> RolloutStock:
        """Return the rollouts that the next RL update can use, or why RL uses none now."""
        threshold = get_row_threshold(self.settings.train, self.rl_phase)
        reason = ""
        if not self.settings.train.rollouts_ahead:
            reason = "train.rollouts_ahead is 0"
        elif self.rl_phase in state.paused_phases:
            reason = f"{self.rl_phase} is paused"
        elif needs_reward_model(self.rl_phase, self.settings.train) and not state.reward_version:
            reason = f"{self.rl_phase} waits for the first reward model"
        elif self.find_label_problem():
            reason = f"{self.rl_phase} is skipped because of the labels"
        if reason:
            return RolloutStock(0, threshold, unneeded_because=reason)
        rows = self.select_rows(self.rl_phase, state)
        voided = find_voided_batches(state, self.rl_phase)
        usable = (
            count_further_rows(rows, voided, read_commit_history(self.store)) if voided else sum(row.weight for row in rows)
        )
        # Later groups have passed the graders, so an earlier group that still waits may wait for ever.
        newest_seq = max((row.commit_seq for row in rows), default=-1)
        num_waiting = sum(group.weight for group in self.updater.groups.waiting if group.commit_seq > newest_seq)
        return RolloutStock(usable, threshold, num_waiting)

    def find_label_problem(self) -> str | None:
        """Return why the RL phase is skipped: what is wrong with the labels. Show the problem once, until it is solved."""
        needs_labels = self.rl_method.needs_labels(self.settings.train)
        problem = self.check_labels(self.store) if self.check_labels and needs_labels else None
        if problem and not self.skips_rl:
            self.notify(
                f"{self.rl_phase} is skipped, because the labels are not good enough to train on: {problem}. Other phases continue."
                " To train anyway, type: charter train --loop --force"
            )
        self.skips_rl = problem is not None
        return problem

    def is_ready(self, phase: str, state: TrainingState) -> bool:
        """Return whether a phase can be updated now.

        A phase needs enough new rows. RL may also need a reward model. SFT may have to wait for RL.
        """
        if needs_reward_model(phase, self.settings.train) and not state.reward_version:
            return False
        return self.has_enough_rows(phase, state) and not (phase == SFT_PHASE and self.sft_waits_for_rl(state))

    def has_enough_rows(self, phase: str, state: TrainingState) -> bool:
        """Return whether a phase has enough new rows, in the shares of its mixture."""
        rows, threshold = self.select_rows(phase, state), get_row_threshold(self.settings.train, phase)
        num_rows = sum(row.weight for row in rows)
        if num_rows < threshold:
            return False
        voided = find_voided_batches(state, phase)
        if voided and count_further_rows(rows, voided, read_commit_history(self.store)) < threshold:
            return False
        # If a source is scarce, wait for more of its rows. Stop waiting when there are twice as many rows as needed.
        mixture = get_mixture(self.settings.train, phase)
        return not mixture or compute_exact_mixture_size(rows, mixture) >= threshold or num_rows >= 2 * threshold

    def sft_waits_for_rl(self, state: TrainingState) -> bool:
        """Return whether SFT must wait for RL.

        After an SFT update, RL cannot use any earlier rollout. Frequent SFT updates would prevent RL from ever having enough
        rollouts. In a training loop, SFT therefore waits until RL has trained on all rollouts that the loop has asked for
        (`trainer.pacing`). Without such a loop, SFT waits after an SFT update: while RL has rollouts that it can use, or groups that
        will have their grades soon, and until the policy of this update has responded to as many prompts as RL needs.
        """
        if self.pacer and self.settings.train.rollouts_ahead:
            waits = self.pacer.sft_waits(self.store)
            if waits and not self.sft_wait_is_reported:
                logger.info("SFT is due, and waits until %s has trained on its rollouts", self.rl_phase)
            self.sft_wait_is_reported = waits
            return waits
        newest = index_policies(state.updates).get(get_weights_version(state.updates, state.policy_version))
        if newest is None or newest.phase != SFT_PHASE or self.rl_phase in state.paused_phases:
            return False
        if self.find_label_problem():
            return False
        if self.select_rows(self.rl_phase, state):
            return True
        # Groups wait for their grades for a short time. If as many of them as two updates need wait, the grades may never come.
        threshold = get_row_threshold(self.settings.train, self.rl_phase)
        num_waiting = sum(group.weight for group in self.updater.groups.waiting)
        if 0 < num_waiting < 2 * threshold:
            return True
        if num_waiting and not self.ignores_waiting_groups:
            missing = ", ".join(self.updater.groups.missing or {})
            self.notify(
                f"{self.rl_phase}: {format_count(num_waiting, 'completions', 'have')} no grades of {missing}. SFT no longer waits for them"
            )
        self.ignores_waiting_groups = num_waiting > 0
        if not self.rl_method.uses_rollouts:
            return False
        if self.rl_method.needs_reward_model(self.settings.train) and not state.reward_version:
            return False
        counted = "sum(len(completions))" if self.rl_method.uses_groups else "count(*)"
        sql = f"""SELECT coalesce({counted}, 0) FROM responses
                  WHERE split <> 'SUITE' AND commit_seq > (SELECT commit_seq FROM policies WHERE record_id = ?)"""
        (count,) = self.store.query(sql, [newest.record_id]).rows[0]
        return bool(count < get_row_threshold(self.settings.train, self.rl_phase))

    # Monitor and rollback

    def run_monitor(self, state: TrainingState | None = None) -> bool:
        """Check the newest policy, and roll back if it exceeds a limit. Return whether a rollback was made.

        The check is skipped while RL is paused. The check is also skipped for `_MONITOR_INTERVAL_S` seconds after the last
        check.
        """
        state = state or self.read_state()
        if self.monitor is None or self.rl_phase in state.paused_phases or time.monotonic() < self.next_monitor_at:
            return False
        self.next_monitor_at = time.monotonic() + _MONITOR_INTERVAL_S
        exceeded = self.check_policy(self.monitor, state)
        if exceeded is None:
            return False
        self.trigger_rollback(exceeded)  # this reads the log again, because the check can take minutes
        return True

    def check_policy(self, monitor: MonitorCheck, state: TrainingState) -> LimitExceeded | None:
        """Run a monitor on the newest policy. Return the exceeded limit, or None."""
        updater = self.updater
        return monitor(state, self.store, updater.get_folders(state), self.log.publish, updater.scores.publish)

    def trigger_rollback(self, exceeded: LimitExceeded) -> PolicyUpdate | None:
        """Pause the RL phase, restore the last good policy and publish an incident, all in one transaction.

        Return the update that restores the policy, or None if its weights are already current. If the checkpoint of the last
        good policy was removed, the reference is restored instead. The checkpoint of the reference is always kept.
        """
        state, run_id = self.read_state(), self.settings.run.id
        version = exceeded.rollback_version
        if version is None:
            version = get_parent_version(state.updates, state.policy_version)
        if not self.updater.get_folders(state).has_policy(version):
            version = state.reference_version
        update = None
        if get_weights_version(state.updates, version) != get_weights_version(state.updates, state.policy_version):
            update = make_restore_update(state.updates, version, run_id=run_id, base_model=self.settings.models.policy)
        pause = make_pause(self.rl_phase, exceeded.title, run_id=run_id)
        incident = Incident(
            record_id=ids.compute_record_id(
                "incident", [pause.record_id], ids.compute_fingerprint("incident", title=exceeded.title)
            ),
            run_id=run_id,
            stage="train",
            policy_version=state.policy_version,
            phase=self.rl_phase,
            title=exceeded.title,
            detail=exceeded.detail,
            metrics=exceeded.metrics,
        )
        self.log.publish([pause, incident, *([update] if update else [])])
        restored = f" Now policy {update.version} has the weights of policy {update.restored_version}." if update else ""
        self.notify(
            f"{self.rl_phase} is paused: {exceeded.title} ({exceeded.detail}).{restored} To resume the phase, type: charter policy resume"
        )
        return update


def _find_resumable_batch(state: TrainingState) -> BatchManifest | None:
    """Return the oldest unfinished batch whose phase is not paused."""
    unfinished = find_unfinished_batches(state)
    return next((manifest for manifest in unfinished if manifest.phase not in state.paused_phases), None)
