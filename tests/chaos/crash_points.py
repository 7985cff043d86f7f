"""One update of the trainer in a process that kills itself at a chosen point. Its FAKE learners only record their batch.

`python -m pytest tests/trainer/test_killed.py` runs all points.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine.bus.embedded
import engine.checkpoints
import trainer.update
from charter.connect import connect_bus, open_store
from engine.settings import load_settings
from schemas.records import BatchManifest, Metric, PolicyUpdate, Record
from trainer.batches import Batch
from trainer.loop import Trainer
from trainer.phases import PHASES, LearnContext
from trainer.state import TrainingLog

NOTES_FILE = "trained.jsonl"
_NUM_STEPS = 2


def make_settings(folder: Path, **changes: str) -> Any:
    flags = {
        "data.folder": str(folder), "models.policy": str(folder / "base"), "train.sft_rows": "4", "train.reward_rows": "4",
        "train.ppo_rows": "4", "reward.replay_ratio": "0", "train.save_total_limit": "1", "train.allow_overlap": "true",
    }  # fmt: skip
    return load_settings(flags | {f"train.{key}": value for key, value in changes.items()}, environment={})[0]


def run_fake_update(context: LearnContext, batch: Batch) -> Any:
    """Run a fake update: record its input, publish metrics of some steps, and save a checkpoint that holds its batch's id."""
    inputs = {"batch": batch.manifest.record_id, "hash": batch.manifest.content_hash, "rows": batch.rows}
    with (context.folders.checkpoints_folder.parent / NOTES_FILE).open("a") as notes:
        notes.write(json.dumps(inputs, default=str) + "\n")
    for step in range(_NUM_STEPS):
        context.on_step(step, {"loss": 1.0})

    def save(folder: Path) -> None:
        (folder / "fake.safetensors").write_text(batch.manifest.record_id)
        _die_if_armed("saved")

    return save, {"beta": 0.1}


FAKE_LEARNERS = dict.fromkeys(PHASES, run_fake_update)
_armed_points: list[str] = []


def _die_if_armed(point: str) -> None:
    if point in _armed_points:
        os.kill(os.getpid(), signal.SIGKILL)


# In the order in which an update reaches them.
CRASH_POINTS = (
    "before BatchManifest", "committing BatchManifest", "after BatchManifest", "before Metric", "after Metric", "saved",
    "flushing", "renamed", "gate", "before PolicyUpdate", "committing PolicyUpdate", "after PolicyUpdate", "removing",
)  # fmt: skip


def _arm_crash_point(point: str) -> None:
    """Make this process kill itself at `point`."""
    _armed_points.append(point)
    _instrument_publish()
    real_flush, real_remove = engine.checkpoints.fsync_path, shutil.rmtree

    def flush(path: Path) -> None:
        # A checkpoint is written in a temporary folder; its parent folder is flushed after the rename.
        _die_if_armed("renamed" if path.name == "checkpoints" else "flushing")
        real_flush(path)

    def rmtree(path: Any, *arguments: Any, **more: Any) -> None:
        _die_if_armed("removing" if str(path).endswith("-removed") else "")
        real_remove(path, *arguments, **more)

    engine.checkpoints.fsync_path = flush
    trainer.update.shutil.rmtree = rmtree


def _instrument_publish() -> None:
    """Add crash points before, inside and after the transaction of a manifest, of metrics and of an update."""
    real: Callable[[TrainingLog, Any], None] = TrainingLog.publish
    real_commit, pending_kinds = engine.bus.embedded.LogConnection.commit, set[str]()

    def commit(connection: Any) -> None:
        for kind in pending_kinds:
            _die_if_armed(f"committing {kind}")
        real_commit(connection)

    def publish(log: TrainingLog, records: list[Record]) -> None:
        kinds = {type(record).__name__ for record in records if isinstance(record, BatchManifest | Metric | PolicyUpdate)}
        for kind in kinds:
            _die_if_armed(f"before {kind}")
        pending_kinds.update(kinds)
        real(log, records)
        pending_kinds.clear()
        for kind in kinds:
            _die_if_armed(f"after {kind}")

    TrainingLog.publish = publish  # type: ignore[method-assign]
    engine.bus.embedded.LogConnection.commit = commit  # type: ignore[method-assign]


def _accept_policy(*_: object) -> None:
    """Accept every policy."""
    _die_if_armed("gate")


def run_update(folder: str, phase: str, point: str, **changes: str) -> None:
    """Run one update of a phase, or resume an unfinished one; the process may kill itself on the way.

    `changes` are settings of the section `train`.
    """
    _arm_crash_point(point)
    settings = make_settings(Path(folder), **changes)
    bus, store = connect_bus(settings), open_store(settings)
    trainer = Trainer(bus, store, settings, settings.folder / "base", learners=FAKE_LEARNERS, promotion_gate=_accept_policy)
    trainer.resume() or trainer.update(phase)
