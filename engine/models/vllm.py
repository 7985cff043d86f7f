"""Manage a vLLM server: load and unload adapters, replace its weights, and read which weights it has.

Adapters need `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. Replacing all weights needs VLLM_SERVER_DEV_MODE=1. The paths
are those of vLLM 0.32.0. Every failed call raises ModelUnreachable, so that a stage waits and tries again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ModelUnreachable

if TYPE_CHECKING:
    import httpx

    from engine.models.endpoint import Endpoint

INITIAL_WEIGHT_VERSION = "default"  # the weight version of a server that was just started
LORA_FIX = "start vLLM with --enable-lora, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and a sufficient --max-lora-rank"
DEV_MODE_FIX = "start vLLM (0.32 or newer) with VLLM_SERVER_DEV_MODE=1, or set models.weight_sync to vllm-lora"
_RELOAD_FIX = (
    "check that the server sees this folder under the same path, and its log; a failed reload can end vLLM, so restart it"
)
_CALL_TIMEOUT_S = 60.0
_RELOAD_TIMEOUT_S = 3600.0  # also the time to finish the requests in flight


@dataclass(frozen=True)
class VllmServer:
    """The server of an endpoint. Its weights and adapters belong to all models that it serves."""

    endpoint: Endpoint

    # Adapters

    def list_models(self) -> set[str]:
        """Return the names that the server serves: its model and the loaded adapters."""
        response = self._call("list its models", "GET", "/v1/models", fix="check models.* and the server")
        return {str(model["id"]) for model in self._read(response, "data")}

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter under a name. If an adapter with this name is already loaded, do not raise an error."""
        body = {"lora_name": name, "lora_path": str(folder)}
        self._call(f"load {name}", "POST", "/v1/load_lora_adapter", accepted="already", fix=LORA_FIX, json=body)

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter. If no adapter with this name is loaded, do not raise an error."""
        body = {"lora_name": name}
        self._call(f"unload {name}", "POST", "/v1/unload_lora_adapter", accepted="cannot be found", fix=LORA_FIX, json=body)

    # Weights

    def get_weight_version(self) -> str:
        """Return the version that `set_weight_version` set last. A restarted server has INITIAL_WEIGHT_VERSION."""
        return str(self._read(self._call("report its weight version", "GET", "/weight_info"), "weight_version"))

    def set_weight_version(self, version: str) -> None:
        self._call("set its weight version", "POST", "/update_weight_version", json={"new_version": version})

    def get_device(self) -> str:
        """Return the type of the device of the model: cuda, cpu, ..."""
        info = self._call("describe itself", "GET", "/server_info", params={"config_format": "json"})
        return str(self._read(info, "vllm_config", "device_config", "device"))

    def pause(self) -> None:
        """Finish the requests in flight, and keep new requests waiting until `resume`.

        The mode is always `wait`: `keep` would continue a completion with other weights, and `abort` would lose it.
        """
        self._call("pause", "POST", "/pause", timeout_s=_RELOAD_TIMEOUT_S, params={"mode": "wait"})

    def resume(self) -> None:
        self._call("resume", "POST", "/resume")

    def reload_weights(self, folder: Path) -> None:
        """Load the weights of a folder, which the server reads itself. Also empty the cache of prefixes, which has the old weights."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._call(f"load {folder}", "POST", "/collective_rpc", timeout_s=_RELOAD_TIMEOUT_S, fix=_RELOAD_FIX, json=body)
        if not self._read(self._call("empty its prefix cache", "POST", "/reset_prefix_cache"), "success"):
            raise ModelUnreachable(
                f"{self.endpoint.url} did not empty its prefix cache",
                "the cache has keys and values of the old weights",
                "nothing: the weights are loaded again",
            )

    def _read(self, response: httpx.Response, *names: str) -> Any:
        """Return a field of a JSON response. Raise ModelUnreachable if the response is not one of vLLM."""
        try:
            value = response.json()
            for name in names:
                value = value[name]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelUnreachable(
                f"the response of {self.endpoint.url} to {response.request.url.path} has no {'.'.join(names)}",
                self.endpoint.sanitize_error_text(response.content) or "it is empty",
                "check that the address is that of a vLLM server (0.32 or newer), and not of a proxy or another server",
            ) from error
        return value

    def _call(
        self,
        action: str,
        method: str,
        path: str,
        *,
        timeout_s: float = _CALL_TIMEOUT_S,
        accepted: str = "",
        fix: str = DEV_MODE_FIX,
        **options: Any,
    ) -> httpx.Response:
        """Send a request that manages the server. Raise ModelUnreachable unless it succeeds, or the message contains `accepted`."""
        import httpx  # it imports click and rich, which a process without a server does not need

        root = self.endpoint.url.removesuffix("/v1")
        try:
            response = self.endpoint.client.request(method, f"{root}{path}", timeout=timeout_s, **options)
        except httpx.HTTPError as error:
            raise self.endpoint.make_unreachable_error(f"{type(error).__name__} for {method} {path}") from error
        if response.status_code != 200 and not (accepted and accepted in response.text):
            raise ModelUnreachable(
                f"{self.endpoint.url} does not {action} (status {response.status_code})",
                self.endpoint.sanitize_error_text(response.content),
                fix,
            )
        return response
