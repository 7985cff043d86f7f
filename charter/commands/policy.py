"""`charter policy`: list, restore, pause and export policies."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from charter.connect import connect_bus
from charter.console import common_options, output_options, print_rows
from charter.policies import LATEST_POLICY, PHASES, get_verified_folder, parse_policy_version
from engine.bus.port import Bus
from engine.checkpoints import locate_checkpoint
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
from engine.settings import Settings
from engine.worker import to_producer_record
from schemas import ids
from schemas.records import Incident, PolicyUpdate

_INTERNAL_FILES = ("checkpoint.json", "rl", "adapter")  # in a checkpoint's folder, and of no use outside Charter


@click.group(invoke_without_command=True)
@output_options
@common_options
def policy(settings: Settings, output: str) -> None:
    """List, restore, pause and export policies.

    Also pausing training; without a verb: the list.

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
    """Every version, and where its weights are.

    What made it, from which one, and whose weights it has.

    \b
    Examples:
      charter policy list
      charter policy list --json
    """
    _print_policies(settings, output)


def _print_policies(settings: Settings, output: str) -> None:

    bus = connect_bus(settings)
    known, held = read_policy_updates(bus), read_paused_phases(bus)
    bus.close()
    newest = get_newest_version(known)
    reference = get_policy_ancestry(known, newest)[-1]
    rows: list[tuple[Any, ...]] = [
        ("policy", 0, "", None, 0, None, settings.models.policy, _format_roles(0, newest, reference))
    ]
    for update in known:
        kind = update.kind.value.lower()
        source = update.version if update.restored_version is None else update.restored_version
        where = _get_weights_location(settings, update)
        used = _format_roles(update.version, newest, reference) if kind == "policy" else ""
        rows.append((kind, update.version, update.phase, update.base_version, source, update.created_at, where, used))
    if not output:  # what fits a terminal
        rows = [(*row[:5], f"{row[5]:%Y-%m-%d %H:%M:%S}" if row[5] else None, Path(row[6]).name, row[7]) for row in rows]
    print_rows(["kind", "version", "made_by", "from", "weights_of", "created_at", "weights", "role"], rows, output)
    for phase, reason in () if output else held.items():
        click.echo(f"{phase} is paused: {reason or 'no reason given'}; type: charter policy resume {phase}", err=True)


def _format_roles(version: int, newest: int, reference: int) -> str:
    names = [name for name, of in (("answers", newest), ("reference", reference)) if of == version]
    return ", ".join(names)


def _get_weights_location(settings: Settings, update: PolicyUpdate) -> str:
    """Where an update's weights are, or that they were removed (train.save_total_limit)."""

    if update.restored_version == 0:
        return settings.models.policy
    folder = locate_checkpoint(update.uri, settings.folder / "checkpoints")
    return str(folder) if folder.exists() else "removed"


# Going back


@policy.command()
@click.argument("version", type=int)
@click.option("--reason", default="", help="Why, for the record.")
@common_options
def use(settings: Settings, version: int, reason: str) -> None:
    """Answer with VERSION's weights, and train on from them.

    They get the next version's number.

    Nothing is taken back: versions only rise, and every record keeps the version that made it.

    \b
    Examples:
      charter policy use 3
      charter policy use 0 --reason "start again from the first model"
    """

    bus = connect_bus(settings)
    click.echo(_restore_policy(settings, bus, version, reason))
    bus.close()


@policy.command()
@click.option("--reason", default="", help="Why, for the record.")
@click.option("--pause", "pausing", is_flag=True, help="Pause the phase that learns from labels, too.")
@common_options
def rollback(settings: Settings, reason: str, pausing: bool) -> None:
    """Go back to the policy that the present one was trained from.

    \b
    Examples:
      charter policy rollback
      charter policy rollback --pause --reason "it flatters"
    """

    bus = connect_bus(settings)
    if pausing:
        phase = settings.train.rl_method
        bus.publish([to_producer_record(make_pause(phase, reason or "rolled back", run_id=settings.run.id))])
        click.echo(f"{phase} is paused; to go on: charter policy resume {phase}")
    known = read_policy_updates(bus)
    click.echo(_restore_policy(settings, bus, get_parent_version(known, get_newest_version(known)), reason))
    bus.close()


