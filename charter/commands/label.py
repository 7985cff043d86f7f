"""`charter label`: add human labels to pairs. The judge has labeled these pairs, or has failed to label them.

A human label is a new preference record with `label_source` HUMAN. Its parent is the judge's record. The judge's record
does not change.
In the view `preference_pairs`, the newest human label replaces the label of the judge. The view `label_agreement_stats` compares
human labels with labels of the judge.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import click

from charter.connect import connect_bus, open_store
from charter.console import common_options
from charter.lookup import make_id_pattern
from charter.text import escape_unprintable, to_one_line
from engine.bus.port import Bus
from engine.eligibility import find_pair_problem
from engine.errors import CharterError, UsageError
from engine.settings import Settings
from engine.store import Store
from engine.worker import to_producer_record
from schemas import ids
from schemas.records import FinishReason, LabelSource, Outcome, Preference

_P_A_BY_CHOICE = {"a": 1.0, "b": 0.0, "tie": 0.5}
_QUERY_TIMEOUT_S = 20.0
_MAX_LINES = 40  # maximum lines of the prompt and of each response; the user can type w to see all lines
_LABEL_COLUMNS = """record_id, prompt_id, run_id, response_id, messages, source, tags, split, epoch, constitution, principle_id,
    policy_version, pairing, response_a, response_b, completion_index_a, completion_index_b, finish_reason_a, finish_reason_b"""

# Selects records of the judge without a human label whose responses can be compared (engine/eligibility.py). Records without a
# usable label come first, then labels with p_a near 0.5.
_OPEN_LABELS_SQL = f"""
    SELECT {_LABEL_COLUMNS} FROM preferences p
    WHERE label_source = 'AI' AND ($principle IS NULL OR principle_id = $principle) AND (NOT $position_flips OR position_flip)
      AND ($run IS NULL OR record_id IN (SELECT record_id FROM run_records WHERE run_id = $run))
      AND find_pair_outcome(response_a, response_b, finish_reason_a, finish_reason_b) IS NULL
      AND record_id NOT IN (SELECT parent_ids[1] FROM preferences WHERE label_source = 'HUMAN' AND len(parent_ids) > 0)
    ORDER BY CASE WHEN outcome = 'OK' AND p_a IS NOT NULL THEN abs(p_a - 0.5) ELSE -1 END, commit_seq
    LIMIT $count"""
_INCOMPARABLE_SQL = """
    SELECT count(*) FROM preferences
    WHERE label_source = 'AI' AND find_pair_outcome(response_a, response_b, finish_reason_a, finish_reason_b) IS NOT NULL"""
_LABEL_BY_ID_SQL = f"SELECT {_LABEL_COLUMNS} FROM preferences WHERE label_source = 'AI' AND record_id::VARCHAR LIKE $id LIMIT 2"


@click.command()
@click.argument("label_id", metavar="[ID|-]", required=False)
@click.option("--prefer", type=click.Choice(list(_P_A_BY_CHOICE)), help="The better response of the pair ID: a, b or tie.")
@click.option("--principle", metavar="ID", help="Show only pairs that were judged by this principle.")
@click.option("--position-flips", is_flag=True, help="Show only pairs whose label changed when the responses were swapped.")
@click.option("--seed", default=0, show_default=True, help="Seed for the random order of the two responses.")
@click.option("--count", type=click.IntRange(1), default=20, show_default=True, help="Maximum number of pairs.")
@common_options
def label(
    settings: Settings,
    origins: dict[str, str],
    label_id: str | None,
    prefer: str | None,
    principle: str | None,
    position_flips: bool,
    seed: int,
    count: int,
) -> None:
    """Label pairs by hand.

    Without ID, show pairs one by one and ask which response is better. The pairs with the least certain labels come first. The
    order of the two responses is random, so it does not reveal the label of the judge. Without --run, show the pairs of all runs.

    With ID and --prefer, label one pair. ID is the id of a preference record or a unique prefix of the id. With -, read labels as
    JSON lines from standard input, e.g. {"record_id": "...", "prefer": "a"}. The exit code is 1 if a line is invalid.

    Each label is published as a new record. The record of the judge does not change.

    \b
    Examples:
      charter label
      charter label --principle privacy --count 5
      charter label 3665c7e4 --prefer b
      charter label - < labels.jsonl
    """
    if label_id not in (None, "-") and prefer is None:
        raise click.UsageError("give the better response: --prefer a, b or tie", click.get_current_context())
    if label_id in (None, "-") and prefer is not None:
        raise click.UsageError("--prefer requires the ID of a label", click.get_current_context())
    store = open_store(settings)
    bus = connect_bus(settings)
    try:
        if label_id is None:
            run = settings.run.id if origins["run.id"] != "default" else None
            filters = {"principle": principle, "position_flips": position_flips, "run": run, "count": count}
            num_labels = _label_interactively(store, bus, filters, seed)
        elif label_id == "-":
            num_labels = _label_from_stdin(store, bus)
        else:
            _publish_label(bus, _make_human_label(find_label(store, label_id), _P_A_BY_CHOICE[str(prefer)]))
            num_labels = 1
    finally:
        bus.close()
    click.echo(f"{num_labels} labels published" if num_labels != 1 else "1 label published")


def find_label(store: Store, identifier: str) -> dict[str, Any]:
    """Return the judge's label with this id or id prefix. Raise UsageError if no label or several labels match."""
    rows = store.query_dicts(_LABEL_BY_ID_SQL, {"id": make_id_pattern(identifier)}, limit_s=_QUERY_TIMEOUT_S)
    if len(rows) == 1:
        return rows[0]
    what = f"{identifier!r} matches {'more than one' if rows else 'no'} label of a judge"
    fix = "type: charter sql \"select record_id, p_a from preferences where label_source = 'AI'\""
    raise UsageError(what, "the ID must be the record_id of one row of the table preferences, or a unique prefix", fix)


