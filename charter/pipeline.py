"""Putting a pipeline together from the settings: bus, models, stages, workers, sink.

One process can host every stage on one shared model, or each stage runs alone in any number of copies: it is the same code,
`charter run` or `charter run --stage NAME`.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import charter
from charter import custom_stage
from charter.connect import open_store
from charter.lag import get_stage_inputs
from charter.models import LatestPolicyProcessor, RoleModels, is_endpoint, make_policy_getter
from charter.telemetry import make_pipeline_collector, open_tracing, start_metrics_server
from constitutions.loader import Constitution, load_constitution
from consumers.critique import CritiqueStage
from consumers.judge import JudgeStage
from consumers.respond import RespondStage
from consumers.revise import ReviseStage
from consumers.sink import Sink
from engine.budget import Budget, parse_prices
from engine.bus.port import Bus
from engine.bus.read import read_values
from engine.crash_journal import CrashJournal
from engine.errors import UsageError
from engine.host import Host, ThreadTarget
from engine.instances import FileLock, InstanceLease
from engine.models.interface import Model
from engine.settings import BusSettings as BusSettings
from engine.settings import Settings
from engine.watchdog import CallTracker
from engine.worker import Stage, Worker, WorkerLimits, skip_tracing, to_producer_record
from schemas import ids
from schemas.codec import decode_record
from schemas.records import ConstitutionRef, RunManifest, Sampling

logger = logging.getLogger("charter.pipeline")

_STANDBY_POLL_INTERVAL_S = 1.0
STAGES = ("respond", "critique", "revise", "judge")
STAGE_ROLES = {"respond": "policy", "critique": "critic", "revise": "critic", "judge": "judge"}


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
