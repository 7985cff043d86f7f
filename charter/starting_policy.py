"""Decide and describe which policy a run starts from: the newest policy on the log, or the base model (run.from_base).

All runs of a log share its policies. So a new run starts from the newest policy, whichever run it was trained on. A run with
run.from_base samples all its responses from the base model. The manifest of the run records this, and later starts keep it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from charter.manifests import parse_evaluation, read_run_manifests
from charter.models import is_endpoint
from engine.bus.port import Bus
from engine.errors import UsageError
from engine.policy import get_newest_version, get_weights_version, index_policies, read_policy_updates
from engine.settings import Settings
from schemas.records import PolicyUpdate, RunManifest

BASE_VERSION = 0


def set_from_base(settings: Settings, origins: Mapping[str, str]) -> tuple[Settings, dict[str, str]]:
    """Return the settings and origins with run.from_base = true, for the option --from-base."""
    run = settings.run.model_copy(update={"from_base": True})
    return settings.model_copy(update={"run": run}), {**origins, "run.from_base": "flag"}


def keep_starting_policy(settings: Settings, origins: Mapping[str, str], bus: Bus) -> Settings:
    """Return the settings with the value of run.from_base with which the run started. For a new run, return them unchanged.

    Raise UsageError if the user sets another value, if run.from_base contradicts models.follow, or if the run is an evaluation.
    """
    run_id, from_base = settings.run.id, settings.run.from_base
    manifests = [manifest for manifest in read_run_manifests(bus) if manifest.run_id == run_id]
    if manifests and (evaluation := parse_evaluation(manifests[0].settings)):
        raise UsageError(
            f"run {run_id} is part of the evaluation {evaluation['name']}",
            f"its policy is {evaluation['policy']}, and its responses are only graded",
            f"type: charter eval run --name {evaluation['name']} --policy {evaluation['policy']} --suite NAME",
        )
    started_from_base = _read_from_base(manifests)
    if started_from_base not in (None, from_base):
        if origins["run.from_base"] != "default":
            start = "the base model (run.from_base)" if started_from_base else "the newest policy, and not from the base model"
            raise UsageError(
                f"run.from_base cannot be {json.dumps(from_base)} in run {run_id}",
                f"this run started from {start}, and a run keeps its start",
                f"start another run: --run NAME{' --from-base' if from_base else ''}",
            )
        run = settings.run.model_copy(update={"from_base": started_from_base})
        settings = settings.model_copy(update={"run": run})
    if settings.run.from_base and settings.models.follow:
        raise UsageError(
            f"run {run_id} starts from the base model, but models.follow is {json.dumps(settings.models.follow)}",
            "run.from_base keeps the base model, and models.follow uses the newest policy",
            "set only one of the two: --set models.follow=",
        )
    return settings


def _read_from_base(manifests: Sequence[RunManifest]) -> bool | None:
    """Return run.from_base in the first manifest of a run. Return None if the run is new."""
    return bool(json.loads(manifests[0].settings)["run"].get("from_base", False)) if manifests else None


def get_pinned_version(settings: Settings) -> int | None:
    """Return the policy version that all responses of the run must have. Return None if the run follows the newest policy."""
    return BASE_VERSION if settings.run.from_base else None


def describe_starting_policy(settings: Settings, bus: Bus) -> str:
    """Return a line that names the policy that the responses of this process come from first, and why."""
    updates = read_policy_updates(bus)
    newest = get_newest_version(updates)
    base = f"policy {BASE_VERSION} ({settings.models.policy}, the base model)"
    if is_endpoint(settings.models.policy) and not settings.models.weight_sync:
        return f"responses come from {base}; the server gets no trained policies (models.weight_sync)"
    if settings.run.from_base:
        newer = f", although the log has policies up to {newest}" if newest else ""
        return f"responses come from {base} for the whole run (run.from_base){newer}"
    if not newest:
        return f"responses come from {base}, until training publishes a policy"
    return f"responses come from {_describe_update(updates, newest)}; for a run with the base model: --run NAME --from-base"


def _describe_update(updates: Sequence[PolicyUpdate], version: int) -> str:
    """Describe the newest policy with the phase and the run that produced its weights."""
    weights = get_weights_version(updates, version)
    if weights == BASE_VERSION:
        return f"policy {version}, which has the weights of the base model"
    update = index_policies(updates)[weights]
    restored = "" if weights == version else f", which has the weights of policy {weights}"
    return f"policy {version}{restored} (from {update.phase}, trained in run {update.run_id}), the newest on the log"
