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

from engine.bus.port import Bus
from engine.bus.read import Growing
from engine.checkpoints import Checkpoint, is_full, located, read, require_room, revision_of, sweep, write
from engine.checkpoints import full as disk_full
from engine.delivery import served_name
from engine.errors import CharterError, CommitInDoubt, DependencyUnreachable, Fenced, UsageError
from engine.policy import RESTORE, first_of_each, pause, paused, policies, restored, version_before, weights_of
from engine.settings import Settings, mix
from engine.store import Ask, Parameters, Rows, Store
from engine.worker import backoff, outgoing
from schemas import ids
from schemas.codec import decode
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
    LIMIT_S,
    SL_PHASE,
    Batch,
    Bounds,
    Light,
    Standing,
    age_s,
    bucketed,
    earlier,
    exact_size,
    manifest_of,
    mixed,
    newest_chains,
    overtaken,
    rebuild,
    rollouts,
    rows_of,
    shortfall,
    standing_of,
    waiting,
)
from trainer.phases import LEARNERS, Learner
from trainer.watch import Trip

log = logging.getLogger("charter.trainer")
PHASES = ("sft", "reward", "ppo", "dpo")
IDLE = {"ppo": ("dpo",), "dpo": ("reward", "ppo")}  # what is never due, by train.policy_learner
LOOK_EVERY_S = 2.0
LOOK_SHARE = 0.03  # of an idle trainer's time; with a large database it looks less often
WATCH_EVERY_S = 30.0
WRITER = "trainer"
OnStep = Callable[[str, int, dict[str, float]], None]
Watch = Callable[["Trainer"], Trip | None]
Gate = Callable[[Store, Path, int], Trip | None]


