"""`charter eval rounds` and `charter eval win-rate`: the experiments that can ask a held-out judge."""

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
from charter.evaluation.rounds import compute_round_rows, load_chains
from charter.evaluation.win_rates import (
    JudgeAccuracy,
    PairJudge,
    apply_judge,
    compute_win_rates,
    list_label_models,
    make_evidence_fields,
    measure_accuracy,
    read_database_accuracy,
    require_held_out,
)
from charter.lookup import resolve_run_id
from engine.settings import Settings

_QUERY_LIMIT_S = 30.0
_ROUND_COLUMNS = [
    "rounds", "chains", "revised", "violation", "verdicts", "refused", "refused_low", "refused_high", "unusable", "similarity",
    "similarity_to_first", "words",
]  # fmt: skip
_WIN_COLUMNS = ["pairs", "labeled", "wins", "win_rate", "low", "high"]


def judge_options(*, required: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add --judge, --judge-pairs and --limit."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        judge = click.option(
            "--judge",
            "judge_model",
            metavar="MODEL",
            required=required,
            help="Model of the judge, in a form of models.judge. It must not be a model whose work it judges.",
        )
        pairs = click.option(
            "--judge-pairs",
            "pair_files",
            metavar="FILE",
            multiple=True,
            type=click.Path(),
            help="Pairs with labels by people (LLMBar, or a format of charter produce) that measure the judge. May be repeated.",
        )
        limit = click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Judge at most N pairs of each kind.")
        return judge(pairs(limit(function)))

    return add


def _measure_judge(
    settings: Settings, judge: PairJudge, model: str, files: Sequence[str], limit: int | None
) -> list[JudgeAccuracy]:
    """Return the accuracies of the judge: on the given files, and on the labels by people in the database."""
    accuracies = [measure_accuracy(judge, file, limit) for file in files]
    with open_store(settings).open_read_session(limit_s=_QUERY_LIMIT_S) as query:
        stored = read_database_accuracy(query, model)
    return accuracies + ([stored] if stored else [])


@click.command("rounds")
@judge_options(required=False)
@output_options
@common_options
def compare_rounds(
    settings: Settings,
    origins: dict[str, str],
    judge_model: str | None,
    pair_files: tuple[str, ...],
    limit: int | None,
    output: str,
) -> None:
    """Measure the same chains after 0, 1, 2, ... revisions.

    A chain that has ended keeps its final response. `violation` is the critic's mean probability of a violation of the chain's first
    principle. `refused` is graded by the rules of the grader refusal. With --judge, the response of each round is compared with the
    initial response by a judge that did not criticize. Without --run, the command reads the newest run.

    \b
    Examples:
      charter eval rounds
      charter eval rounds --run live --judge http://localhost:8000/v1#MODEL --judge-pairs llmbar.json --csv
    """
    if pair_files and not judge_model:
        raise click.UsageError("--judge-pairs needs --judge MODEL", click.get_current_context())
    store = open_store(settings)
    run = resolve_run_id(settings, origins, store)
    with store.open_read_session(limit_s=_QUERY_LIMIT_S) as query:
        chain_set = load_chains(query, run)
    judge: HeldOutJudge | None = None
    evidence: dict[str, Any] = {}
    if judge_model:
        settings, model = apply_judge(settings, judge_model)
        require_held_out(judge_model, model, chain_set.critics, "criticized or revised these chains")
        judge = HeldOutJudge(settings)
        evidence = dict(make_evidence_fields(model, _measure_judge(settings, judge, model, pair_files, limit)))
    rows = []
    for row in compute_round_rows(chain_set.chains, judge, limit):
        values = {column: getattr(row, column) for column in _ROUND_COLUMNS}
        for group in row.wins:
            prefix = "judge_" if group is row.wins[0] else "equal_length_"
            values |= {f"{prefix}{column}": getattr(group, column) for column in _WIN_COLUMNS}
        rows.append(values | evidence)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not output:
        columns = [column for column in columns if column not in evidence]
    print_rows(columns, [[row.get(column) for column in columns] for row in rows], output)
    _print_evidence(evidence)
    print_progress(
        f"run {run}: {len(chain_set.chains)} chains; not counted: {chain_set.num_unfinished} unfinished, {chain_set.num_skipped} of"
        f" skipped sources, {chain_set.num_unusable} with an unusable initial response"
    )


def _print_evidence(evidence: dict[str, Any]) -> None:
    if evidence:
        accuracy = evidence["judge_accuracy"] or "give --judge-pairs FILE to measure it"
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
    pair_files: tuple[str, ...],
    limit: int | None,
    output: str,
) -> None:
    """Measure how often a held-out judge prefers policy B to policy A.

    The pairs are the first completions of both policies for the same prompt of a suite. A tie is half a win. Pairs of about equal length
    (within 10 %) have a separate row. The accuracy of the judge is measured on --judge-pairs. If it is not above chance, the
    result is no evidence.

    \b
    Examples:
      charter eval win-rate 0 latest --judge http://localhost:8000/v1#MODEL --judge-pairs llmbar.json
    """
    store = open_store(settings)
    with store.open_read_session(limit_s=_QUERY_LIMIT_S) as query:
        policies = require_evaluation(query, name)
        versions = resolve_policies(a, b, name, policies)
        responses = load_first_responses(query, name, *versions)
        label_models = list_label_models(query)
    settings, model = apply_judge(settings, judge_model)
    require_held_out(judge_model, model, label_models, "labeled training data in this database")
    judge = HeldOutJudge(settings)
    evidence = dict(make_evidence_fields(model, _measure_judge(settings, judge, model, pair_files, limit)))
    by_suite: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for suite, transform, *pair in responses:
        by_suite[suite, transform].append(tuple(pair))
    rows = []
    for (suite, transform), pairs in by_suite.items():
        compared = [pair for pair in pairs if pair[1] != pair[2]][:limit]
        for group in compute_win_rates(compared, judge(compared)):
            place = {"suite": suite, "transform": transform, "identical": len(pairs) - sum(p[1] != p[2] for p in pairs)}
            rows.append(place | asdict(group) | evidence)
    columns = ["suite", "transform", "identical", "group", *_WIN_COLUMNS, *(evidence if output else ())]
    print_rows(columns, [[row[column] for column in columns] for row in rows], output)
    _print_evidence(evidence)
