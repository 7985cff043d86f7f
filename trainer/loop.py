"""The trainer: batches from DuckDB, three kinds of update, and each new policy back onto the stream.

One update goes through these steps, each durable before the next, so that a crash anywhere resumes with the same batch:

1. draw the rows after the phase's cursor, and publish their manifest (`batches`);
2. train, publishing each step's numbers (`metrics`);
3. write the checkpoint: safetensors and the manifest in a temporary folder, then renamed;
4. publish the PolicyUpdate (`policies`), which is what raises the version and what every responder follows.

A manifest without its PolicyUpdate is taken up again before anything new is drawn. A second trainer on the same log fences
the first. Where training stands is read from the log, never kept in memory alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.bus.port import Bus
from engine.bus.read import read_values
from engine.checkpoints import Checkpoint, located, read, write
from engine.errors import CommitInDoubt, DependencyUnreachable, UsageError
from engine.policy import updates
from engine.settings import Settings
from engine.store import Store
from engine.worker import backoff, outgoing
from schemas import ids
from schemas.codec import decode
from schemas.records import BatchManifest, Incident, Metric, ModelRef, PolicyKind, PolicyUpdate, Record, Score
from trainer.batches import (
    Batch,
    Standing,
    candidates,
    manifest_of,
    newest_chains,
    preference_example,
    rebuild,
    rollout,
    rows_of,
    sft_example,
    turns_of,
)

if TYPE_CHECKING:
    from trainer.weights import Hardware

log = logging.getLogger("charter.trainer")
PHASES = ("sft", "reward", "ppo", "dpo")
IDLE = {"ppo": ("dpo",), "dpo": ("reward", "ppo")}  # what is never due, by train.policy_learner
LOOK_EVERY_S = 2.0
WRITER = "trainer"
OnStep = Callable[[str, int, dict[str, float]], None]


def standing_of(known: Sequence[PolicyUpdate], manifests: Sequence[BatchManifest]) -> Standing:
    """Where training stands, from what it has published."""
    by_id = {manifest.record_id: manifest for manifest in manifests}
    done = [update for update in known if update.batch_id in by_id]
    policies = [update for update in known if update.kind is PolicyKind.POLICY]
    rewards = [update for update in known if update.kind is PolicyKind.REWARD]
    newest_reward = max(rewards, key=lambda update: update.version, default=None)
    cursors: dict[str, int] = {}
    for update in done:
        cursors[update.phase] = max(cursors.get(update.phase, -1), by_id[update.batch_id].commit_seq_to)
    return Standing(
        policy_version=max((update.version for update in policies), default=0),
        reward_version=newest_reward.version if newest_reward else 0,
        reference_version=max((update.version for update in policies if update.phase == "sft"), default=0),
        cursors=tuple(cursors.items()),
        reward_batch=newest_reward.batch_id if newest_reward else None,
    )


@dataclass
class Trainer:
    """Trains from `store`, publishes on `bus`. `base` is the folder of policy version 0."""

    bus: Bus
    store: Store
    settings: Settings
    base: Path
    on_step: OnStep = lambda phase, step, measures: None

    def __post_init__(self) -> None:
        self.writer = self.bus.writer(WRITER)

    def close(self) -> None:
        self.writer.close()

    # What to do

    def known(self) -> tuple[list[PolicyUpdate], list[BatchManifest]]:
        manifests = [decode(value, BatchManifest) for value in read_values(self.bus, BatchManifest.topic)]
        return updates(self.bus), manifests

    def standing(self) -> Standing:
        return standing_of(*self.known())

    def unfinished(self) -> BatchManifest | None:
        """A manifest that a crash left without its update."""
        known, manifests = self.known()
        finished = {update.batch_id for update in known}
        return next((manifest for manifest in manifests if manifest.record_id not in finished), None)

    def threshold(self, phase: str) -> int:
        train = self.settings.train
        return {"sft": train.sft_rows, "reward": train.reward_rows, "ppo": train.ppo_rows, "dpo": train.reward_rows}[phase]

    def due(self) -> str | None:
        """The first phase that has enough new rows; PPO needs a reward model."""
        standing = self.standing()
        for phase in PHASES:
            if phase in IDLE[self.settings.train.policy_learner] or (phase == "ppo" and not standing.reward_version):
                continue
            if len(self.candidates(phase, standing)[0]) >= self.threshold(phase):
                return phase
        return None

    def candidates(self, phase: str, standing: Standing) -> tuple[list[str], list[Any]]:
        train = self.settings.train
        return candidates(
            self.store,
            phase,
            standing,
            limit=max(train.max_rows, self.threshold(phase)),
            max_staleness=train.max_staleness,
            allow_overlap=train.allow_overlap,
        )

    # Doing it

    def resume(self) -> PolicyUpdate | None:
        """Finish what a crash left unfinished, with the identical batch."""
        manifest = self.unfinished()
        if manifest is None:
            return None
        log.info("going on with the %s batch %s that was left unfinished", manifest.phase, manifest.record_id)
        return self.finish(rebuild(self.store, manifest))

    def update(self, phase: str) -> PolicyUpdate:
        """One update of a phase on the rows that are new to it; raises UsageError when there are none."""
        standing = self.standing()
        if phase == "ppo" and not standing.reward_version:
            raise UsageError("PPO needs a reward model", "none has been trained yet", "type: charter train --phase reward")
        record_ids, drops = self.candidates(phase, standing)
        if not record_ids:
            raise UsageError(
                f"there is nothing new for {phase} to train on",
                self.why_nothing(phase, len(drops)),
                "type: charter status",
            )
        rows = rows_of(self.store, phase, record_ids[: self.settings.train.max_rows])
        sl_rows = newest_chains(self.store, len(rows)) if self.combined(phase) else []
        manifest = manifest_of(
            phase,
            self.number(phase),
            rows,
            sl_rows,
            standing,
            run_id=self.settings.run.id,
            seed=self.settings.train.seed,
            settings=self.learner_settings(phase),
        )
        self.publish([manifest, *drops])
        return self.finish(Batch(manifest, rows, sl_rows))

    def combined(self, phase: str) -> bool:
        return phase == "ppo" and self.settings.train.objective == "combined"

    def why_nothing(self, phase: str, dropped: int) -> str:
        if dropped:
            return f"{dropped} new rollouts may not be used; why: charter sql 'select reason, count(*) from drops group by 1'"
        return "every row was trained on already, or none has arrived"

    def number(self, phase: str) -> int:
        return 1 + sum(1 for manifest in self.known()[1] if manifest.phase == phase)

    def learner_settings(self, phase: str) -> dict[str, Any]:
        learner: Any = getattr(self.settings, phase)
        train = self.settings.train
        settings = learner.model_dump() | {"lora_rank": train.lora_rank, "max_length": train.max_length}
        if phase == "ppo":
            settings |= {"beta": self.beta(), "alpha": train.alpha}
        return settings

    def beta(self) -> float:
        """The KL weight that the last PPO phase left behind, or the setting."""
        phases = [update for update in self.known()[0] if update.phase == "ppo"]
        newest = max(phases, key=lambda update: update.version, default=None)
        return newest.metrics["beta"] if newest else self.settings.ppo.beta

    def publish(self, records: Sequence[Record]) -> None:
        self.writer.commit([outgoing(record) for record in records])

    def finish(self, batch: Batch) -> PolicyUpdate:
        """Train on a batch whose manifest is published, and publish the update (steps 2 to 4)."""
        manifest = batch.manifest
        kind = PolicyKind.REWARD if manifest.phase == "reward" else PolicyKind.POLICY
        base = manifest.base_reward_version or 0 if kind is PolicyKind.REWARD else manifest.base_policy_version
        version = base + 1
        folder = self.settings.folder / "checkpoints" / f"{kind.value.lower()}-{version:06d}"
        checkpoint = self.checkpoint_of(batch, folder)
        update = PolicyUpdate(
            record_id=ids.record_id("train", [manifest.record_id], ids.fingerprint(version=version)),
            parent_ids=[manifest.record_id],
            run_id=manifest.run_id,
            stage="train",
            model=ModelRef(id=str(folder.name), revision=checkpoint.content_hash[:16]),
            policy_version=version if kind is PolicyKind.POLICY else manifest.base_policy_version,
            seed=manifest.seed,
            kind=kind,
            version=version,
            phase=manifest.phase,
            uri=str(folder.resolve()),
            content_hash=checkpoint.content_hash,
            base_version=base,
            batch_id=manifest.record_id,
            metrics=checkpoint.manifest["metrics"],
        )
        self.publish([update])
        return update

    def checkpoint_of(self, batch: Batch, folder: Path) -> Checkpoint:
        """The batch's checkpoint: the one on disk when a crash came after it was written, else trained now."""
        if folder.exists():
            found = read(folder)
            if found.manifest.get("batch_id") == batch.manifest.record_id:
                return found
            raise UsageError(
                f"{folder} holds a checkpoint of another batch",
                "the log and the checkpoints do not belong together",
                "use the data folder that the log belongs to, or move that checkpoint away",
            )
        save, metrics = LEARNERS[batch.manifest.phase](self, batch)
        about = {"batch_id": batch.manifest.record_id, "phase": batch.manifest.phase, "metrics": metrics}
        return write(folder, save, about | {"batch": batch.manifest.model_dump(mode="json")})

    def step(self, manifest: BatchManifest, step: int, measures: dict[str, float]) -> None:
        """Publish one step's numbers and pass them on."""
        metric = Metric(
            record_id=ids.record_id("metric", [manifest.record_id], ids.fingerprint(), step),
            parent_ids=[manifest.record_id],
            run_id=manifest.run_id,
            stage="train",
            policy_version=manifest.base_policy_version,
            phase=manifest.phase,
            number=manifest.number,
            step=step,
            measures=measures,
        )
        self.publish([metric])
        self.on_step(manifest.phase, step, measures)

    def policy_folder(self, version: int) -> Path:
        return self.folder_of(PolicyKind.POLICY, version) if version else self.base

    def folder_of(self, kind: PolicyKind, version: int) -> Path:
        """The verified folder of a published version."""
        update = next(u for u in updates(self.bus) if u.kind is kind and u.version == version)
        return read(located(update.uri, self.settings.folder / "checkpoints"), update.content_hash).folder

    def loop(self, stop: threading.Event) -> None:
        """Update whenever a phase has enough new rows, until `stop`; what is away is waited for."""
        failures, settled = 0, False
        while not stop.is_set():
            try:
                if failures:
                    self.start_anew()
                if not settled:
                    self.resume()
                    settled = True
                phase = self.due()
                if phase is not None:
                    self.update(phase)
                failures = 0
            except (DependencyUnreachable, CommitInDoubt) as error:
                log.warning("the trainer waits: %s", error.what)
                stop.wait(backoff(failures))
                failures, settled = failures + 1, False
            else:
                if phase is None:
                    stop.wait(LOOK_EVERY_S)

    def start_anew(self) -> None:
        """A new writer settles what the last one left in doubt; the log then says whether it landed."""
        with suppress(CommitInDoubt, DependencyUnreachable):
            self.writer.close()
        self.writer = self.bus.writer(WRITER)


