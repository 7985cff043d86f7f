"""One update of the trainer in a process that kills itself at a chosen point, with FAKE learners that only note their batch.

The points are named for what was durable last; `python -m pytest tests/trainer/test_killed.py` goes through all of them.
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


def make_settings(folder: Path) -> Any:
    flags = {
        "data.folder": str(folder), "models.policy": str(folder / "base"), "train.sft_rows": "4", "train.reward_rows": "4",
        "train.ppo_rows": "4", "reward.replay_ratio": "0", "train.save_total_limit": "1", "train.allow_overlap": "true",
    }  # fmt: skip
    return load_settings(flags, environment={})[0]


def run_fake_update(context: LearnContext, batch: Batch) -> Any:
    """A fake update: notes what it was given, publishes some steps, and saves a folder that names its batch."""
    given = {"batch": batch.manifest.record_id, "hash": batch.manifest.content_hash, "rows": batch.rows}
    with (context.folders.checkpoints_folder.parent / NOTES_FILE).open("a") as notes:
        notes.write(json.dumps(given, default=str) + "\n")
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


# The points, in the order in which an update comes to them.
CRASH_POINTS = (
    "before BatchManifest", "committing BatchManifest", "after BatchManifest", "before Metric", "after Metric", "saved",
    "flushing", "renamed", "gate", "before PolicyUpdate", "committing PolicyUpdate", "after PolicyUpdate", "removing",
)  # fmt: skip


def _arm_crash_point(point: str) -> None:
    """Let this process die at a point."""
    _armed_points.append(point)
    _instrument_publish()
    real_flush, real_remove = engine.checkpoints.fsync_path, shutil.rmtree

    def flush(path: Path) -> None:
        # A checkpoint's files lie in a folder with a dot until it is renamed; its parent is flushed after that.
        _die_if_armed("renamed" if path.name == "checkpoints" else "flushing")
        real_flush(path)

    def rmtree(path: Any, *arguments: Any, **more: Any) -> None:
        _die_if_armed("removing" if str(path).endswith("-removed") else "")
        real_remove(path, *arguments, **more)

    engine.checkpoints.fsync_path = flush
    trainer.update.shutil.rmtree = rmtree


def _instrument_publish() -> None:
    """Before, amid and after the transaction of a manifest, a step's numbers, an update."""
    real: Callable[[TrainingLog, Any], None] = TrainingLog.publish
    real_commit, amid = engine.bus.embedded.LogConnection.commit, set[str]()

    def commit(connection: Any) -> None:
        for kind in amid:
            _die_if_armed(f"committing {kind}")
        real_commit(connection)

    def publish(log: TrainingLog, records: list[Record]) -> None:
        kinds = {type(record).__name__ for record in records if isinstance(record, BatchManifest | Metric | PolicyUpdate)}
        for kind in kinds:
            _die_if_armed(f"before {kind}")
        amid.update(kinds)
        real(log, records)
        amid.clear()
        for kind in kinds:
            _die_if_armed(f"after {kind}")

    TrainingLog.publish = publish  # type: ignore[method-assign]
    engine.bus.embedded.LogConnection.commit = commit  # type: ignore[method-assign]


def _accept_policy(*_: object) -> None:
    """Lets every policy pass."""
    _die_if_armed("gate")


def run_update(folder: str, phase: str, point: str) -> None:
    """One update of a phase, or what is left of it to do; or the death of the process."""
    _arm_crash_point(point)
    settings = make_settings(Path(folder))
    bus, store = connect_bus(settings), open_store(settings)
    trainer = Trainer(bus, store, settings, settings.folder / "base", learners=FAKE_LEARNERS, promotion_gate=_accept_policy)
    trainer.resume() or trainer.update(phase)
