"""`charter replay`: earlier records through the stages again, as a run of its own; and `charter runs`, which compares runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from charter.options import common_options, json_option, print_rows, stop_on_signals

if TYPE_CHECKING:
    from constitutions.loader import Constitution
    from engine.bus.port import Bus, Offsets
    from engine.host import Host
    from engine.settings import Settings
    from producers.replay import ArchiveSelection, LogSelection
    from schemas.records import Record, RunManifest

_STAGES = ("respond", "critique", "revise", "judge")
_POLL_INTERVAL_S = 0.5


@click.command()
@click.option("--stage", type=click.Choice(_STAGES), required=True, help="Where to begin; what follows from it runs too.")
@click.option("--from", "start", default="earliest", show_default=True, help="earliest, an offset, a time, or run:NAME.")
@click.option("--to", "end", default="latest", show_default=True, help="latest (now), an offset, or a time; not included.")
@click.option("--as", "name", metavar="NAME", help="The new run's name; without it one that follows from what is replayed.")
@click.option("--constitution", help="Another constitution: a shipped one's name or a file.")
@click.option("--without", metavar="PRINCIPLE", multiple=True, help="Leave this principle out; may be repeated.")
@click.option("--model", help="Another model for the stage: smollm2, a folder, a hub id, or http://HOST:PORT/v1#MODEL.")
@click.option("--policy", type=int, help="The policy version that answers; without it the one that the source run used.")
@click.option("--archive", is_flag=True, help="Read from the database, which has what the log keeps no more.")
@click.option("--only", is_flag=True, help="Run this stage alone, nothing that follows from it.")
@click.option("--dry-run", is_flag=True, help="Say what it would do and cost, and do nothing.")
@common_options
def replay(settings: Settings, **how: Any) -> None:
    """Run earlier records through the stages, as a new run.

    It reads the records of one run (--run, or --from run:NAME), up to the ends that the topics have when it starts, and is
    over when everything that follows from them has ended. With the same configuration it makes the same record ids and adds
    nothing to the views; with another it stands beside: select it by its run_id. Killed half way, the same command goes on.

    \b
    Examples:
      charter replay --stage judge --constitution red-team --as rejudged
      charter replay --stage respond --from 2026-11-24T10:00 --dry-run
      charter replay --stage critique --from run:live --archive --model http://localhost:8000/v1#critic
      charter replay --stage judge --constitution customer-service --without kinder
    """
    from charter.pipeline import connect_bus

    bus = connect_bus(settings)
    try:
        plan = make_replay_plan(settings, bus, **{key: value for key, value in how.items() if key != "dry_run"})
        if how["dry_run"]:
            for line in plan.describe():
                click.echo(line)
        else:
            run_replay(plan, bus)
    finally:
        bus.close()


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
        from charter.estimate import estimate_costs, format_costs

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
              without: Sequence[str] = ()) -> ReplayPlan:  # fmt: skip
    """Decide what is replayed; a replay that was begun before keeps the bounds that it began with."""
    from charter.pipeline import STAGE_ROLES, get_stage_inputs, make_run_manifest, open_store, read_run_manifests
    from constitutions.loader import load_constitution
    from engine.bus.port import TopicPartition
    from engine.errors import UsageError
    from producers.replay import EARLIEST, ArchiveSelection, LogSelection, ReplayBound, is_chain_end, is_chain_start
    from schemas import ids

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
    if without:
        loaded = loaded.without_principles(without)
        what["without"] = list(without)
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
    from engine.settings import Settings as Tree

    values = settings.model_dump()
    for name, value in changes.items():
        section, _, key = name.partition(".")
        values[section][key] = value
    return Tree(**values)


def _get_downstream_stages(stage: str, pairing: str) -> tuple[str, ...]:
    """The stage and every one that reads what it, or one that follows from it, makes."""
    from charter.pipeline import get_stage_inputs

    made = {"respond": "responses", "critique": "critiques", "revise": "revisions", "judge": "preferences"}
    reached, topics = {stage}, {made[stage]}
    while more := {name for name, inputs in get_stage_inputs(pairing).items() if name not in reached and topics & set(inputs)}:
        reached |= more
        topics |= {made[name] for name in more}
    return tuple(name for name in _STAGES if name in reached)


def _resolve_policy_version(bus: Bus, source: str, policy: int | None, model: str | None) -> int:
    """The policy version that answers: as told, another model's own weights, or the one that answered most in the source."""
    from engine.bus.read import read_topic
    from producers.replay import decode_or_none

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
    from charter.pipeline import find_oldest_unread, get_stage_inputs, make_host, open_store, read_sink_offsets
    from producers.replay import republish_records
    from schemas.topics import TOPICS

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


# Runs


@click.group(invoke_without_command=True)
@json_option
@common_options
def runs(settings: Settings, as_json: bool) -> None:
    """The runs of this database: list or compare them.

    Without a verb: the list.

    \b
    Examples:
      charter runs
      charter runs compare live rejudged
    """
    if click.get_current_context().invoked_subcommand is None:
        _print_runs(settings, as_json)


@runs.command("list")
@json_option
@common_options
def list_runs(settings: Settings, as_json: bool) -> None:
    """Every run: what it is made of, and its records.

    Records that it shares with another run are counted too.

    \b
    Examples:
      charter runs list --json
    """
    _print_runs(settings, as_json)


