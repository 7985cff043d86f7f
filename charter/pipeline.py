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
from charter import custom_stage
from charter.telemetry import make_pipeline_collector, open_tracing, start_metrics_server
from constitutions.loader import Constitution, load_constitution
from consumers.critique import CritiqueStage
from consumers.judge import JudgeStage
from consumers.respond import RespondStage
from consumers.revise import ReviseStage
from consumers.sink import Sink
from engine.budget import Budget, parse_prices
from engine.bus import KAFKA_SCHEME, open_bus
from engine.bus.port import Bus, Offsets, TopicPartition
from engine.bus.read import read_values
from engine.bus.security import make_client_options
from engine.checkpoints import locate_checkpoint, read_checkpoint
from engine.crash_journal import CrashJournal
from engine.errors import SchemaRegistryUnreachable, UsageError
from engine.host import Host, ThreadTarget
from engine.instances import FileLock, InstanceLease
from engine.models import open_model
from engine.models.interface import Model
from engine.policy import PolicyFollower, read_policy_updates
from engine.settings import BusSettings as BusSettings
from engine.settings import Settings
from engine.store import Store
from engine.watchdog import CallTracker
from engine.worker import ModelExecutor, Stage, Worker, WorkerLimits, skip_tracing, to_producer_record
from schemas import codec, ids
from schemas.codec import decode_record
from schemas.confluent import SchemaRegistryClient, SchemaRejected
from schemas.records import ConstitutionRef, PolicyKind, PolicyUpdate, Record, RunManifest, Sampling
from schemas.topics import TOPICS, TopicSpec, make_topic_table

logger = logging.getLogger("charter.pipeline")

_STANDBY_POLL_INTERVAL_S = 1.0
_SCAN_TIMEOUT_S = 2.0
_REGISTRY_TIMEOUT_S = 5.0
STAGES = ("respond", "critique", "revise", "judge")
STAGE_ROLES = {"respond": "policy", "critique": "critic", "revise": "critic", "judge": "judge"}
_ENDPOINT_THREADS = 4


def connect_bus(settings: Settings) -> Bus:
    """The bus of the settings, with every topic there."""
    bus = open_bus_from_settings(settings)
    bus.create_topics(get_topic_specs(settings))
    return bus


def open_bus_from_settings(settings: Settings) -> Bus:
    """The bus of the settings, as it is; from here on this process frames records as the settings say."""
    _configure_framing(settings.bus)
    options = make_client_options(settings.bus) if settings.bus_address.startswith(KAFKA_SCHEME) else {}
    return open_bus(
        settings.bus_address, prefix=settings.bus.prefix, options=options, static_members=settings.bus.static_members
    )


def _configure_framing(bus_settings: BusSettings) -> None:
    """Single-object framing, or Confluent's with its registry; with a registry both are read."""
    try:
        codec.configure_framing(
            bus_settings.framing, _make_schema_registry(bus_settings) if bus_settings.schema_registry else None
        )
    except SchemaRejected as error:
        raise UsageError(error.what, error.why, error.fix) from None
    except ValueError as error:
        fix = "set bus.schema_registry to the registry's URL, or leave bus.framing as it is"
        raise UsageError("bus.framing and bus.schema_registry cannot be used", str(error), fix) from None


def _make_schema_registry(bus_settings: BusSettings) -> SchemaRegistryClient:
    login = os.environ.get(bus_settings.schema_registry_auth_env, "")
    return SchemaRegistryClient(
        bus_settings.schema_registry,
        credentials=login,
        prefix=bus_settings.prefix,
        timeout_s=_REGISTRY_TIMEOUT_S,
        make_unreachable_error=SchemaRegistryUnreachable,
    )


def get_topic_specs(settings: Settings) -> list[TopicSpec]:
    wanted = settings.bus
    return list(make_topic_table(wanted.partitions, wanted.retention_ms, wanted.replication).values())


def open_store(settings: Settings) -> Store:
    return Store(settings.folder / "charter.duckdb")


