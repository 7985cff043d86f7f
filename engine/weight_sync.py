"""Bringing a policy to the inference server that answers, and knowing when it does.

`vllm` loads the checkpoint's adapter (POST /v1/load_lora_adapter); anything else is a command of the user's, which is run with
the checkpoint's folder and the policy's name. Either way the server is then asked for a token under that name. Until it gives
one the policy is not delivered: who follows policies goes on with the one before, and records carry that one's version.
"""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ModelUnreachable, UsageError

if TYPE_CHECKING:
    from engine.models.endpoint import Endpoint
    from schemas.records import PolicyUpdate

_VLLM = "vllm"
ADAPTER_FOLDER = "adapter"  # in a checkpoint's folder: all that was learned since the first model's weights
_COMMAND_TIMEOUT_S = 3600.0  # a command may restart a server


def get_served_model_name(update: PolicyUpdate) -> str:
    """The model name under which a server serves a policy: its version, and the hash of its checkpoint.

    A server may outlive a data folder. Another folder's policy of the same version, which it still serves, has another name.
    """
    return f"policy-{update.version:06d}-{update.content_hash[:8]}"


@dataclass(frozen=True)
class WeightSync:
    """Delivers to the server of `endpoint`, whose own model is policy version 0."""

    endpoint: Endpoint
    method: str

    def __call__(self, update: PolicyUpdate, folder: Path) -> Endpoint:
        """The server as it answers with this policy; raises ModelUnreachable or UsageError when it does not."""
        name = get_served_model_name(update)
        served = self.endpoint.with_model(name)
        if self.method == _VLLM:
            self.load_adapter(name, folder)
        else:
            self.run_command(name, folder)
        served.require_served()
        return served

    def load_adapter(self, name: str, folder: Path) -> None:
        adapter = folder / ADAPTER_FOLDER
        if not adapter.exists():
            raise UsageError(
                f"{name} has no adapter for {self.endpoint.url}",
                f"{folder} was trained with all weights, or on weights that the server does not have",
                "set train.lora_rank before training, or let models.weight_sync be a command",
            )
        self.endpoint.load_adapter(name, adapter.resolve())

    def run_command(self, name: str, folder: Path) -> None:
        command = [*shlex.split(self.method), str(folder.resolve()), name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ModelUnreachable(f"{name} was not delivered", str(error), "look at models.weight_sync") from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it said nothing"]
            raise ModelUnreachable(
                f"{name} was not delivered",
                f"{command[0]} ended with {done.returncode}: {said[0][:200]}",
                "look at models.weight_sync",
            )