RUNS_SQL = (
    """
WITH counted AS (SELECT run_id, topic, count(*) AS n FROM run_records GROUP BY ALL),
     named AS (SELECT run_id, min(created_at) AS started, arg_max(constitution.name, commit_seq) AS constitution,
                      arg_max(settings, commit_seq) AS settings FROM raw.runs GROUP BY 1)
SELECT run_id AS run, started, constitution,
       coalesce(settings ->> '$.replay.stage', '') AS replays_from, coalesce(settings ->> '$.replay.source', '') AS of_run,
       settings ->> '$.models.policy' AS policy, """
    + ", ".join(
        f"coalesce(sum(n) FILTER (topic = '{topic}'), 0)::BIGINT AS {topic}"
        for topic in ("prompts", "responses", "critiques", "revisions", "preferences")
    )
    + """
FROM named LEFT JOIN counted USING (run_id) GROUP BY ALL ORDER BY started"""
)


def _print_runs(settings: Settings, as_json: bool) -> None:
    from charter.pipeline import open_store

    found = open_store(settings).query(RUNS_SQL, limit_s=30.0)
    if as_json or found.rows:
        print_rows(found.columns, found.rows, as_json)
    else:
        click.echo("no run has begun yet")


@runs.command()
@click.argument("first", metavar="RUN")
@click.argument("second", metavar="RUN")
@json_option
@common_options
def compare(settings: Settings, first: str, second: str, as_json: bool) -> None:
    """What two runs differ in.

    Settings, records that only one has, and labels of the same pair of answers.

    \b
    Examples:
      charter runs compare live rejudged
    """
    from charter.pipeline import open_store

    store = open_store(settings)
    rows: list[tuple[Any, ...]] = [*_diff_settings(store, first, second)]
    for topic, shared, one, other in store.query(SHARED_RECORDS_SQL, [first, second], limit_s=30.0).rows:
        rows.append((f"{topic} that both have", shared, shared))
        rows.append((f"{topic} of its own", one, other))
    labels = store.query_dicts(SHARED_LABELS_SQL, [first, second], limit_s=30.0)
    for label in labels:
        head = f"labels by {label['principle']}"
        rows.append((f"{head}: pairs that both judged", label["pairs"], label["pairs"]))
        rows.append((f"{head}: mean p(a)", label["mean_first"], label["mean_second"]))
        rows.append((f"{head}: another answer is better", "", label["flips"]))
    print_rows(["what", first, second], rows, as_json)


def _diff_settings(store: Any, first: str, second: str) -> list[tuple[str, str, str]]:
    """(setting, value in the first run, value in the second) where they differ."""
    from engine.errors import UsageError

    trees = []
    for run in (first, second):
        sql = (
            "SELECT settings, constitution.name || ' ' || constitution.version AS name, constitution.hash AS hash FROM raw.runs"
        )
        found = store.query_dicts(f"{sql} WHERE run_id = ? ORDER BY commit_seq DESC LIMIT 1", [run])
        if not found:
            raise UsageError(f"there is no run {run}", f"{store.path} has no manifest of it", "type: charter runs")
        tree = flatten_settings(json.loads(found[0]["settings"])) | {
            "constitution": found[0]["name"],
            "constitution hash": found[0]["hash"],
        }
        trees.append({key: value for key, value in tree.items() if not key.startswith("replay.") and key != "run.id"})
    return [
        (key, str(trees[0].get(key, "")), str(trees[1].get(key, "")))
        for key in sorted({*trees[0], *trees[1]})
        if trees[0].get(key) != trees[1].get(key)
    ]


def flatten_settings(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names."""
    flattened: dict[str, Any] = {}
    for key, value in tree.items():
        flattened |= flatten_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flattened


SHARED_RECORDS_SQL = """
SELECT topic, count(*) FILTER (one AND other) AS shared, count(*) FILTER (one AND NOT other) AS one_alone,
       count(*) FILTER (other AND NOT one) AS other_alone
FROM (SELECT topic, record_id, bool_or(run_id = $1) AS one, bool_or(run_id = $2) AS other FROM run_records
      WHERE run_id IN ($1, $2) GROUP BY ALL)
WHERE topic IN ('responses', 'critiques', 'revisions', 'preferences') GROUP BY topic ORDER BY topic"""

# The same pair of answers, judged in both runs; by the second run's principle, since the constitutions may differ.
SHARED_LABELS_SQL = """
WITH judged AS (SELECT DISTINCT ON (run_id, record_id) run_id, response_id, response_a, response_b, p_a, principle_id
                FROM raw.preferences WHERE run_id IN ($1, $2) AND outcome = 'OK')
SELECT two.principle_id AS principle, count(*) AS pairs, avg(one.p_a) AS mean_first, avg(two.p_a) AS mean_second,
       count(*) FILTER ((one.p_a > 0.5) <> (two.p_a > 0.5)) AS flips
FROM judged one JOIN judged two ON one.response_id = two.response_id AND one.response_a = two.response_a AND one.response_b = two.response_b
WHERE one.run_id = $1 AND two.run_id = $2 GROUP BY 1 ORDER BY 1"""

VERBS = (replay, runs)