Trained = tuple[Callable[[Path], None], dict[str, float]]


def hardware_of(settings: Settings) -> Hardware:
    """How learners use this machine; no part of a batch, whose rows train the same on another one."""
    from trainer.weights import Hardware

    train = settings.train
    return Hardware(train.micro_rows, train.checkpointing, train.precision)


def learn_sft(trainer: Trainer, batch: Batch) -> Trained:
    """The policy on the final texts of chains."""
    from trainer import processes, sft, weights

    model, tokenizer, metrics = processes.call(
        sft.train,
        trainer.policy_folder(batch.manifest.base_policy_version),
        [sft_example(row) for row in batch.rows],
        seed=batch.manifest.seed or 0,
        hardware=hardware_of(trainer.settings),
        on_step=partial(trainer.step, batch.manifest),
        **batch.settings,
    )
    return weights.saver(model, tokenizer), metrics


def learn_reward(trainer: Trainer, batch: Batch) -> Trained:
    """The reward model on soft labels: from the last one, or from the policy with a fresh head."""
    from trainer import processes, reward

    manifest = batch.manifest
    version = manifest.base_reward_version
    base = trainer.policy_folder(manifest.base_policy_version)
    model, metrics = processes.call(
        reward.train,
        trainer.folder_of(PolicyKind.REWARD, version) if version else base,
        [preference_example(row) for row in batch.rows],
        seed=manifest.seed or 0,
        hardware=hardware_of(trainer.settings),
        on_step=partial(trainer.step, manifest),
        **batch.settings,
    )
    return model.save, metrics


