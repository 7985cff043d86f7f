"""One process of the system under test: Charter's command line with a FAKE model and FAKE learners.

The model's output is a hash of its input. Each call takes CHAOS_BATCH_S seconds, so that a kill interrupts unfinished work.
A learner writes a checkpoint that holds only a revision. Everything else is the code that `charter` runs.
"""

from __future__ import annotations

from charter.__main__ import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()  # as `charter` does, before the slow imports
    print("the process has started", flush=True)

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import engine.models
import schemas.records
from engine.models.interface import Generation, GenerationRequest, Model, OptionScores
from engine.models.scripted import ScriptedModel

_MARKER_FILE = "fake.json"
_NUM_STEPS = 4
_CLOCK_READ_INTERVAL_S = 0.05


@dataclass
class _SlowScriptedModel(ScriptedModel):
    """A fake model with a delay in each call."""

    def generate(self, batch: Sequence[GenerationRequest], **options: Any) -> list[list[Generation]]:
        _sleep()
        return super().generate(batch, **options)

    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[OptionScores]:
        _sleep()
        return super().score_options(batch, options)


def _sleep() -> None:
    """Sleep as long as a model call or a training step takes."""
    time.sleep(float(os.environ.get("CHAOS_BATCH_S", "0.02")))


def _open_fake_model(spec: str, **options: Any) -> Model:
    """Return a fake model, with the revision of the fake checkpoint if there is one; open a server address normally."""
    if spec.startswith("http"):
        return engine.models.open_model(spec, **options)
    marker = Path(spec) / _MARKER_FILE
    return replace(_SlowScriptedModel(), revision=json.loads(marker.read_text())["revision"] if marker.exists() else "fake")


def _run_fake_update(context: Any, batch: Any) -> Any:
    """Run a fake update: publish metrics of some steps; the checkpoint holds only the id of its batch."""
    for step in range(_NUM_STEPS):
        _sleep()
        context.on_step(step, {"loss": 1.0 / (1 + step)})

    def save(folder: Path) -> None:
        (folder / _MARKER_FILE).write_text(json.dumps({"revision": batch.manifest.record_id[:8]}))

    return save, {"beta": 0.1, "rows": float(len(batch.rows))}


class _ShiftedClock:
    """The wall clock of this process: the clock of the machine, and the seconds in a file that the scenario changes."""

    def __init__(self, path: Path) -> None:
        self.path, self.machine_time_ns = path, time.time_ns
        self.shift_ns, self.read_at = 0, 0.0

    def time_ns(self) -> int:
        if time.monotonic() - self.read_at > _CLOCK_READ_INTERVAL_S:
            self.shift_ns, self.read_at = int(float(self.path.read_text() or 0) * 1e9), time.monotonic()
        return self.machine_time_ns() + self.shift_ns

    def install(self) -> None:
        clock = self

        class ShiftedDatetime(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> datetime:
                return datetime.fromtimestamp(clock.time_ns() / 1e9, tz)

        time.time_ns, time.time = self.time_ns, lambda: self.time_ns() / 1e9
        schemas.records.datetime = ShiftedDatetime  # type: ignore[misc, attr-defined]


def main() -> None:
    end_on_interrupt()
    if clock_file := os.environ.get("CHAOS_CLOCK_FILE"):
        _ShiftedClock(Path(clock_file)).install()
    import charter.cli
    import charter.models

    charter.models.open_model = _open_fake_model
    if "train" in sys.argv:
        import trainer.loop
        import trainer.phases

        trainer.phases.LEARNERS.update(dict.fromkeys(trainer.phases.PHASES, _run_fake_update))
        trainer.loop.POLL_INTERVAL_S = 0.2
        engine.models.resolve_model_folder = Path
    charter.cli.main()


if __name__ == "__main__":
    main()
