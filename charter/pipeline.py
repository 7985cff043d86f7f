"""Putting a pipeline together from the settings: bus, models, stages, workers, sink.

One process can host every stage on one shared model, or each stage runs alone in any number of copies: it is the same code,
`charter run` or `charter run --stage NAME`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import charter
from constitutions.loader import Constitution, load
from consumers.critique import Criticise
from consumers.judge import Judge
from consumers.respond import Respond
from consumers.revise import Revise
from consumers.sink import Sink
from engine.budget import Budget
from engine.bus import KAFKA, open_bus
from engine.bus.port import Bus
from engine.bus.read import read_values
from engine.bus.security import client_options
from engine.checkpoints import read
from engine.errors import UsageError
from engine.host import Host, Run
from engine.journal import Journal
from engine.models import open_model
from engine.models.port import Model
from engine.policy import PolicyFollower
from engine.settings import Settings
from engine.slots import Slot
from engine.store import Store
from engine.worker import Lane, Limits, Stage, Worker, outgoing
from schemas import ids
from schemas.codec import decode
from schemas.records import PolicyUpdate, RunManifest, Sampling
from schemas.topics import TopicSpec, topic_table

STAGES = ("respond", "critique", "revise", "judge")
ROLES = {"respond": "policy", "critique": "critic", "revise": "critic", "judge": "judge"}
ENDPOINT_THREADS = 4


def connect(settings: Settings) -> Bus:
    """The bus of the settings, with every topic there."""
    bus = open_settings(settings)
    bus.create_topics(topic_specs(settings))
    return bus


def open_settings(settings: Settings) -> Bus:
    """The bus of the settings, as it is."""
    options = client_options(settings.bus) if settings.bus_address.startswith(KAFKA) else {}
    return open_bus(
        settings.bus_address, prefix=settings.bus.prefix, options=options, static_members=settings.bus.static_members
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

    def lane(self, role: str) -> Lane:
        """Local models share the machine and so one lane; each endpoint has its own."""
        name = self.spec(role) if is_endpoint(self.spec(role)) else "local"
        threads = ENDPOINT_THREADS if is_endpoint(self.spec(role)) else 1
        return self.lanes.setdefault(name, Lane(name, threads, self.settings.worker.linger_ms / 1000))

    def open_update(self, update: PolicyUpdate) -> Model:
        """The weights of a policy update, verified against its hash."""
        folder = read(Path(update.uri), update.content_hash).folder
        return open_model(str(folder), threads=self.settings.models.threads, max_batch=self.settings.models.max_rows)


def policy_of(models: Models, bus: Bus) -> Callable[[], tuple[Model, int]]:
    """What answers now. A server's weights are its own: it stays at version 0 until it is given others."""
    first = models.role("policy")
    if is_endpoint(models.spec("policy")):
        return lambda: (first, 0)
    models.follower = PolicyFollower(bus, first, models.open_update)
    return models.follower.current


