"""Find pairs for human labels, and make and publish the labels. `charter label` and the dashboard use these functions.

A human label is a new preference record with `label_source` HUMAN. Its parent is the judge's record. The judge's record
does not change.
In the view `preference_pairs`, the newest human label replaces the label of the judge. A pair that a person marked as not
applicable has a record without a label (outcome NOT_APPLICABLE), so the pair is not in this view. The view
`label_agreement_stats` compares human labels with labels of the judge.

The order in which a person sees the two responses is random, so it does not reveal the label of the judge.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from charter.constitution_texts import find_judge_questions, load_constitutions
from charter.lag import read_sink_offsets
from charter.lookup import make_id_pattern
from engine.bus.port import Bus
from engine.bus.read import read_between
from engine.eligibility import find_pair_problem
from engine.errors import UsageError
from engine.store import QueryFunction, Store
from engine.worker import to_producer_record
from schemas import ids
from schemas.codec import RecordError, decode_record
from schemas.records import FinishReason, LabelSource, Outcome, Preference

NOT_APPLICABLE = "not-applicable"
# The probability that A is better, for each choice of a person. A pair to which the question does not apply has no label.
P_A_BY_CHOICE: dict[str, float | None] = {"a": 1.0, "b": 0.0, "tie": 0.5, NOT_APPLICABLE: None}
_CHOICES_BY_KEY = {"=": "tie", "n": NOT_APPLICABLE}
KEYS = ("1", "2", *_CHOICES_BY_KEY)
_MAX_NAME_LENGTH = 100

_COPIED_COLUMNS = """run_id, messages, source, tags, split, epoch, constitution, principle_id,
    policy_version, pairing, response_a, response_b, completion_index_a, completion_index_b, finish_reason_a, finish_reason_b"""
_COLUMNS = f"record_id, prompt_id, response_id, votes, {_COPIED_COLUMNS}"
# Selects the judge's records of a filter whose responses can be compared (engine/eligibility.py). Pairs of prompts for RL are left
# out, because a label would take their prompt from RL.
_COMPARABLE = """label_source = 'AI' AND ($principle IS NULL OR principle_id = $principle) AND (NOT $position_flips OR position_flip)
    AND ($run IS NULL OR record_id IN (SELECT record_id FROM run_records WHERE run_id = $run))
    AND outcome <> 'NOT_NEEDED' AND find_pair_outcome(response_a, response_b, finish_reason_a, finish_reason_b) IS NULL"""
_LABELED = """(record_id IN (SELECT parent_ids[1] FROM preferences WHERE label_source = 'HUMAN' AND len(parent_ids) > 0)
    OR record_id IN (SELECT unnest($pending::UUID[])))"""
# Records without a usable label come first, then labels with p_a near 0.5.
_OPEN_PAIRS_SQL = f"""
    SELECT {_COLUMNS} FROM preferences WHERE {_COMPARABLE} AND NOT {_LABELED}
    ORDER BY CASE WHEN outcome = 'OK' AND p_a IS NOT NULL THEN abs(p_a - 0.5) ELSE -1 END, commit_seq
    LIMIT $count OFFSET $skip"""
_PROGRESS_SQL = f"SELECT count(*) FILTER ({_LABELED}), count(*) FROM preferences WHERE {_COMPARABLE}"
_INCOMPARABLE_SQL = """
    SELECT count(*) FROM preferences
    WHERE label_source = 'AI' AND find_pair_outcome(response_a, response_b, finish_reason_a, finish_reason_b) IS NOT NULL"""
_PAIR_BY_ID_SQL = f"SELECT {_COLUMNS} FROM preferences WHERE label_source = 'AI' AND record_id::VARCHAR LIKE $id LIMIT 2"


@dataclass(frozen=True)
class PairFilter:
    """The pairs that a person wants to label. None and False select all pairs."""

    principle: str | None = None
    position_flips: bool = False
    run: str | None = None

    def to_parameters(self, pending: Collection[str]) -> dict[str, Any]:
        values = {"principle": self.principle, "position_flips": self.position_flips, "run": self.run}
        return values | {"pending": sorted(pending)}


@dataclass(frozen=True)
class LabelProgress:
    """The number of pairs of a filter with a human decision, the number of all its pairs, and the number of all incomparable pairs."""

    num_labeled: int
    num_pairs: int
    num_incomparable: int


def load_open_pairs(
    query: QueryFunction, pairs: PairFilter, count: int, *, skip: int = 0, pending: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return at most `count` pairs without a human decision, the least certain first. Leave out the first `skip` pairs.

    `pending` has the ids of pairs whose labels are not in the database yet. Each row has `questions`, the judge's questions.
    """
    parameters = pairs.to_parameters(pending) | {"count": count, "skip": skip}
    return _add_questions(query, query(_OPEN_PAIRS_SQL, parameters).to_dicts())


