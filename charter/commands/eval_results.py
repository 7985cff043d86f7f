"""`charter eval show` and `charter eval compare`: the rates of an evaluation, and the comparison of two policies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from charter.connect import open_store
from charter.console import common_options, output_options, print_progress, print_rows
from charter.evaluation.results import (
    ComparisonRow,
    RateRow,
    SuiteCompletion,
    compare_policies,
    compute_rates,
    count_ungraded,
    find_failed_rows,
    load_completions,
    require_evaluation,
    resolve_policies,
)
from engine.settings import Settings
from engine.text import format_count

_QUERY_LIMIT_S = 30.0
_SHOW_COLUMNS = [
    "policy", "suite", "subset", "transform", "metric", "rate", "low", "high", "prompts", "completions", "unusable", "ungraded",
    "truncated",
]  # fmt: skip
_COMPARE_COLUMNS = [
    "suite", "subset", "transform", "metric", "prompts", "rate_a", "rate_b", "difference", "low", "high", "test", "p", "p_holm",
    "outcome", "only_a", "only_b", "ungraded", "unusable_a", "unusable_b",
]  # fmt: skip
_COUNT_COLUMNS = ("only_a", "only_b", "ungraded", "unusable_a", "unusable_b")
name_option = click.option(
    "--name", metavar="NAME", default="eval", show_default=True, help="Name of the evaluation: --name of charter eval run."
)


def _load(settings: Settings, name: str) -> tuple[list[int], list[SuiteCompletion]]:
    with open_store(settings).open_read_session(limit_s=_QUERY_LIMIT_S) as query:
        return require_evaluation(query, name), load_completions(query, name)


def _make_table(columns: Sequence[str], rows: Sequence[Any], output: str) -> list[list[Any]]:
    """Return the values of the columns. In a table for people, an empty cell has a word."""
    values = [[asdict(row)[column] for column in columns] for row in rows]
    if not output:
        for row in values:
            row[columns.index("subset")] = row[columns.index("subset")] or "all"
            row[columns.index("transform")] = row[columns.index("transform")] or "-"
    return values


def _warn_of_ungraded(completions: Sequence[SuiteCompletion]) -> None:
    if num_ungraded := count_ungraded(completions):
        print_progress(
            f"{num_ungraded:,} of {len(completions):,} completions have no grade by the grader of their metric, and are not part of the"
            " rates. The stage grade has not graded them yet, or grade.graders does not name the grader"
        )


@click.command("show")
@name_option
@output_options
@common_options
def show_results(settings: Settings, name: str, output: str) -> None:
    """Show the rates of an evaluation, with Wilson's 95 % intervals.

    There is a row for each policy, suite, subset, jailbreak transformation and metric. A prompt with several completions counts
    once, with its mean. Unusable completions (empty, degenerate or encoded) count in the rate, but not as a hit. Ungraded completions
    are not part of a rate.

    \b
    Examples:
      charter eval show
      charter eval show --name nightly --csv
    """
    _, completions = _load(settings, name)
    rows: list[RateRow] = compute_rates(completions)
    print_rows(_SHOW_COLUMNS, _make_table(_SHOW_COLUMNS, rows, output), output)
    _warn_of_ungraded(completions)


@click.command("compare")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@name_option
@click.option(
    "--margin",
    default=0.05,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Largest loss of a rate that does not count as worse; 0.05 is five percentage points.",
)
@click.option(
    "--fail-on",
    type=click.Choice(["worse", "undecided"]),
    help="Exit with code 1 if B is worse in a row, or also if a suite is undecided.",
)
@output_options
@common_options
def compare_results(settings: Settings, a: str, b: str, name: str, margin: float, fail_on: str | None, output: str) -> None:
    """Compare policy B with policy A on the prompts that both have.

    A and B are policy versions of the evaluation, or `latest`. Each row has one of three outcomes: worse, not worse by margin (a loss
    of more than --margin is excluded), or undecided. With one completion for each prompt, the test is McNemar's exact test.
    With several, prompts are resampled (bootstrap). p_holm is corrected for the number of suites.

    \b
    Examples:
      charter eval compare 0 latest
      charter eval compare 0 3 --margin 0.02 --fail-on worse
    """
    policies, completions = _load(settings, name)
    versions = resolve_policies(a, b, name, policies)
    rows = compare_policies(completions, versions[0], versions[1], margin)
    # In a table for people, a count that is 0 in all rows has no column.
    columns = [c for c in _COMPARE_COLUMNS if output or c not in _COUNT_COLUMNS or any(getattr(row, c) for row in rows)]
    print_rows(columns, _make_table(columns, rows, output), output)
    print_progress(f"difference: policy {versions[1]} minus policy {versions[0]}; margin {margin:g}")
    _report_unpaired(rows, versions)
    _warn_of_ungraded([c for c in completions if c.policy in versions])
    if failed := find_failed_rows(rows, fail_on) if fail_on else []:
        for row in failed:
            place = " ".join(part for part in (row.suite, row.subset, row.transform) if part)
            print_progress(f"--fail-on {fail_on}: policy {versions[1]} is {row.outcome} on {place}, {row.metric}")
        sys.exit(1)


def _report_unpaired(rows: Sequence[ComparisonRow], versions: Sequence[int]) -> None:
    """Print the number of prompts that only one policy has."""
    whole = [row for row in rows if not row.is_part]
    for policy, count in zip(versions, (sum(r.only_a for r in whole), sum(r.only_b for r in whole)), strict=True):
        if count:
            print_progress(
                f"policy {policy}: {format_count(count, 'prompts', 'are')} not compared, because the other policy did not get them"
            )
