"""`charter constitution`: list, show, lint and compare constitutions, test them with the judge, and ablate principles."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, astuple, fields
from typing import Any

import click

from charter.connect import connect_existing_bus, open_store
from charter.console import common_options, output_options, print_records, print_rows, replay_range_options
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
from engine.text import format_count

_RUN_PREFIX = "run:"


@click.group()
def constitution() -> None:
    """List, show, lint, compare, test and ablate constitutions.

    CONSTITUTION is the name of a shipped constitution, a file, - for standard input, or run:ID for the constitution of a run.

    \b
    Examples:
      charter constitution list
      charter constitution lint my.toml
      charter constitution diff run:live my.toml --rejudge 50
      charter constitution test customer-service
    """


def _resolve_constitution(settings: Settings, spec: str) -> Constitution:
    """Load a shipped constitution, a file, standard input (-), or the constitution of a run in the database (run:ID)."""
    if spec == "-":
        return parse_constitution(sys.stdin.buffer.read(), "standard input")
    if not spec.startswith(_RUN_PREFIX):
        return load_constitution(spec)
    run_id = spec.removeprefix(_RUN_PREFIX)
    sql = "SELECT constitution_text FROM raw.runs WHERE run_id = ? ORDER BY commit_seq DESC LIMIT 1"
    store = open_store(settings)
    rows = store.query(sql, [run_id]).rows
    if not rows:
        raise UsageError(f"there is no run {run_id}", f"{store.path} has no manifest of this run", "type: charter runs")
    return parse_constitution(rows[0][0], spec)


def _query_used_constitutions(settings: Settings) -> list[tuple[str, str, str, str]]:
    """Return (name, version, hash, id of the first run) for each constitution of the runs in the database."""
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
    """List the shipped constitutions and those of earlier runs.

    The columns `critique` and `judge` show the number of principles. The column `prose` shows the number of paragraphs.

    \b
    Examples:
      charter constitution list --json
    """
    constitutions = [(name, load_constitution(name)) for name in list_shipped_constitutions()]
    shipped_hashes = {c.hash for _, c in constitutions}
    constitutions += [
        (f"{_RUN_PREFIX}{run}", _resolve_constitution(settings, f"{_RUN_PREFIX}{run}"))
        for _, _, content_hash, run in _query_used_constitutions(settings)
        if content_hash not in shipped_hashes
    ]
    rows = [
        (
            spec,
            c.name,
            c.version,
            c.hash if output else c.hash[:12],
            len(c.critique),
            len(c.judge),
            len(c.prose),
            c.description,
        )
        for spec, c in constitutions
    ]
    columns = ["constitution", "name", "version", "hash", "critique", "judge", "prose", "description"]
    print_rows(columns if output else columns[:-1], rows if output else [row[:-1] for row in rows], output)


@constitution.command("show")
@click.argument("spec", metavar="[CONSTITUTION]", required=False, type=click.Path())
@click.option("--toml", "as_text", is_flag=True, help="Print the TOML source.")
@output_options
@common_options
def show_constitution(settings: Settings, spec: str | None, as_text: bool, output: str) -> None:
    """Show the principles of a constitution.

    CONSTITUTION defaults to run.constitution.

    \b
    Examples:
      charter constitution show customer-service
      charter constitution show run:live --toml > live.toml
    """
    loaded = _resolve_constitution(settings, spec or settings.run.constitution)
    if as_text:
        click.echo(loaded.text, nl=False)
    elif output:
        print_rows(["hash", *to_toml_values(loaded)], [(loaded.hash, *to_toml_values(loaded).values())], output)
    else:
        for line in _format_constitution(loaded):
            click.echo(line)


def _format_constitution(loaded: Constitution) -> Iterator[str]:
    """Yield the lines that describe a constitution."""
    yield f"{loaded.name} {loaded.version}  {loaded.hash}"
    yield wrap_text(loaded.description, "  ")
    selection = "sampled by weight" if loaded.selection == "sample" else "in rotation"
    judging = "all in one prompt" if loaded.judge_with == "all" else "one sampled by weight for each pair"
    if loaded.prose:
        yield f"\nprose: {format_count(len(loaded.prose), 'paragraphs')}; critique: {selection}; judge: {judging}"
        for paragraph in loaded.prose:
            yield f"\n{paragraph.priority}. {paragraph.id}: {paragraph.name}{_format_scope(paragraph)}"
            yield wrap_text(paragraph.text, "   ")
        return
    yield f"\ncritique and revision: {format_count(len(loaded.critique), 'principles')}, {selection}"
    for principle in loaded.critique:
        yield f"\n  {principle.id}: {principle.name}{_format_scope(principle)}"
        yield f"{wrap_text(principle.critique_prompt, '    ')}\n{wrap_text(principle.revision_prompt, '    ')}"
    yield f"\njudge: {format_count(len(loaded.judge), 'principles')}, {judging}"
    for judge_principle in loaded.judge:
        yield f"\n  {judge_principle.id}: {judge_principle.name}{_format_scope(judge_principle)}"
        yield wrap_text(judge_principle.judge_prompt, "    ")


def _format_scope(principle: Any) -> str:
    """Return the weight and the tags of a principle. Omit values that are equal to the default."""
    weight = f"weight {principle.weight:g}" if principle.weight != 1 else ""
    tags = f"only for {', '.join(principle.tags)}" if principle.tags else ""
    scope = "; ".join(part for part in (weight, tags) if part)
    return f"  ({scope})" if scope else ""


@constitution.command("lint")
@click.argument("specs", metavar="[CONSTITUTION...]", nargs=-1, type=click.Path())
@output_options
@common_options
def lint_constitutions(settings: Settings, specs: tuple[str, ...], output: str) -> None:
    """Report likely mistakes in constitutions.

    The rules find duplicates, missing parts, constitutions that only require or only forbid behavior, and constitutions without a
    principle against over-reaction. If there is a database, one rule also finds runs that used other content with the same name
    and version. The exit code is 1 if there are findings. CONSTITUTION defaults to run.constitution.

    \b
    Examples:
      charter constitution lint default
      charter constitution lint my.toml other.toml --json
    """
    findings_by_spec: dict[str, list[LintFinding]] = {}
    for spec in specs or [settings.run.constitution]:
        loaded = _resolve_constitution(settings, spec)
        findings_by_spec[spec] = [*_find_reused_version(settings, loaded, spec), *lint_constitution(loaded)]
    findings = [finding for found in findings_by_spec.values() for finding in found]
    if output:
        print_rows([f.name for f in fields(LintFinding)], [astuple(finding) for finding in findings], output)
    for finding in [] if output else findings:
        principle = f"{finding.principle}: " if finding.principle else ""
        click.echo(f"{finding.file}:{finding.line}: {finding.rule}: {principle}{finding.what}\n    {finding.fix}")
    for spec, found in {} if output else findings_by_spec.items():
        click.echo(f"{spec}: {format_count(len(found), 'findings') if found else 'no findings'}")
    sys.exit(1 if findings else 0)


def _find_reused_version(settings: Settings, loaded: Constitution, spec: str) -> list[LintFinding]:
    """Return a finding if a run used a constitution with the same name and version but different content."""
    conflicting_runs = [
        run
        for name, version, content_hash, run in _query_used_constitutions(settings)
        if (name, version) == (loaded.name, loaded.version) and content_hash != loaded.hash
    ]
    if not conflicting_runs:
        return []
    what = f"run {conflicting_runs[0]} used other content as {loaded.name} {loaded.version}"
    line = find_key_line(loaded.text, ("version",))
    return [
        LintFinding(
            "version",
            spec,
            line,
            "",
            what,
            "increase the version; to see the changes, type: charter constitution diff run:ID FILE",
        )
    ]


@constitution.command("diff")
@click.argument("first", metavar="A", type=click.Path())
@click.argument("second", metavar="B", type=click.Path())
@click.option("--rejudge", metavar="N", type=click.IntRange(min=1), help="Judge N pairs from the database under A and under B.")
@output_options
@common_options
def diff_constitutions(settings: Settings, first: str, second: str, rejudge: int | None, output: str) -> None:
    """Show what changes from constitution A to constitution B.

    Print the principles that are added, removed or changed. With --rejudge, also print the number of labels that flip for each
    principle. A hash of the ids selects the pairs, so each call judges the same pairs. The judge is models.judge.

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
    for line in map(_format_change, changes) if changes else ["no differences"]:
        click.echo(line)
    if labels:
        click.echo()
        print_rows(list(labels[0]), [tuple(row.values()) for row in labels], "")


