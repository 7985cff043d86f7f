"""Putting a pipeline together from the settings: bus, models, stages, workers, sink.

One process can host every stage on one shared model, or each stage runs alone in any number of copies: it is the same code,
`charter run` or `charter run --stage NAME`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import charter
from charter import addition
from charter.observe import figures_of, show, tracing_of
from constitutions.loader import Constitution, load
from consumers.critique import Criticise
from consumers.judge import Judge
from consumers.respond import Respond
from consumers.revise import Revise
from consumers.sink import Sink
from engine.budget import Budget, parse_prices
from engine.bus import KAFKA, open_bus
from engine.bus.port import Bus, Offsets, TopicPartition
from engine.bus.read import read_values
from engine.bus.security import client_options
from engine.checkpoints import located, read
from engine.errors import RegistryUnreachable, UsageError
from engine.host import Host, Run
from engine.journal import Journal
from engine.models import open_model
from engine.models.port import Model
from engine.policy import PolicyFollower, updates
from engine.settings import Bus as BusSettings
from engine.settings import Settings
from engine.slots import Lease, Slot
from engine.store import Store
from engine.watchdog import Calls
from engine.worker import Lane, Limits, Stage, Worker, outgoing, untraced
from schemas import codec, ids
from schemas.codec import decode
from schemas.confluent import Registry, SchemaRefused
from schemas.records import ConstitutionRef, PolicyKind, PolicyUpdate, Record, RunManifest, Sampling
from schemas.topics import TOPICS, TopicSpec, topic_table

log = logging.getLogger("charter.pipeline")

STAND_BY_S = 1.0
LOOK_FOR_S = 2.0
REGISTRY_WITHIN_S = 5.0
STAGES = ("respond", "critique", "revise", "judge")
ROLES = {"respond": "policy", "critique": "critic", "revise": "critic", "judge": "judge"}
ENDPOINT_THREADS = 4


def connect(settings: Settings) -> Bus:
    """The bus of the settings, with every topic there."""
    bus = open_settings(settings)
    bus.create_topics(topic_specs(settings))
    return bus


def open_settings(settings: Settings) -> Bus:
    """The bus of the settings, as it is; from here on this process frames records as the settings say."""
    use_framing(settings.bus)
    options = client_options(settings.bus) if settings.bus_address.startswith(KAFKA) else {}
    return open_bus(
        settings.bus_address, prefix=settings.bus.prefix, options=options, static_members=settings.bus.static_members
    )


def use_framing(wanted: BusSettings) -> None:
    """Single-object framing, or Confluent's with its registry; with a registry both are read."""
    try:
        codec.use(wanted.framing, registry_of(wanted) if wanted.schema_registry else None)
    except SchemaRefused as error:
        raise UsageError(error.what, error.why, error.fix) from None
    except ValueError as error:
        fix = "set bus.schema_registry to the registry's URL, or leave bus.framing as it is"
        raise UsageError("bus.framing and bus.schema_registry cannot be used", str(error), fix) from None


def registry_of(wanted: BusSettings) -> Registry:
    login = os.environ.get(wanted.schema_registry_auth_env, "")
    return Registry(
        wanted.schema_registry, login=login, prefix=wanted.prefix, timeout_s=REGISTRY_WITHIN_S, away=RegistryUnreachable
    )


def topic_specs(settings: Settings) -> list[TopicSpec]:
    wanted = settings.bus
    return list(topic_table(wanted.partitions, wanted.retention_ms, wanted.replication).values())


def store_of(settings: Settings) -> Store:
    return Store(settings.folder / "charter.duckdb")


