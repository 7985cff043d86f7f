"""The models of each role (policy, critic, judge) and the executors that run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.bus.port import Bus
from engine.checkpoints import locate_checkpoint, read_checkpoint
from engine.errors import UsageError
from engine.models import open_model
from engine.models.interface import Model
from engine.policy import PolicyFollower, read_policy_updates
from engine.settings import BusSettings as BusSettings
from engine.settings import Settings
from engine.worker import ModelExecutor
from schemas.records import PolicyKind, PolicyUpdate, Record

_ENDPOINT_THREADS = 4


def is_endpoint(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


@dataclass
class RoleModels:
    """The models by role. Roles with the same setting share one model; critic and judge default to policy version 0."""

    settings: Settings
    open_models: dict[str, Model] = field(default_factory=dict)
    executors: dict[str, ModelExecutor] = field(default_factory=dict)
    policy_follower: PolicyFollower | None = None

    def close(self) -> None:
        if self.policy_follower:
            self.policy_follower.close()

    def get_spec(self, role: str) -> str:
        return getattr(self.settings.models, role) or self.settings.models.policy

    def get_model_by_spec(self, spec: str) -> Model:
        if spec not in self.open_models:
            chosen = self.settings.models
            options: dict[str, Any] = {"threads": chosen.threads, "max_batch_size": chosen.max_batch_size}
            if is_endpoint(spec):
                options = {
                    "api_key_env": chosen.api_key_env,
                    "timeout_s": chosen.timeout_s,
                    "concurrency": chosen.concurrency,
                }
            self.open_models[spec] = open_model(spec, **options)
        return self.open_models[spec]

    def get_model(self, role: str) -> Model:
        return self.get_model_by_spec(self.get_spec(role))

    def get_executor(self, role: str | None) -> ModelExecutor:
        """Local models share the machine and so one lane; each endpoint has its own, and so has what needs no model."""
        if role is None:
            return self.executors.setdefault("", ModelExecutor("no model", 1, 0.0))
        name = self.get_spec(role) if is_endpoint(self.get_spec(role)) else "local"
        threads = _ENDPOINT_THREADS if is_endpoint(self.get_spec(role)) else 1
        return self.executors.setdefault(name, ModelExecutor(name, threads, self.settings.worker.downstream_wait_ms / 1000))

    def follow_policy(self, bus: Bus) -> PolicyFollower:
        """What follows the log's policies; the roles that do so share it, and its weights."""
        self.policy_follower = self.policy_follower or PolicyFollower(bus, self.get_model("policy"), self.open_policy_update)
        return self.policy_follower

    def open_policy_update(self, update: PolicyUpdate) -> Model:
        """The weights of a policy update, verified against its hash."""
        if update.restored_version == 0:
            return self.get_model("policy")
        folder = read_checkpoint(
            locate_checkpoint(update.uri, self.settings.folder / "checkpoints"), update.content_hash
        ).folder
        first = self.get_model("policy")
        if is_endpoint(self.get_spec("policy")):
            from engine.weight_sync import WeightSync

            return WeightSync(first, self.settings.models.weight_sync)(update, folder)  # type: ignore[arg-type]
        return open_model(str(folder), threads=self.settings.models.threads, max_batch_size=self.settings.models.max_batch_size)


def make_policy_getter(models: RoleModels, bus: Bus, pinned_version: int | None) -> Callable[[], tuple[Model, int]]:
    """What answers now. A server's weights are its own: it stays at version 0 until it is given others."""
    if pinned_version:
        kept = (models.open_policy_update(_find_policy_update(bus, pinned_version)), pinned_version)
        return lambda: kept
    first = models.get_model("policy")
    if pinned_version == 0 or (is_endpoint(models.get_spec("policy")) and not models.settings.models.weight_sync):
        return lambda: (first, 0)
    return models.follow_policy(bus).get_current_policy


def _find_policy_update(bus: Bus, version: int) -> PolicyUpdate:
    for update in read_policy_updates(bus):
        if update.kind is PolicyKind.POLICY and update.version == version:
            return update
    raise UsageError(
        f"there is no policy {version} on the log", "training has made no such version", "type: charter policy list"
    )


@dataclass(frozen=True)
class LatestPolicyProcessor:
    """A stage's work by the newest policy: the weights change between batches, never within one."""

    process: Any
    get_current_policy: Callable[[], tuple[Model, int]]

    def __call__(self, records: Sequence[Record]) -> Sequence[Sequence[Record]]:
        result: Sequence[Sequence[Record]] = replace(self.process, model=self.get_current_policy()[0])(records)
        return result