def _restore_policy(settings: Settings, bus: Bus, version: int, reason: str) -> str:
    """Publish the version that has the weights of an earlier one; says what was done."""

    known = read_policy_updates(bus)
    if version and (present := get_weights_version(known, get_newest_version(known))) == get_weights_version(known, version):
        return f"policy {get_newest_version(known)} has the weights of policy {present} already"
    update = make_restore_update(known, version, run_id=settings.run.id, base_model=settings.models.policy)
    if update.restored_version:
        get_verified_folder(settings, known, version)
    bus.publish([to_producer_record(update), to_producer_record(_make_restore_incident(update, reason))])
    if update.record_id not in {one.record_id for one in read_policy_updates(bus)}:
        raise CharterError(
            f"policy {update.version} was published by someone else meanwhile",
            "the trainer or another person was faster",
            "look, then try again: charter policy list",
        )
    return f"policy {update.version} answers from now on, with the weights of policy {update.restored_version}"


def _make_restore_incident(update: PolicyUpdate, reason: str) -> Incident:
    """Why someone went back, beside what stopped training by itself."""

    return Incident(
        record_id=ids.compute_record_id(
            "incident", [update.record_id], ids.compute_fingerprint("rollback_incident", reason=reason)
        ),
        parent_ids=[update.record_id],
        run_id=update.run_id,
        stage="policy",
        policy_version=update.version,
        phase=update.phase,
        title=f"someone went back to policy {update.restored_version}",
        detail=reason,
    )


# Pausing


@policy.command("pause")
@click.argument("phases", nargs=-1, type=click.Choice(PHASES))
@click.option("--reason", default="", help="Why, for the record.")
@common_options
def pause_phases(settings: Settings, phases: tuple[str, ...], reason: str) -> None:
    """Pause training: every phase, or those named. The stream flows on; what is being trained on is finished.

    \b
    Examples:
      charter policy pause
      charter policy pause ppo --reason "looking at the rewards"
    """
    _publish_pauses(settings, phases or PHASES, reason, paused=True)


@policy.command("resume")
@click.argument("phases", nargs=-1, type=click.Choice(PHASES))
@click.option("--reason", default="", help="Why, for the record.")
@common_options
def resume_phases(settings: Settings, phases: tuple[str, ...], reason: str) -> None:
    """Let training go on: every phase that is paused, or those named.

    \b
    Examples:
      charter policy resume
    """
    _publish_pauses(settings, phases or PHASES, reason, paused=False)


def _publish_pauses(settings: Settings, phases: Sequence[str], reason: str, *, paused: bool) -> None:

    bus = connect_bus(settings)
    held = read_paused_phases(bus)
    changed = [phase for phase in phases if (phase in held) != paused]
    bus.publish([to_producer_record(make_pause(phase, reason, run_id=settings.run.id, paused=paused)) for phase in changed])
    bus.close()
    state = "paused" if paused else "no longer paused"
    click.echo(f"{', '.join(changed)}: {state}" if changed else f"nothing to do: {', '.join(phases)} is {state} already")


# Taking one out


@policy.command()
@click.argument("version", default=LATEST_POLICY)
@click.argument("folder", type=click.Path(path_type=Path))
@common_options
def export(settings: Settings, version: str, folder: Path) -> None:
    """Copy a policy's weights into a new FOLDER.

    VERSION is a number, or "latest"; transformers, vLLM and others load the folder.

    \b
    Examples:
      charter policy export latest my-model
      charter policy export 3 my-model
    """

    if folder.exists():
        raise UsageError(f"{folder} is there already", "an export never overwrites", "name a new folder")
    bus = connect_bus(settings)
    known = read_policy_updates(bus)
    bus.close()
    number = parse_policy_version(version, known)
    source = get_verified_folder(settings, known, number)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*_INTERNAL_FILES))
    click.echo(f"policy {number}: {folder}")


COMMAND = policy
