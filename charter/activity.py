"""Find out which stages, sinks and trainers run now, and which training phases are paused.

The stages are found by their heartbeats: the members of their consumer groups on the log, on any machine. The sink and the
trainer have no group. They are found by the locks that they hold in the data folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from charter.manifests import read_run_manifests
from charter.stages import STAGES
from engine.bus.port import Bus
from engine.bus.read import read_values
from engine.instances import SERVICES, list_running_services
from engine.pacing import PacedAdmission
from engine.policy import RESTORE_PHASE, get_weights_version, read_paused_phases, read_policy_updates
from engine.settings import Settings
from schemas.codec import decode_record
from schemas.records import Incident, PolicyUpdate


def list_workers(bus: Bus, settings: Settings, run_id: str) -> list[dict[str, Any]]:
    """Return one row {worker, run, running, instances} for each stage and service. `running` is the number of instances.

    The stages of `run_id`, the sink and the trainer are always listed. Custom stages and stages of other runs are listed if they
    run.
    """
    run_ids = {run_id, *(manifest.run_id for manifest in read_run_manifests(bus))}
    stopped: dict[tuple[str, str], list[str]] = {(run_id, stage): [] for stage in STAGES}
    instances = stopped | _list_stages(bus, run_ids)
    rows = [_make_row(stage, run, found) for (run, stage), found in instances.items()]
    services = list_running_services(settings.folder)
    return [*rows, *(_make_row(service, None, services[service]) for service in SERVICES)]


def _list_stages(bus: Bus, run_ids: set[str]) -> dict[tuple[str, str], list[str]]:
    """Return the instances of each (run, stage) that runs. The name of a group is RUN.STAGE, and a run id can contain dots."""
    members = bus.list_members([f"{run_id}." for run_id in sorted(run_ids)])
    found: dict[tuple[str, str], list[str]] = {}
    for group, instances in members.items():
        run_id, _, stage = group.rpartition(".")
        if run_id in run_ids:
            found[run_id, stage] = instances
    return found


def _make_row(worker: str, run_id: str | None, instances: Sequence[str]) -> dict[str, Any]:
    return {"worker": worker, "run": run_id, "running": len(instances), "instances": list(instances)}


def list_paused_phases(bus: Bus) -> list[dict[str, Any]]:
    """Return one row {phase, reason} for each training phase that is paused."""
    return [{"phase": phase, "reason": reason} for phase, reason in read_paused_phases(bus).items()]


def list_held_stages(admission: PacedAdmission) -> list[dict[str, Any]]:
    """Return one row {stage, reason} for each stage that holds new prompts, because a training loop wants no completions now."""
    reason = admission.find_hold()
    return [{"stage": "respond", "reason": reason}] if reason else []


def list_policies(bus: Bus) -> list[dict[str, Any]]:
    """Return one row for each policy and reward model, oldest first. `weights_of` differs from `version` after a rollback."""
    updates = read_policy_updates(bus)
    return [
        {
            "kind": update.kind.value.lower(),
            "version": update.version,
            "phase": update.phase,
            "weights_of": _get_weights_of(updates, update),
            "created_at": update.created_at,
            "uri": update.uri,
            "run": update.run_id,
        }
        for update in updates
    ]


def _get_weights_of(updates: Sequence[PolicyUpdate], update: PolicyUpdate) -> int:
    return get_weights_version(updates, update.version) if update.phase == RESTORE_PHASE else update.version


def list_incidents(bus: Bus) -> list[dict[str, Any]]:
    """Return one row for each incident of training, oldest first: rollbacks, voided batches and rejected policies."""
    incidents = [decode_record(value, Incident) for value in read_values(bus, Incident.topic)]
    return [
        {
            "created_at": incident.created_at,
            "phase": incident.phase,
            "policy_version": incident.policy_version,
            "title": incident.title,
            "detail": incident.detail,
        }
        for incident in incidents
    ]