def _format_change(change: ConstitutionChange) -> str:
    """Format a change as a header, the old text (-) and the new text (+)."""
    header = " ".join(part for part in (change.what, change.part, change.principle, change.field) if part)
    before, after = (
        [f"  {sign} " + wrap_text(text, "    ")[4:]] if text else []
        for sign, text in (("-", change.before), ("+", change.after))
    )
    return "\n".join([header, *before, *after])


def _rejudge_pairs(settings: Settings, a: Constitution, b: Constitution, num_pairs: int) -> list[dict[str, Any]]:
    """Return the rows of `compare_labels` as dictionaries."""
    pairs = load_frozen_pairs(settings, num_pairs)
    if not pairs:
        raise UsageError("there are no pairs to judge", "the database has no preferences yet", "type: charter run")
    with open_batch_judge(settings) as judge:
        rows = compare_labels(judge, a, b, pairs)
    return [dict(zip(COMPARISON_COLUMNS, row, strict=True)) for row in rows]


@constitution.command("test")
@click.argument("file", metavar="FILE", type=click.Path())
@click.option("--constitution", "spec", help="Constitution to test [default: the constitution in FILE, or run.constitution].")
@click.option(
    "--min-accuracy",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Minimum fraction of labels that are hits.",
)
@output_options
@common_options
def test_constitution(settings: Settings, file: str, spec: str | None, min_accuracy: float, output: str) -> None:
    """Judge known failure cases under a constitution.

    FILE is JSON lines or TOML. Each case has a prompt, a response that must win and a response that must lose. FILE can also be
    the name of a shipped constitution; it then selects the cases of this constitution. A hit is a label that prefers the correct
    response. Print the hits and misses of each principle. The exit code is 1 if the fraction of hits is below --min-accuracy.

    \b
    Examples:
      charter constitution test customer-service
      charter constitution test failures.jsonl --constitution my.toml --min-accuracy 0.9
    """
    cases = read_cases(file)
    loaded = _resolve_constitution(settings, spec or cases.constitution or settings.run.constitution)
    with open_batch_judge(settings) as judge:
        tallies = run_cases(judge, loaded, cases)
    print_rows(TALLY_COLUMNS, [tally.to_row() for tally in tallies if tally.to_row()[1]], output)
    hits, total = sum(t.hits for t in tallies), sum(t.hits + t.misses + t.unlabeled for t in tallies)
    if not output:
        judge_spec = judge.models.get_spec("judge")
        click.echo(f"{hits} of {total} labels are hits under {loaded.name} {loaded.version}, judged by {judge_spec}")
    sys.exit(0 if hits >= min_accuracy * total else 1)


