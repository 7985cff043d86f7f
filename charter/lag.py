"""Consumer lag: what the stages and the sink have not processed yet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from engine.bus.port import Bus, Offsets, TopicPartition
from engine.settings import BusSettings as BusSettings
from engine.store import Store
from engine.worker import Worker
from schemas.topics import TOPICS


def compute_lag_rows(bus: Bus, reader: str, topic_names: Sequence[str], committed_offsets: Offsets) -> list[tuple[Any, ...]]:
    """(reader, topic, committed, end, messages behind, age of the oldest of them in seconds) for each topic."""

    begins, ends = bus.beginning_offsets(topic_names), bus.end_offsets(topic_names)
    stands = {place: max(committed_offsets.get(place, 0), begin) for place, begin in begins.items()}
    oldest = find_oldest_unread(bus, stands, ends)
    rows: list[tuple[Any, ...]] = []
    for topic in topic_names:
        places = [place for place in ends if place.topic == topic]
        behind = sum(ends[place] - stands[place] for place in places if place in oldest)
        since = min((oldest[place] for place in places if place in oldest), default=None)
        age = None if since is None else round(time.time() - since / 1000, 1)
        rows.append((reader, topic, sum(stands[p] for p in places), sum(ends[p] for p in places), behind, age))
    return rows


_SCAN_TIMEOUT_S = 2.0


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
