"""Convert a command-line argument to a policy version, and find the folder with the weights of a version."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.errors import UsageError
from engine.models import resolve_model_folder
from engine.policy import get_newest_version, get_weights_version, index_policies
from engine.remote_checkpoints import fetch_checkpoint, has_checkpoint, locate_checkpoint
from engine.settings import Settings
from schemas.records import PolicyUpdate

LATEST_POLICY = "latest"


def get_verified_folder(settings: Settings, updates: Sequence[PolicyUpdate], version: int) -> Path:
    """Find the folder with the weights of a policy version. Verify the hash of the checkpoint, then return the folder.

    Raises UsageError if the version does not exist, or if its checkpoint was deleted.
    """
    # A version made by `charter policy use` has the weights of an earlier version.
    weights_version = get_weights_version(updates, version)
    if weights_version == 0:
        return resolve_model_folder(settings.train.base_model or settings.models.policy)
    update = index_policies(updates).get(weights_version)
    if update is None:
        raise UsageError(
            f"there is no policy {version} on the log", "no training run has published it", "type: charter policy list"
        )
    checkpoints = settings.folder / "checkpoints"
    if not has_checkpoint(update.uri, checkpoints):
        raise UsageError(
            f"the weights of policy {version} are missing",
            f"{locate_checkpoint(update.uri, checkpoints)} does not exist; train.save_total_limit limits the number of stored checkpoints",
            "type: charter policy list    (it lists the weights that exist)",
        )
    return fetch_checkpoint(update.uri, checkpoints, update.content_hash).folder


def parse_policy_version(version: str, updates: Sequence[PolicyUpdate]) -> int:
    """Return the policy version for a command-line argument: a number or "latest"."""
    if version == LATEST_POLICY:
        return get_newest_version(updates)
    if not version.isdigit():
        raise UsageError(f"{version} is not a policy version", 'a version is a number or "latest"', "type: charter policy list")
    return int(version)
