"""`charter label`: a person's word on pairs that a judge has labelled, or could not.

Each answer is a record of its own with `label_source` HUMAN whose parent is the judge's; nothing is ever edited. The views let
it stand in the judge's place from then on (`preference_pairs`), and set the two side by side (`label_agreement_stats`).
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
from engine.errors import CharterError, UsageError
from engine.settings import Settings
from engine.store import Store
from engine.worker import to_producer_record
from schemas import ids
from schemas.records import LabelSource, Outcome, Preference

_P_A_BY_CHOICE = {"a": 1.0, "b": 0.0, "tie": 0.5}
_QUERY_TIMEOUT_S = 20.0
_MAX_TEXT_LINES = 40  # of a text that are shown at once
_LABEL_COLUMNS = """record_id, prompt_id, run_id, response_id, messages, source, tags, split, epoch, constitution, principle_id,
    policy_version, pairing, response_a, response_b, completion_index_a, completion_index_b, finish_reason_a, finish_reason_b"""

# Labels that no person has answered yet, the least certain first: no label at all, then near one half.
_OPEN_LABELS_SQL = f"""
    SELECT {_LABEL_COLUMNS} FROM preferences p
    WHERE label_source = 'AI' AND ($principle IS NULL OR principle_id = $principle) AND (NOT $flips OR position_flip)
      AND ($run IS NULL OR record_id IN (SELECT record_id FROM run_records WHERE run_id = $run))
      AND record_id NOT IN (SELECT parent_ids[1] FROM preferences WHERE label_source = 'HUMAN' AND len(parent_ids) > 0)
    ORDER BY CASE WHEN outcome = 'OK' AND p_a IS NOT NULL THEN abs(p_a - 0.5) ELSE -1 END, commit_seq
    LIMIT $count"""
_LABEL_BY_ID_SQL = f"SELECT {_LABEL_COLUMNS} FROM preferences WHERE label_source = 'AI' AND record_id::VARCHAR LIKE $id LIMIT 2"


@click.command()
@click.argument("label_id", metavar="[ID|-]", required=False)
@click.option(
    "--prefer", type=click.Choice(list(_P_A_BY_CHOICE)), help="The better answer of the pair ID, as its record names them."
)
@click.option("--principle", metavar="ID", help="Only pairs that were judged by this principle.")
@click.option("--flips", is_flag=True, help="Only pairs whose label changed with the order of the answers.")
@click.option("--seed", default=0, show_default=True, help="Of the order in which the two answers are shown.")
@click.option("--count", type=click.IntRange(1), default=20, show_default=True, help="How many pairs to ask for.")
@common_options
def label(
    settings: Settings,
    origins: dict[str, str],
    label_id: str | None,
    prefer: str | None,
    principle: str | None,
    flips: bool,
    seed: int,
    count: int,
) -> None:
    """Label pairs by hand.

    Without ID it shows pairs one after the other, of all runs or of one with --run, those first of which the judge was least
    sure, the answers in an order that says nothing of what the judge thought, and asks. A label that ID names is answered with
    --prefer; from standard input (-) come JSON lines such as {"record_id": "...", "prefer": "a"}. Each answer is a new record;
    the judge's stays.

    \b
    Examples:
      charter label
      charter label --principle privacy --count 5
      charter label 3665c7e4 --prefer b
      charter label - < answers.jsonl
    """

    if label_id not in (None, "-") and prefer is None:
        raise click.UsageError("say which answer is better: --prefer a, b or tie", click.get_current_context())
    if label_id in (None, "-") and prefer is not None:
        raise click.UsageError("--prefer needs the ID of a label", click.get_current_context())
    store = open_store(settings)
    bus = connect_bus(settings)
    try:
        if label_id is None:
            run = settings.run.id if origins["run.id"] != "default" else None
            given = _label_interactively(store, bus, {"principle": principle, "flips": flips, "run": run, "count": count}, seed)
        elif label_id == "-":
            given = _label_from_stdin(store, bus)
        else:
            _publish_label(bus, _make_human_label(find_label(store, label_id), _P_A_BY_CHOICE[str(prefer)]))
            given = 1
    finally:
        bus.close()
    click.echo(f"{given} labels given" if given != 1 else "1 label given")


def find_label(store: Store, identifier: str) -> dict[str, Any]:
    """The judge's label that an id, or its beginning, names."""

    rows = store.query_dicts(_LABEL_BY_ID_SQL, {"id": make_id_pattern(identifier)}, limit_s=_QUERY_TIMEOUT_S)
    if len(rows) == 1:
        return rows[0]
    what = f"{identifier} names no label of a judge" if not rows else f"{identifier} names more than one label"
    fix = "type: charter sql \"select record_id, p_a from preferences where label_source = 'AI'\""
    raise UsageError(what, "an id, or the beginning of one, from the table preferences", fix)