def is_endpoint(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


@dataclass
class RoleModels:
    """The models by role. Roles with the same setting share one model; critic and judge default to policy version 0."""

    settings: Settings
    open_models: dict[str, Model] = field(default_factory=dict)
    executors: dict[str, ModelExecutor] = field(default_factory=dict)
    policy_follower: PolicyFollower | None = None

    def close(self) -> None:
        if self.policy_follower:
            self.policy_follower.close()

    def get_spec(self, role: str) -> str:
        return getattr(self.settings.models, role) or self.settings.models.policy

    def get_model_by_spec(self, spec: str) -> Model:
        if spec not in self.open_models:
            chosen = self.settings.models
            options: dict[str, Any] = {"threads": chosen.threads, "max_batch_size": chosen.max_batch_size}
            if is_endpoint(spec):
                options = {
                    "api_key_env": chosen.api_key_env,
                    "timeout_s": chosen.timeout_s,
                    "concurrency": chosen.concurrency,
                }
            self.open_models[spec] = open_model(spec, **options)
        return self.open_models[spec]

    def get_model(self, role: str) -> Model:
        return self.get_model_by_spec(self.get_spec(role))

    def get_executor(self, role: str | None) -> ModelExecutor:
        """Local models share the machine and so one lane; each endpoint has its own, and so has what needs no model."""
        if role is None:
            return self.executors.setdefault("", ModelExecutor("no model", 1, 0.0))
        name = self.get_spec(role) if is_endpoint(self.get_spec(role)) else "local"
        threads = _ENDPOINT_THREADS if is_endpoint(self.get_spec(role)) else 1
        return self.executors.setdefault(name, ModelExecutor(name, threads, self.settings.worker.downstream_wait_ms / 1000))

    def follow_policy(self, bus: Bus) -> PolicyFollower:
        """What follows the log's policies; the roles that do so share it, and its weights."""
        self.policy_follower = self.policy_follower or PolicyFollower(bus, self.get_model("policy"), self.open_policy_update)
        return self.policy_follower

    def open_policy_update(self, update: PolicyUpdate) -> Model:
        """The weights of a policy update, verified against its hash."""
        if update.restored_version == 0:
            return self.get_model("policy")
        folder = read_checkpoint(
            locate_checkpoint(update.uri, self.settings.folder / "checkpoints"), update.content_hash
        ).folder
        first = self.get_model("policy")
        if is_endpoint(self.get_spec("policy")):
            from engine.weight_sync import WeightSync

            return WeightSync(first, self.settings.models.weight_sync)(update, folder)  # type: ignore[arg-type]
        return open_model(str(folder), threads=self.settings.models.threads, max_batch_size=self.settings.models.max_batch_size)


def make_policy_getter(models: RoleModels, bus: Bus, pinned_version: int | None) -> Callable[[], tuple[Model, int]]:
    """What answers now. A server's weights are its own: it stays at version 0 until it is given others."""
    if pinned_version:
        kept = (models.open_policy_update(_find_policy_update(bus, pinned_version)), pinned_version)
        return lambda: kept
    first = models.get_model("policy")
    if pinned_version == 0 or (is_endpoint(models.get_spec("policy")) and not models.settings.models.weight_sync):
        return lambda: (first, 0)
    return models.follow_policy(bus).get_current_policy


def _find_policy_update(bus: Bus, version: int) -> PolicyUpdate:
    for update in read_policy_updates(bus):
        if update.kind is PolicyKind.POLICY and update.version == version:
            return update
    raise UsageError(
        f"there is no policy {version} on the log", "training has made no such version", "type: charter policy list"
    )


def make_stage(
    name: str, settings: Settings, models: RoleModels, constitution: Constitution, bus: Bus, pinned_version: int | None = None
) -> Stage:
    """One stage of the stream from the settings; `pinned` is the policy version that answers, None for the newest."""
    stage = _make_fixed_stage(name, settings, models, constitution, bus, pinned_version)
    role = STAGE_ROLES[name]
    if role not in settings.models.follow or pinned_version is not None:
        return stage
    if models.get_spec(role) != models.get_spec("policy") or is_endpoint(models.get_spec("policy")):
        raise UsageError(
            f"models.follow and models.{role} contradict each other",
            f"{models.get_spec(role)} is not the policy whose versions the trainer makes here",
            f"leave models.{role} empty, or take {role} out of models.follow",
        )
    return replace(stage, process=LatestPolicyProcessor(stage.process, models.follow_policy(bus).get_current_policy))


@dataclass(frozen=True)
class LatestPolicyProcessor:
    """A stage's work by the newest policy: the weights change between batches, never within one."""

    process: Any
    get_current_policy: Callable[[], tuple[Model, int]]

    def __call__(self, records: Sequence[Record]) -> Sequence[Sequence[Record]]:
        result: Sequence[Sequence[Record]] = replace(self.process, model=self.get_current_policy()[0])(records)
        return result


def _make_fixed_stage(
    name: str, settings: Settings, models: RoleModels, constitution: Constitution, bus: Bus, pinned_version: int | None
) -> Stage:
    """A stage whose critic and judge stay as they are."""
    rows, inputs = settings.models.max_batch_size, get_stage_inputs(settings.judge.pairing).get(name, ())
    if name == "respond":
        work: Any = make_respond_stage(settings, make_policy_getter(models, bus, pinned_version))
        return Stage(name, inputs, ("responses",), 0, max(1, rows // settings.respond.num_completions), work)
    if name == "critique":
        work = make_critique_stage(settings, models, constitution)
        return Stage(name, inputs, ("critiques",), 1, rows, work)
    if name == "revise":
        work = make_revise_stage(settings, models, constitution)
        return Stage(name, inputs, ("revisions",), 2, rows, work)
    if name == "judge":
        return Stage(name, inputs, ("preferences",), 3, rows, make_judge_stage(settings, models, constitution))
    raise UsageError(f"there is no stage {name}", f"the stages are {', '.join(STAGES)}", "type: charter run --help")


def make_respond_stage(settings: Settings, get_policy: Callable[[], tuple[Model, int]]) -> RespondStage:
    wanted = settings.respond
    sampling = Sampling(temperature=wanted.temperature, top_p=wanted.top_p, max_tokens=wanted.max_tokens)
    return RespondStage(get_policy, wanted.num_completions, sampling)


def make_critique_stage(settings: Settings, models: RoleModels, constitution: Constitution) -> CritiqueStage:
    wanted = settings.critique
    return CritiqueStage(
        model=models.get_model("critic"),
        constitution=constitution,
        sampling=Sampling(temperature=wanted.temperature, top_p=1.0, max_tokens=wanted.max_tokens),
        rounds=wanted.rounds,
        early_stop=wanted.early_stop,
        few_shot=wanted.few_shot,
        min_option_mass=wanted.min_option_mass,
        accept_threshold=wanted.accept_threshold,
        reject_threshold=wanted.reject_threshold,
        similarity_threshold=wanted.similarity_threshold,
        skip_sources=tuple(wanted.skip_sources),
        preset=wanted.preset,
        selection=wanted.selection,
    )


def make_revise_stage(settings: Settings, models: RoleModels, constitution: Constitution) -> ReviseStage:
    sampling = Sampling(temperature=settings.critique.temperature, top_p=1.0, max_tokens=settings.revise.max_tokens)
    return ReviseStage(models.get_model("critic"), constitution, sampling, settings.critique.few_shot, settings.critique.preset)


def make_judge_stage(settings: Settings, models: RoleModels, constitution: Constitution) -> JudgeStage:
    wanted = settings.judge
    return JudgeStage(
        model=models.get_model("judge"),
        constitution=constitution,
        pairing=wanted.pairing,
        min_option_mass=wanted.min_option_mass,
        reject_position_flips=wanted.reject_position_flips,
        preset=wanted.preset,
        answer_mode=wanted.answer_mode,
        principles=wanted.principles,
        num_principles=wanted.num_principles,
        label_order=wanted.label_order,
        clamp=wanted.clamp,
        max_tokens=wanted.max_tokens,
        timeout_s=wanted.timeout_s,
    )


def make_host(
    settings: Settings,
    bus: Bus,
    stages: Sequence[str],
    *,
    sink: bool,
    custom_stages: Sequence[custom_stage.CustomStage] = (),
    instance: str | None = None,
    pinned_version: int | None = None,
    manifest: RunManifest | None = None,
    constitution: Constitution | None = None,
) -> Host:
    """A host of these stages, and of the sink if asked for.

    A replay has a manifest of its own, pins the policy, and may have a constitution that is not the settings' one.
    """
    constitution = constitution or load_constitution(settings.run.constitution)
    _publish_run_manifest(bus, manifest or make_run_manifest(settings, constitution))
    models = RoleModels(settings)
    leased = None if instance else InstanceLease(settings.folder / "slots")
    name_of_copy = instance or (leased.name if leased else "")
    budget = _make_budget(settings, models, bus, stages)
    tracing = open_tracing(settings)
    made: list[tuple[Stage, str | None]]
    made = [(make_stage(name, settings, models, constitution, bus, pinned_version), STAGE_ROLES[name]) for name in stages]
    made += [
        (custom_stage.validate_custom_stage(own.make_stage(settings, models), own.path, STAGES), own.role)
        for own in custom_stages
    ]
    workers = [
        Worker(
            bus,
            stage,
            models.get_executor(role),
            run_id=settings.run.id,
            instance=name_of_copy,
            limits=_make_worker_limits(settings),
            journal=CrashJournal(settings.folder / "journal" / f"{settings.run.id}.{stage.name}", name_of_copy),
            can_admit=partial(budget.can_admit, stage.name) if budget else lambda: True,
            trace=tracing.make_stage_tracer(stage.name, settings.run.id) if tracing else skip_tracing,
        )
        for stage, role in made
    ]
    others: dict[str, ThreadTarget] = {}
    watched: list[CallTracker] = []
    sinks: list[Sink] = []
    if sink:
        lease = FileLock(settings.folder / "sink.lock")
        others["sink"], watched = _make_sink_or_standby(settings, bus, lease, sinks)
    closing = start_metrics_server(settings, make_pipeline_collector(workers, sinks))
    closing += [tracing.close] if tracing else []
    closing += [models.close, *(worker.journal.close for worker in workers if worker.journal)]
    closing += [leased.close] if leased else []
    closing += [budget.close] if budget else []
    closing += [lease.close] if sink else []
    return Host(
        workers,
        others,
        closing,
        watched_calls=watched,
        shutdown_timeout_s=settings.worker.shutdown_timeout_s,
        call_timeout_s=settings.worker.call_timeout_s,
    )


def _make_budget(settings: Settings, models: RoleModels, bus: Bus, stages: Sequence[str]) -> Budget | None:
    """What bounds the use of these stages' run, if anything does. Each endpoint that a cost limit is to bound needs a price."""
    budget = settings.budget
    prices = parse_prices(budget.prices)
    for spec in {models.get_spec(STAGE_ROLES[stage]) for stage in stages} if budget.max_cost else ():
        name = spec.partition("#")[2]
        if is_endpoint(spec) and name not in prices:
            raise UsageError(
                f"budget.max_cost cannot bound what {name} costs",
                "budget.prices has no price for it",
                f'add it, for a million tokens read and written: --set "budget.prices={name}=0.15/0.60"',
            )
    if not budget.max_cost and not (budget.max_tokens and "respond" in stages):
        return None
    return Budget(bus, settings.run.id, max_tokens=budget.max_tokens, max_cost=budget.max_cost, prices=prices)


def _make_worker_limits(settings: Settings) -> WorkerLimits:
    wanted = settings.worker
    return WorkerLimits(
        wanted.max_in_flight, wanted.max_bytes, wanted.max_attempts, wanted.retry_timeout_s, wanted.max_consecutive_dead_letters
    )


def _make_sink_or_standby(
    settings: Settings, bus: Bus, lease: FileLock, sinks: list[Sink]
) -> tuple[ThreadTarget, list[CallTracker]]:
    """The sink or, while another process has this database's sink, one that takes over when that ends; `running` names it."""
    if lease.try_acquire():
        sink = _make_sink(settings, bus)
        sinks.append(sink)
        return sink.run, [sink.call_tracker]
    logger.warning("the sink of process %s writes to this database; this one's stands by", lease.get_holder_pid())

    def stand_by(stop: threading.Event) -> None:
        while not lease.try_acquire():
            if stop.wait(_STANDBY_POLL_INTERVAL_S):
                return
        sinks.append(_make_sink(settings, bus))
        sinks[-1].run(stop)

    return stand_by, []


def _make_sink(settings: Settings, bus: Bus) -> Sink:
    return Sink(bus, open_store(settings), max_rows=settings.sink.max_rows, max_wait_s=settings.sink.max_wait_s)


def make_run_manifest(settings: Settings, constitution: Constitution, replay: dict[str, Any] | None = None) -> RunManifest:
    """What a run is made of; `replay` says what a replay reads."""
    chosen = settings.model_dump(mode="json", exclude={"data", "bus"}) | ({"replay": replay} if replay else {})
    text = json.dumps(chosen, ensure_ascii=False)
    configuration = ids.compute_fingerprint(
        "run_configuration", settings=text, constitution=constitution.hash, version=charter.__version__
    )
    return RunManifest(
        record_id=ids.compute_record_id(
            "run", [], ids.compute_fingerprint("run", run=settings.run.id, configuration=configuration)
        ),
        run_id=settings.run.id,
        stage="run",
        constitution=ConstitutionRef(name=constitution.name, version=constitution.version, hash=constitution.hash),
        name=settings.run.id,
        settings=text,
        constitution_text=constitution.text,
        charter_version=charter.__version__,
    )


def read_run_manifests(bus: Bus) -> list[RunManifest]:
    """Every run's manifests, oldest first."""
    return [decode_record(value, RunManifest) for value in read_values(bus, RunManifest.topic)]


def _publish_run_manifest(bus: Bus, manifest: RunManifest) -> None:
    """Say what a run is made of, once for each configuration."""
    if manifest.record_id not in {known.record_id for known in read_run_manifests(bus)}:
        bus.publish([to_producer_record(manifest)])


def get_stage_inputs(pairing: str) -> dict[str, tuple[str, ...]]:
    """Stage -> the topics that it reads."""
    judged = ("responses",) if pairing == "completions" else ("critiques", "revisions")
    return {"respond": ("prompts",), "critique": ("revisions", "responses"), "revise": ("critiques",), "judge": judged}


def find_oldest_unread(bus: Bus, next_offsets: Offsets, end_offsets: Offsets) -> dict[TopicPartition, int]:
    """Where a reader that stands there has a message before it, and that message's time (milliseconds since 1970).

    Offsets alone do not tell: on Kafka the marker of a transaction takes one too, and nobody has to read it.
    """
    found: dict[TopicPartition, int] = {}
    left = {place: at for place, at in next_offsets.items() if at < end_offsets[place]}
    reader, deadline = bus.open_reader(left), time.monotonic() + _SCAN_TIMEOUT_S
    try:
        while len(found) < len(left) and time.monotonic() < deadline:
            for message in reader.poll(0.1, 1000):
                found.setdefault(TopicPartition(message.topic, message.partition), message.timestamp_ms)
            if all(at >= end_offsets[place] for place, at in reader.positions().items() if place not in found):
                break
    finally:
        reader.close()
    return found


def is_all_work_done(bus: Bus, workers: Sequence[Worker], store: Store | None) -> bool:
    """Whether these stages have finished all that is on the log, and the sink of `store`, if it is given, has written it.

    A stage commits what it has read together with what came of it, so what nobody has to read leaves nothing under way.
    """
    for worker in workers:
        topics = worker.stage.inputs
        stands = bus.beginning_offsets(topics) | bus.committed(worker.group, topics)
        if find_oldest_unread(bus, stands, bus.end_offsets(topics)):
            return False
    if store is None:
        return True
    if not store.path.exists():
        return False  # the sink has yet to make it
    everything = list(TOPICS)
    return not find_oldest_unread(
        bus, bus.beginning_offsets(everything) | read_sink_offsets(store, bus.cluster_id), bus.end_offsets(everything)
    )


def compute_lags(bus: Bus, run_id: str, pairing: str) -> dict[str, int]:
    """For each topic how many of its messages wait at the stage that is furthest behind on it (other runs' included)."""
    furthest: dict[str, int] = {}
    stages = get_stage_inputs(pairing)
    committed = {stage: bus.committed(f"{run_id}.{stage}", topics) for stage, topics in stages.items()}
    begun = [stage for stage in stages if committed[stage]] or list(stages)  # a replay has not all of them
    for stage in begun:
        topics = stages[stage]
        begins, ends = bus.beginning_offsets(topics), bus.end_offsets(topics)
        stands = begins | committed[stage]
        there = find_oldest_unread(bus, stands, ends)
        for topic in topics:
            behind = sum(ends[place] - stands[place] for place in there if place.topic == topic)
            furthest[topic] = max(furthest.get(topic, 0), behind)
    return furthest


def read_sink_offsets(store: Store, cluster_id: str) -> Offsets:
    """How far the sink of this database has come with this log."""
    sql = "SELECT topic, partition, next_offset FROM raw.sink_offsets WHERE cluster_id = ?"
    return {TopicPartition(topic, number): offset for topic, number, offset in store.query(sql, [cluster_id]).rows}


def resolve_run_id(settings: Settings, origins: Mapping[str, str], store: Store) -> str:
    """The run that a reading verb is about: the one that was named, else the newest of the database."""
    if origins["run.id"] != "default" or not store.path.exists():
        return settings.run.id
    newest = store.query("SELECT run_id FROM runs ORDER BY commit_seq DESC LIMIT 1").rows
    return newest[0][0] if newest else settings.run.id


def make_id_pattern(identifier: str) -> str:
    """The LIKE pattern of ids that begin so; what no id begins with finds none."""
    given = identifier.strip().lower()
    return f"{given}%" if given and set(given) <= set("0123456789abcdef-") else ""


def find_prompt_ids(store: Store, identifier: str) -> list[str]:
    """The prompts that an id, or its beginning, belongs to: of a prompt or of any record made from one."""
    tables = ("prompts", "responses", "critiques", "revisions", "preferences", "demonstrations")
    parts = [f"SELECT prompt_id FROM {name} WHERE record_id::VARCHAR LIKE $1 OR prompt_id::VARCHAR LIKE $1" for name in tables]
    rows = store.query(" UNION ".join(parts), [make_id_pattern(identifier)], limit_s=10.0).rows
    return [str(prompt) for (prompt,) in rows]