@constitution.command("ablate")
@click.argument("principles", metavar="[PRINCIPLE...]", nargs=-1)
@replay_range_options
@output_options
@common_options
def ablate_principles(
    settings: Settings, principles: tuple[str, ...], start: str, end: str, archive: bool, dry_run: bool, output: str
) -> None:
    """Measure the effect of each principle: replay a run without it.

    Replay a run (--run) under run.constitution, and again for each principle of that constitution without this principle. With
    PRINCIPLE, exclude only the given principles. A replay without a critique principle generates new chains. A replay without a
    judge principle generates new labels. Print how responses and labels differ from the replay under the full constitution. To
    continue after an interruption, run the same command.

    \b
    Examples:
      charter constitution ablate --set run.constitution=customer-service
      charter constitution ablate kinder hands-over --set run.constitution=customer-service --json
    """
    bus = connect_existing_bus(settings)
    try:
        ablations = list(plan_ablations(settings, bus, principles, start=start, end=end, archive=archive))
        if dry_run:
            for ablation in ablations:
                click.echo(f"without {ablation.excluded_principle}:" if ablation.excluded_principle else "full constitution:")
                for line in ablation.plan.describe():
                    click.echo(f"  {line}")
            return
        run_ablations(ablations, bus)
    finally:
        bus.close()
    rows = compute_ablation_rows(ablations, open_store(settings))
    if output:
        print_rows(list(ABLATION_COLUMNS), rows, output)
        return
    for columns, stage_rows in split_by_stage(rows):
        print_rows(columns, stage_rows, "")
        click.echo()


COMMAND = constitution
