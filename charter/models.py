"""Open the models of the roles (policy, critic, judge), and the executors that run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charter.served_policy import load_base_tokenizer, require_base_model, require_reload_support, require_reloaded_weights
from engine.bus.port import Bus
from engine.errors import CharterError, UsageError
from engine.models import open_model, resolve_model_folder
from engine.models.interface import Model
from engine.models.vllm import INITIAL_WEIGHT_VERSION, VllmServer
from engine.policy import PolicyFollower, read_policy_updates
from engine.reloaded_weights import ReloadedWeights, WeightLoader
from engine.remote_checkpoints import fetch_checkpoint
from engine.settings import Settings
from engine.weight_sync import BASE_WEIGHTS_NAME, VLLM, WeightSync
from engine.worker import ModelExecutor
from schemas.records import ConfigurationField, PolicyKind, PolicyUpdate, Record
from trainer.methods import RL_METHODS

if TYPE_CHECKING:
    from engine.models.endpoint import Endpoint

_ENDPOINT_THREADS = 4  # number of batches in flight at one endpoint; models.concurrency limits the number of requests


def is_endpoint(spec: str) -> bool:
    """Return whether a model setting names a server instead of a local model."""
    return spec.startswith(("http://", "https://"))


@dataclass
class RoleModels:
    """Opens the model of each role on first use.

    Roles with the same model setting share one model. A critic or judge without a setting uses the policy's model at version 0.
    """

    settings: Settings
    open_models: dict[str, Model] = field(default_factory=dict)
    executors: dict[str, ModelExecutor] = field(default_factory=dict)
    policy_follower: PolicyFollower | None = None
    weight_sync: WeightSync | None = None

    def close(self) -> None:
        if self.policy_follower:
            self.policy_follower.close()

    def get_spec(self, role: str) -> str:
        """Return the setting that names the role's model: a name, a folder, a hub id, or http://HOST:PORT/v1#MODEL."""
        return getattr(self.settings.models, role) or self.settings.models.policy

    def get_model_by_spec(self, spec: str) -> Model:
        if spec not in self.open_models:
            settings = self.settings.models
            options: dict[str, Any] = {"threads": settings.threads, "max_batch_size": settings.max_batch_size}
            if is_endpoint(spec):
                options = {
                    "api_key_env": settings.api_key_env,
                    "timeout_s": settings.timeout_s,
                    "concurrency": settings.concurrency,
                    "send_seed": settings.send_seed,
                    "stream": settings.stream,
                    "verify": self._make_verification(spec),
                }
                if spec == self.settings.models.policy:
                    options["load_tokenizer"] = partial(load_base_tokenizer, self.settings.train.base_model)
            model: Any = open_model(spec, **options)
            if self._replaces_weights(spec):
                model.served_weights = self._make_base_weights(model)
            self.open_models[spec] = model
        return self.open_models[spec]

    def _make_verification(self, spec: str) -> Callable[[Endpoint], None] | None:
        """Return the check of a policy on a server whose completions train `train.base_model`."""
        base_model = self.settings.train.base_model
        if spec != self.settings.models.policy or not base_model or is_endpoint(base_model):
            return None
        needs_rollouts = bool(self.settings.models.weight_sync) and RL_METHODS[self.settings.train.rl_method].uses_rollouts
        verify = partial(require_base_model, base_model=base_model, needs_rollouts=needs_rollouts)
        return partial(_verify_replaceable, verify=verify, base_model=base_model) if self._replaces_weights(spec) else verify

    def _replaces_weights(self, spec: str) -> bool:
        """Return whether all weights of the server of this model are replaced by those of each policy."""
        return is_endpoint(spec) and spec == self.settings.models.policy and self.settings.models.weight_sync == VLLM

    def _make_base_weights(self, endpoint: Endpoint) -> ReloadedWeights:
        return ReloadedWeights(self._make_loader(endpoint), 0, BASE_WEIGHTS_NAME, self._get_base_folder())

    def _make_loader(self, endpoint: Endpoint) -> WeightLoader:
        lock_path = self.settings.folder / "weight_sync.lock"
        return WeightLoader(VllmServer(endpoint), require_reloaded_weights, lock_path)

    def _get_base_folder(self) -> Path:
        """Return the folder of version 0. Raise UsageError if train.base_model is not set."""
        if not self.settings.train.base_model:
            raise UsageError(
                "models.weight_sync = vllm needs train.base_model",
                "the weights that the server loads are compared with those on this machine",
                "set train.base_model to the model that the server serves",
            )
        return resolve_model_folder(self.settings.train.base_model)

    def get_model(self, role: str) -> Model:
        return self.get_model_by_spec(self.get_spec(role))

    def list_servers(self) -> list[Endpoint]:
        """Return the models on servers that are open now, also the newest policy on the server of the policy."""
        models: list[Any] = [model for spec, model in list(self.open_models.items()) if is_endpoint(spec)]
        if self.policy_follower and is_endpoint(self.get_spec("policy")):
            models.append(self.policy_follower.model)
        # With models.weight_sync = vllm, the base model and the newest policy are one model on the server.
        return list({id(model.health): model for model in models}.values())

    def get_executor(self, role: str | None) -> ModelExecutor:
        """Return the executor of a role; `role` is None for a stage without a model.

        All local models share one executor, because they share the machine. Each endpoint has a separate executor.
        """
        if role is None:
            return self.executors.setdefault("", ModelExecutor("no model", 1, 0.0))
        spec = self.get_spec(role)
        name, threads = (spec, _ENDPOINT_THREADS) if is_endpoint(spec) else ("local", 1)
        return self.executors.setdefault(name, ModelExecutor(name, threads))

    def follow_policy(self, bus: Bus) -> PolicyFollower:
        """Return the follower of the newest policy on the log. All roles that follow it share its weights."""
        self.policy_follower = self.policy_follower or PolicyFollower(bus, self.get_model("policy"), self.open_policy_update)
        return self.policy_follower

    def get_weight_sync(self) -> WeightSync:
        """Return the object that loads policies into the server of the policy."""
        if self.weight_sync is None:
            endpoint: Any = self.get_model("policy")  # an Endpoint, because its setting is the address of a server
            loader = self._make_loader(endpoint) if self._replaces_weights(self.get_spec("policy")) else None
            self.weight_sync = WeightSync(endpoint, self.settings.models.weight_sync, loader)
        return self.weight_sync

    def open_policy_update(self, update: PolicyUpdate) -> Model:
        """Verify the checkpoint of a policy update. Load the weights, or send the weights to the server of an endpoint."""
        is_base = update.restored_version == 0
        if is_base and not self._replaces_weights(self.get_spec("policy")):
            return self.get_model("policy")
        checkpoints = self.settings.folder / "checkpoints"
        folder = self._get_base_folder() if is_base else fetch_checkpoint(update.uri, checkpoints, update.content_hash).folder
        if is_endpoint(self.get_spec("policy")):
            return self.get_weight_sync()(update, folder)
        return open_model(str(folder), threads=self.settings.models.threads, max_batch_size=self.settings.models.max_batch_size)


