"""Publish which model servers the stages of a process wait for, so that other processes on the data folder can show it.

While requests wait, the process writes a file to the folder `waits` of the data folder every second, and removes it afterwards. A
reader ignores a file that is older than a few seconds, because its process was killed.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.models.server_health import ServerHealth

logger = logging.getLogger("charter.endpoint")

_FOLDER = "waits"
_WRITE_INTERVAL_S = 1.0
_MAX_AGE_S = 10.0
_REMOVAL_AGE_S = 3600.0


class ServerWaitReporter:
    """Writes the waits of this process while `run` runs. `list_health` returns the health of all models on servers."""

    def __init__(self, data_folder: Path, list_health: Callable[[], Sequence[ServerHealth]]) -> None:
        self.folder, self.list_health = data_folder / _FOLDER, list_health
        self.path = self.folder / f"{socket.gethostname()}-{os.getpid()}.json"
        self.has_failed = False

    def run(self, stop: threading.Event) -> None:
        try:
            while not stop.wait(_WRITE_INTERVAL_S):
                self.write()
        finally:
            self.path.unlink(missing_ok=True)

    def write(self) -> None:
        """Write the current waits, or remove the file if nothing waits. A failure is logged once, because the stages can work."""
        waits = [wait for health in self.list_health() if (wait := health.get_wait())]
        if not waits:
            self.path.unlink(missing_ok=True)
            return
        temporary = self.path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps([asdict(wait) | {"message": str(wait)} for wait in waits]))
            temporary.replace(self.path)
        except OSError as error:
            if not self.has_failed:
                self.has_failed = True
                logger.warning("charter status and the dashboard do not show what waits: %s", error)


def list_server_waits(data_folder: Path) -> list[dict[str, Any]]:
    """Return one row for each model server that a running process waits for: the fields of ServerWait, `message` and `process`.

    Files of processes that were killed long ago are removed.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted((data_folder / _FOLDER).glob("*.json")):
        with suppress(FileNotFoundError):  # the wait ended just now
            age_s = time.time() - path.stat().st_mtime
            if age_s <= _MAX_AGE_S:
                host, _, process = path.stem.rpartition("-")
                rows += [row | {"process": f"{host}, process {process}"} for row in json.loads(path.read_text())]
            elif age_s > _REMOVAL_AGE_S:
                with suppress(PermissionError):  # a user without write permission can also ask
                    path.unlink()
    return rows
