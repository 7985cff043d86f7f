"""`charter constitution`: the principles as code. List, show, lint and compare them, test them with the judge, study them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, astuple, fields
from typing import Any

import click

from charter.connect import connect_bus, open_store
from charter.console import common_options, output_options, print_records, print_rows
from charter.evaluation.ablation import ABLATION_COLUMNS, compute_ablation_rows, plan_ablations, run_ablations, split_by_stage
from charter.evaluation.rejudge import (
    COMPARISON_COLUMNS,
    TALLY_COLUMNS,
    compare_labels,
    load_frozen_pairs,
    open_batch_judge,
    run_cases,
)
from charter.text import wrap_text
from constitutions.cases import read_cases
from constitutions.diff import ConstitutionChange, compare_constitutions
from constitutions.lint import LintFinding, lint_constitution
from constitutions.loader import Constitution, list_shipped_constitutions, load_constitution, parse_constitution, to_toml_values
from constitutions.sources import find_key_line
from engine.errors import UsageError
from engine.settings import Settings

_RUN_PREFIX = "run:"


@click.group()
def constitution() -> None:
    """List, show, lint, compare, test and ablate constitutions.

    List, show, lint and compare constitutions, test them with the judge, study what each principle does.

    A constitution is a shipped one's name, a file, - for standard input, or run:NAME for the one that a run used.

    \b
    Examples:
      charter constitution list
      charter constitution lint my.toml
      charter constitution diff run:live my.toml --rejudge 50
      charter constitution test customer-service
    """


def _resolve_constitution(settings: Settings, spec: str) -> Constitution:
    """A shipped constitution, a file, standard input, or what a run of this database used."""

    if spec == "-":
        return parse_constitution(sys.stdin.buffer.read(), "standard input")
    if not spec.startswith(_RUN_PREFIX):
        return load_constitution(spec)
    sql = "SELECT constitution_text FROM raw.runs WHERE run_id = ? ORDER BY commit_seq DESC LIMIT 1"
    store = open_store(settings)
    found = store.query(sql, [spec.removeprefix(_RUN_PREFIX)]).rows
    if not found:
        raise UsageError(
            f"there is no run {spec.removeprefix(_RUN_PREFIX)}", f"{store.path} has no manifest of it", "type: charter runs"
        )
    return parse_constitution(found[0][0], spec)


def _query_used_constitutions(settings: Settings) -> list[tuple[str, str, str, str]]:
    """(name, version, hash, a run) of each constitution that a run of this database used."""

    store = open_store(settings)
    if not store.path.exists():
        return []
    sql = """SELECT constitution.name, constitution.version, constitution.hash, arg_min(run_id, commit_seq)
             FROM raw.runs WHERE constitution IS NOT NULL GROUP BY ALL ORDER BY min(commit_seq)"""
    return store.query(sql).rows


@constitution.command("list")
@output_options
@common_options
def list_constitutions(settings: Settings, output: str) -> None:
    """The shipped constitutions, and those of the runs here.

    \b
    Examples:
      charter constitution list --json
    """

    found = [(name, load_constitution(name)) for name in list_shipped_constitutions()]
    shipped = {c.hash for _, c in found}
    found += [
        (f"{_RUN_PREFIX}{run}", _resolve_constitution(settings, f"{_RUN_PREFIX}{run}"))
        for _, _, known, run in _query_used_constitutions(settings)
        if known not in shipped
    ]
    rows = [
        (
            where,
            c.name,
            c.version,
            c.hash if output else c.hash[:12],
            len(c.critique),
            len(c.judge),
            len(c.prose),
            c.description,
        )
        for where, c in found
    ]
    columns = ["constitution", "name", "version", "hash", "critique", "judge", "prose", "description"]
    print_rows(columns if output else columns[:-1], rows if output else [row[:-1] for row in rows], output)


@constitution.command("show")
@click.argument("wanted", metavar="[CONSTITUTION]", required=False, type=click.Path())
@click.option("--toml", "as_text", is_flag=True, help="The file itself, as a run's manifest keeps it.")
@output_options
@common_options
def show_constitution(settings: Settings, wanted: str | None, as_text: bool, output: str) -> None:
    """A constitution's principles.

    Without an argument: those of the settings' constitution.

    \b
    Examples:
      charter constitution show customer-service
      charter constitution show run:live --toml > live.toml
    """

    found = _resolve_constitution(settings, wanted or settings.run.constitution)
    if as_text:
        click.echo(found.text, nl=False)
    elif output:
        print_rows(["hash", *to_toml_values(found)], [(found.hash, *to_toml_values(found).values())], output)
    else:
        for line in _format_constitution(found):
            click.echo(line)


def _format_constitution(found: Constitution) -> Iterator[str]:
    """A constitution for reading."""

    yield f"{found.name} {found.version}  {found.hash}"
    yield wrap_text(found.description, "  ")
    drawn = "drawn at random, by weight" if found.selection == "sample" else "taken in turn"
    asked = "all in one question" if found.judge_with == "all" else "one drawn for each pair, by weight"
    if found.prose:
        yield f"\nprose: {len(found.prose)} paragraphs; critique: {drawn}; judging: {asked}"
        for paragraph in found.prose:
            yield f"\n{paragraph.priority}. {paragraph.id}: {paragraph.name}{_format_scope(paragraph)}"
            yield wrap_text(paragraph.text, "   ")
        return
    yield f"\ncritique and revision: {len(found.critique)}, {drawn}"
    for principle in found.critique:
        yield f"\n  {principle.id}: {principle.name}{_format_scope(principle)}"
        yield f"{wrap_text(principle.critique_prompt, '    ')}\n{wrap_text(principle.revision_prompt, '    ')}"
    yield f"\njudging: {len(found.judge)}, {asked}"
    for judging in found.judge:
        yield f"\n  {judging.id}: {judging.name}{_format_scope(judging)}"
        yield wrap_text(judging.judge_prompt, "    ")


def _format_scope(principle: Any) -> str:
    """Weight and tags, where they are not the usual ones."""
    weight = f"weight {principle.weight:g}" if principle.weight != 1 else ""
    tags = f"only for {', '.join(principle.tags)}" if principle.tags else ""
    told = "; ".join(part for part in (weight, tags) if part)
    return f"  ({told})" if told else ""


@constitution.command("lint")
@click.argument("wanted", metavar="[CONSTITUTION...]", nargs=-1, type=click.Path())
@output_options
@common_options
def lint_constitutions(settings: Settings, wanted: tuple[str, ...], output: str) -> None:
    """What a constitution may do wrong.

    Duplicates, missing parts, only do's or don'ts, no guard against over-reaction.

    With a database also whether its runs know another content under the same name and version. The exit code is 1 when there
    is anything to say.

    \b
    Examples:
      charter constitution lint default
      charter constitution lint my.toml other.toml --json
    """

    found: list[LintFinding] = []
    for one in wanted or [settings.run.constitution]:
        loaded = _resolve_constitution(settings, one)
        found += [*_find_reused_version(settings, loaded, one), *lint_constitution(loaded)]
    if output:
        print_rows([f.name for f in fields(LintFinding)], [astuple(finding) for finding in found], output)
    for finding in [] if output else found:
        who = f"{finding.principle}: " if finding.principle else ""
        click.echo(f"{finding.file}:{finding.line}: {finding.rule}: {who}{finding.what}\n    {finding.fix}")
    if not output:
        click.echo(f"{len(found)} finding{'s'[: len(found) > 1]}" if found else "nothing to say")
    sys.exit(1 if found else 0)


def _find_reused_version(settings: Settings, loaded: Constitution, spec: str) -> list[LintFinding]:
    """The finding that a run used another content under this name and version."""

    others = [
        run
        for name, version, known, run in _query_used_constitutions(settings)
        if (name, version) == (loaded.name, loaded.version) and known != loaded.hash
    ]
    if not others:
        return []
    what = f"run {others[0]} used another content as {loaded.name} {loaded.version}"
    line = find_key_line(loaded.text, ("version",))
    return [LintFinding("version", spec, line, "", what, "raise the version; see: charter constitution diff run:NAME FILE")]


@constitution.command("diff")
@click.argument("first", metavar="A", type=click.Path())
@click.argument("second", metavar="B", type=click.Path())
@click.option("--rejudge", metavar="N", type=click.IntRange(min=1), help="Judge N pairs of the database under both.")
@output_options
@common_options
def diff_constitutions(settings: Settings, first: str, second: str, rejudge: int | None, output: str) -> None:
    """What B changes against A.

    Principles added, removed, changed; and with --rejudge how many labels flip, by principle.

    The pairs are a slice by a hash of their ids, the same one each time; the judge is the settings' one.

    \b
    Examples:
      charter constitution diff default my.toml
      charter constitution diff run:live my.toml --rejudge 50
    """

    a, b = _resolve_constitution(settings, first), _resolve_constitution(settings, second)
    changes = compare_constitutions(a, b)
    labels = _rejudge_pairs(settings, a, b, rejudge) if rejudge else []
    if output:
        print_records(
            [{"kind": "change"} | asdict(change) for change in changes] + [{"kind": "labels"} | row for row in labels], output
        )
        return
    click.echo(f"{a.name} {a.version} ({a.hash[:12]})  ->  {b.name} {b.version} ({b.hash[:12]})")
    for line in map(_format_change, changes) if changes else ["nothing differs"]:
        click.echo(line)
    if labels:
        click.echo()
        print_rows(list(labels[0]), [tuple(row.values()) for row in labels], "")


def _format_change(change: ConstitutionChange) -> str:
    """A change for reading: what it is about, and under it the words before (-) and after (+)."""

    head = " ".join(word for word in (change.what, change.part, change.principle, change.field) if word)
    before, after = (
        [f"  {sign} " + wrap_text(text, "    ")[4:]] if text else []
        for sign, text in (("-", change.before), ("+", change.after))
    )
    return "\n".join([head, *before, *after])


def _rejudge_pairs(settings: Settings, a: Constitution, b: Constitution, num_pairs: int) -> list[dict[str, Any]]:
    """The rows of `compare_labels` as objects."""

    pairs = load_frozen_pairs(settings, num_pairs)
    if not pairs:
        raise UsageError("there are no pairs to judge again", "the database has no preferences yet", "type: charter run")
    with open_batch_judge(settings) as bench:
        rows = compare_labels(bench, a, b, pairs)
    return [dict(zip(COMPARISON_COLUMNS, row, strict=True)) for row in rows]


@constitution.command("test")
@click.argument("file", metavar="FILE", type=click.Path())
@click.option("--constitution", "wanted", help="The constitution to test; without it the file's, else the settings' one.")
@click.option("--at-least", default=1.0, show_default=True, type=click.FloatRange(0, 1), help="Share of hits that is enough.")
@output_options
@common_options
def test_constitution(settings: Settings, file: str, wanted: str | None, at_least: float, output: str) -> None:
    """Let the judge decide known failure modes.

    Counts each principle's hits and misses.

    FILE is JSONL or TOML with a prompt, an answer that must win and one that must lose in each case, or the name of a shipped
    constitution, which has a few cases of its own. The exit code is 1 when fewer than --at-least of the labels are hits.

    \b
    Examples:
      charter constitution test customer-service
      charter constitution test failures.jsonl --constitution my.toml --at-least 0.9
    """

    cases = read_cases(file)
    found = _resolve_constitution(settings, wanted or cases.constitution or settings.run.constitution)
    with open_batch_judge(settings) as bench:
        tallies = run_cases(bench, found, cases)
    print_rows(TALLY_COLUMNS, [tally.to_row() for tally in tallies if tally.to_row()[1]], output)
    hits, asked = sum(t.hits for t in tallies), sum(t.hits + t.misses + t.unlabeled for t in tallies)
    if not output:
        click.echo(f"{hits} of {asked} labels are hits under {found.name} {found.version}, by {bench.models.get_spec('judge')}")
    sys.exit(0 if hits >= at_least * asked else 1)


@constitution.command("ablate")
@click.argument("principles", metavar="[PRINCIPLE...]", nargs=-1)
@click.option("--from", "start", default="earliest", show_default=True, help="earliest, an offset, a time, or run:NAME.")
@click.option("--to", "end", default="latest", show_default=True, help="latest (now), an offset, or a time; not included.")
@click.option("--archive", is_flag=True, help="Read from the database, which has what the log keeps no more.")
@click.option("--dry-run", is_flag=True, help="Say what it would do and cost, and do nothing.")
@output_options
@common_options
def ablate_principles(
    settings: Settings, principles: tuple[str, ...], start: str, end: str, archive: bool, dry_run: bool, output: str
) -> None:
    """What each principle does, by leaving it out.

    A replay without each in turn (or those named), and how answers and labels change.

    The chains of the run (--run) go again without each critique principle, its pairs without each judging principle, and both
    once under the full constitution of the settings, with which the others are compared. Killed half way, the same command
    goes on.

    \b
    Examples:
      charter constitution ablate --set run.constitution=customer-service
      charter constitution ablate kinder hands-over --set run.constitution=customer-service --json
    """

    bus = connect_bus(settings)
    try:
        planned = list(plan_ablations(settings, bus, principles, start=start, end=end, archive=archive))
        if dry_run:
            for trial in planned:
                click.echo(f"without {trial.excluded_principle or 'nothing'}:")
                for line in trial.plan.describe():
                    click.echo(f"  {line}")
            return
        run_ablations(planned, bus)
    finally:
        bus.close()
    rows = compute_ablation_rows(planned, open_store(settings))
    if output:
        print_rows(list(ABLATION_COLUMNS), rows, output)
        return
    for columns, part in split_by_stage(rows):
        print_rows(columns, part, "")
        click.echo()


COMMAND = constitution