def is_endpoint(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


@dataclass
class Models:
    """The models by role. Roles with the same setting share one model; critic and judge default to policy version 0."""

    settings: Settings
    opened: dict[str, Model] = field(default_factory=dict)
    lanes: dict[str, Lane] = field(default_factory=dict)
    follower: PolicyFollower | None = None

    def close(self) -> None:
        if self.follower:
            self.follower.close()

    def spec(self, role: str) -> str:
        return getattr(self.settings.models, role) or self.settings.models.policy

    def open(self, spec: str) -> Model:
        if spec not in self.opened:
            chosen = self.settings.models
            options: dict[str, Any] = {"threads": chosen.threads, "max_batch": chosen.max_rows}
            if is_endpoint(spec):
                options = {
                    "api_key_env": chosen.api_key_env,
                    "timeout_s": chosen.timeout_s,
                    "concurrency": chosen.concurrency,
                }
            self.opened[spec] = open_model(spec, **options)
        return self.opened[spec]

    def role(self, role: str) -> Model:
        return self.open(self.spec(role))

    def lane(self, role: str | None) -> Lane:
        """Local models share the machine and so one lane; each endpoint has its own, and so has what needs no model."""
        if role is None:
            return self.lanes.setdefault("", Lane("no model", 1, 0.0))
        name = self.spec(role) if is_endpoint(self.spec(role)) else "local"
        threads = ENDPOINT_THREADS if is_endpoint(self.spec(role)) else 1
        return self.lanes.setdefault(name, Lane(name, threads, self.settings.worker.linger_ms / 1000))

    def follow(self, bus: Bus) -> PolicyFollower:
        """What follows the log's policies; the roles that do so share it, and its weights."""
        self.follower = self.follower or PolicyFollower(bus, self.role("policy"), self.open_update)
        return self.follower

    def open_update(self, update: PolicyUpdate) -> Model:
        """The weights of a policy update, verified against its hash."""
        if update.restored_version == 0:
            return self.role("policy")
        folder = read(located(update.uri, self.settings.folder / "checkpoints"), update.content_hash).folder
        first = self.role("policy")
        if is_endpoint(self.spec("policy")):
            from engine.delivery import Delivery

            return Delivery(first, self.settings.models.delivery)(update, folder)  # type: ignore[arg-type]
        return open_model(str(folder), threads=self.settings.models.threads, max_batch=self.settings.models.max_rows)


def policy_of(models: Models, bus: Bus, pinned: int | None) -> Callable[[], tuple[Model, int]]:
    """What answers now. A server's weights are its own: it stays at version 0 until it is given others."""
    if pinned:
        kept = (models.open_update(policy_update(bus, pinned)), pinned)
        return lambda: kept
    first = models.role("policy")
    if pinned == 0 or (is_endpoint(models.spec("policy")) and not models.settings.models.delivery):
        return lambda: (first, 0)
    return models.follow(bus).current


def policy_update(bus: Bus, version: int) -> PolicyUpdate:
    for update in updates(bus):
        if update.kind is PolicyKind.POLICY and update.version == version:
            return update
    raise UsageError(
        f"there is no policy {version} on the log", "training has made no such version", "type: charter policy list"
    )


def make_stage(
    name: str, settings: Settings, models: Models, constitution: Constitution, bus: Bus, pinned: int | None = None
) -> Stage:
    """One stage of the stream from the settings; `pinned` is the policy version that answers, None for the newest."""
    stage = pinned_stage(name, settings, models, constitution, bus, pinned)
    role = ROLES[name]
    if role not in settings.models.follow or pinned is not None:
        return stage
    if models.spec(role) != models.spec("policy") or is_endpoint(models.spec("policy")):
        raise UsageError(
            f"models.follow and models.{role} contradict each other",
            f"{models.spec(role)} is not the policy whose versions the trainer makes here",
            f"leave models.{role} empty, or take {role} out of models.follow",
        )
    return replace(stage, work=Following(stage.work, models.follow(bus).current))


@dataclass(frozen=True)
class Following:
    """A stage's work by the newest policy: the weights change between batches, never within one."""

    work: Any
    current: Callable[[], tuple[Model, int]]

    def __call__(self, records: Sequence[Record]) -> Sequence[Sequence[Record]]:
        result: Sequence[Sequence[Record]] = replace(self.work, model=self.current()[0])(records)
        return result


def pinned_stage(
    name: str, settings: Settings, models: Models, constitution: Constitution, bus: Bus, pinned: int | None
) -> Stage:
    """A stage whose critic and judge stay as they are."""
    rows, inputs = settings.models.max_rows, readers_of(settings.judge.pairing).get(name, ())
    if name == "respond":
        work: Any = make_respond(settings, policy_of(models, bus, pinned))
        return Stage(name, inputs, ("responses",), 0, max(1, rows // settings.respond.samples), work)
    if name == "critique":
        work = make_critique(settings, models, constitution)
        return Stage(name, inputs, ("critiques",), 1, rows, work)
    if name == "revise":
        work = make_revise(settings, models, constitution)
        return Stage(name, inputs, ("revisions",), 2, rows, work)
    if name == "judge":
        return Stage(name, inputs, ("preferences",), 3, rows, make_judge(settings, models, constitution))
    raise UsageError(f"there is no stage {name}", f"the stages are {', '.join(STAGES)}", "type: charter run --help")


def make_respond(settings: Settings, policy: Callable[[], tuple[Model, int]]) -> Respond:
    wanted = settings.respond
    sampling = Sampling(temperature=wanted.temperature, top_p=wanted.top_p, max_tokens=wanted.max_tokens)
    return Respond(policy, wanted.samples, sampling)


def make_critique(settings: Settings, models: Models, constitution: Constitution) -> Criticise:
    wanted = settings.critique
    return Criticise(
        model=models.role("critic"),
        constitution=constitution,
        sampling=Sampling(temperature=wanted.temperature, top_p=1.0, max_tokens=wanted.max_tokens),
        rounds=wanted.rounds,
        early_stop=wanted.early_stop,
        few_shot=wanted.few_shot,
        min_mass=wanted.min_mass,
        win=wanted.win,
        lose=wanted.lose,
        same=wanted.same,
        skip_sources=tuple(wanted.skip_sources),
        preset=wanted.preset,
        selection=wanted.selection,
    )


def make_revise(settings: Settings, models: Models, constitution: Constitution) -> Revise:
    sampling = Sampling(temperature=settings.critique.temperature, top_p=1.0, max_tokens=settings.revise.max_tokens)
    return Revise(models.role("critic"), constitution, sampling, settings.critique.few_shot, settings.critique.preset)


def make_judge(settings: Settings, models: Models, constitution: Constitution) -> Judge:
    wanted = settings.judge
    return Judge(
        model=models.role("judge"),
        constitution=constitution,
        pairing=wanted.pairing,
        min_mass=wanted.min_mass,
        reject_flips=wanted.reject_flips,
        preset=wanted.preset,
        form=wanted.form,
        principles=wanted.principles,
        k=wanted.k,
        order=wanted.order,
        clamp=wanted.clamp,
        max_tokens=wanted.max_tokens,
        deadline_s=wanted.deadline_s,
    )


def make_host(
    settings: Settings,
    bus: Bus,
    stages: Sequence[str],
    *,
    sink: bool,
    additions: Sequence[addition.Addition] = (),
    slot: str | None = None,
    pinned: int | None = None,
    manifest: RunManifest | None = None,
    constitution: Constitution | None = None,
) -> Host:
    """A host of these stages, and of the sink if asked for.

    A replay has a manifest of its own, pins the policy, and may have a constitution that is not the settings' one.
    """
    constitution = constitution or load(settings.run.constitution)
    publish_manifest(bus, manifest or manifest_of(settings, constitution))
    models = Models(settings)
    leased = None if slot else Slot(settings.folder / "slots")
    name_of_copy = slot or (leased.name if leased else "")
    budget = budget_of(settings, models, bus, stages)
    tracing = tracing_of(settings)
    made: list[tuple[Stage, str | None]]
    made = [(make_stage(name, settings, models, constitution, bus, pinned), ROLES[name]) for name in stages]
    made += [(addition.checked(own.make(settings, models), own.path, STAGES), own.role) for own in additions]
    workers = [
        Worker(
            bus,
            stage,
            models.lane(role),
            run_id=settings.run.id,
            slot=name_of_copy,
            limits=limits_of(settings),
            journal=Journal(settings.folder / "journal" / f"{settings.run.id}.{stage.name}", name_of_copy),
            admits=partial(budget.admits, stage.name) if budget else lambda: True,
            trace=tracing.stage(stage.name, settings.run.id) if tracing else untraced,
        )
        for stage, role in made
    ]
    others: dict[str, Run] = {}
    watched: list[Calls] = []
    sinks: list[Sink] = []
    if sink:
        lease = Lease(settings.folder / "sink.lock")
        others["sink"], watched = sink_or_standby(settings, bus, lease, sinks)
    closing = show(settings, figures_of(workers, sinks))
    closing += [tracing.close] if tracing else []
    closing += [models.close, *(worker.journal.close for worker in workers if worker.journal)]
    closing += [leased.close] if leased else []
    closing += [budget.close] if budget else []
    closing += [lease.close] if sink else []
    return Host(workers, others, closing, watched=watched, drain_s=settings.worker.drain_s, hang_s=settings.worker.hang_s)


def budget_of(settings: Settings, models: Models, bus: Bus, stages: Sequence[str]) -> Budget | None:
    """What bounds the use of these stages' run, if anything does. Each endpoint that a cost limit is to bound needs a price."""
    limits = settings.limits
    prices = parse_prices(limits.prices)
    for spec in {models.spec(ROLES[stage]) for stage in stages} if limits.max_cost else ():
        name = spec.partition("#")[2]
        if is_endpoint(spec) and name not in prices:
            raise UsageError(
                f"limits.max_cost cannot bound what {name} costs",
                "limits.prices has no price for it",
                f'add it, for a million tokens read and written: --set "limits.prices={name}=0.15/0.60"',
            )
    if not limits.max_cost and not (limits.max_tokens and "respond" in stages):
        return None
    return Budget(bus, settings.run.id, max_tokens=limits.max_tokens, max_cost=limits.max_cost, prices=prices)


def limits_of(settings: Settings) -> Limits:
    wanted = settings.worker
    return Limits(wanted.max_in_flight, wanted.max_bytes, wanted.attempts, wanted.record_s, wanted.dead_in_a_row)


def sink_or_standby(settings: Settings, bus: Bus, lease: Lease, running: list[Sink]) -> tuple[Run, list[Calls]]:
    """The sink or, while another process has this database's sink, one that takes over when that ends; `running` names it."""
    if lease.take():
        sink = make_sink(settings, bus)
        running.append(sink)
        return sink.run, [sink.calls]
    log.warning("the sink of process %s writes to this database; this one's stands by", lease.holder())

    def stand_by(stop: threading.Event) -> None:
        while not lease.take():
            if stop.wait(STAND_BY_S):
                return
        running.append(make_sink(settings, bus))
        running[-1].run(stop)

    return stand_by, []


def make_sink(settings: Settings, bus: Bus) -> Sink:
    return Sink(bus, store_of(settings), max_rows=settings.sink.max_rows, max_wait_s=settings.sink.max_wait_s)


def manifest_of(settings: Settings, constitution: Constitution, replay: dict[str, Any] | None = None) -> RunManifest:
    """What a run is made of; `replay` says what a replay reads."""
    chosen = settings.model_dump(mode="json", exclude={"data", "bus"}) | ({"replay": replay} if replay else {})
    text = json.dumps(chosen, ensure_ascii=False)
    configuration = ids.fingerprint(settings=text, constitution=constitution.hash, version=charter.__version__)
    return RunManifest(
        record_id=ids.record_id("run", [], ids.fingerprint(run=settings.run.id, configuration=configuration)),
        run_id=settings.run.id,
        stage="run",
        constitution=ConstitutionRef(name=constitution.name, version=constitution.version, hash=constitution.hash),
        name=settings.run.id,
        settings=text,
        constitution_text=constitution.text,
        charter_version=charter.__version__,
    )


def manifests(bus: Bus) -> list[RunManifest]:
    """Every run's manifests, oldest first."""
    return [decode(value, RunManifest) for value in read_values(bus, RunManifest.topic)]


def publish_manifest(bus: Bus, manifest: RunManifest) -> None:
    """Say what a run is made of, once for each configuration."""
    if manifest.record_id not in {known.record_id for known in manifests(bus)}:
        bus.publish([outgoing(manifest)])


def readers_of(pairing: str) -> dict[str, tuple[str, ...]]:
    """Stage -> the topics that it reads."""
    judged = ("responses",) if pairing == "completions" else ("critiques", "revisions")
    return {"respond": ("prompts",), "critique": ("revisions", "responses"), "revise": ("critiques",), "judge": judged}


def waiting(bus: Bus, stands: Offsets, ends: Offsets) -> dict[TopicPartition, int]:
    """Where a reader that stands there has a message before it, and that message's time (milliseconds since 1970).

    Offsets alone do not tell: on Kafka the marker of a transaction takes one too, and nobody has to read it.
    """
    found: dict[TopicPartition, int] = {}
    left = {place: at for place, at in stands.items() if at < ends[place]}
    reader, deadline = bus.reader(left), time.monotonic() + LOOK_FOR_S
    try:
        while len(found) < len(left) and time.monotonic() < deadline:
            for message in reader.poll(0.1, 1000):
                found.setdefault(TopicPartition(message.topic, message.partition), message.timestamp_ms)
            if all(at >= ends[place] for place, at in reader.positions().items() if place not in found):
                break
    finally:
        reader.close()
    return found


def nothing_left(bus: Bus, workers: Sequence[Worker], store: Store | None) -> bool:
    """Whether these stages have finished all that is on the log, and the sink of `store`, if it is given, has written it.

    A stage commits what it has read together with what came of it, so what nobody has to read leaves nothing under way.
    """
    for worker in workers:
        topics = worker.stage.inputs
        stands = bus.begin_offsets(topics) | bus.committed(worker.group, topics)
        if waiting(bus, stands, bus.end_offsets(topics)):
            return False
    if store is None:
        return True
    if not store.path.exists():
        return False  # the sink has yet to make it
    everything = list(TOPICS)
    return not waiting(bus, bus.begin_offsets(everything) | sink_offsets(store, bus.cluster_id), bus.end_offsets(everything))


def lags(bus: Bus, run_id: str, pairing: str) -> dict[str, int]:
    """For each topic how many of its messages wait at the stage that is furthest behind on it (other runs' included)."""
    furthest: dict[str, int] = {}
    stages = readers_of(pairing)
    committed = {stage: bus.committed(f"{run_id}.{stage}", topics) for stage, topics in stages.items()}
    begun = [stage for stage in stages if committed[stage]] or list(stages)  # a replay has not all of them
    for stage in begun:
        topics = stages[stage]
        begins, ends = bus.begin_offsets(topics), bus.end_offsets(topics)
        stands = begins | committed[stage]
        there = waiting(bus, stands, ends)
        for topic in topics:
            behind = sum(ends[place] - stands[place] for place in there if place.topic == topic)
            furthest[topic] = max(furthest.get(topic, 0), behind)
    return furthest


def sink_offsets(store: Store, cluster_id: str) -> Offsets:
    """How far the sink of this database has come with this log."""
    sql = "SELECT topic, partition, next_offset FROM raw.sink_offsets WHERE cluster_id = ?"
    return {TopicPartition(topic, number): offset for topic, number, offset in store.query(sql, [cluster_id]).rows}


def shown_run(settings: Settings, origins: Mapping[str, str], store: Store) -> str:
    """The run that a reading verb is about: the one that was named, else the newest of the database."""
    if origins["run.id"] != "default" or not store.path.exists():
        return settings.run.id
    newest = store.query("SELECT run_id FROM runs ORDER BY commit_seq DESC LIMIT 1").rows
    return newest[0][0] if newest else settings.run.id


def beginning(identifier: str) -> str:
    """The LIKE pattern of ids that begin so; what no id begins with finds none."""
    given = identifier.strip().lower()
    return f"{given}%" if given and set(given) <= set("0123456789abcdef-") else ""


def find_prompts(store: Store, identifier: str) -> list[str]:
    """The prompts that an id, or its beginning, belongs to: of a prompt or of any record made from one."""
    tables = ("prompts", "responses", "critiques", "revisions", "preferences", "demonstrations")
    parts = [f"SELECT prompt_id FROM {name} WHERE record_id::VARCHAR LIKE $1 OR prompt_id::VARCHAR LIKE $1" for name in tables]
    rows = store.query(" UNION ".join(parts), [beginning(identifier)], limit_s=10.0).rows
    return [str(prompt) for (prompt,) in rows]
