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
import trainer.loop
from charter.pipeline import connect, store_of
from engine.settings import load
from schemas.records import BatchManifest, Metric, PolicyUpdate, Record
from trainer.batches import Batch
from trainer.loop import Trainer

NOTES = "trained.jsonl"
STEPS = 2


def settings_of(folder: Path) -> Any:
    flags = {
        "data.folder": str(folder), "models.policy": str(folder / "base"), "train.sft_rows": "4", "train.reward_rows": "4",
        "train.ppo_rows": "4", "reward.replay": "0", "train.keep": "1", "train.allow_overlap": "true",
    }  # fmt: skip
    return load(flags, environment={})[0]


def learn(made: Trainer, batch: Batch) -> Any:
    """A fake update: notes what it was given, publishes some steps, and saves a folder that names its batch."""
    given = {"batch": batch.manifest.record_id, "hash": batch.manifest.content_hash, "rows": batch.rows}
    with (made.settings.folder / NOTES).open("a") as notes:
        notes.write(json.dumps(given, default=str) + "\n")
    for step in range(STEPS):
        made.step(batch.manifest, step, {"loss": 1.0})

    def save(folder: Path) -> None:
        (folder / "fake.safetensors").write_text(batch.manifest.record_id)
        reached("saved")

    return save, {"beta": 0.1}


LEARNERS = dict.fromkeys(trainer.loop.PHASES, learn)
wanted: list[str] = []


def reached(point: str) -> None:
    if point in wanted:
        os.kill(os.getpid(), signal.SIGKILL)


# The points, in the order in which an update comes to them.
POINTS = (
    "before BatchManifest", "committing BatchManifest", "after BatchManifest", "before Metric", "after Metric", "saved",
    "flushing", "renamed", "gate", "before PolicyUpdate", "committing PolicyUpdate", "after PolicyUpdate", "removing",
)  # fmt: skip


def kill_at(point: str) -> None:
    """Let this process die at a point."""
    wanted.append(point)
    around_publish()
    real_flush, real_remove = engine.checkpoints.flush, shutil.rmtree

    def flush(path: Path) -> None:
        # A checkpoint's files lie in a folder with a dot until it is renamed; its parent is flushed after that.
        reached("renamed" if path.name == "checkpoints" else "flushing")
        real_flush(path)

    def rmtree(path: Any, *arguments: Any, **more: Any) -> None:
        reached("removing" if str(path).endswith("-removed") else "")
        real_remove(path, *arguments, **more)

    engine.checkpoints.flush = flush
    trainer.loop.shutil.rmtree = rmtree


def around_publish() -> None:
    """Before, amid and after the transaction of a manifest, a step's numbers, an update."""
    real: Callable[[Trainer, Any], None] = Trainer.publish
    real_commit, amid = engine.bus.embedded.Connection.commit, set[str]()

    def commit(connection: Any) -> None:
        for kind in amid:
            reached(f"committing {kind}")
        real_commit(connection)

    def publish(made: Trainer, records: list[Record]) -> None:
        kinds = {type(record).__name__ for record in records if isinstance(record, BatchManifest | Metric | PolicyUpdate)}
        for kind in kinds:
            reached(f"before {kind}")
        amid.update(kinds)
        real(made, records)
        amid.clear()
        for kind in kinds:
            reached(f"after {kind}")

    Trainer.publish = publish  # type: ignore[method-assign]
    engine.bus.embedded.Connection.commit = commit  # type: ignore[method-assign]


def gate(*_: object) -> None:
    """Lets every policy pass."""
    reached("gate")


def update(folder: str, phase: str, point: str) -> None:
    """One update of a phase, or what is left of it to do; or the death of the process."""
    kill_at(point)
    settings = settings_of(Path(folder))
    bus, store = connect(settings), store_of(settings)
    trainer = Trainer(bus, store, settings, settings.folder / "base", learners=LEARNERS, gate=gate)
    trainer.resume() or trainer.update(phase)
