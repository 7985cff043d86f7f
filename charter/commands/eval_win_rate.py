"""`charter eval win-rate`: measure how often a held-out judge prefers one policy to another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import click

from charter.commands.eval_results import name_option
from charter.connect import open_store
from charter.console import common_options, output_options, print_progress, print_rows
from charter.evaluation.held_out_judge import HeldOutJudge
from charter.evaluation.results import load_first_responses, require_evaluation, resolve_policies
from charter.evaluation.win_rates import (
    apply_judge,
    compute_win_rates,
    list_label_models,
    make_evidence_fields,
    measure_on_suites,
    read_database_accuracy,
    require_held_out,
)
from engine.settings import Settings

QUERY_LIMIT_S = 30.0
WIN_COLUMNS = ("pairs", "labeled", "wins", "win_rate", "low", "high")


def judge_options(*, required: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add --judge, --judge-suite and --limit."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        judge = click.option(
            "--judge",
            "judge_model",
            metavar="MODEL",
            required=required,
            help="Model of the judge, in a form of models.judge. It must not be a model whose work it judges.",
        )
        suites = click.option(
            "--judge-suite",
            "judge_suites",
            metavar="NAME=FILE",
            multiple=True,
            help="Pairs that measure the judge: llmbar=FILE or pairs=FILE, as in charter eval judge. May be repeated.",
        )
        limit = click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Judge at most N pairs of each kind.")
        return judge(suites(limit(function)))

    return add


def measure_evidence(settings: Settings, model: str, suites: Sequence[str], limit: int | None) -> dict[str, Any]:
    """Measure the held-out judge on suites and on the labels by people in the database. Return the columns with its evidence."""
    accuracies = measure_on_suites(settings, suites, limit)
    with open_store(settings).open_read_session(limit_s=QUERY_LIMIT_S) as query:
        stored = read_database_accuracy(query, model)
    return make_evidence_fields(model, accuracies + ([stored] if stored else []))


def print_evidence(evidence: dict[str, Any]) -> None:
    """Print one line about the judge, or nothing without a judge."""
    if evidence:
        accuracy = evidence["judge_accuracy"] or "not measured; to measure it: --judge-suite llmbar=FILE"
        print_progress(f"judge {evidence['judge']}: {evidence['evidence']}; accuracy: {accuracy}")


@click.command("win-rate")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@name_option
@judge_options(required=True)
@output_options
@common_options
def compare_with_judge(
    settings: Settings,
    a: str,
    b: str,
    name: str,
    judge_model: str,
    judge_suites: tuple[str, ...],
    limit: int | None,
    output: str,
) -> None:
    """Measure how often a held-out judge prefers policy B to policy A.

    The pairs are the first completions of both policies for the same prompt of a suite. A tie is half a win. Pairs of about equal length
    (within 10 %) have a separate row. The accuracy of the judge is measured on --judge-suite. If it is not above chance, the
    result is no evidence.

    \b
    Examples:
      charter eval win-rate 0 latest --judge http://localhost:8000/v1#MODEL --judge-suite llmbar=natural.json
    """
    store = open_store(settings)
    with store.open_read_session(limit_s=QUERY_LIMIT_S) as query:
        policies = require_evaluation(query, name)
        versions = resolve_policies(a, b, name, policies)
        responses = load_first_responses(query, name, *versions)
        label_models = list_label_models(query)
    settings, model = apply_judge(settings, judge_model)
    require_held_out(judge_model, model, label_models, "labeled training data in this database")
    judge = HeldOutJudge(settings)
    evidence = measure_evidence(settings, model, judge_suites, limit)
    by_suite: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for suite, transform, *pair in responses:
        by_suite[suite, transform].append(tuple(pair))
    rows = []
    for (suite, transform), pairs in by_suite.items():
        compared = [pair for pair in pairs if pair[1] != pair[2]][:limit]
        for group in compute_win_rates(compared, judge(compared)):
            place = {"suite": suite, "transform": transform, "identical": len(pairs) - sum(p[1] != p[2] for p in pairs)}
            rows.append(place | asdict(group) | evidence)
    columns = ["suite", "transform", "identical", "group", *WIN_COLUMNS, *(evidence if output else ())]
    print_rows(columns, [[row[column] for column in columns] for row in rows], output)
    print_evidence(evidence)