class TimedStore(Store):
    """A store that adds up how long its questions took, waiting for the file included, and can keep the file open for several.

    Opening it takes tens of milliseconds, more than most of the trainer's questions.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.spent_s = 0.0
        self.ask: Ask | None = None

    def query(self, sql: str, parameters: Parameters = (), **limits: float) -> Rows:
        with self.timed():
            return self.ask(sql, parameters) if self.ask else super().query(sql, parameters, **limits)

    @contextmanager
    def timed(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.spent_s += time.monotonic() - started

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """Inside, all questions go to one connection; the sink waits meanwhile, so this is for moments."""
        with ExitStack() as stack:
            with self.timed():
                self.ask = stack.enter_context(self.reading(limit_s=LIMIT_S))
            try:
                yield
            finally:
                self.ask = None


@dataclass
class Trainer:
    """Trains from `store`, publishes on `bus`. `base` is the folder of policy version 0.

    `watch` looks after every update, and while the loop waits; what it returns stops the RL phase (see `trip`). `gate` looks
    at a new policy's folder and version before it is published; what it returns keeps it back. `say` tells a person.
    """

    bus: Bus
    store: Store
    settings: Settings
    base: Path
    on_step: OnStep = lambda phase, step, metrics: None
    on_update: Callable[[PolicyUpdate], None] = lambda update: None
    say: Callable[[str], None] = log.warning
    watch: Watch | None = None
    gate: Gate | None = None
    learners: Mapping[str, Learner] = field(default_factory=lambda: LEARNERS)

    def __post_init__(self) -> None:
        self.store = self.timed = TimedStore(self.store.path)
        self.first_revision = revision_of(self.base)
        self.dropped: set[str] = set()
        self.mixes: dict[str, str | None] = {}
        self.born = time.monotonic()
        self.began, self.watch_at = (self.born, 0.0), 0.0
        self.open()

    def open(self) -> None:
        """A writer of our own, which fences any other trainer, and the log from its beginning."""
        self.writer = self.bus.writer(WRITER)
        topics = (PolicyUpdate, BatchManifest, Incident, Pause, RunManifest)
        self.growing = {record: Growing(self.bus, record.topic) for record in topics}
        self.records: dict[type[Record], list[Any]] = {record: [] for record in topics}
        for folder in sweep(self.checkpoints):
            log.info("removed %s, which a killed trainer has left half-written", folder.name)

    def close(self) -> None:
        self.writer.close()

    @property
    def checkpoints(self) -> Path:
        return self.settings.folder / "checkpoints"

    # Where training stands

    def look(self) -> None:
        """Read what has come to the log since the last look."""
        for record, growing in self.growing.items():
            self.records[record] += [decode(message.value or b"", record) for message in growing.new()]

    def known(self) -> tuple[list[PolicyUpdate], list[BatchManifest]]:
        """Every update and every manifest so far."""
        self.look()
        return first_of_each(self.records[PolicyUpdate]), list(self.records[BatchManifest])

    def standing(self) -> Standing:
        return standing_of(*self.known(), self.first_revision)

    def begun(self) -> list[BatchManifest]:
        """The manifests that a crash left without their updates, and that are still to be trained on."""
        known, manifests = self.known()
        over = {update.batch_id for update in known} | {record.voided_batch_id for record in self.records[Incident]}
        standing = self.standing()
        left = [manifest for manifest in manifests if manifest.record_id not in over]
        return [manifest for manifest in left if not overtaken(manifest, standing)]

    def paused(self) -> dict[str, str]:
        """The phases that are paused, and why."""
        self.look()
        return paused(self.records[Pause])

    # What to do

    def threshold(self, phase: str) -> int:
        train = self.settings.train
        return {"sft": train.sft_rows, "ppo": train.ppo_rows}.get(phase, train.reward_rows)

    def due(self) -> str | None:
        """The phase to start now, if one is due: they take turns, and one that is paused or not ready is passed over."""
        standing, (known, _) = self.standing(), self.known()
        held = {*self.paused(), *(manifest.phase for manifest in self.begun())}  # what is begun is finished first: `resume`
        order = tuple(phase for phase in PHASES if phase not in IDLE[self.rl])
        if (last := last_phase(known)) in order:
            after = order.index(last) + 1
            order = (*order[after:], *order[:after])
        if not self.store.path.exists():
            return None
        with self.timed.kept_open():
            return next((phase for phase in order if phase not in held and self.ready(phase, standing)), None)

    def ready(self, phase: str, standing: Standing) -> bool:
        """Whether a phase has enough new rows, and what else it needs."""
        if phase == "ppo" and not standing.reward_version:
            return False
        rows, threshold = self.candidates(phase, standing), self.threshold(phase)
        tried = self.given_up_at(phase, standing)
        if len(rows) < threshold or sum(row.commit_seq > tried for row in rows) < (threshold if tried >= 0 else 0):
            return False
        if phase == SL_PHASE and self.rl_is_next(standing):
            return False
        # A source that is scarce is waited for, but not longer than until there are twice the rows.
        return exact_size(rows, self.shares(phase)) >= threshold or len(rows) >= 2 * threshold

    @property
    def rl(self) -> str:
        """The phase that learns from labels."""
        return self.settings.train.policy_learner

    def rl_is_next(self, standing: Standing) -> bool:
        """Whether SL waits for RL: each SL update makes all earlier answers useless to RL, which would starve otherwise.

        It waits while there are answers that RL can use, or none by the policy of the last SL update yet.
        """
        by_version = policies(self.known()[0])
        newest = by_version.get(weights_of(self.known()[0], standing.policy_version))
        if newest is None or newest.phase != SL_PHASE or self.rl in self.paused():
            return False
        if self.rl == "dpo" or self.candidates("ppo", standing):
            return bool(self.candidates(self.rl, standing))
        if not standing.reward_version:
            return False
        since = "SELECT count(*) FROM responses WHERE created_at > ?"
        return bool(self.store.query(since, [newest.created_at.replace(tzinfo=None)]).rows[0][0] < self.threshold("ppo"))

    def given_up_at(self, phase: str, standing: Standing) -> int:
        """The last commit of the newest batch of a phase that was given up, while the model it started from is the same; -1."""
        voided = {record.voided_batch_id for record in self.records[Incident] if record.voided_batch_id}
        found = [
            manifest.commit_seq_to
            for manifest in self.records[BatchManifest]
            if manifest.phase == phase and manifest.record_id in voided and not overtaken(manifest, standing)
        ]
        return max(found, default=-1)

    def candidates(self, phase: str, standing: Standing) -> list[Light]:
        """The rows that a phase may train on. What it may not use any more is dropped here, on the log."""
        train = self.settings.train
        most = max(train.max_rows, 2 * self.threshold(phase))
        if phase != "ppo":
            return waiting(self.store, phase, standing, most=most)
        bounds = Bounds(train.max_staleness, train.max_reward_staleness, train.max_age_s)
        found, drops = rollouts(self.store, standing, bounds, allow_overlap=train.allow_overlap, served=self.served_revisions())
        self.drop(drops)
        return found

    def served_revisions(self) -> dict[int, str]:
        """The revision that stands for each policy version where a server answers."""
        address, _, model = self.settings.models.policy.partition("#")
        if not address.startswith(("http://", "https://")):
            return {}
        from engine.models.endpoint import served_revision

        known, url = self.known()[0], address.rstrip("/")
        by_version = policies(known)
        names = {version: served_name(by_version[version]) if weights_of(known, version) else model for version in by_version}
        return {version: served_revision(url, name) for version, name in ({0: model} | names).items()}

    def drop(self, drops: Sequence[DroppedRollout]) -> None:
        """Publish drops, each once: they are in the database only a moment later."""
        new = [record for record in drops if record.record_id not in self.dropped]
        if new:
            self.publish(new)
            self.dropped |= {record.record_id for record in new}

    def shares(self, phase: str) -> dict[str, float]:
        train = self.settings.train
        return mix({"sft": train.sft_mix, "ppo": []}.get(phase, train.reward_mix))

    def draw(self, phase: str, rows: Sequence[Light]) -> list[Light]:
        """The batch that the rows make, in the order of their commits."""
        return mixed(rows, self.shares(phase), least=self.threshold(phase), most=self.settings.train.max_rows)

    # Doing it

    def resume(self) -> PolicyUpdate | None:
        """Finish what a crash left unfinished, with the identical batch; that of a paused phase waits until it goes on."""
        held = self.paused()
        manifest = next((manifest for manifest in self.begun() if manifest.phase not in held), None)
        if manifest is None:
            return None
        log.info("going on with the %s batch %d that was left unfinished", manifest.phase, manifest.batch_number)
        self.start_clock()
        if why := self.outdated(manifest):
            self.give_up(manifest, f"batch {manifest.batch_number} ({manifest.phase}) was left unfinished and is given up", why)
            return None
        return self.attempt(rebuild(self.store, manifest))

    def outdated(self, manifest: BatchManifest) -> str | None:
        """Why an unfinished batch must not be trained on any more: rows were forgotten, or are too old by now."""
        forgotten = "SELECT count(*) FROM erasures WHERE created_at > ?"
        drawn_at, bound = manifest.created_at.replace(tzinfo=None), self.settings.train.max_age_s
        if self.store.query(forgotten, [drawn_at]).rows[0][0]:
            try:
                rebuild(self.store, manifest)
            except CharterError:
                return "some of its rows were forgotten"
        if manifest.phase == "ppo" and bound and self.finished_checkpoint(manifest) is None:
            oldest = "SELECT min(created_at) FROM responses WHERE record_id IN (SELECT unnest(?::UUID[]))"
            (sampled_at,) = self.store.query(oldest, [manifest.record_ids]).rows[0]
            if sampled_at and age_s(sampled_at) > bound:
                return f"its oldest rollout is older than {bound:g} s by now (train.max_age_s)"
        return None

    def update(self, phase: str) -> PolicyUpdate:
        """One update of a phase on the rows that are new to it; raises UsageError when there are none."""
        self.start_clock()
        standing = self.standing()
        if phase == "ppo" and not standing.reward_version:
            raise UsageError("PPO needs a reward model", "none has been trained yet", "type: charter train --phase reward")
        with self.timed.kept_open():
            rows = self.candidates(phase, standing)
            if not rows:
                raise UsageError(
                    f"there is nothing new for {phase} to train on", self.why_nothing(phase), "type: charter status"
                )
            batch = self.drawn(phase, rows, standing)
        return self.attempt(batch)

    def drawn(self, phase: str, candidates: Sequence[Light], standing: Standing) -> Batch:
        """Draw a batch and publish its manifest (step 1)."""
        number, settings = len(self.known()[1]) + 1, self.learner_settings(phase)
        chosen, shares = self.draw(phase, candidates), self.shares(phase)
        self.tell_mix(phase, shortfall(chosen, shares))
        if replay := settings.get("replay", 0.0):
            wanted, most = round(replay * len(chosen)), self.settings.train.max_rows
            count = min(wanted, most - len(chosen))
            if count < wanted:
                log.warning(
                    "%s: at most %d of %d earlier labels fit beside the new ones (train.max_rows)", phase, count, wanted
                )
            chosen += earlier(self.store, phase, standing, count=count, seed=self.settings.train.seed + number)
        if phase != "ppo":
            chosen = bucketed(chosen, settings["batch_size"], self.settings.train.seed + number)
        rows = rows_of(self.store, phase, [light.key for light in chosen], settings.get("rounds", ()))
        sl_rows = newest_chains(self.store, len(rows)) if self.combined(phase) else []
        manifest = manifest_of(
            phase,
            number,
            rows,
            sl_rows,
            standing,
            chosen,
            run_id=self.settings.run.id,
            seed=self.settings.train.seed,
            settings=settings,
            shares=shares,
        )
        self.publish([manifest])
        return Batch(manifest, rows, sl_rows)

    def tell_mix(self, phase: str, words: str | None) -> None:
        """Say that a batch is not the mix that was asked for; once, as long as it stays so."""
        if words and words != self.mixes.get(phase):
            self.say(f"{phase}: {words}")
        self.mixes[phase] = words

    def combined(self, phase: str) -> bool:
        return phase == "ppo" and self.settings.train.objective == "combined"

    def why_nothing(self, phase: str) -> str:
        if phase == "ppo" and self.dropped:
            count = "charter sql 'select reason, count(*) from dropped_rollouts group by 1'"
            return f"{len(self.dropped)} rollouts may not be used any more; why: {count}"
        return "every row was trained on already, or none has arrived"

    def learner_settings(self, phase: str) -> dict[str, Any]:
        learner: Any = getattr(self.settings, phase)
        train = self.settings.train
        settings: dict[str, Any] = learner.model_dump() | {"lora_rank": train.lora_rank, "max_length": train.max_length}
        if phase == "ppo":
            settings |= {"beta": self.beta(), "alpha": train.alpha}
        return settings

    def beta(self) -> float:
        """The KL weight that the last PPO update left behind; never less than the setting."""
        found = [update for update in self.known()[0] if update.phase == "ppo"]
        newest = max(found, key=lambda update: update.version, default=None)
        return max(newest.metrics["beta"] if newest else 0.0, self.settings.ppo.beta)

    def publish(self, records: Sequence[Record]) -> None:
        self.writer.commit([outgoing(record) for record in records])

    def attempt(self, batch: Batch) -> PolicyUpdate:
        """Finish a batch whose manifest is published; one that cannot be finished is given up, and its rows are free again."""
        try:
            return self.finish(batch)
        except (DependencyUnreachable, CommitInDoubt, Fenced):
            raise  # not the batch's fault: it is taken up again
        except CharterError as error:
            self.give_up(batch.manifest, error.what, error.why)
            raise

    def give_up(self, manifest: BatchManifest, what: str, why: str) -> None:
        self.publish([incident_of(manifest, what, why, voided_batch_id=manifest.record_id)])
        if self.finished_checkpoint(manifest):
            discard(self.folder_for(manifest))

    def finish(self, batch: Batch) -> PolicyUpdate:
        """Train on a batch whose manifest is published, and publish the update (steps 2 to 6)."""
        manifest, folder = batch.manifest, self.folder_for(batch.manifest)
        checkpoint = self.checkpoint_of(batch, folder)
        self.refuse_overtaken(manifest)
        kind, version = kind_of(manifest), base_of(manifest) + 1
        if self.gate and kind is PolicyKind.POLICY and (trip := self.gate(self.store, folder, version)):
            raise CharterError(
                f"policy {version} is not published: {trip.what}", trip.why, "its batch is free again; see gate.*"
            )
        update = PolicyUpdate(
            record_id=ids.record_id("train", [manifest.record_id], ids.fingerprint(version=version)),
            parent_ids=[manifest.record_id],
            run_id=manifest.run_id,
            stage="train",
            model=ModelRef(id=folder.name, revision=revision_of(folder)),
            policy_version=version if kind is PolicyKind.POLICY else manifest.base_policy_version,
            seed=manifest.seed,
            kind=kind,
            version=version,
            phase=manifest.phase,
            uri=str(folder.resolve()),
            content_hash=checkpoint.content_hash,
            base_version=base_of(manifest),
            batch_id=manifest.record_id,
            metrics=checkpoint.manifest["metrics"] | self.clock(),
        )
        self.publish([update, self.timing(manifest, update)])
        if update.record_id not in {known.record_id for known in self.known()[0]}:
            self.refuse_overtaken(manifest)
        self.remove_old_checkpoints()
        self.on_update(update)
        return update

    def refuse_overtaken(self, manifest: BatchManifest) -> None:
        """Raise CharterError when someone has published another version of what this batch would make."""
        standing = self.standing()
        if overtaken(manifest, standing):
            raise CharterError(
                f"batch {manifest.batch_number} ({manifest.phase}) is given up",
                f"it trained from policy {manifest.base_policy_version}, and policy {standing.policy_version} was published"
                " meanwhile",
                "its rows are free again; the next batch starts from the present policy",
            )

    def folder_for(self, manifest: BatchManifest) -> Path:
        return self.checkpoints / f"{kind_of(manifest).value.lower()}-{base_of(manifest) + 1:06d}"

    def finished_checkpoint(self, manifest: BatchManifest) -> Checkpoint | None:
        """The checkpoint of this batch, if it was written whole."""
        folder = self.folder_for(manifest)
        found = read(folder) if folder.exists() else None
        return found if found and found.manifest.get("batch_id") == manifest.record_id else None

    def checkpoint_of(self, batch: Batch, folder: Path) -> Checkpoint:
        """The batch's checkpoint: the one on disk when a crash came after it was written, else trained now."""
        if found := self.finished_checkpoint(batch.manifest):
            return found
        if folder.exists():
            self.discard_given_up(folder)
        base = self.policy_folder(batch.manifest.base_policy_version)
        require_room(self.checkpoints, base)
        try:
            save, metrics = self.learners[batch.manifest.phase](self, batch)
        except OSError as error:
            if is_full(error):
                raise disk_full(self.checkpoints, str(error)) from error
            raise
        about = {"batch_id": batch.manifest.record_id, "phase": batch.manifest.phase, "metrics": metrics}
        return write(folder, save, about | {"batch": batch.manifest.model_dump(mode="json")})

    def discard_given_up(self, folder: Path) -> None:
        """Remove the checkpoint of a batch of this log that was given up; raises UsageError when it is anything else."""
        owner = read(folder).manifest.get("batch_id")
        known, manifests = self.known()
        if owner not in {m.record_id for m in manifests} or owner in {update.batch_id for update in known}:
            raise UsageError(
                f"{folder} holds a checkpoint of another batch",
                "the log and the checkpoints do not belong together",
                "use the data folder that the log belongs to, or move that checkpoint away",
            )
        discard(folder)

    def step(self, manifest: BatchManifest, step: int, metrics: dict[str, float]) -> None:
        """Publish one step's numbers and pass them on."""
        metric = Metric(
            record_id=ids.record_id("metric", [manifest.record_id], ids.fingerprint(), step),
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

    def policy_folder(self, version: int) -> Path:
        """The verified folder whose weights this policy version answers with."""
        source = weights_of(self.known()[0], version)
        return self.folder_of(PolicyKind.POLICY, source) if source else self.base

    def folder_of(self, kind: PolicyKind, version: int) -> Path:
        """The verified folder of a published version."""
        update = next(u for u in self.known()[0] if u.kind is kind and u.version == version)
        return read(located(update.uri, self.checkpoints), update.content_hash).folder

    def remove_old_checkpoints(self) -> None:
        """Keep the newest of each kind and every one that is still referred to; the update that replaces them is on the log."""
        known = self.known()[0]
        wanted = {folder.name for folder in self.referenced()}
        for kind in (PolicyKind.POLICY, PolicyKind.REWARD):
            trained = sorted(u.version for u in known if u.kind is kind and u.restored_version is None)
            for version in trained[: -self.settings.train.keep]:
                folder = self.checkpoints / f"{kind.value.lower()}-{version:06d}"
                if folder.name not in wanted and folder.exists():
                    discard(folder)
                    log.info("removed the checkpoint %s", folder.name)

    def referenced(self) -> set[Path]:
        """The checkpoints of the live policy, the one before it and its reference, of the reward model, and those of runs."""
        known, standing = self.known()[0], self.standing()
        versions = {weights_of(known, version) for version in (*standing.line[:2], standing.reference_version)}
        named = set()
        for manifest in self.records[RunManifest]:
            settings = json.loads(manifest.settings)
            pinned = (settings.get("replay") or {}).get("pinned")
            versions |= {weights_of(known, pinned)} if pinned else set()
            named |= {Path(spec) for spec in settings.get("models", {}).values() if isinstance(spec, str)}
        found = {self.checkpoints / f"policy-{version:06d}" for version in versions}
        return found | {self.checkpoints / f"reward-{standing.reward_version:06d}"} | {path for path in named if path.name}

    # Time

    def start_clock(self) -> None:
        self.began = (time.monotonic(), self.timed.spent_s)

    def clock(self) -> dict[str, float]:
        """How long this update took, and how much of that was waiting for the database."""
        wall, waited = time.monotonic() - self.began[0], self.timed.spent_s - self.began[1]
        return {"wall_s": wall, "duckdb_s": waited, "duckdb_share": waited / max(wall, 1e-9)}

    def timing(self, manifest: BatchManifest, update: PolicyUpdate) -> Metric:
        """The seconds of an update, and DuckDB's share of all time since the start, looking for rows included."""
        metrics = {name: update.metrics[name] for name in ("wall_s", "duckdb_s", "duckdb_share")}
        alive = time.monotonic() - self.born
        metrics |= {"alive_s": alive, "alive_duckdb_share": self.timed.spent_s / max(alive, 1e-9)}
        return Metric(
            record_id=ids.record_id("metric", [update.record_id], ids.fingerprint(of="time")),
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

    def trip(self, trip: Trip) -> PolicyUpdate | None:
        """Pause the RL phase, go back to the last good policy and say why, in one transaction; returns the new update."""
        known, standing = self.known()[0], self.standing()
        run_id = self.settings.run.id
        good = self.still_there(version_before(known, standing.policy_version) if trip.good is None else trip.good)
        update = None
        if weights_of(known, good) != weights_of(known, standing.policy_version):
            update = restored(known, good, run_id=run_id, first=self.settings.models.policy)
        stop = pause(self.rl, trip.what, run_id=run_id)
        incident = Incident(
            record_id=ids.record_id("incident", [stop.record_id], ids.fingerprint(what=trip.what)),
            run_id=run_id,
            stage="train",
            policy_version=standing.policy_version,
            phase=self.rl,
            title=trip.what,
            detail=trip.why,
            metrics=trip.metrics,
        )
        self.publish([stop, incident, *([update] if update else [])])
        back = f"; policy {update.version} has the weights of policy {update.restored_version}" if update else ""
        self.say(f"{self.rl} is paused: {trip.what} ({trip.why}){back}. To go on: charter policy resume")
        return update

    def still_there(self, version: int) -> int:
        """A version whose weights are still on disk: this one, or the reference, whose weights always are."""
        source = weights_of(self.known()[0], version)
        there = source == 0 or (self.checkpoints / f"policy-{source:06d}").exists()
        return version if there else self.standing().reference_version

    def watched(self) -> None:
        """Let the watch look, unless RL is paused already."""
        if self.watch is None or self.rl in self.paused() or time.monotonic() < self.watch_at:
            return
        self.watch_at = time.monotonic() + WATCH_EVERY_S
        if trip := self.watch(self):
            self.trip(trip)

    # The loop

    def loop(self, stop: threading.Event) -> None:
        """Update whenever a phase has enough new rows, until `stop`; what is away is waited for, what fails is told once."""
        failures, doubt, told = 0, False, ""
        while not stop.is_set():
            phase, looked = None, self.timed.spent_s
            try:
                if doubt:
                    self.start_anew()
                    doubt = False
                self.resume()  # at each look: a phase that was paused with a batch in hand may have been let go on
                self.watched()
                phase = self.due()
                if phase is not None:
                    self.update(phase)
                    self.watch_at = 0.0
                failures, told = 0, ""
            except (DependencyUnreachable, CommitInDoubt) as error:
                log.warning("the trainer waits: %s", error.what)
                failures, doubt = failures + 1, True
            except Fenced:
                raise
            except CharterError as error:
                if str(error) != told:
                    self.say(str(error))
                failures, told = failures + 1, str(error)
            if failures:
                stop.wait(backoff(failures - 1))
            elif phase is None:
                stop.wait(max(LOOK_EVERY_S, (self.timed.spent_s - looked) / LOOK_SHARE))

    def start_anew(self) -> None:
        """A new writer settles what the last one left in doubt; the log then says whether it landed."""
        with suppress(CommitInDoubt, DependencyUnreachable):
            self.writer.close()
        self.open()


def kind_of(manifest: BatchManifest) -> PolicyKind:
    return PolicyKind.REWARD if manifest.phase == "reward" else PolicyKind.POLICY


def base_of(manifest: BatchManifest) -> int:
    """The version that a batch's update starts from."""
    return manifest.base_reward_version or 0 if kind_of(manifest) is PolicyKind.REWARD else manifest.base_policy_version


def last_phase(known: Sequence[PolicyUpdate]) -> str:
    """The phase of the newest update that was trained."""
    return next((update.phase for update in reversed(known) if update.phase != RESTORE), "")


def discard(folder: Path) -> None:
    """Remove a checkpoint; one that is half removed after a crash is not taken for a whole one."""
    aside = folder.with_name(f".{folder.name}-removed")
    folder.rename(aside)
    shutil.rmtree(aside)


def incident_of(manifest: BatchManifest, what: str, why: str, voided_batch_id: str | None = None) -> Incident:
    return Incident(
        record_id=ids.record_id("incident", [manifest.record_id], ids.fingerprint(what=what)),
        parent_ids=[manifest.record_id],
        run_id=manifest.run_id,
        stage="train",
        policy_version=manifest.base_policy_version,
        phase=manifest.phase,
        title=what,
        detail=why,
        voided_batch_id=voided_batch_id,
    )
