"""`charter label`: add human labels to pairs. The judge has labeled these pairs, or has failed to label them (charter/labels.py)."""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

from charter.connect import connect_bus, open_store
from charter.console import common_options
from charter.labels import (
    KEYS,
    P_A_BY_CHOICE,
    PairFilter,
    find_pair,
    get_displayed_responses,
    load_open_pairs,
    load_progress,
    make_human_label,
    parse_key,
    parse_labeler,
    publish_label,
    read_pending_pair_ids,
)
from charter.text import to_one_line, wrap_text
from engine.bus.port import Bus
from engine.errors import CharterError, UsageError
from engine.instances import list_running_services
from engine.settings import Settings
from engine.store import Store
from engine.text import format_count

_QUERY_TIMEOUT_S = 20.0
_MAX_LINES = 40  # maximum lines of the prompt and of each response; the user can type w to see all lines
_LINE_KEYS = ("record_id", "prefer", "labeler")  # the keys of a line of standard input


@click.command()
@click.argument("label_id", metavar="[ID|-]", required=False)
@click.option(
    "--prefer",
    type=click.Choice(list(P_A_BY_CHOICE)),
    help="The better response of the pair ID: a, b or tie. not-applicable: the pair must not have a label.",
)
@click.option("--labeler", metavar="NAME", help="Name of the person who labels. Each label has it. [default: the login name]")
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
    labeler: str | None,
    principle: str | None,
    position_flips: bool,
    seed: int,
    count: int,
) -> None:
    """Label pairs by hand.

    Without ID, show pairs one by one, with the question of the judge, and ask which response is better. The pairs with the least
    certain labels come first. The order of the two responses is random, so it does not reveal the label of the judge. Without
    --run, show the pairs of all runs. If the question does not apply to a pair, answer n: the pair gets no label, and is not used
    for training.

    With ID and --prefer, label one pair. ID is the id of a preference record or a unique prefix of the id. With -, read labels as
    JSON lines from standard input, e.g. {"record_id": "...", "prefer": "a", "labeler": "ana"}. The exit code is 1 if a line is
    invalid.

    Each label is published as a new record. The record of the judge does not change.

    \b
    Examples:
      charter label --labeler ana
      charter label --principle privacy --count 5
      charter label 3665c7e4 --prefer b
      charter label - < labels.jsonl
    """
    if label_id not in (None, "-") and prefer is None:
        raise click.UsageError(f"give the better response: --prefer {', '.join(P_A_BY_CHOICE)}", click.get_current_context())
    if label_id in (None, "-") and prefer is not None:
        raise click.UsageError("--prefer requires the ID of a label", click.get_current_context())
    labeler = _get_login_name() if labeler is None else parse_labeler(labeler)
    store = open_store(settings)
    store.query("SELECT 1")  # without a database, raise the error before the log is created
    bus = connect_bus(settings)
    try:
        if label_id is None:
            run = settings.run.id if origins["run.id"] != "default" else None
            num_labels = _label_interactively(store, bus, PairFilter(principle, position_flips, run), count, seed, labeler)
        elif label_id == "-":
            num_labels = _label_from_stdin(store, bus, labeler)
        else:
            publish_label(bus, make_human_label(_find_pair(store, label_id), str(prefer), labeler))
            num_labels = 1
    finally:
        bus.close()
    is_waiting = num_labels and not list_running_services(settings.folder)["sink"]
    rest = (
        f"; to add {'it' if num_labels == 1 else 'them'} to the database, type: charter run --until-done" if is_waiting else ""
    )
    click.echo(f"{format_count(num_labels, 'labels')} published{rest}")


def _get_login_name() -> str:
    try:
        return parse_labeler(getpass.getuser())
    except (OSError, KeyError):  # Python 3.13 raises OSError; earlier versions raise KeyError
        raise UsageError(
            "the name of the labeler is unknown",
            "each human label has the name of its labeler, and this user has no login name",
            "give a name, such as --labeler ana",
        ) from None


def _find_pair(store: Store, identifier: str) -> dict[str, Any]:
    with store.open_read_session(limit_s=_QUERY_TIMEOUT_S) as query:
        return find_pair(query, identifier)


def _label_from_stdin(store: Store, bus: Bus, labeler: str) -> int:
    """Publish the labels from standard input. Report and skip invalid lines. Exit with code 1 if any line is invalid."""
    num_labels = num_invalid = 0
    for number, line in enumerate(sys.stdin.buffer, 1):
        if not line.strip():
            continue
        try:
            entry = _parse_line(line)
            pair = _find_pair(store, entry["record_id"])
            record = make_human_label(pair, entry["prefer"], entry.get("labeler", labeler))
        except CharterError as error:
            click.echo(to_one_line(f"line {number}: {error.what}: {error.why}; {error.fix}"), err=True)
            num_invalid += 1
            continue
        publish_label(bus, record)
        num_labels += 1
    if num_invalid:
        click.echo(
            f"{format_count(num_labels, 'labels')} published; {format_count(num_invalid, 'lines', 'are')} invalid (see above)",
            err=True,
        )
        sys.exit(1)
    return num_labels


