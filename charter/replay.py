"""`charter replay`: run earlier records through the stages again, as a new run.

1. `make_replay_plan` finds the source run, the settings and constitution of the new run, the records to read and the stages.
2. `run_replay` publishes copies of the records with the new run id, and runs the stages until they have processed all records.

A stopped replay can be started again. The manifest of the new run stores the range of records of the first start.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import click

from charter.connect import open_store
from charter.estimate import estimate_costs, format_costs
from charter.lag import CompletionCheck
from charter.manifests import read_run_manifests
from charter.pipeline import make_host
from charter.progress import show_progress
from charter.stages import STAGE_OUTPUTS, get_downstream_stages, get_stage_inputs, get_stage_role
from charter.startup import start_when_ready
from constitutions.loader import Constitution, load_constitution
from engine.bus.port import Bus, Offsets, TopicPartition
from engine.bus.read import read_between, read_topic
from engine.commit_history import read_commit_history
from engine.errors import UsageError
from engine.pairing import CONTRAST_PAIRING, REVISION_PAIRING
from engine.progress import WorkProgress
from engine.run_starts import ensure_run_start
from engine.settings import Settings
from engine.stop_signals import stop_on_signals
from engine.store import Store
from engine.text import format_count
from producers.replay import (
    EARLIEST,
    LATEST,
    ArchiveSelection,
    LogSelection,
    ReplayBound,
    decode_or_none,
    is_chain_end,
    is_chain_start,
    is_response_or_chain_end,
    republish_records,
)
from schemas import ids
from schemas.codec import RecordError, decode_record
from schemas.records import DeadLetter, Record, RunManifest
from schemas.topics import TOPICS

_POLL_INTERVAL_S = 0.5
_RUN_PREFIX = "run:"
# The default run id depends on these settings. It does not depend on ports, addresses of the log, and limits.
_HASHED_SETTINGS: dict[str, Any] = {
    "models": {"policy", "critic", "judge", "follow"},
    "respond": True,
    "critique": True,
    "revise": True,
    "judge": True,
}


@dataclass(frozen=True)
class ReplayRequest:
    """Holds the options of `charter replay`, as the user typed them.

    `start` is earliest, an offset, a time, or run:NAME. `end` is latest, an offset or a time. Without `name`, the run id is
    derived from a hash of the request. `policy` is the policy version that samples the responses.
    `revises_suites` is only set by `charter eval principles`: responses to prompts of evaluation suites are then revised, too.
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
    revises_suites: bool = False

    @property
    def source_run_id(self) -> str | None:
        """Return the run id in --from run:ID. Return None if --from has no run id.

        Without a run id, the source is the run of the settings.
        """
        return self.start.removeprefix(_RUN_PREFIX) if self.start.startswith(_RUN_PREFIX) else None

    @property
    def start_bound(self) -> str:
        return EARLIEST if self.source_run_id is not None else self.start

    def to_manifest_fields(self, source_run_id: str) -> dict[str, Any]:
        """Return the fields that identify the replay. The run id depends on their hash. The manifest stores them."""
        fields: dict[str, Any] = {
            "stage": self.stage,
            "source": source_run_id,
            "from": self.start,
            "to": self.end,
            "only": self.only,
            "policy": self.policy,
            "archive": self.archive,
        }
        # These fields are added only if they are used. The run ids of other replays therefore stay the same.
        fields |= {"without": list(self.excluded_principles)} if self.excluded_principles else {}
        return fields | ({"revises_suites": True} if self.revises_suites else {})


@dataclass(frozen=True)
class ReplayPlan:
    """Holds the settings and constitution of the new run, the records to read, the stages and the policy version."""

    settings: Settings
    constitution: Constitution
    selection: LogSelection | ArchiveSelection
    first_stage: str
    stages: tuple[str, ...]
    pinned_version: int | None
    from_archive: bool
    manifest_fields: dict[str, Any]
    read_records: Callable[[], Iterator[Record]]

    def describe(self) -> list[str]:
        """Return lines about the records, the stages and the estimated token counts."""
        with show_progress(f"reading run {self.selection.run_id}", "records") as progress:
            records = list({record.record_id: record for record in _collect_ids(self.read_records(), set(), progress)}.values())
        num_chars = sum(len(message.content) for record in records for message in getattr(record, "messages", []))
        origin = "the database" if self.from_archive else "the log"
        stages = ", ".join(self.stages)
        if self.pinned_version is not None:
            stages += f"; responses from policy {self.pinned_version}"
        topics = ", ".join(self.selection.topics)
        return [
            f"would replay {format_count(len(records), 'records')} of run {self.selection.run_id} ({topics}) from {origin}"
            + (f"; {format_count(self.selection.num_erased, 'records', 'are')} erased" if self.selection.num_erased else ""),
            f"as run {self.settings.run.id}, through {stages}",
            *format_costs(estimate_costs(self.settings, self.stages, len(records), num_chars)),
        ]