def make_stage(name: str, settings: Settings, models: Models, constitution: Constitution, bus: Bus) -> Stage:
    """One stage of the stream from the settings."""
    rows = settings.models.max_rows
    if name == "respond":
        wanted = settings.respond
        sampling = Sampling(temperature=wanted.temperature, top_p=wanted.top_p, max_tokens=wanted.max_tokens)
        work: Any = Respond(policy_of(models, bus), wanted.samples, sampling)
        return Stage(name, ("prompts",), ("responses",), 0, max(1, rows // wanted.samples), work)
    if name == "critique":
        work = make_critique(settings, models, constitution)
        return Stage(name, ("revisions", "responses"), ("critiques",), 1, rows, work)
    if name == "revise":
        sampling = Sampling(temperature=settings.critique.temperature, top_p=1.0, max_tokens=settings.revise.max_tokens)
        work = Revise(models.role("critic"), constitution, sampling, settings.critique.few_shot)
        return Stage(name, ("critiques",), ("revisions",), 2, rows, work)
    if name == "judge":
        wanted_pairs = settings.judge
        work = Judge(models.role("judge"), constitution, wanted_pairs.pairing, wanted_pairs.min_mass, wanted_pairs.reject_flips)
        inputs = ("responses",) if wanted_pairs.pairing == "candidates" else ("critiques", "revisions")
        return Stage(name, inputs, ("preferences",), 3, rows, work)
    raise UsageError(f"there is no stage {name}", f"the stages are {', '.join(STAGES)}", "type: charter run --help")


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
    )


def make_host(settings: Settings, bus: Bus, stages: Sequence[str], *, sink: bool, slot: str | None = None) -> Host:
    """A host of these stages, and of the sink if asked for."""
    constitution = load(settings.run.constitution)
    publish_manifest(bus, settings, constitution)
    models = Models(settings)
    leased = None if slot else Slot(settings.folder / "slots")
    name_of_copy = slot or (leased.name if leased else "")
    limit = settings.limits.max_tokens
    budget = Budget(bus, settings.run.id, limit) if limit and "respond" in stages else None
    workers = [
        Worker(
            bus,
            make_stage(name, settings, models, constitution, bus),
            models.lane(ROLES[name]),
            run_id=settings.run.id,
            slot=name_of_copy,
            limits=limits_of(settings),
            journal=Journal(settings.folder / "journal" / f"{settings.run.id}.{name}", name_of_copy),
            admits=budget.allows if name == "respond" and budget else lambda: True,
        )
        for name in stages
    ]
    others: dict[str, Run] = {}
    watched = []
    if sink:
        opened = make_sink(settings, bus)
        others["sink"], watched = opened.run, [opened.calls]
    closing = [models.close, *(worker.journal.close for worker in workers if worker.journal)]
    closing += [leased.close] if leased else []
    closing += [budget.close] if budget else []
    return Host(workers, others, closing, watched=watched, drain_s=settings.worker.drain_s, hang_s=settings.worker.hang_s)


def limits_of(settings: Settings) -> Limits:
    wanted = settings.worker
    return Limits(wanted.max_in_flight, wanted.max_bytes, wanted.attempts, wanted.record_s, wanted.dead_in_a_row)


def make_sink(settings: Settings, bus: Bus) -> Sink:
    return Sink(bus, store_of(settings), max_rows=settings.sink.max_rows, max_wait_s=settings.sink.max_wait_s)


def publish_manifest(bus: Bus, settings: Settings, constitution: Constitution) -> None:
    """Say what this run is made of, once for each configuration."""
    text = settings.model_dump_json(exclude={"data", "bus"})
    configuration = ids.fingerprint(settings=text, constitution=constitution.hash, version=charter.__version__)
    manifest = RunManifest(
        record_id=ids.record_id("run", [], ids.fingerprint(run=settings.run.id, configuration=configuration)),
        run_id=settings.run.id,
        stage="run",
        name=settings.run.id,
        settings=text,
        constitution_text=constitution.text,
        charter_version=charter.__version__,
    )
    known = {decode(value, RunManifest).record_id for value in read_values(bus, RunManifest.topic)}
    if manifest.record_id not in known:
        bus.publish([outgoing(manifest)])


def lags(bus: Bus, run_id: str, pairing: str) -> dict[str, int]:
    """For each topic how many of its messages wait at the stage that is furthest behind on it (other runs' included)."""
    judged = ("responses",) if pairing == "candidates" else ("critiques", "revisions")
    readers = {
        "respond": ("prompts",),
        "critique": ("responses", "revisions"),
        "revise": ("critiques",),
        "judge": judged,
    }
    waiting: dict[str, int] = {}
    for stage, topics in readers.items():
        begins, ends = bus.begin_offsets(topics), bus.end_offsets(topics)
        committed = bus.committed(f"{run_id}.{stage}", topics)
        for topic in topics:
            behind = sum(ends[p] - committed.get(p, begins[p]) for p in ends if p.topic == topic)
            waiting[topic] = max(waiting.get(topic, 0), behind)
    return waiting


def find_prompts(store: Store, identifier: str) -> list[str]:
    """The prompts that an id, or its beginning, belongs to: of a prompt or of any record made from one."""
    pattern = "".join(c for c in identifier.lower() if c in "0123456789abcdef-") + "%"
    tables = ("prompts", "responses", "critiques", "revisions", "preferences")
    parts = [f"SELECT prompt_id FROM {name} WHERE record_id::VARCHAR LIKE $1 OR prompt_id::VARCHAR LIKE $1" for name in tables]
    rows = store.query(" UNION ".join(parts), [pattern], limit_s=10.0).rows
    return [str(prompt) for (prompt,) in rows]
