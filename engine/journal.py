"""Which records a process was working on, so that its successor knows what may have killed it.

Before a batch goes to the model its coordinates are written to a small file, which is emptied when the batch is finished.
A process that dies in between leaves them there. Its successor counts a death for each of these records and works them one
at a time, so that a record that kills the process (it makes the model run out of memory, say) is found: at its third death it
is a dead letter of kind CRASH. Without this such a record would kill every process that ever reads it.

The file is not synced: it has to outlive the process, not the machine. Deaths are shared by all copies of a stage on a host.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from engine.bus.port import Message

DEADLY = 3


class Journal:
    """The journal of one copy of a stage. `folder` is the stage's, `slot` the copy's name."""

    def __init__(self, folder: Path, slot: str) -> None:
        self.suspects = folder / "suspects"
        self.suspects.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(folder / f"{slot}.working", os.O_RDWR | os.O_CREAT, 0o644)
        self.working: set[str] = set()
        self.lock = threading.Lock()
        self.blame(os.read(self.descriptor, 1 << 20).decode().split())
        self.clear()

    def blame(self, names: Iterable[str]) -> None:
        """Count a death for each of these records."""
        for name in names:
            path = self.suspects / name
            path.write_text(str(self.count(name) + 1))

    def count(self, name: str) -> int:
        try:
            return int((self.suspects / name).read_text() or 0)
        except FileNotFoundError:
            return 0

    def deaths(self) -> dict[str, int]:
        """Record -> how many processes have died at it, for those at which one has."""
        return {path.name: self.count(path.name) for path in self.suspects.iterdir()}

    def begin(self, messages: Iterable[Message]) -> None:
        """These records go to the model now."""
        with self.lock:
            self.working |= {coordinates(message) for message in messages}
            self.write()

    def end(self, messages: Iterable[Message]) -> None:
        """They have come back."""
        with self.lock:
            self.working -= {coordinates(message) for message in messages}
            self.write()

    def clear(self) -> None:
        """The process ends for another reason than these records."""
        with self.lock:
            self.working = set()
            self.write()

    def write(self) -> None:
        text = " ".join(sorted(self.working)).encode()
        os.pwrite(self.descriptor, text, 0)
        os.ftruncate(self.descriptor, len(text))

    def acquit(self, messages: Iterable[Message]) -> None:
        """These records are finished: no process will die at them any more."""
        for message in messages:
            (self.suspects / coordinates(message)).unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self.descriptor)


def coordinates(message: Message) -> str:
    return f"{message.topic}-{message.partition}-{message.offset}"