def make_replay_plan(settings: Settings, bus: Bus, request: ReplayRequest) -> ReplayPlan:
    """Find the source run and the records of a request on the log. With --archive, find the records in the database.

    Raises UsageError if the source run does not exist, or if another run already has the id of the new run.
    """
    manifests = read_run_manifests(bus)
    source_run_id = _resolve_source_run(settings, request, manifests)
    constitution = _load_replay_constitution(settings, request)
    request_fields = request.to_manifest_fields(source_run_id)
    new_settings = _make_replay_settings(settings, request, request_fields, constitution)
    earlier_fields = _find_earlier_start(new_settings.run.id, source_run_id, request_fields, manifests)
    selection, read_records, bounds = _select_records(new_settings, bus, request, source_run_id, earlier_fields)
    stages = (request.stage,) if request.only else get_downstream_stages(request.stage, new_settings)
    if earlier_fields:
        fields = earlier_fields
    else:
        pinned_version = _resolve_policy_version(bus, source_run_id, request) if "respond" in stages else None
        fields = request_fields | bounds | {"pinned": pinned_version}
    return ReplayPlan(
        settings=new_settings,
        constitution=constitution,
        selection=selection,
        first_stage=request.stage,
        stages=stages,
        pinned_version=fields["pinned"],
        from_archive=request.archive,
        manifest_fields=fields,
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
    """Return the settings of the new run. The default run id depends on all options that change the records of the replay."""
    role = get_stage_role(request.stage, settings)
    if request.model and role is None:
        raise UsageError(f"the stage {request.stage} uses no model", "--model is given", "omit --model")
    overrides = {"run.constitution": request.constitution, f"models.{role}": request.model}
    settings = _override_settings(settings, {name: value for name, value in overrides.items() if value})
    # Only a replay of the stage grade has another default run id if the graders change.
    included = _HASHED_SETTINGS | ({"grade": True} if request.stage == "grade" else {})
    included |= {"contrast": True} if settings.judge.pairing == CONTRAST_PAIRING else {}
    hashed_settings = settings.model_dump(mode="json", include=included, exclude={"judge": {"timeout_s"}})
    fingerprint = ids.compute_fingerprint(
        "replay", selection=request_fields, settings=hashed_settings, constitution=constitution.hash
    )
    return _override_settings(settings, {"run.id": request.name or f"replay-{request.stage}-{fingerprint[:8]}"})


def _override_settings(settings: Settings, overrides: dict[str, Any]) -> Settings:
    """Replace some settings and validate the result. `overrides` maps dotted names to new values."""
    values = settings.model_dump()
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        values[section][key] = value
    return Settings(**values)


def _find_earlier_start(
    run_id: str, source_run_id: str, request_fields: dict[str, Any], manifests: Sequence[RunManifest]
) -> dict[str, Any] | None:
    """Return the manifest fields of the first start of this replay. Return None if this is the first start.

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
    if fields["archive"] != request_fields["archive"]:
        origin, option = ("the archive", "with") if fields["archive"] else ("the log", "without")
        raise UsageError(f"replay {run_id} started from {origin}", f"it can be continued only {option} --archive", fix)
    # A changed constitution is a changed configuration of the stages (see charter.configurations).
    changed = {name: value for name, value in request_fields.items() if name != "without" and fields.get(name) != value}
    if changed:
        listed = ", ".join(f"{name} was {fields.get(name)} and is now {value}" for name, value in changed.items())
        raise UsageError(
            f"replay {run_id} started with other options: {listed}", "it can be continued only with the same options", fix
        )
    return fields


def _select_records(
    settings: Settings, bus: Bus, request: ReplayRequest, source_run_id: str, earlier_fields: dict[str, Any] | None
) -> tuple[LogSelection | ArchiveSelection, Callable[[], Iterator[Record]], dict[str, Any]]:
    """Return the selection of records, a function that reads the records, and the bounds for the manifest."""
    # The critique stage also reads revisions, but the replay makes new revisions.
    topics = ("responses",) if request.stage == "critique" else get_stage_inputs(settings)[request.stage]
    predicate = _get_predicate(request.stage, settings)
    store = open_store(settings)
    if request.archive:
        bounds = _compute_archive_bounds(store, source_run_id, earlier_fields)
        archived = ArchiveSelection(source_run_id, topics, request.start_bound, request.end, bounds["before_seq"], predicate)
        return archived, partial(archived.read_records, store), bounds
    bounds = earlier_fields or {
        "begins": _offsets_to_lists(ReplayBound(request.start_bound).resolve_offsets(bus, topics)),
        "ends": _offsets_to_lists(ReplayBound(request.end).resolve_offsets(bus, topics)),
    }
    start_offsets, end_offsets = _lists_to_offsets(bounds["begins"]), _lists_to_offsets(bounds["ends"])
    logged = LogSelection(source_run_id, topics, start_offsets, end_offsets, predicate)
    return logged, partial(logged.read_records, bus), bounds


def _get_predicate(stage: str, settings: Settings) -> Callable[[Record], bool]:
    """Return the condition that selects, from the input topics of a stage, the records that the stage can process."""
    if stage == "grade":
        return is_response_or_chain_end
    return is_chain_end if stage == "judge" and settings.judge.pairing == REVISION_PAIRING else is_chain_start


def _compute_archive_bounds(store: Store, source_run_id: str, earlier_fields: dict[str, Any] | None) -> dict[str, Any]:
    """Return the end of the archive at the start of the replay, as a commit sequence number of a session of the sink.

    Raise UsageError if the database has numbered its rows again since then. The replay could then miss records.
    """
    history = read_commit_history(store)
    if earlier_fields is None:
        return {"before_seq": history.next_seq, "sink_session": history.session_id}
    if not history.is_valid(earlier_fields.get("sink_session"), earlier_fields["before_seq"] - 1):
        raise UsageError(
            f"this replay of {source_run_id} cannot be continued",
            f"it started from the first {earlier_fields['before_seq']} rows of {store.path}, and the database has numbered its rows"
            " again since then",
            "choose another name: --as NAME    (starts a new replay)",
        )
    return earlier_fields


def _offsets_to_lists(offsets: Offsets) -> list[list[Any]]:
    """Return offsets as [topic, partition, offset] lists for JSON."""
    return [[*partition, offset] for partition, offset in offsets.items()]


def _lists_to_offsets(lists: Sequence[Sequence[Any]]) -> Offsets:
    return {TopicPartition(topic, partition): offset for topic, partition, offset in lists}


def _resolve_policy_version(bus: Bus, source_run_id: str, request: ReplayRequest) -> int:
    """Return the requested policy version.

    By default, return 0 if the request names another model. Otherwise return the most frequent version of the source run.
    """
    if request.policy is not None or request.model:
        return request.policy or 0
    run_header = ("run", source_run_id.encode())
    versions = Counter(
        record.policy_version or 0
        for message in read_topic(bus, "responses")
        if run_header in message.headers and (record := decode_or_none(message))
    )
    return versions.most_common(1)[0][0] if versions else 0


@dataclass(frozen=True)
class ReplayResult:
    """Counts the selected records that are done, skipped (the first stage has no output for them), or dead letters.

    `num_dead_letters` is the number of dead letters of all stages. `written` is the number of records that each stage wrote in
    all starts of the replay.
    """

    is_finished: bool
    num_selected: int
    num_done: int
    num_skipped: int
    num_dead_letters: int
    written: dict[str, int]
    written_in_this_start: dict[str, int]

    @property
    def exit_code(self) -> int:
        return 0 if self.is_finished and not self.num_dead_letters else 1


def run_replay(
    plan: ReplayPlan, bus: Bus, *, quiet: bool = False, accept_configuration: bool = False, wait: bool = False
) -> ReplayResult:
    """Publish the records and run the stages until everything is processed or a signal stops the replay.

    If `quiet` is true, print the last line to standard error, because the caller prints its result to standard output.
    """
    run_id = plan.settings.run.id
    inputs = {stage: topics for stage, topics in get_stage_inputs(plan.settings).items() if stage in plan.stages}
    groups = {f"{run_id}.{stage}": topics for stage, topics in inputs.items()}
    # Records that were on the topics before the first start belong to other runs.
    run_start = ensure_run_start(bus, run_id, may_have_records=False)
    start = partial(
        make_host,
        plan.settings,
        bus,
        plan.stages,
        sink=True,
        pinned_version=plan.pinned_version,
        replay=plan.manifest_fields,
        constitution=plan.constitution,
        accept_configuration=accept_configuration,
    )
    host = start_when_ready(start, wait=wait)
    stop = stop_on_signals(host.note_stop)
    selected_ids: set[str] = set()
    with show_progress(f"replay of {plan.selection.run_id}", "records read") as progress:
        counts = republish_records(bus, _collect_ids(plan.read_records(), selected_ids, progress), run_id)
    selected_ids -= counts.erased_ids
    num_erased = plan.selection.num_erased + len(counts.erased_ids)
    click.echo(
        f"run {run_id}: replaying {format_count(counts.published + counts.from_earlier_start, 'records')} of run {plan.selection.run_id}"
        f" ({counts.from_earlier_start} published by an earlier start, {num_erased} erased) through {', '.join(plan.stages)}",
        err=True,
    )
    check = CompletionCheck(bus, groups, open_store(plan.settings), run_start.offsets)
    is_finished = False
    with host, show_progress(f"run {run_id}", "known records") as progress:
        while not host.failure_event.is_set() and not stop.wait(_POLL_INTERVAL_S):
            check.update_progress(progress, sum(worker.num_committed for worker in host.workers))
            if check.is_done():
                is_finished = True
                break
    host.raise_if_failed()
    with show_progress(f"counting the records of run {run_id}", "records"):
        written = {worker.stage.name: worker.num_written for worker in host.workers}
        result = _count_results(bus, plan, selected_ids, is_finished, written)
    click.echo(_format_result(run_id, result), err=quiet)
    return result


def _count_results(
    bus: Bus, plan: ReplayPlan, selected_ids: set[str], is_finished: bool, written_in_this_start: dict[str, int]
) -> ReplayResult:
    """Count the records of the new run on the log. Include the records from earlier starts of the same replay."""
    written: dict[str, int] = {}
    parent_ids: set[str] = set()
    for stage in plan.stages:
        output_ids: set[str] = set()
        for record in _read_run_records(bus, plan, STAGE_OUTPUTS[stage]):
            if record.stage == stage:
                output_ids.add(record.record_id)
                parent_ids |= set(record.parent_ids) if stage == plan.first_stage else set()
        written[stage] = len(output_ids)
    dead_ids: set[str] = set()
    num_dead_letters = 0
    for letter in _read_run_records(bus, plan, DeadLetter.topic):
        assert isinstance(letter, DeadLetter)
        num_dead_letters += 1
        if letter.stage == plan.first_stage and (record_id := _get_source_record_id(letter)):
            dead_ids.add(record_id)
    done, dead = selected_ids & parent_ids, (selected_ids & dead_ids) - parent_ids
    return ReplayResult(
        is_finished=is_finished,
        num_selected=len(selected_ids),
        num_done=len(done),
        num_skipped=len(selected_ids - done - dead) if is_finished else 0,
        num_dead_letters=num_dead_letters,
        written=written,
        written_in_this_start=written_in_this_start,
    )


def _read_run_records(bus: Bus, plan: ReplayPlan, topic: str) -> Iterator[Record]:
    """Yield the records of the new run on a topic. Skip records that cannot be decoded, because the sink counts them."""
    run_header, run_start = ("run", plan.settings.run.id.encode()), ensure_run_start(bus, plan.settings.run.id)
    for raw in read_between(bus, run_start.get_offsets(bus, [topic]), bus.end_offsets([topic])):
        if run_header in raw.headers and (record := decode_or_none(raw)) is not None:
            yield record


def _get_source_record_id(letter: DeadLetter) -> str | None:
    """Return the id of the record in a dead letter. Return None if the record cannot be decoded."""
    try:
        return decode_record(letter.value or b"", TOPICS[letter.source_topic].record_class).record_id
    except RecordError:
        return None


def _collect_ids(records: Iterator[Record], record_ids: set[str], progress: WorkProgress) -> Iterator[Record]:
    """Yield the records, and add their ids to `record_ids`. Only the ids are stored, because the records may not fit in memory."""
    for record in records:
        record_ids.add(record.record_id)
        progress.num_done += 1
        yield record


def _format_result(run_id: str, result: ReplayResult) -> str:
    state = "finished" if result.is_finished else "stopped; run the same command to continue"
    written = ", ".join(
        f"{stage} {count} ({result.written_in_this_start[stage]} in this start)" for stage, count in result.written.items()
    )
    return (
        f"run {run_id}: {state}; selected {result.num_selected}, done {result.num_done}, skipped {result.num_skipped},"
        f" dead letters {result.num_dead_letters}; records written: {written}"
    )
