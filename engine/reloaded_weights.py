"""Replace all weights of a vLLM server (models.weight_sync = vllm), and check before each batch that it still has them.

The server has one weight version, a text. One process on the machine loads a policy, while it holds a lock file:

1. It pauses the server, which finishes the requests in flight with the old weights.
2. It sets the weight version `loading/HOST/NAME`, so that no process uses what the server generates from now on.
3. The server loads the folder of the checkpoint, and empties its cache of prefixes.
4. It resumes the server, and compares the log-probabilities of a short completion with those of the weights in the folder.
5. It sets the weight version `NAME.NUMBER` with a random number.

Other processes wait for the lock, and find the new version. Every process reads the weight version before a batch and after it. If
the two differ, the batch is discarded and asked again, because some of its completions may come from other weights. The random number
differs for each load, so a server that was restarted and loaded again in the middle of a batch is also noticed.
"""

from __future__ import annotations

import fcntl
import logging
import re
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import CharterError, ModelUnreachable, UsageError
from engine.models.vllm import INITIAL_WEIGHT_VERSION, VllmServer

if TYPE_CHECKING:
    from engine.models.endpoint import Endpoint

logger = logging.getLogger("charter.models")

_HELD_PATTERN = re.compile(r"(policy-(\d+)-\w+)\.\w+")
_LOADING_PATTERN = re.compile(r"loading/([^/]*)/(.*)")
_FAILED_PREFIX = "failed/"


@dataclass(frozen=True)
class WeightLoader:
    """Loads weights into a server.

    `verify` compares the server with the weights in a folder, and raises CharterError if they differ. It returns False if it cannot
    compare them. Processes that share `lock_path` load one after the other.
    """

    server: VllmServer
    verify: Callable[[Endpoint, Path], bool]
    lock_path: Path

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock file. The operating system releases it when a process ends."""
        self.lock_path.parent.mkdir(parents=True, exist_ok=True)
        with self.lock_path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("%s: waiting until another process has loaded its policy", self.server.endpoint.url)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def load(self, name: str, folder: Path) -> str:
        """Load the weights of a folder and verify them. Return the new weight version. Call this while you hold the lock.

        The outcome is counted in the health of the server.
        """
        load_counts = self.server.endpoint.health.weight_load_counts
        logger.info("%s loads %s from %s", self.server.endpoint.url, name, folder)
        try:
            self.server.pause()
            self.server.set_weight_version(f"loading/{socket.gethostname()}/{name}")
            self.server.reload_weights(folder)
            self.server.resume()
            is_verified = self.verify(self.server.endpoint.with_weights(None), folder)
        except CharterError:
            load_counts["failed"] += 1
            self.abandon(name)
            raise
        held = f"{name}.{secrets.token_hex(4)}"
        self.server.set_weight_version(held)
        load_counts["verified" if is_verified else "not verified"] += 1
        logger.info("%s has the weights of %s", self.server.endpoint.url, name)
        return held

    def abandon(self, name: str) -> None:
        """Mark the weights of the server as unusable, and let it answer other requests."""
        try:
            self.server.set_weight_version(f"{_FAILED_PREFIX}{name}")
            self.server.resume()
        except ModelUnreachable as error:
            logger.warning("%s after the failed load of %s: %s", error.what, name, error.why)


@dataclass(frozen=True)
class ReloadedWeights:
    """The weights of policy `version` in `folder`. A server that was just started has those of version 0."""

    loader: WeightLoader
    version: int
    name: str
    folder: Path

    @property
    def url(self) -> str:
        return self.loader.server.endpoint.url

    def acquire(self) -> str:
        """Load the weights if the server does not have them. Return its weight version.

        Raise ModelUnreachable if the server has newer weights, or another machine loads some. Raise UsageError if the weights of the
        server do not belong to this log.
        """
        get_held = self.loader.server.get_weight_version
        if self.matches(held := get_held()):
            return held
        with self.loader.lock():
            if not self.matches(held := get_held()):
                self.require_replaceable(held)
                held = self.loader.load(self.name, self.folder)
        return held

    def require_unchanged(self, mark: str) -> None:
        """Raise ModelUnreachable if the server has other weights than when `acquire` returned `mark`."""
        if (held := self.loader.server.get_weight_version()) != mark:
            raise ModelUnreachable(
                f"the weights of {self.url} were replaced during a batch",
                f"its weight version was {mark}, and is {held} now; the responses of the batch are discarded",
                "nothing: the stage asks again with the newest policy",
            )

    def matches(self, held: str) -> bool:
        return held.rpartition(".")[0] == self.name or (held == INITIAL_WEIGHT_VERSION and not self.version)

    def require_replaceable(self, held: str) -> None:
        """Raise an error unless this process may replace the weights of version `held`."""
        if held == INITIAL_WEIGHT_VERSION or held.startswith(_FAILED_PREFIX):
            return
        if loading := _LOADING_PATTERN.fullmatch(held):
            if loading[1] != socket.gethostname():  # on this machine, the lock shows that the process has ended
                raise ModelUnreachable(
                    f"{self.url} is loading {loading[2]}",
                    f"a process on {loading[1]} does this",
                    "wait; if that process has ended, restart the server",
                )
            return
        other = _HELD_PATTERN.fullmatch(held)
        if other is None or (int(other[2]) == self.version and other[1] != self.name):
            raise UsageError(
                f"{self.url} has weights that do not belong to this data folder",
                f"its weight version is {held}, and this data folder has {self.name}",
                "restart the server, and use one server for each data folder (models.weight_sync = vllm)",
            )
        if int(other[2]) > self.version:
            raise ModelUnreachable(
                f"{self.url} has newer weights than policy {self.version}",
                f"its weight version is {held}; weights that another process uses are not replaced by older ones",
                "wait until this process has loaded the newer policy; to use an older one, restart the server",
            )
