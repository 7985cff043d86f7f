"""`charter replay`: run earlier records through the stages again, as a new run.

1. `make_replay_plan` resolves the source run, the settings and constitution of the new run, the records to read and the stages.
2. `run_replay` publishes copies of the records under the new run id, and runs the stages until they have processed everything.

A replay can be stopped and started again: the manifest of the new run keeps the bounds of the first start.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import click

from charter.connect import open_store
from charter.estimate import estimate_costs, format_costs
from charter.lag import find_oldest_unread, read_sink_offsets
from charter.manifests import make_run_manifest, read_run_manifests
from charter.pipeline import make_host
from charter.stages import STAGE_ROLES, get_downstream_stages, get_stage_inputs
from constitutions.loader import Constitution, load_constitution
from engine.bus.port import Bus, Offsets, TopicPartition
from engine.bus.read import read_topic
from engine.errors import UsageError
from engine.host import Host
from engine.settings import Settings
from engine.stop_signals import stop_on_signals
from producers.replay import (
    EARLIEST,
    LATEST,
    ArchiveSelection,
    LogSelection,
    ReplayBound,
    decode_or_none,
    is_chain_end,
    is_chain_start,
    republish_records,
)
from schemas import ids
from schemas.records import Record, RunManifest
from schemas.topics import TOPICS

_POLL_INTERVAL_S = 0.5
_RUN_PREFIX = "run:"


@dataclass(frozen=True)
class ReplayRequest:
    """The options of `charter replay`, as the user typed them.

    `start` is earliest, an offset, a time, or run:NAME; `end` is latest, an offset or a time. Without `name`, the run id is
    derived from a hash of the request. `policy` is the version to sample responses from.
    """

    stage: str
    start: str = EARLIEST
    end: str = LATEST
    name: str | None = None
    only: bool = False
    archive: bool = False
    constitution: str | None = None
    model: str | None = None
    policy: int | None = None
    excluded_principles: tuple[str, ...] = ()

    @property
    def source_run_id(self) -> str | None:
        """The run that --from names; None means the run of the settings."""
        return self.start.removeprefix(_RUN_PREFIX) if self.start.startswith(_RUN_PREFIX) else None

    @property
    def start_bound(self) -> str:
        return EARLIEST if self.source_run_id is not None else self.start

    def to_manifest_fields(self, source_run_id: str) -> dict[str, Any]:
        """Return the fields that identify the replay: they are hashed for the run id and stored in the manifest."""
        fields: dict[str, Any] = {
            "stage": self.stage,
            "source": source_run_id,
            "from": self.start,
            "to": self.end,
            "only": self.only,
            "policy": self.policy,
            "archive": self.archive,
        }
        # Added only if given, so that the run ids of other replays do not depend on this option.
        return fields | ({"without": list(self.excluded_principles)} if self.excluded_principles else {})


@dataclass(frozen=True)
class ReplayPlan:
    """A resolved replay: the new run's settings and constitution, the records to read, the stages and the policy version."""

    settings: Settings
    constitution: Constitution
    selection: LogSelection | ArchiveSelection
    stages: tuple[str, ...]
    pinned_version: int | None
    from_archive: bool
    manifest: RunManifest
    read_records: Callable[[], Iterator[Record]]

    def describe(self) -> list[str]:
        """Return lines about the records, the stages and the estimated token counts."""
        records = list({record.record_id: record for record in self.read_records()}.values())
        num_chars = sum(len(message.content) for record in records for message in getattr(record, "messages", []))
        origin = "the database" if self.from_archive else "the log"
        stages = ", ".join(self.stages)
        if self.pinned_version is not None:
            stages += f"; responses from policy {self.pinned_version}"
        topics = ", ".join(self.selection.topics)
        return [
            f"would replay {len(records)} records of run {self.selection.run_id} ({topics}) from {origin}",
            f"as run {self.settings.run.id}, through {stages}",
            *format_costs(estimate_costs(self.settings, self.stages, len(records), num_chars)),
        ]


