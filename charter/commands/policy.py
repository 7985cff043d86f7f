"""`charter policy`: list, restore, pause and export policies."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from charter.connect import connect_existing_bus
from charter.console import common_options, output_options, print_rows
from charter.policies import LATEST_POLICY, get_verified_folder, parse_policy_version
from engine.bus.port import Bus
from engine.errors import CharterError, UsageError
from engine.policy import (
    get_newest_version,
    get_parent_version,
    get_policy_ancestry,
    get_weights_version,
    make_pause,
    make_restore_update,
    read_paused_phases,
    read_policy_updates,
)
from engine.remote_checkpoints import is_url, locate_checkpoint
from engine.settings import Settings
from engine.worker import to_producer_record
from schemas import ids
from schemas.records import Incident, PolicyUpdate
from trainer.methods import PHASES

_INTERNAL_FILES = ("checkpoint.json", "rl", "adapter")  # parts of a checkpoint that only Charter reads


@click.group(invoke_without_command=True)
@output_options
@common_options
def policy(settings: Settings, output: str) -> None:
    """List, restore, pause and export policies.

    Without a verb, print the list.

    \b
    Examples:
      charter policy
      charter policy rollback --pause
      charter policy use 3
      charter policy pause ppo && charter policy resume
      charter policy export 3 my-model
    """
    if click.get_current_context().invoked_subcommand is None:
        _print_policies(settings, output)


@policy.command("list")
@output_options
@common_options
def list_policies(settings: Settings, output: str) -> None:
    """List all policy and reward model versions.

    For each version, print the training phase, the base version, the version that the weights come from, and the folder of the
    weights. The role is "current" for the policy that generates responses and "reference" for the reference policy of the RL phase.

    \b
    Examples:
      charter policy list
      charter policy list --json
    """
    _print_policies(settings, output)


def _print_policies(settings: Settings, output: str) -> None:
    bus = connect_existing_bus(settings)
    updates, paused_phases = read_policy_updates(bus), read_paused_phases(bus)
    bus.close()
    newest = get_newest_version(updates)
    reference = get_policy_ancestry(updates, newest)[-1]
    rows: list[tuple[Any, ...]] = [
        ("policy", 0, "", None, 0, None, settings.models.policy, _format_roles(0, newest, reference))
    ]
    for update in updates:
        kind = update.kind.value.lower()
        weights_of = update.version if update.restored_version is None else update.restored_version
        location = _get_weights_location(settings, update)
        roles = _format_roles(update.version, newest, reference) if kind == "policy" else ""
        rows.append((kind, update.version, update.phase, update.base_version, weights_of, update.created_at, location, roles))
    if not output:  # shorten times and paths, so that the table is narrow enough for a terminal
        rows = [(*row[:5], f"{row[5]:%Y-%m-%d %H:%M:%S}" if row[5] else None, Path(row[6]).name, row[7]) for row in rows]
    print_rows(["kind", "version", "phase", "base_version", "weights_of", "created_at", "weights", "role"], rows, output)
    for phase, reason in () if output else paused_phases.items():
        click.echo(f"{phase} is paused ({reason or 'no reason given'}); to resume: charter policy resume {phase}", err=True)


def _format_roles(version: int, newest: int, reference: int) -> str:
    return ", ".join(role for role, holder in (("current", newest), ("reference", reference)) if holder == version)


def _get_weights_location(settings: Settings, update: PolicyUpdate) -> str:
    """Return the folder or the URL of the weights, or "removed" if train.save_total_limit deleted the folder."""
    if update.restored_version == 0:
        return settings.models.policy
    folder = locate_checkpoint(update.uri, settings.folder / "checkpoints")
    if folder.exists():
        return str(folder)
    return update.uri if is_url(update.uri) else "removed"


# Restoring earlier weights


@policy.command()
@click.argument("version", type=int)
@click.option("--reason", default="", help="Reason to store on the log.")
@common_options
def use(settings: Settings, version: int, reason: str) -> None:
    """Restore the weights of policy VERSION.

    The command publishes these weights as a new version. The new version generates all later responses, and training continues
    from it. Version numbers only increase. Earlier records keep their version number. Version 0 is the base model.

    \b
    Examples:
      charter policy use 3
      charter policy use 0 --reason "restart from the base model"
    """
    bus = connect_existing_bus(settings)
    click.echo(_restore_policy(settings, bus, version, reason))
    bus.close()


@policy.command()
@click.option("--reason", default="", help="Reason to store on the log.")
@click.option("--pause", is_flag=True, help="Also pause the RL phase (train.rl_method).")
@common_options
def rollback(settings: Settings, reason: str, pause: bool) -> None:
    """Restore the policy that the current policy was trained from.

    \b
    Examples:
      charter policy rollback
      charter policy rollback --pause --reason "the responses flatter the user"
    """
    bus = connect_existing_bus(settings)
    if pause:
        phase = settings.train.rl_method
        bus.publish([to_producer_record(make_pause(phase, reason or "rolled back", run_id=settings.run.id))])
        click.echo(f"{phase} is paused; to resume: charter policy resume {phase}")
    updates = read_policy_updates(bus)
    click.echo(_restore_policy(settings, bus, get_parent_version(updates, get_newest_version(updates)), reason))
    bus.close()


def _restore_policy(settings: Settings, bus: Bus, version: int, reason: str) -> str:
    """Publish a new version with the weights of an earlier version. Return a message for the user."""
    updates = read_policy_updates(bus)
    newest = get_newest_version(updates)
    if (weights := get_weights_version(updates, newest)) == get_weights_version(updates, version):
        return f"policy {newest} already has the weights of policy {weights}"
    update = make_restore_update(updates, version, run_id=settings.run.id, base_model=settings.models.policy)
    if update.restored_version:
        get_verified_folder(settings, updates, version)
    bus.publish([to_producer_record(update), to_producer_record(_make_restore_incident(update, reason))])
    # Two processes can publish the same version number. Only the first record on the log is valid, so check that the first
    # record is `update`.
    if update.record_id not in {published.record_id for published in read_policy_updates(bus)}:
        raise CharterError(
            f"another process published policy {update.version} at the same time",
            "the trainer or another user published its version first, and only the first version is valid",
            "type: charter policy list    (to check the versions), then repeat this command",
        )
    return f"policy {update.version} is now the current policy, with the weights of policy {update.restored_version}"


def _make_restore_incident(update: PolicyUpdate, reason: str) -> Incident:
    """Return an incident record with the reason for a manual restore."""
    return Incident(
        record_id=ids.compute_record_id(
            "incident", [update.record_id], ids.compute_fingerprint("rollback_incident", reason=reason)
        ),
        parent_ids=[update.record_id],
        run_id=update.run_id,
        stage="policy",
        policy_version=update.version,
        phase=update.phase,
        title=f"policy {update.restored_version} was restored manually",
        detail=reason,
    )


# Pausing and resuming training


@policy.command("pause")
@click.argument("phases", nargs=-1, type=click.Choice(PHASES))
@click.option("--reason", default="", help="Reason to store on the log.")
@common_options
def pause_phases(settings: Settings, phases: tuple[str, ...], reason: str) -> None:
    """Pause all training phases, or only the given phases.

    The stages continue. The trainer finishes the batch that it is training.

    \b
    Examples:
      charter policy pause
      charter policy pause ppo --reason "checking the rewards"
    """
    _publish_pauses(settings, phases, reason, paused=True)


@policy.command("resume")
@click.argument("phases", nargs=-1, type=click.Choice(PHASES))
@click.option("--reason", default="", help="Reason to store on the log.")
@common_options
def resume_phases(settings: Settings, phases: tuple[str, ...], reason: str) -> None:
    """Resume all paused training phases, or only the given phases.

    \b
    Examples:
      charter policy resume
    """
    _publish_pauses(settings, phases, reason, paused=False)


def _publish_pauses(settings: Settings, named: Sequence[str], reason: str, *, paused: bool) -> None:
    """Pause or resume the named phases, or all phases if none is named. Print what has changed, and what has not."""
    phases = named or PHASES
    bus = connect_existing_bus(settings)
    paused_phases = read_paused_phases(bus)
    changed = [phase for phase in phases if (phase in paused_phases) != paused]
    unchanged = [phase for phase in phases if phase not in changed]
    bus.publish([to_producer_record(make_pause(phase, reason, run_id=settings.run.id, paused=paused)) for phase in changed])
    bus.close()
    state = "was already paused" if paused else "was not paused"
    if changed:
        click.echo(f"{', '.join(changed)}: {'paused' if paused else 'resumed'}")
    elif not paused_phases:
        click.echo("nothing to resume: no phase is paused")
    if unchanged and (paused_phases or changed) and (named or not changed):
        click.echo(f"{', '.join(unchanged)}: {state}")


# Exporting weights


@policy.command()
@click.argument("version", default=LATEST_POLICY)
@click.argument("folder", type=click.Path(path_type=Path))
@common_options
def export(settings: Settings, version: str, folder: Path) -> None:
    """Copy the weights of a policy to a new FOLDER.

    VERSION is a number or "latest". The folder is a Hugging Face model folder that transformers and vLLM can load.

    \b
    Examples:
      charter policy export latest my-model
      charter policy export 3 my-model
    """
    if folder.exists():
        raise UsageError(f"{folder} already exists", "an export never overwrites a folder", "give the name of a new folder")
    bus = connect_existing_bus(settings)
    updates = read_policy_updates(bus)
    bus.close()
    number = parse_policy_version(version, updates)
    source = get_verified_folder(settings, updates, number)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*_INTERNAL_FILES))
    click.echo(f"policy {number}: {folder}")


COMMAND = policy