def _parse_line(line: bytes) -> dict[str, str]:
    """Return the label of a line of standard input. Raise UsageError if it is not a label."""
    choices = ", ".join(json.dumps(choice) for choice in P_A_BY_CHOICE)
    fix = 'write it as {"record_id": "...", "prefer": "a"}, and optionally with "labeler"'
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UsageError("the line is not JSON", str(error), fix) from None
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise UsageError("the line is not a label", "it must be a JSON object whose values are strings", fix)
    if unknown := set(entry) - set(_LINE_KEYS):
        raise UsageError(f"the line has the unknown key {min(unknown)!r}", f"the keys are {', '.join(_LINE_KEYS)}", fix)
    if missing := {"record_id", "prefer"} - entry.keys():
        raise UsageError(f"the line has no {min(missing)}", f"the keys are {', '.join(_LINE_KEYS)}", fix)
    if entry["prefer"] not in P_A_BY_CHOICE:
        raise UsageError(f"prefer cannot be {entry['prefer']!r}", f"it must be one of {choices}", fix)
    return entry


# Interactive labeling


def _label_interactively(store: Store, bus: Bus, pairs: PairFilter, count: int, seed: int, labeler: str) -> int:
    """Ask for a label of each pair until the list ends or the user quits. Return the number of published decisions."""
    pending = read_pending_pair_ids(store, bus)
    with store.open_read_session(limit_s=_QUERY_TIMEOUT_S) as query:
        rows = load_open_pairs(query, pairs, count, pending=pending)
        progress = load_progress(query, pairs, pending)
    if progress.num_incomparable:
        click.echo(
            f"{format_count(progress.num_incomparable, 'pairs', 'are')} not shown: a response is empty or withheld, or both are the same",
            err=True,
        )
    if pending:
        pairs_text = format_count(len(pending), "pairs")
        click.echo(f"not in the database yet: the human labels of {pairs_text}; a sink adds them: charter run", err=True)
    if not rows:
        click.echo("there are no pairs without a human label")
        return 0
    click.echo(f"the labels are recorded with the name {labeler} (change it with --labeler)")
    num_labels = 0
    for number, row in enumerate(rows, 1):
        click.echo(f"\npair {number} of {len(rows)}; {progress.num_labeled + num_labels} of {progress.num_pairs} pairs labeled")
        try:
            key = _ask_key(row, seed)
        except click.Abort:  # Ctrl-C or Ctrl-D; the labels before the interruption are already on the log
            click.echo()
            return num_labels
        if key == "q":
            return num_labels
        if key != "s":
            publish_label(bus, make_human_label(row, parse_key(key, str(row["record_id"]), seed), labeler))
            num_labels += 1
    return num_labels


def _ask_key(row: dict[str, Any], seed: int) -> str:
    """Show one pair, and ask for a key: one of KEYS, s to skip the pair, or q to quit."""
    first, second = get_displayed_responses(row, seed)
    prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in row["messages"])
    sections = [("prompt", prompt), ("1", first), ("2", second), ("question", _format_question(row))]
    for line in _format_sections(sections, _MAX_LINES):
        click.echo(line)
    choices = click.Choice([*KEYS, "s", "w", "q"])
    text = "better: 1, 2, = (tie) or n (not applicable); s: skip, w: show all lines, q: quit"
    while (key := click.prompt(text, type=choices, show_choices=False)) == "w":
        for line in _format_sections(sections, None):
            click.echo(line)
    return str(key)


def _format_question(row: dict[str, Any]) -> str:
    """Return what the judge was asked about a pair."""
    principle = f" (principle {row['principle_id']})" if row["principle_id"] else ""
    if len(row["questions"]) > 1:
        return "\n".join(f"- {question}" for question in row["questions"]) + principle
    if row["questions"]:
        return str(row["questions"][0]) + principle
    return f"the question of the judge is not in the database{principle}: which answer is better?"


def _format_sections(sections: Sequence[tuple[str, str]], max_lines: int | None) -> Iterator[str]:
    """Yield the name and the wrapped text of each section. Truncate each text to `max_lines` lines."""
    for name, text in sections:
        lines = wrap_text(text, "  ").splitlines()
        yield f"--- {name}"
        yield from lines[:max_lines]
        if max_lines is not None and len(lines) > max_lines:
            yield f"({format_count(len(lines) - max_lines, 'more lines')}; type w to show them)"


COMMAND = label