def make_replay_plan(settings: Settings, bus: Bus, request: ReplayRequest) -> ReplayPlan:
    """Resolve a request against the log, and against the database for --archive.

    Raises UsageError if the source run does not exist, or if the new run's id belongs to something other than this replay.
    """
    manifests = read_run_manifests(bus)
    source_run_id = _resolve_source_run(settings, request, manifests)
    constitution = _load_replay_constitution(settings, request)
    request_fields = request.to_manifest_fields(source_run_id)
    new_settings = _make_replay_settings(settings, request, request_fields, constitution)
    earlier_fields = _find_earlier_start(new_settings.run.id, source_run_id, request, constitution, manifests)
    selection, read_records, bounds = _select_records(new_settings, bus, request, source_run_id, earlier_fields)
    stages = (request.stage,) if request.only else get_downstream_stages(request.stage, new_settings.judge.pairing)
    pinned_version = _resolve_policy_version(bus, source_run_id, request) if "respond" in stages else None
    return ReplayPlan(
        settings=new_settings,
        constitution=constitution,
        selection=selection,
        stages=stages,
        pinned_version=pinned_version,
        from_archive=request.archive,
        manifest=make_run_manifest(
            new_settings, constitution, earlier_fields or request_fields | bounds | {"pinned": pinned_version}
        ),
        read_records=read_records,
    )


def _resolve_source_run(settings: Settings, request: ReplayRequest, manifests: Sequence[RunManifest]) -> str:
    source_run_id = settings.run.id if request.source_run_id is None else request.source_run_id
    run_ids = list(dict.fromkeys(manifest.run_id for manifest in manifests))
    if source_run_id not in run_ids:
        raise UsageError(
            f"there is no run {source_run_id}", f"the log has these runs: {', '.join(run_ids) or 'none'}", "type: charter runs"
        )
    return source_run_id


def _load_replay_constitution(settings: Settings, request: ReplayRequest) -> Constitution:
    constitution = load_constitution(request.constitution or settings.run.constitution)
    return constitution.without_principles(request.excluded_principles) if request.excluded_principles else constitution


def _make_replay_settings(
    settings: Settings, request: ReplayRequest, request_fields: dict[str, Any], constitution: Constitution
) -> Settings:
    """Return the settings of the new run. Its default id depends on everything that changes what the replay writes."""
    overrides = {"run.constitution": request.constitution, f"models.{STAGE_ROLES[request.stage]}": request.model}
    settings = _override_settings(settings, {name: value for name, value in overrides.items() if value})
    hashed_settings = settings.model_dump(mode="json", exclude={"data", "bus", "run"})
    fingerprint = ids.compute_fingerprint(
        "replay", selection=request_fields, settings=hashed_settings, constitution=constitution.hash
    )
    return _override_settings(settings, {"run.id": request.name or f"replay-{request.stage}-{fingerprint[:8]}"})


def _override_settings(settings: Settings, overrides: dict[str, Any]) -> Settings:
    """Return validated settings with some values, by dotted name, replaced."""
    values = settings.model_dump()
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        values[section][key] = value
    return Settings(**values)


def _find_earlier_start(
    run_id: str, source_run_id: str, request: ReplayRequest, constitution: Constitution, manifests: Sequence[RunManifest]
) -> dict[str, Any] | None:
    """Return the manifest fields of this replay's first start, or None if it starts now.

    Raises UsageError if the run id belongs to the source run, to a run that is not a replay, or to a different replay.
    """
    fix = "choose another name: --as NAME"
    if run_id == source_run_id:
        raise UsageError(f"the replay of run {run_id} cannot have the same name", "a replay writes a new run", fix)
    manifest = next((manifest for manifest in manifests if manifest.run_id == run_id), None)
    if manifest is None:
        return None
    fields: dict[str, Any] | None = json.loads(manifest.settings).get("replay")
    if not fields:
        raise UsageError(f"run {run_id} already exists", "it is not a replay, so it cannot be continued", fix)
    if fields["archive"] != request.archive:
        origin, option = ("the archive", "with") if fields["archive"] else ("the log", "without")
        raise UsageError(f"replay {run_id} started from {origin}", f"it can be continued only {option} --archive", fix)
    used = manifest.constitution
    if used and used.hash != constitution.hash:
        why = f"it can be continued only with {used.name} {used.version} ({used.hash[:12]})"
        raise UsageError(f"replay {run_id} started with another constitution", why, fix)
    return fields


def _select_records(
    settings: Settings, bus: Bus, request: ReplayRequest, source_run_id: str, earlier_fields: dict[str, Any] | None
) -> tuple[LogSelection | ArchiveSelection, Callable[[], Iterator[Record]], dict[str, Any]]:
    """Return what to read, a function that reads it, and the bounds for the manifest."""
    # The critique stage also reads revisions, but the replay makes new ones.
    topics = ("responses",) if request.stage == "critique" else get_stage_inputs(settings.judge.pairing)[request.stage]
    judges_chains = request.stage == "judge" and settings.judge.pairing == "revision"
    predicate = is_chain_end if judges_chains else is_chain_start
    store = open_store(settings)
    if request.archive:
        bounds = earlier_fields or {"before_seq": store.query("SELECT next_seq FROM raw.sink_state").rows[0][0]}
        archived = ArchiveSelection(source_run_id, topics, request.start_bound, request.end, bounds["before_seq"], predicate)
        return archived, partial(archived.read_records, store), bounds
    bounds = earlier_fields or {
        "begins": _offsets_to_lists(ReplayBound(request.start_bound).resolve_offsets(bus, topics)),
        "ends": _offsets_to_lists(ReplayBound(request.end).resolve_offsets(bus, topics)),
    }
    start_offsets, end_offsets = _lists_to_offsets(bounds["begins"]), _lists_to_offsets(bounds["ends"])
    logged = LogSelection(source_run_id, topics, start_offsets, end_offsets, predicate)
    return logged, partial(logged.read_records, bus), bounds