def learn_ppo(trainer: Trainer, batch: Batch) -> Trained:
    """The policy on its own scored answers, held near the policy that the last supervised phase made."""
    from trainer import ppo, processes, sft, weights

    manifest, settings = batch.manifest, batch.settings
    lora_rank, max_length = settings.pop("lora_rank"), settings.pop("max_length")
    policy = trainer.policy_folder(manifest.base_policy_version)
    reference = trainer.policy_folder(manifest.reference_policy_version or 0)
    tokenizer = weights.load_tokenizer(policy)
    learned, metrics = processes.call(
        ppo.train,
        policy,
        reference,
        [rollout(row) for row in batch.rows],
        scores_of(trainer, batch),
        ppo.Hyperparameters(**settings),
        first_folder=None if reference == trainer.base else trainer.base,
        sl_rows=[sft.encode(tokenizer, sft_example(row), max_length) for row in batch.sl_rows],
        lora_rank=lora_rank,
        hardware=hardware_of(trainer.settings),
        seed=manifest.seed or 0,
        on_step=partial(trainer.step, manifest),
    )
    if metrics["stopped_early"]:
        trainer.publish([incident(manifest, metrics)])
    return learned.save, metrics


def learn_dpo(trainer: Trainer, batch: Batch) -> Trained:
    """The policy on labels, held near the policy that the last supervised phase made."""
    from trainer import dpo, processes

    manifest = batch.manifest
    save, metrics = processes.call(
        dpo.train,
        trainer.policy_folder(manifest.base_policy_version),
        trainer.policy_folder(manifest.reference_policy_version or 0),
        [preference_example(row) for row in batch.rows],
        hardware=hardware_of(trainer.settings),
        seed=manifest.seed or 0,
        on_step=partial(trainer.step, manifest),
        **batch.settings,
    )
    return save, metrics


