"""Erase prompts: find everything that was made from them, publish the erasure, wait until it is finished, and list the rest.

`charter erase` publishes one Erasure for each prompt. The sink of each database then deletes the rows, the values on the
embedded log, and the bytes of both in the files (`consumers.sink`). If no sink runs on the data folder, this process runs one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from charter.connect import open_sink_lock, open_store
from charter.console import print_progress
from charter.lake.claims import list_lakes
from charter.lake.export import erase_from_lake
from charter.lookup import describe_matches, find_erased_prompt_ids, find_prompt_ids, find_prompt_titles
from charter.progress import show_progress
from charter.text import wrap_text
from consumers.sink import Sink
from engine.bus import KAFKA_SCHEME
from engine.bus.port import Bus
from engine.errors import CharterError, StoreBusy, UsageError
from engine.progress import WorkProgress
from engine.settings import Settings
from engine.store import Store
from engine.text import format_count
from engine.worker import to_producer_record
from schemas import ids
from schemas.records import ChatMessage, Erasure
from schemas.topics import PROMPT_TOPICS, TOPICS

_QUERY_TIMEOUT_S = 60.0
_POLL_INTERVAL_S = 0.2
_MAX_SHOWN_CHARS = 2000
_MAX_SHOWN_IDS = 5
_TEXT_TABLES = ("prompts", "responses", "critiques", "revisions", "preferences", "demonstrations")
_IMPORTED_TABLES = ("prompts", "preferences", "demonstrations")  # their records may have an origin
_MESSAGES_SQL = " UNION ALL ".join(f"SELECT prompt_id, messages, source, epoch FROM raw.{table}" for table in _TEXT_TABLES)


@dataclass(frozen=True)
class ErasurePlan:
    """What an erasure deletes.

    `prompt_ids` contains the ids of all epochs of the prompts. `prompts` has one row for each text: `messages` and `source`.
    `num_records` and `newest` have the number of records of each topic and the time of the newest one, in the database.
    `record_ids` are the ids of these records. `origins` are the files and lines from which the prompts, labels and demonstrations
    were read.
    """

    prompt_ids: list[str]
    prompts: list[dict[str, Any]]
    num_records: dict[str, int]
    newest: dict[str, datetime]
    record_ids: list[str]
    origins: list[str]

    def describe(self) -> Iterator[str]:
        """Yield lines with the text of each prompt and the number of its records."""
        for prompt in self.prompts:
            yield f"prompt {prompt['prompt_id']}  ({prompt['source']})"
            for message in prompt["messages"]:
                text = message["content"]
                yield wrap_text(f"{message['role']}: {text[:_MAX_SHOWN_CHARS]}", "  ")
                if len(text) > _MAX_SHOWN_CHARS:
                    yield f"  ... {len(text) - _MAX_SHOWN_CHARS} more characters"
        if len(self.prompt_ids) > max(len(self.prompts), 1):
            yield f"{len(self.prompt_ids)} prompt ids, because each epoch of a prompt has its own id"
        yield self.format_counts()

    def format_counts(self) -> str:
        """Return the number of records of each topic."""
        counts = ", ".join(f"{topic} {count}" for topic, count in self.num_records.items() if count)
        return f"records: {counts or 'none'}"


def make_erasure_plan(store: Store, identifiers: Sequence[str]) -> ErasurePlan:
    """Find the prompts and their records. Raise UsageError if an identifier does not match exactly one prompt."""
    named = [_find_prompt_id(store, identifier) for identifier in identifiers]
    sql = f"""
        WITH texts AS ({_MESSAGES_SQL}), named AS (SELECT messages FROM texts WHERE prompt_id IN (SELECT unnest(?::UUID[])))
        SELECT list(DISTINCT prompt_id::VARCHAR) AS prompt_ids, arg_min(prompt_id, epoch)::VARCHAR AS prompt_id, messages,
               any_value(source) AS source
        FROM texts WHERE messages IN (FROM named) GROUP BY messages"""
    prompts = store.query_dicts(sql, [named], limit_s=_QUERY_TIMEOUT_S)
    prompt_ids = set(named)
    for prompt in prompts:
        # A producer checks the id of epoch 0, so that the text does not come back under the id of a new epoch.
        first_epoch_id = ids.compute_prompt_id([ChatMessage(**message) for message in prompt["messages"]])
        prompt_ids |= {*prompt["prompt_ids"], first_epoch_id}
    num_records, newest, record_ids = {}, {}, list[str]()
    for topic in PROMPT_TOPICS:
        sql = f"SELECT list(record_id::VARCHAR), max(created_at) FROM raw.{TOPICS[topic].table} WHERE prompt_id IN (SELECT unnest(?::UUID[]))"
        ((found, created_at),) = store.query(sql, [sorted(prompt_ids)], limit_s=_QUERY_TIMEOUT_S).rows
        if found:
            num_records[topic], newest[topic] = len(found), created_at
            record_ids += found
    # The origin of a generated prompt is a recipe, and no file contains its text.
    generated = {"prompts": "WHERE recipe_item IS NULL"}
    tables = " UNION ALL ".join(f"SELECT prompt_id, origin FROM raw.{t} {generated.get(t, '')}" for t in _IMPORTED_TABLES)
    sql = f"SELECT DISTINCT origin FROM ({tables}) WHERE origin <> '' AND prompt_id IN (SELECT unnest(?::UUID[])) ORDER BY 1"
    origins = [origin for (origin,) in store.query(sql, [sorted(prompt_ids)]).rows]
    return ErasurePlan(sorted(prompt_ids), prompts, num_records, newest, record_ids, origins)


def _find_prompt_id(store: Store, identifier: str) -> str:
    # An erasure that was interrupted can be repeated.
    matches = find_prompt_ids(store, identifier) or find_erased_prompt_ids(store, identifier)
    if len(matches) != 1:
        listed = describe_matches(len(matches), find_prompt_titles(store, matches)) if matches else "no record has such an id"
        raise UsageError(
            f"{identifier!r} matches {len(matches) or 'no'} prompts",
            f"an erasure cannot be undone, so each id must match exactly one prompt; {listed}",
            "type: charter sql 'select prompt_id, prompt from traces'    and give a complete prompt_id",
        )
    return matches[0]


def publish_erasures(bus: Bus, prompt_ids: Sequence[str], run_id: str, reason: str) -> None:
    erasures = [
        Erasure(
            record_id=ids.compute_record_id("forget", [prompt_id], ""),
            prompt_id=prompt_id,
            run_id=run_id,
            stage="erase",
            reason=reason,
        )
        for prompt_id in prompt_ids
    ]
    bus.publish([to_producer_record(erasure) for erasure in erasures])


def wait_until_erased(settings: Settings, bus: Bus, prompt_ids: Sequence[str]) -> None:
    """Return when the database and the log have no bytes of the prompts. If no sink runs on the data folder, run one."""
    store, lock = open_store(settings), open_sink_lock(settings)
    try:
        with show_progress("erase", "records") as progress:
            if not lock.try_acquire():
                print_progress(f"the sink of process {lock.get_holder_pid()} writes to {store.path} and finishes the erasure")
                progress.start_step("waiting for the sink")
                while not lock.try_acquire():
                    if _is_erased(store, prompt_ids):
                        return
                    time.sleep(_POLL_INTERVAL_S)
            progress.start_step("deleting the records, and rewriting the log and the database")
            _run_sink(Sink(bus, store, max_rows=settings.sink.max_rows), bus, progress)
    finally:
        lock.close()


def _run_sink(sink: Sink, bus: Bus, progress: WorkProgress) -> None:
    """Run a sink until it has finished all erasures that are on the log now."""
    ends = bus.end_offsets([Erasure.topic])
    try:
        while sink.unfinished_erasures or any(sink.reader.positions()[tp] < end for tp, end in ends.items()):
            progress.num_done += sink.step()
    finally:
        sink.close()


def _is_erased(store: Store, prompt_ids: Sequence[str]) -> bool:
    sql = """
        SELECT (SELECT count(DISTINCT prompt_id) FROM raw.erasures WHERE prompt_id IN (SELECT unnest($ids::UUID[]))) = len($ids)
               AND NOT EXISTS (FROM raw.unfinished_erasures WHERE prompt_id IN (SELECT unnest($ids::UUID[])))"""
    try:
        return bool(store.query(sql, {"ids": list(prompt_ids)}, limit_s=_QUERY_TIMEOUT_S).rows[0][0])
    except StoreBusy:  # the sink copies the file
        return False


def erase_from_lakes(settings: Settings, prompt_ids: Sequence[str]) -> None:
    """Delete the prompts from all lakes of the data folder. If this fails for some lakes, raise an error after the others."""
    failures: list[CharterError] = []
    for address in list_lakes(settings.folder):
        try:
            with show_progress(f"erase from {address.url}", "records") as progress:
                num_rows = erase_from_lake(settings.folder, address, prompt_ids, progress)
            print_progress(f"erased {format_count(num_rows, 'rows')} from the lake {address.url}")
        except CharterError as error:
            print_progress(f"not erased from the lake {address.url}: {error.what}: {error.why}", logging.ERROR)
            failures.append(error)
    if failures:
        raise type(failures[0])(
            f"the erasure has not reached {format_count(len(failures), 'lakes')}",
            failures[0].why,
            f"{failures[0].fix}. The next charter export lake URL also rewrites the lake",
        )


# What an erasure does not reach


def list_remaining_copies(settings: Settings, store: Store, bus: Bus, plan: ErasurePlan) -> list[str]:
    """Return lines about copies of the text that Charter cannot delete."""
    lines = _describe_kafka_retention(bus, plan) if settings.bus_address.startswith(KAFKA_SCHEME) else []
    models = _find_trained_models(store, plan)
    lines += [f"models trained on it: {', '.join(models)}"] if models else ["models: no finished batch contains its records"]
    for prompt_ids in _find_other_prompts(store, plan):
        lines.append(f"other prompts that contain the same text: {prompt_ids}; to erase them: charter erase ID")
    if plan.origins:
        lines.append(f"input files: {_join_first(plan.origins)}")
    data = settings.folder
    if damaged := sorted(folder.name for folder in data.glob("damaged-*")):
        lines.append(f"files that charter repair moved away: {', '.join(damaged)} in {data}. Delete these folders")
    lines.append(
        f"copies of {data} made before now (charter backup, snapshot, export, report): Charter does not know their folders."
        " Delete them. A backup with an embedded log can also be erased: charter erase --data BACKUP ID"
    )
    lines.append("lakes of other data folders, until their next charter export lake")
    lines.append("logs of model servers, of this machine's terminals and services, and disk snapshots")
    return lines


def _describe_kafka_retention(bus: Bus, plan: ErasurePlan) -> list[str]:
    """Return, for each topic with records of the prompts, until when Kafka keeps them."""
    configs = {description.name: description.configs for description in bus.describe_topics([*plan.num_records, Erasure.topic])}
    lines = ["Kafka cannot delete single records. Its topics keep the text as follows:"]
    for topic, count in plan.num_records.items():
        retention_ms = int(configs[topic].get("retention.ms", -1))
        if retention_ms < 0:
            until = "for ever (retention.ms=-1)"
        else:
            until = f"until about {plan.newest[topic] + timedelta(milliseconds=retention_ms):%Y-%m-%d %H:%M} UTC"
            until += f" (retention.ms={retention_ms}; Kafka deletes whole segments, so it can be later)"
        lines.append(f"  {topic}: {format_count(count, 'records')}, {until}")
    if any(int(configs[topic].get("retention.ms", -1)) < 0 for topic in plan.num_records):
        lines.append(
            "  to limit this time: kafka-configs.sh --alter --topic TOPIC --add-config retention.ms=... (docs/operations.md)"
        )
    if int(configs[Erasure.topic].get("retention.ms", -1)) >= 0:
        lines.append(
            f"  the topic {Erasure.topic} has a retention time: a database that is built again after this time gets the text back."
            f" To keep erasures: kafka-configs.sh --alter --topic {Erasure.topic} --add-config retention.ms=-1"
        )
    return lines


def _find_trained_models(store: Store, plan: ErasurePlan) -> list[str]:
    """Return the names of the policies and reward models that learned from the records, directly or from such a model."""
    sql = "SELECT batch_id, kind, version, phase, uri, base_policy_version, base_reward_version, list_has_any(record_ids || sl_record_ids, ?::UUID[])"
    sql += " FROM policies JOIN (SELECT record_id AS batch_id, * EXCLUDE (record_id, phase, policy_version) FROM batches) USING (batch_id)"
    rows = store.query(f"{sql} ORDER BY policies.commit_seq", [plan.record_ids], limit_s=_QUERY_TIMEOUT_S).rows
    affected, names = set[tuple[str, int]](), []
    for _, kind, version, phase, uri, base_policy, base_reward, is_direct in rows:
        if is_direct or affected & {("POLICY", base_policy), ("REWARD", base_reward)}:
            affected.add((kind, version))
            names.append(f"{kind.lower()} {version} ({phase}, {Path(uri).name})")
    return names


def _find_other_prompts(store: Store, plan: ErasurePlan) -> Iterator[str]:
    """Yield, for each erased text, the ids of other prompts with a message that contains the text."""
    sql = """SELECT prompt_id::VARCHAR FROM all_prompts WHERE NOT list_contains(?::UUID[], prompt_id)
             AND len(list_filter(messages, lambda message: contains(message.content, ?))) > 0 ORDER BY 1"""
    for prompt in plan.prompts:
        text = prompt["messages"][-1]["content"]
        found = [prompt_id for (prompt_id,) in store.query(sql, [plan.prompt_ids, text], limit_s=_QUERY_TIMEOUT_S).rows]
        if found:
            yield _join_first(found)


def _join_first(names: Sequence[str]) -> str:
    """Return the first names, and the number of those that are left out."""
    more = f" and {len(names) - _MAX_SHOWN_IDS} more" if len(names) > _MAX_SHOWN_IDS else ""
    return ", ".join(names[:_MAX_SHOWN_IDS]) + more
