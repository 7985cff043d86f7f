"""The folder and the number of a policy version."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.checkpoints import locate_checkpoint, read_checkpoint
from engine.errors import UsageError
from engine.models import resolve_model_folder
from engine.policy import get_newest_version, get_weights_version, index_policies
from engine.settings import Settings
from schemas.records import PolicyUpdate

PHASES = ("sft", "reward", "ppo", "dpo")
LATEST_POLICY = "latest"


def get_verified_folder(settings: Settings, updates: Sequence[PolicyUpdate], version: int) -> Path:
    """The verified folder with the weights of a version."""

    source = get_weights_version(updates, version)
    if source == 0:
        return resolve_model_folder(settings.train.base_model or settings.models.policy)
    update = index_policies(updates).get(source)
    if update is None:
        raise UsageError(
            f"there is no policy {version} on the log", "training has made no such version", "type: charter policy list"
        )
    folder = locate_checkpoint(update.uri, settings.folder / "checkpoints")
    if not folder.exists():
        raise UsageError(
            f"the weights of policy {version} are gone",
            f"{folder} is not there: train.save_total_limit says how many checkpoints are kept",
            "type: charter policy list    (which weights there are)",
        )
    return read_checkpoint(folder, update.content_hash).folder


def parse_policy_version(version: str, updates: Sequence[PolicyUpdate]) -> int:
    """The policy version that a word of the command line means."""

    if version == LATEST_POLICY:
        return get_newest_version(updates)
    if not version.isdigit():
        raise UsageError(f"{version} is no policy version", 'it is a number, or "latest"', "type: charter policy list")
    return int(version)
