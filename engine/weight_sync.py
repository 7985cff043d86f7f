"""Load a new policy into the inference server, and check that the server uses it.

The method `vllm` loads the LoRA adapter of the checkpoint (POST /v1/load_lora_adapter). Any other value is a command. The
command is run with two arguments: the folder of the checkpoint and the name of the policy. After that the server must generate
a token for this name. Until then, stages continue with the previous policy, and records contain the version of the previous
policy.
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
ADAPTER_FOLDER = "adapter"  # subfolder of a checkpoint that contains the LoRA adapter
_COMMAND_TIMEOUT_S = 3600.0  # a command may restart a server


def get_served_model_name(update: PolicyUpdate) -> str:
    """Return the name under which a server serves a policy: its version and the hash of its checkpoint.

    The server may also serve policies of other data folders with the same version. The hash distinguishes them.
    """
    return f"policy-{update.version:06d}-{update.content_hash[:8]}"


@dataclass(frozen=True)
class WeightSync:
    """Loads policies into the server of `endpoint`. The model of `endpoint` is policy version 0."""

    endpoint: Endpoint
    method: str

    def __call__(self, update: PolicyUpdate, folder: Path) -> Endpoint:
        """Load a policy and return its endpoint. Raise ModelUnreachable or UsageError if the server does not serve it."""
        name = get_served_model_name(update)
        endpoint = self.endpoint.with_model(name)
        if self.method == _VLLM:
            self.load_adapter(name, folder)
        else:
            self.run_command(name, folder)
        endpoint.require_served()
        return endpoint

    def load_adapter(self, name: str, folder: Path) -> None:
        adapter = folder / ADAPTER_FOLDER
        if not adapter.exists():
            raise UsageError(
                f"{name} has no adapter for {self.endpoint.url}",
                f"{folder} was trained without LoRA, or from weights that the server does not have",
                "set train.lora_rank before training, or set models.weight_sync to a command",
            )
        self.endpoint.load_adapter(name, adapter.resolve())

    def run_command(self, name: str, folder: Path) -> None:
        command = [*shlex.split(self.method), str(folder.resolve()), name]
        try:
            process = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ModelUnreachable(f"{name} was not loaded", str(error), "check models.weight_sync") from error
        if process.returncode:
            last_line = (process.stderr or process.stdout).strip().splitlines()[-1:] or ["without output"]
            raise ModelUnreachable(
                f"{name} was not loaded",
                f"{command[0]} exited with {process.returncode}: {last_line[0][:200]}",
                "check models.weight_sync",
            )