def _make_human_label(row: dict[str, Any], p_a: float) -> Preference:
    """Return a human label for the pair of `row`, which is a label of the judge. `p_a` is 1, 0 or 0.5 (tie).

    Raise UsageError if the responses cannot be compared.
    """
    finish_reasons = FinishReason(row["finish_reason_a"]), FinishReason(row["finish_reason_b"])
    if problem := find_pair_problem(row["response_a"], row["response_b"], *finish_reasons):
        raise UsageError(
            f"the pair {str(row['record_id'])[:8]} cannot be labeled",
            problem[1],
            "label another pair: charter label shows only pairs that can be compared",
        )
    created_at = datetime.now(UTC)
    parent_id = str(row["record_id"])
    # The id depends on the time, so each label is a new record. For example, if a person labels one pair A, B and A again,
    # there are three records, and Charter uses the newest record.
    fingerprint = ids.compute_fingerprint("human_label", p_a=p_a, at=created_at.isoformat())
    copied = {key: value for key, value in row.items() if key not in ("record_id", "prompt_id", "response_id")}
    return Preference(
        **copied,
        record_id=ids.compute_record_id("label", [parent_id], fingerprint),
        parent_ids=[parent_id],
        prompt_id=str(row["prompt_id"]),
        response_id=str(row["response_id"]) if row["response_id"] else None,
        stage="label",
        p_a=p_a,
        outcome=Outcome.OK,
        label_source=LabelSource.HUMAN,
        created_at=created_at,
    )


def _publish_label(bus: Bus, record: Preference) -> None:
    bus.publish([to_producer_record(record)])


def _label_from_stdin(store: Store, bus: Bus) -> int:
    """Publish the labels from standard input. Report and skip invalid lines. Exit with code 1 if any line is invalid."""
    num_labels = num_invalid = 0
    for number, line in enumerate(sys.stdin.buffer, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            p_a = _P_A_BY_CHOICE[entry["prefer"]]
            label = _make_human_label(find_label(store, str(entry["record_id"])), p_a)
        except (ValueError, KeyError, TypeError, CharterError) as error:
            expected = 'expected {"record_id": ID, "prefer": "a", "b" or "tie"}'
            reason = str(error).splitlines()[0] if isinstance(error, CharterError) else expected
            click.echo(to_one_line(f"line {number}: {reason}"), err=True)
            num_invalid += 1
            continue
        _publish_label(bus, label)
        num_labels += 1
    if num_invalid:
        click.echo(f"{num_labels} labels published; {num_invalid} lines are invalid (see above)", err=True)
        sys.exit(1)
    return num_labels


# Interactive labeling


def _label_interactively(store: Store, bus: Bus, filters: dict[str, Any], seed: int) -> int:
    """Ask for a label of each pair until the list ends or the user quits. Return the number of labels."""
    pairs = store.query_dicts(_OPEN_LABELS_SQL, filters, limit_s=_QUERY_TIMEOUT_S)
    ((num_excluded,),) = store.query(_INCOMPARABLE_SQL, limit_s=_QUERY_TIMEOUT_S).rows
    if num_excluded:
        click.echo(f"{num_excluded} pairs are not shown: a response is empty or withheld, or both are the same", err=True)
    if not pairs:
        click.echo("there are no pairs without a human label")
    num_labels = 0
    for number, row in enumerate(pairs, 1):
        try:
            p_a = _ask_preference(row, number, len(pairs), seed)
        except click.Abort:  # Ctrl-C or Ctrl-D; the labels before the interruption are already on the log
            click.echo()
            return num_labels
        if p_a is None:
            return num_labels
        if p_a >= 0:
            _publish_label(bus, _make_human_label(row, p_a))
            num_labels += 1
    return num_labels


def _ask_preference(row: dict[str, Any], number: int, total: int, seed: int) -> float | None:
    """Ask for the label of one pair. Return p(A is better), -1 to skip the pair, or None to quit."""
    swapped = ids.compute_seed(str(row["record_id"]), seed) % 2 == 1
    first, second = (row["response_b"], row["response_a"]) if swapped else (row["response_a"], row["response_b"])
    prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in row["messages"])
    sections = [("prompt", prompt), ("1", first), ("2", second)]
    click.echo(
        f"\npair {number} of {total}"
        + (f", judged by {escape_unprintable(row['principle_id'])}" if row["principle_id"] else "")
    )
    for line in _format_sections(sections, _MAX_LINES):
        click.echo(line)
    choices = click.Choice(["1", "2", "=", "s", "w", "q"])
    while True:
        choice = click.prompt("better: 1, 2 or = (tie); s: skip, w: show all lines, q: quit", type=choices, show_choices=False)
        if choice == "w":
            for line in _format_sections(sections, None):
                click.echo(line)
            continue
        if choice in "sq":
            return -1.0 if choice == "s" else None
        return 0.5 if choice == "=" else float((choice == "1") != swapped)


def _format_sections(sections: list[tuple[str, str]], max_lines: int | None) -> Iterator[str]:
    """Yield the name and the text of each section. Escape unprintable characters, and truncate each text to `max_lines` lines."""
    for name, text in sections:
        lines = escape_unprintable(text).splitlines()
        yield f"--- {name}"
        yield from lines[:max_lines]
        if max_lines is not None and len(lines) > max_lines:
            yield f"({len(lines) - max_lines} more lines; type w to show them)"


COMMAND = label