def scores_of(trainer: Trainer, batch: Batch) -> list[float]:
    """The reward model's normalised score of each rollout; all scores are published too."""
    from trainer import reward

    manifest = batch.manifest
    version = manifest.base_reward_version
    assert version is not None, "PPO batches are drawn only when there is a reward model"
    model = reward.load(
        trainer.folder_of(PolicyKind.REWARD, version),
        hardware_of(trainer.settings),
        policy=trainer.policy_folder(manifest.base_policy_version),
    )
    raw = model.score([(turns_of(row), row["text"], row["stopped"]) for row in batch.rows])
    normalised = model.normalised(raw)
    configuration = ids.fingerprint(reward=version)
    trainer.publish(
        [
            Score(
                record_id=ids.record_id("score", [str(row["response_id"])], configuration, row["candidate"]),
                parent_ids=[str(row["response_id"])],
                prompt_id=str(row["prompt_id"]),
                run_id=manifest.run_id,
                stage="train",
                policy_version=row["policy_version"],
                response_id=str(row["response_id"]),
                candidate=row["candidate"],
                reward_version=version,
                score=score,
                normalised=value,
            )
            for row, score, value in zip(batch.rows, raw, normalised, strict=True)
        ]
    )
    return normalised


def incident(manifest: BatchManifest, metrics: dict[str, float]) -> Incident:
    return Incident(
        record_id=ids.record_id("incident", [manifest.record_id], ids.fingerprint(what="kl")),
        parent_ids=[manifest.record_id],
        run_id=manifest.run_id,
        stage="train",
        policy_version=manifest.base_policy_version,
        phase=manifest.phase,
        what="PPO stopped early: the policy moved too far",
        why="the KL to the reference or to the first policy passed ppo.kl_stop or ppo.kl_first_stop",
        measures=metrics,
    )


LEARNERS: dict[str, Callable[[Trainer, Batch], Trained]] = {
    "sft": learn_sft,
    "reward": learn_reward,
    "ppo": learn_ppo,
    "dpo": learn_dpo,
}