def _offsets_to_lists(offsets: Offsets) -> list[list[Any]]:
    """Return offsets as [topic, partition, offset] lists for JSON."""
    return [[*partition, offset] for partition, offset in offsets.items()]


def _lists_to_offsets(lists: Sequence[Sequence[Any]]) -> Offsets:
    return {TopicPartition(topic, partition): offset for topic, partition, offset in lists}


def _resolve_policy_version(bus: Bus, source_run_id: str, request: ReplayRequest) -> int:
    """Return the requested version, 0 for another model's weights, or the most frequent version of the source run."""
    if request.policy is not None or request.model:
        return request.policy or 0
    run_header = ("run", source_run_id.encode())
    versions = Counter(
        record.policy_version or 0
        for message in read_topic(bus, "responses")
        if run_header in message.headers and (record := decode_or_none(message))
    )
    return versions.most_common(1)[0][0] if versions else 0


def run_replay(plan: ReplayPlan, bus: Bus, *, quiet: bool = False) -> bool:
    """Publish the records and run the stages until everything is processed; return False if a signal stopped it before.

    `quiet` prints the last line on standard error, so that standard output has only the caller's result.
    """
    run_id, stop = plan.settings.run.id, stop_on_signals()
    inputs = {stage: topics for stage, topics in get_stage_inputs(plan.settings.judge.pairing).items() if stage in plan.stages}
    for stage, topics in inputs.items():
        # Records that are already on these topics belong to other runs.
        bus.initialize_group_offsets(f"{run_id}.{stage}", bus.end_offsets(topics))
    host = make_host(
        plan.settings,
        bus,
        plan.stages,
        sink=True,
        pinned_version=plan.pinned_version,
        manifest=plan.manifest,
        constitution=plan.constitution,
    )
    num_published, num_earlier = republish_records(bus, plan.read_records(), run_id)
    click.echo(
        f"run {run_id}: replaying {num_published + num_earlier} records of run {plan.selection.run_id}"
        f" ({num_earlier} published by an earlier start) through {', '.join(plan.stages)}",
        err=True,
    )
    with host:
        input_topics = sorted({topic for topics in inputs.values() for topic in topics})
        finished = _wait_until_finished(host, bus, input_topics, stop)
        while finished and not _is_archived(plan, bus) and not host.failure_event.is_set() and not stop.wait(_POLL_INTERVAL_S):
            pass
    host.raise_if_failed()
    written = ", ".join(f"{worker.stage.name} {worker.num_written}" for worker in host.workers)
    state = "finished" if finished else "stopped; run the same command to continue"
    click.echo(f"run {run_id}: {state}; records written: {written}", err=quiet)
    return finished


def _is_archived(plan: ReplayPlan, bus: Bus) -> bool:
    """Return whether the sink has written everything on the log to the database."""
    next_offsets = read_sink_offsets(open_store(plan.settings), bus.cluster_id)
    return not find_oldest_unread(bus, next_offsets, bus.end_offsets(list(TOPICS)))


def _wait_until_finished(host: Host, bus: Bus, topics: Sequence[str], stop: threading.Event) -> bool:
    """Wait until all workers are caught up in two polls in a row without a new record between them; return False if stopped.

    One poll is not enough: a worker may publish a record for a worker that was checked before it.
    """
    previous_count = None
    while not host.failure_event.is_set() and not stop.wait(_POLL_INTERVAL_S):
        end_offsets = bus.end_offsets(topics)
        count = sum(worker.num_written for worker in host.workers)
        idle = all(worker.is_caught_up(_filter_offsets(worker.stage.inputs, end_offsets)) for worker in host.workers)
        if idle and count == previous_count:
            return True
        previous_count = count if idle else None
    return False


def _filter_offsets(topics: Sequence[str], end_offsets: Offsets) -> Offsets:
    return {partition: end for partition, end in end_offsets.items() if partition.topic in topics}