def _add_questions(query: QueryFunction, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    constitutions = load_constitutions(query, [row["constitution"]["hash"] for row in rows if row["constitution"]])
    for row in rows:
        constitution = constitutions.get(row["constitution"]["hash"]) if row["constitution"] else None
        row["questions"] = find_judge_questions(constitution, row) if constitution else []
    return rows


def load_progress(query: QueryFunction, pairs: PairFilter, pending: Collection[str] = ()) -> LabelProgress:
    """Count the pairs of a filter, and those with a human decision."""
    ((num_labeled, num_pairs),) = query(_PROGRESS_SQL, pairs.to_parameters(pending)).rows
    ((num_incomparable,),) = query(_INCOMPARABLE_SQL).rows
    return LabelProgress(num_labeled, num_pairs, num_incomparable)


def read_pending_pair_ids(store: Store, bus: Bus) -> set[str]:
    """Return the ids of the pairs whose human labels are on the log, but not in the database yet."""
    topics = [Preference.topic]
    starts = bus.beginning_offsets(topics)
    sink_offsets = read_sink_offsets(store, bus)
    starts = {tp: max(start, sink_offsets.get(tp, 0)) for tp, start in starts.items()}
    pending = set()
    for raw in read_between(bus, starts, bus.end_offsets(topics)):
        try:
            record = decode_record(raw.value or b"", Preference)
        except RecordError:
            continue  # the sink makes it a dead letter, with the reason
        if record.label_source is LabelSource.HUMAN and record.parent_ids:
            pending.add(record.parent_ids[0])
    return pending


def find_pair(query: QueryFunction, identifier: str) -> dict[str, Any]:
    """Return the judge's record with this id or id prefix, with `questions`. Raise UsageError if not exactly one record matches."""
    rows = query(_PAIR_BY_ID_SQL, {"id": make_id_pattern(identifier)}).to_dicts()
    if len(rows) == 1:
        return _add_questions(query, rows)[0]
    what = f"{identifier!r} matches {'more than one' if rows else 'no'} label of a judge"
    fix = "type: charter sql \"select record_id, p_a from preferences where label_source = 'AI'\""
    raise UsageError(what, "the ID must be the record_id of one row of the table preferences, or a unique prefix", fix)


def is_swapped(record_id: str, seed: int = 0) -> bool:
    """Return whether a person sees response B first."""
    return ids.compute_seed(record_id, seed) % 2 == 1


def get_displayed_responses(row: dict[str, Any], seed: int = 0) -> tuple[str, str]:
    """Return the responses of a pair in the order in which a person sees them."""
    responses = row["response_a"], row["response_b"]
    return responses[::-1] if is_swapped(str(row["record_id"]), seed) else responses


def parse_key(key: str, record_id: str, seed: int = 0) -> str:
    """Return the choice (see P_A_BY_CHOICE) for a key of KEYS. The keys 1 and 2 refer to the displayed order."""
    if key not in KEYS:
        raise UsageError(
            f"{key!r} is not a label",
            "a label is 1 or 2 (the better response), = (both are equally good) or n (the question does not apply)",
            f"choose one of {', '.join(KEYS)}",
        )
    return _CHOICES_BY_KEY.get(key) or ("a" if (key == "1") != is_swapped(record_id, seed) else "b")


def parse_labeler(text: str) -> str:
    """Return the name of the person who labels, without blanks at its ends. Raise UsageError if it cannot be a name."""
    name = text.strip()
    if name and len(name) <= _MAX_NAME_LENGTH and name.isprintable():
        return name
    raise UsageError(
        f"the name of the labeler cannot be {name[:_MAX_NAME_LENGTH]!r}",
        f"each human label has the name of its labeler, with 1 to {_MAX_NAME_LENGTH} printable characters",
        "give a name, such as --labeler ana",
    )


def make_human_label(row: dict[str, Any], choice: str, labeler: str) -> Preference:
    """Return the record of a person's decision about the pair of `row`. `choice` is a key of P_A_BY_CHOICE.

    Raise UsageError if the responses cannot be compared, or if `labeler` is not a name.
    """
    finish_reasons = FinishReason(row["finish_reason_a"]), FinishReason(row["finish_reason_b"])
    if problem := find_pair_problem(row["response_a"], row["response_b"], *finish_reasons):
        raise UsageError(
            f"the pair {str(row['record_id'])[:8]} cannot be labeled",
            problem[1],
            "label another pair; the pairs that can be compared are shown by: charter label",
        )
    created_at, p_a = datetime.now(UTC), P_A_BY_CHOICE[choice]
    parent_id = str(row["record_id"])
    # The id depends on the time, so each label is a new record. For example, if a person labels one pair A, B and A again,
    # there are three records, and Charter uses the newest record.
    fingerprint = ids.compute_fingerprint("human_label", p_a=p_a, at=created_at.isoformat())
    return Preference(
        **{name.strip(): row[name.strip()] for name in _COPIED_COLUMNS.split(",")},
        record_id=ids.compute_record_id("label", [parent_id], fingerprint),
        parent_ids=[parent_id],
        prompt_id=str(row["prompt_id"]),
        response_id=str(row["response_id"]) if row["response_id"] else None,
        stage="label",
        p_a=p_a,
        outcome=Outcome.NOT_APPLICABLE if p_a is None else Outcome.OK,
        label_source=LabelSource.HUMAN,
        labeler=parse_labeler(labeler),
        created_at=created_at,
    )


def publish_label(bus: Bus, record: Preference) -> None:
    """Publish a human label."""
    bus.publish([to_producer_record(record)])
