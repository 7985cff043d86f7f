"""`charter replay`: earlier records through the stages again, as a run of its own; and `charter runs`, which compares runs."""

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
from charter.lag import find_oldest_unread, get_stage_inputs, read_sink_offsets
from charter.pipeline import STAGE_ROLES, STAGES, make_host, make_run_manifest, read_run_manifests
from constitutions.loader import Constitution, load_constitution
from engine.bus.port import Bus, Offsets, TopicPartition
from engine.bus.read import read_topic
from engine.errors import UsageError
from engine.host import Host
from engine.settings import Settings
from engine.settings import Settings as Tree
from engine.stop_signals import stop_on_signals
from producers.replay import (
    EARLIEST,
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


@dataclass(frozen=True)
class ReplayPlan:
    """A replay, decided: settings and constitution, what it reads, the stages, and the policy version that answers."""

    settings: Settings
    constitution: Constitution
    selection: LogSelection | ArchiveSelection
    stages: tuple[str, ...]
    pinned_version: int | None
    from_archive: bool
    manifest: RunManifest
    read_records: Callable[[], Iterator[Record]]

    def describe(self) -> list[str]:
        """What it would do and cost."""

        records = list({record.record_id: record for record in self.read_records()}.values())
        chars = sum(len(message.content) for record in records for message in getattr(record, "messages", []))
        where = "the database" if self.from_archive else "the log"
        answers = (
            f"policy {self.pinned_version} answers" if self.pinned_version is not None and "respond" in self.stages else ""
        )
        topics = ", ".join(self.selection.topics)
        return [
            f"would replay {len(records)} records of run {self.selection.run_id} ({topics}) from {where}",
            f"as run {self.settings.run.id}, through {', '.join(self.stages)}" + (f"; {answers}" if answers else ""),
            *format_costs(estimate_costs(self.settings, self.stages, len(records), chars)),
        ]


def make_replay_plan(settings: Settings, bus: Bus, *, stage: str, start: str, end: str, name: str | None, only: bool, archive: bool,
              constitution: str | None, model: str | None, policy: int | None,
              excluded_principles: Sequence[str] = ()) -> ReplayPlan:  # fmt: skip
    """Decide what is replayed; a replay that was begun before keeps the bounds that it began with."""

    known = read_run_manifests(bus)
    source = start.removeprefix("run:") if start.startswith("run:") else settings.run.id
    if source not in {manifest.run_id for manifest in known}:
        there = ", ".join(dict.fromkeys(manifest.run_id for manifest in known)) or "none"
        raise UsageError(f"there is no run {source}", f"the runs here are: {there}", "type: charter runs")
    changed = {"run.constitution": constitution, f"models.{STAGE_ROLES[stage]}": model}
    chosen = _override_settings(settings, {key: value for key, value in changed.items() if value})
    loaded = load_constitution(chosen.run.constitution)
    what: dict[str, Any] = {
        "stage": stage,
        "source": source,
        "from": start,
        "to": end,
        "only": only,
        "policy": policy,
        "archive": archive,
    }
    if excluded_principles:
        loaded = loaded.without_principles(excluded_principles)
        what["without"] = list(excluded_principles)
    fingerprint = ids.compute_fingerprint("replay", selection=what, settings=_dump_settings(chosen), constitution=loaded.hash)
    chosen = _override_settings(chosen, {"run.id": name or f"replay-{stage}-{fingerprint[:8]}"})
    if chosen.run.id == source:
        raise UsageError(
            "a replay is a run of its own", f"--as names the run that it reads, {source}", "give another: --as NAME"
        )
    topics = get_stage_inputs(chosen.judge.pairing)[stage]
    topics = topics if stage != "critique" else ("responses",)  # its other input is made by the replay itself
    begun = next((manifest for manifest in known if manifest.run_id == chosen.run.id), None)
    before = json.loads(begun.settings).get("replay") if begun else None
    if begun and not before:
        raise UsageError(
            f"{chosen.run.id} is a run already", "it is no replay that could go on", "give another name: --as NAME"
        )
    if before and before["archive"] != archive:
        where = "the archive" if before["archive"] else "the log"
        raise UsageError(f"{chosen.run.id} was begun from {where}", "it goes on from there", "give another name: --as NAME")
    if begun and begun.constitution and begun.constitution.hash != loaded.hash:
        was = f"it goes on under {begun.constitution.name} {begun.constitution.version} ({begun.constitution.hash[:12]})"
        raise UsageError(f"{chosen.run.id} was begun under another constitution", was, "give another name: --as NAME")
    wanted = is_chain_end if stage == "judge" and chosen.judge.pairing == "revision" else is_chain_start
    begin = EARLIEST if start.startswith("run:") else start
    store = open_store(chosen)
    selection: LogSelection | ArchiveSelection
    if archive:
        bounds: dict[str, Any] = before or {"before_seq": store.query("SELECT next_seq FROM raw.sink_state").rows[0][0]}
        selection = ArchiveSelection(source, topics, begin, end, bounds["before_seq"], wanted)
        read = partial(selection.read_records, store)
    else:
        bounds = before or {
            "begins": _offsets_to_lists(ReplayBound(begin).resolve_offsets(bus, topics)),
            "ends": _offsets_to_lists(ReplayBound(end).resolve_offsets(bus, topics)),
        }
        begins, ends = ({TopicPartition(t, p): o for t, p, o in bounds[bound]} for bound in ("begins", "ends"))
        selection = LogSelection(source, topics, begins, ends, wanted)
        read = partial(selection.read_records, bus)
    stages = (stage,) if only else _get_downstream_stages(stage, chosen.judge.pairing)
    pinned = _resolve_policy_version(bus, source, policy, model) if "respond" in stages else None
    return ReplayPlan(
        settings=chosen,
        constitution=loaded,
        selection=selection,
        stages=stages,
        pinned_version=pinned,
        from_archive=archive,
        manifest=make_run_manifest(chosen, loaded, before or what | bounds | {"pinned": pinned}),
        read_records=read,
    )


def _offsets_to_lists(offsets: Offsets) -> list[list[Any]]:
    """As they are kept in a manifest."""
    return [[*place, offset] for place, offset in offsets.items()]


def _dump_settings(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude={"data", "bus", "run"})


def _override_settings(settings: Settings, changes: dict[str, Any]) -> Settings:
    """The settings with some of them, by dotted name, changed."""

    values = settings.model_dump()
    for name, value in changes.items():
        section, _, key = name.partition(".")
        values[section][key] = value
    return Tree(**values)


def _get_downstream_stages(stage: str, pairing: str) -> tuple[str, ...]:
    """The stage and every one that reads what it, or one that follows from it, makes."""

    made = {"respond": "responses", "critique": "critiques", "revise": "revisions", "judge": "preferences"}
    reached, topics = {stage}, {made[stage]}
    while more := {name for name, inputs in get_stage_inputs(pairing).items() if name not in reached and topics & set(inputs)}:
        reached |= more
        topics |= {made[name] for name in more}
    return tuple(name for name in STAGES if name in reached)


def _resolve_policy_version(bus: Bus, source: str, policy: int | None, model: str | None) -> int:
    """The policy version that answers: as told, another model's own weights, or the one that answered most in the source."""

    if policy is not None or model:
        return policy or 0
    run = ("run", source.encode())
    versions = Counter(
        record.policy_version or 0
        for message in read_topic(bus, "responses")
        if run in message.headers and (record := decode_or_none(message))
    )
    return versions.most_common(1)[0][0] if versions else 0


def run_replay(plan: ReplayPlan, bus: Bus, *, quiet: bool = False) -> bool:
    """Feed the records to the stages, and run these until everything has ended; whether it has, or was stopped before."""

    def archived() -> bool:
        return not find_oldest_unread(
            bus, read_sink_offsets(open_store(plan.settings), bus.cluster_id), bus.end_offsets(list(TOPICS))
        )

    run_id, stop = plan.settings.run.id, stop_on_signals()
    inputs = {stage: topics for stage, topics in get_stage_inputs(plan.settings.judge.pairing).items() if stage in plan.stages}
    for stage, topics in inputs.items():
        bus.initialize_group_offsets(
            f"{run_id}.{stage}", bus.end_offsets(topics)
        )  # what is there already is none of this run's
    host = make_host(
        plan.settings,
        bus,
        plan.stages,
        sink=True,
        pinned_version=plan.pinned_version,
        manifest=plan.manifest,
        constitution=plan.constitution,
    )
    published, earlier = republish_records(bus, plan.read_records(), run_id)
    found = f"{published + earlier} records of run {plan.selection.run_id}"
    click.echo(f"run {run_id}: {found}, {earlier} of them begun earlier, through {', '.join(plan.stages)}", err=True)
    with host:
        finished = _wait_until_finished(host, bus, sorted({topic for of_one in inputs.values() for topic in of_one}), stop)
        while finished and not archived() and not host.failure_event.is_set() and not stop.wait(_POLL_INTERVAL_S):
            pass
    host.raise_if_failed()
    made = ", ".join(f"{worker.stage.name} {worker.num_written}" for worker in host.workers)
    state = "over" if finished else "stopped; the same command goes on with it"
    click.echo(f"run {run_id} is {state}; written now: {made}", err=quiet)
    return finished


def _wait_until_finished(host: Host, bus: Bus, topics: Sequence[str], stop: Any) -> bool:
    """Whether all that follows has ended: twice in a row everything is read and finished, and nothing was made in between."""
    before = None
    while not host.failure_event.is_set() and not stop.wait(_POLL_INTERVAL_S):
        ends = bus.end_offsets(topics)
        made = sum(worker.num_written for worker in host.workers)
        idle = all(worker.is_caught_up(_filter_offsets(worker.stage.inputs, ends)) for worker in host.workers)
        if idle and made == before:
            return True
        before = made if idle else None
    return False


def _filter_offsets(topics: Sequence[str], end_offsets: Offsets) -> Offsets:
    return {place: end for place, end in end_offsets.items() if place.topic in topics}