def _make_human_label(row: dict[str, Any], p_a: float) -> Preference:
    """A person's record on a judge's label."""

    at = datetime.now(UTC)
    parent = str(row["record_id"])
    # A person who thinks again says something new, even when it was said before: the time is part of it.
    record_id = ids.compute_record_id("label", [parent], ids.compute_fingerprint("human_label", p_a=p_a, at=at.isoformat()))
    kept = {key: value for key, value in row.items() if key not in ("record_id", "prompt_id", "response_id")}
    return Preference(
        **kept,
        record_id=record_id,
        parent_ids=[parent],
        prompt_id=str(row["prompt_id"]),
        response_id=str(row["response_id"]) if row["response_id"] else None,
        stage="label",
        p_a=p_a,
        outcome=Outcome.OK,
        label_source=LabelSource.HUMAN,
        created_at=at,
    )


def _publish_label(bus: Bus, record: Preference) -> None:

    bus.publish([to_producer_record(record)])


def _label_from_stdin(store: Store, bus: Bus) -> int:
    """Answers from standard input; a bad line is told and passed over, and the exit code is then 1."""

    given = bad = 0
    for number, line in enumerate(sys.stdin.buffer, 1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
            p_a = _P_A_BY_CHOICE[said["prefer"]]
            row = find_label(store, str(said["record_id"]))
        except (ValueError, KeyError, TypeError, CharterError) as error:
            why = str(error).splitlines()[0] if isinstance(error, CharterError) else 'it is no {"record_id": ID, "prefer": "a"}'
            click.echo(to_one_line(f"line {number}: {why}"), err=True)
            bad += 1
            continue
        _publish_label(bus, _make_human_label(row, p_a))
        given += 1
    if bad:
        click.echo(f"{given} labels given, {bad} lines were none", err=True)
        sys.exit(1)
    return given


# The interview


def _label_interactively(store: Store, bus: Bus, filters: dict[str, Any], seed: int) -> int:
    """Ask for pair after pair until there are no more, or the person has had enough."""
    pairs = store.query_dicts(_OPEN_LABELS_SQL, filters, limit_s=_QUERY_TIMEOUT_S)
    if not pairs:
        click.echo("there is no pair of a judge that nobody has answered yet")
    given = 0
    for number, row in enumerate(pairs, 1):
        try:
            said = _ask_preference(row, number, len(pairs), seed)
        except click.Abort:  # Ctrl-C, Ctrl-D: what was given is on the log
            click.echo()
            return given
        if said is None:
            return given
        if said >= 0:
            _publish_label(bus, _make_human_label(row, said))
            given += 1
    return given


def _ask_preference(row: dict[str, Any], number: int, total: int, seed: int) -> float | None:
    """p(a is better) as the person says; -1 to pass over the pair, None to stop."""

    swapped = ids.compute_seed(str(row["record_id"]), seed) % 2 == 1
    first, second = (row["response_b"], row["response_a"]) if swapped else (row["response_a"], row["response_b"])
    texts = [
        ("prompt", "\n\n".join(f"{message['role']}: {message['content']}" for message in row["messages"])),
        ("1", first),
        ("2", second),
    ]
    click.echo(
        f"\npair {number} of {total}"
        + (f", judged by {escape_unprintable(row['principle_id'])}" if row["principle_id"] else "")
    )
    for line in _format_texts(texts, _MAX_TEXT_LINES):
        click.echo(line)
    choices = click.Choice(["1", "2", "=", "s", "w", "q"])
    while True:
        said = click.prompt("better: 1, 2 or = (s: skip, w: whole texts, q: quit)", type=choices, show_choices=False)
        if said == "w":
            for line in _format_texts(texts, None):
                click.echo(line)
            continue
        if said in "sq":
            return -1.0 if said == "s" else None
        return 0.5 if said == "=" else float((said == "1") != swapped)


def _format_texts(texts: list[tuple[str, str]], max_lines: int | None) -> Iterator[str]:
    """Texts under their names, made harmless for the terminal, each cut after `most` lines."""

    for name, text in texts:
        lines = escape_unprintable(text).splitlines()
        yield f"--- {name}"
        yield from lines[:max_lines]
        if max_lines is not None and len(lines) > max_lines:
            yield f"({len(lines) - max_lines} more lines: w)"


COMMAND = label