def _verify_replaceable(endpoint: Endpoint, verify: Callable[..., None], base_model: str) -> None:
    """Check a server whose weights are replaced: that this is possible, and that it has the tokenizer and weights of the base model.

    The weights are compared only if no policy was loaded into the server before.
    """
    require_reload_support(endpoint, resolve_model_folder(base_model))
    is_new = VllmServer(endpoint).get_weight_version() == INITIAL_WEIGHT_VERSION
    verify(endpoint.with_weights(None), compare_weights=is_new)


def make_policy_getter(models: RoleModels, bus: Bus, pinned_version: int | None) -> Callable[[], tuple[Model, int]]:
    """Return a function that returns the current policy model and its version.

    The version is `pinned_version`. If `pinned_version` is None, the version is the newest version on the log. An endpoint
    without models.weight_sync stays at version 0, because its weights cannot be replaced.
    """
    if pinned_version:
        pinned_model = models.open_policy_update(_find_policy_update(bus, pinned_version))
        return lambda: (pinned_model, pinned_version)
    base_model = models.get_model("policy")
    if pinned_version == 0 or (is_endpoint(models.get_spec("policy")) and not models.settings.models.weight_sync):
        return lambda: (base_model, 0)
    return models.follow_policy(bus).get_current_policy


def _find_policy_update(bus: Bus, version: int) -> PolicyUpdate:
    for update in read_policy_updates(bus):
        if update.kind is PolicyKind.POLICY and update.version == version:
            return update
    raise UsageError(
        f"there is no policy {version} on the log", "no training run has published it", "type: charter policy list"
    )


@dataclass(frozen=True)
class ConfigurationProcessor:
    """Runs the process function of a stage, and writes the number of the run's configuration into its records."""

    process: Any
    configuration: int

    def __call__(self, records: Sequence[Record]) -> Sequence[Sequence[Record] | CharterError]:
        return [
            outputs if isinstance(outputs, CharterError) else [self.set_configuration(output) for output in outputs]
            for outputs in self.process(records)
        ]

    def set_configuration(self, output: Record) -> Record:
        if not isinstance(output, ConfigurationField):  # a custom stage can write any kind of record
            return output
        return output.model_copy(update={"configuration": self.configuration})


@dataclass(frozen=True)
class LatestPolicyProcessor:
    """Runs the process function of a stage with the newest policy as its model. The weights change only between batches."""

    process: Any
    get_current_policy: Callable[[], tuple[Model, int]]

    def __call__(self, records: Sequence[Record]) -> Sequence[Sequence[Record] | CharterError]:
        model, _ = self.get_current_policy()
        outputs: Sequence[Sequence[Record] | CharterError] = replace(self.process, model=model)(records)
        return outputs
