"""Load a new policy into the inference server, and check that the server uses it (models.weight_sync).

vllm-lora   load the LoRA adapter of the checkpoint under the name of the policy; the weights of the server stay version 0
vllm        replace all weights of the server (`engine.reloaded_weights`)
COMMAND     run a command with two arguments: the folder of the checkpoint and the name of the policy

After an adapter or a command, the server must generate a token for the name. Until then, stages continue with the previous
policy, and records contain the version of the previous policy.
"""

from __future__ import annotations

import logging
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ModelUnreachable, UsageError
from engine.models.vllm import VllmServer
from engine.reloaded_weights import ReloadedWeights, WeightLoader

if TYPE_CHECKING:
    from engine.models.endpoint import Endpoint
    from schemas.records import PolicyUpdate

logger = logging.getLogger("charter.models")

VLLM_LORA = "vllm-lora"
VLLM = "vllm"
ADAPTER_FOLDER = "adapter"  # subfolder of a checkpoint that contains the LoRA adapter
BASE_WEIGHTS_NAME = "policy-000000-base"
_COMMAND_TIMEOUT_S = 3600.0  # a command may restart a server


def get_served_model_name(update: PolicyUpdate) -> str:
    """Return the name under which a server serves a policy: its version and the hash of its checkpoint.

    The server may also serve policies of other data folders with the same version. The hash distinguishes them. A policy with the
    weights of the base model has no checkpoint.
    """
    return f"policy-{update.version:06d}-{update.content_hash[:8] or 'base'}"


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter on a vLLM server, which loads it again if the server was restarted or another process has unloaded it."""

    server: VllmServer
    name: str
    folder: Path

    def acquire(self) -> str:
        if self.name not in self.server.list_models():
            logger.warning("%s does not have %s any more: it is loaded again", self.server.endpoint.url, self.name)
            self.server.load_adapter(self.name, self.folder)
        return self.name

    def require_unchanged(self, mark: str) -> None:
        """Do nothing: requests name the adapter, so no other weights can answer them."""


@dataclass(frozen=True)
class WeightSync:
    """Loads policies into the server of `endpoint`. The model of `endpoint` is policy version 0.

    `loader` loads all weights, and is used only by the method `vllm`. `adapters` are the adapters that this process has loaded, in
    order.
    """

    endpoint: Endpoint
    method: str
    loader: WeightLoader | None = None
    adapters: dict[str, Endpoint] = field(default_factory=dict)

    def __call__(self, update: PolicyUpdate, folder: Path) -> Endpoint:
        """Load a policy and return its endpoint. Raise ModelUnreachable or UsageError if the server does not serve it."""
        name = get_served_model_name(update)
        if self.method == VLLM:
            return self.reload(update, name, folder)
        endpoint = self.endpoint.with_model(name)
        if self.method == VLLM_LORA:
            self.load_adapter(endpoint, folder)
        else:
            self.run_command(name, folder)
        endpoint.require_served()
        if self.method == VLLM_LORA:
            self.unload_unused_adapters(endpoint)
        return endpoint

    def reload(self, update: PolicyUpdate, name: str, folder: Path) -> Endpoint:
        """Replace the weights of the server. A policy with the weights of the base model has the revision of the base model."""
        assert self.loader is not None
        _ = self.endpoint.server_capabilities  # refuses a server whose weights cannot be replaced, before they are
        weights = ReloadedWeights(self.loader, update.version, name, folder.resolve())
        weights.acquire()
        return self.endpoint.with_weights(weights, None if update.restored_version == 0 else name)

    def load_adapter(self, endpoint: Endpoint, folder: Path) -> None:
        adapter = folder / ADAPTER_FOLDER
        if not adapter.exists():
            raise UsageError(
                f"{endpoint.id} has no adapter for {self.endpoint.url}",
                f"{folder} was trained without LoRA, or from weights that the server does not have",
                "set train.lora_rank before training, or set models.weight_sync to vllm or to a command",
            )
        server = VllmServer(self.endpoint)
        server.load_adapter(endpoint.id, adapter.resolve())
        endpoint.served_weights = AdapterWeights(server, endpoint.id, adapter.resolve())

    def unload_unused_adapters(self, current: Endpoint) -> None:
        """Unload the adapters that no request uses. Keep the newest two: other processes may still use the older of them."""
        self.adapters.pop(current.id, None)
        self.adapters[current.id] = current
        for name, endpoint in list(self.adapters.items())[:-2]:
            if endpoint.health.num_waiting:
                continue
            try:
                VllmServer(self.endpoint).unload_adapter(name)
            except ModelUnreachable as error:
                logger.warning("%s is not unloaded: %s; %s", name, error.what, error.why)
                continue
            del self.adapters[name]
            logger.info("%s: unloaded %s, which no request uses", self.endpoint.url, name)

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
