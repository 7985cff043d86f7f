"""Locate the model folders of training: the folder of the base model, and one checkpoint folder for each trained version."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.policy import get_weights_version
from engine.remote_checkpoints import fetch_checkpoint
from schemas.records import BatchManifest, PolicyKind
from trainer.methods import REWARD_PHASE
from trainer.state import TrainingState, name_checkpoint


@dataclass(frozen=True)
class ModelFolders:
    """This object locates the model folders for one training state. `base_folder` holds policy version 0."""

    state: TrainingState
    base_folder: Path
    checkpoints_folder: Path

    def get_policy_folder(self, version: int) -> Path:
        """Return the folder with the weights of a policy version. Verify the content hash of a checkpoint."""
        source = get_weights_version(self.state.updates, version)
        return self.get_version_folder(PolicyKind.POLICY, source) if source else self.base_folder

    def get_version_folder(self, kind: PolicyKind, version: int) -> Path:
        """Return the checkpoint folder of a trained version, and verify its content hash."""
        update = next(update for update in self.state.updates if update.kind is kind and update.version == version)
        return fetch_checkpoint(update.uri, self.checkpoints_folder, update.content_hash).folder

    def has_policy(self, version: int) -> bool:
        """Return whether the weights of a policy version are on disk."""
        source = get_weights_version(self.state.updates, version)
        return source == 0 or (self.checkpoints_folder / name_checkpoint(PolicyKind.POLICY, source)).exists()


def get_policy_kind(manifest: BatchManifest) -> PolicyKind:
    """Return whether a batch trains a policy or a reward model."""
    return PolicyKind.REWARD if manifest.phase == REWARD_PHASE else PolicyKind.POLICY


def get_base_version(manifest: BatchManifest) -> int:
    """Return the version that a batch's update starts from. For the first reward model, return 0."""
    if get_policy_kind(manifest) is PolicyKind.REWARD:
        return manifest.base_reward_version or 0
    return manifest.base_policy_version


def name_batch_checkpoint(manifest: BatchManifest) -> str:
    """Return the folder name of the checkpoint that a batch's update writes."""
    return name_checkpoint(get_policy_kind(manifest), get_base_version(manifest) + 1)
